"""The pictures: every kind is drawn for every mechanism, with named axes."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo import analysis
from zoo.analysis.pictures import displayable


@pytest.fixture(scope="module")
def model():
    return zoo.create_model("dat_digits").eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(figure, folder) -> int:
    figure.savefig(folder / "picture.png")
    return (folder / "picture.png").stat().st_size


def test_maps_have_a_panel_for_each_head_and_the_mean(model, image, tmp_path):
    blocks = analysis.block_attention(model, image[None])
    figure = analysis.draw_maps(image, analysis.choose_block(blocks, 0), query=(0.5, 0.5))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[0] == "image" and [title.split(",")[0] for title in titles[1:]] == [
        "mean of heads",
        "head 0",
        "head 1",
    ]
    assert saved(figure, tmp_path) > 1000


def test_a_query_has_a_panel_for_each_block_and_sampled_points(model, image, tmp_path):
    blocks = analysis.block_attention(model, image[None])
    figure = analysis.draw_query(image, [analysis.query_view(block, (0.2, 0.8)) for block in blocks.values()])
    assert "9 seen" in figure.axes[1].get_title()
    assert "deformable" in figure.axes[3].get_title() and figure.axes[3].collections
    assert saved(figure, tmp_path) > 1000


def test_agents_and_channels_are_drawn(image, tmp_path):
    weights = torch.rand(2, 4).softmax(-1)
    maps, heat = torch.rand(2, 4, 8, 8), torch.rand(2, 8, 8)
    common = {"query": (1, 2), "grid": (8, 8)}
    agents = analysis.QueryView(
        "a", "agent", heat=heat, cells=heat[0] > 0, agent_weights=weights, agent_maps=maps, **common
    )
    channels = analysis.QueryView("c", "channel", groups=torch.rand(2, 6, 6), **common)
    figure = analysis.draw_query(image, [agents, channels])
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 1 + 2 + 4 and "group 0 of 2" in titles[2] and "weight" in titles[3]
    assert figure.axes[2].get_xlabel() == "channel that gives"
    assert saved(figure, tmp_path) > 1000


def test_charts_name_their_axes_and_units(model, image, tmp_path):
    figure = analysis.draw_statistics(analysis.head_statistics(model, image[None]))
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "mean attention distance (pixels)",
        "entropy of the weights (nats)",
    ]
    assert saved(figure, tmp_path) > 1000
    figure = analysis.draw_field(analysis.effective_receptive_field(model, image[None]))
    assert figure.axes[0].get_xlabel() == "column (pixels)" and saved(figure, tmp_path) > 1000
    rollout = analysis.attention_rollout(model, image[None])[0]
    figure = analysis.draw_heat(image, rollout, title="rollout", label="share")
    assert figure.axes[-1].get_ylabel() == "share" and saved(figure, tmp_path) > 1000


def test_a_picture_needs_an_image(model):
    with pytest.raises(zoo.ConfigError, match="image must be"):
        displayable(torch.zeros(4, 8, 8))
