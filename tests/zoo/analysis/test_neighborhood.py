"""Pictures of neighborhoods: drawn for any query and block, refused with a reason where there is none."""

from __future__ import annotations

import pytest
import timm
import torch

import zoo
from zoo import analysis


@pytest.fixture(scope="module")
def model():
    return zoo.create_model("nat_digits").eval()


def panels(figure) -> list:
    return [axis.get_title() for axis in figure.axes]


def test_it_draws_the_image_and_one_panel_for_each_block(model, tmp_path):
    figure = analysis.explain_neighborhood(model, torch.randn(3, 32, 32), title="a five")
    titles = panels(figure)
    assert titles[0] == "a five" and len(titles) == 5
    assert "levels.0.blocks.0.attn" in titles[1] and "8 x 8 tokens" in titles[1]
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("query", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.9)])
def test_the_query_lies_in_its_neighborhood(model, query):
    """On the first map, 8 x 8 tokens, the window is nine cells around the query's, shifted in at a border."""
    name = "levels.0.blocks.0.attn"
    figure = analysis.explain_neighborhood(model, torch.randn(1, 3, 32, 32), query=query, blocks=(name,))
    *cells, own = figure.axes[1].patches
    corners = {cell.get_xy() for cell in cells}
    assert len(corners) == 9 and own.get_xy() in corners


def test_wrong_arguments_say_what_is_right(model):
    image = torch.randn(3, 32, 32)
    with pytest.raises(zoo.ConfigError, match="query must be two fractions"):
        analysis.explain_neighborhood(model, image, query=(16, 16))
    with pytest.raises(zoo.ConfigError, match="did you mean levels.0.blocks.0.attn"):
        analysis.explain_neighborhood(model, image, blocks=("levels.0.block.0.attn",))
    with pytest.raises(zoo.ConfigError, match="image must be"):
        analysis.explain_neighborhood(model, torch.randn(2, 3, 32, 32))
    with pytest.raises(zoo.ConfigError, match="ResNet has no attention module of the zoo's"):
        analysis.explain_neighborhood(timm.create_model("resnet18").eval(), torch.randn(3, 64, 64))


def test_padding_is_drawn_beyond_the_image(model):
    """The last map of 2 x 2 tokens is padded to the window's 3 x 3; the query stays on the image."""
    figure = analysis.explain_neighborhood(
        model, torch.randn(3, 32, 32), query=(1.0, 1.0), blocks=("levels.2.blocks.0.attn",)
    )
    axis = figure.axes[1]
    assert "2 x 2 tokens" in axis.get_title()
    assert axis.patches[-1].get_xy() == (15.5, 15.5)
    assert axis.get_xlim() == (-0.5, 47.5)
