"""The view of a video: what it draws is the mask that radial attention computes with."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo import analysis
from zoo.cli import main
from zoo.diffusion import radial_block_mask

GRID = (9, 4, 6)
RULES = {"block_size": 4, "decay_factor": 0.3, "decimation_threshold": 8}


@pytest.mark.parametrize("text", [0, 10])
def test_frames_and_tokens_are_those_of_the_mask_token_by_token(text):
    view = analysis.radial_view(GRID, query=(0.5, 0.3, 0.9), text_tokens=text, **RULES)
    mask = radial_block_mask(9, 24, text_tokens=text, **RULES)
    tokens = 216 + text
    block = torch.arange(tokens) // 4
    dense = mask[block][:, block]  # every pair of tokens
    assert torch.equal(view.blocks, mask) and view.query == (4, 1, 5)
    assert torch.equal(view.seen, dense[4 * 24 + 1 * 6 + 5, :216].view(GRID))
    shares = dense[:216, :216].view(9, 24, 9, 24).double().mean((1, 3))
    torch.testing.assert_close(view.frames, shares)
    assert view.kept == pytest.approx(dense.double().mean().item()) and 0 < view.kept < 1


def test_the_picture_has_named_axes_and_the_query_frame(tmp_path):
    view = analysis.radial_view((12, 4, 6), text_tokens=10, **RULES)
    figure = analysis.draw_video(view)
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes[:2]]
    assert labels == [("block of keys", "block of queries"), ("frame of keys", "frame of queries")]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title().startswith("frame")]
    assert any(title.startswith("frame 6\n") for title in titles) and len(titles) <= 9
    figure.savefig(tmp_path / "video.png")


def test_the_command_draws_it_with_the_rules_given(tmp_path, capsys):
    line = "visualize radial 12x4x6 --rule block_size=16 --rule model_type=hunyuan --rule decay_factor=0.5"
    assert main([*line.split(), "--output", str(tmp_path)]) == 0
    kept = analysis.radial_view((12, 4, 6), block_size=16, model_type="hunyuan", decay_factor=0.5).kept
    assert f"{kept:.1%}" in capsys.readouterr().out
    assert (tmp_path / "radial.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("radial 12x4", "a video is FRAMESxROWSxCOLUMNS"),
        ("radial 12x4x6 --rule decay_factr=1", "did you mean decay_factor"),
        ("radial 12x4x6 --html", "draws one picture"),
        ("nat_digits digits:0 --rule decay_factor=1", "--rule belongs to zoo visualize radial"),
        ("radial 12x4x6 --rule decay_factor=-1", "decay_factor must be a finite number above 0"),
    ],
)
def test_mistakes_say_what_is_right(line, message, capsys):
    assert main(["visualize", *line.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_query_outside_the_video_is_refused():
    with pytest.raises(zoo.ConfigError, match="three fractions"):
        analysis.radial_view(GRID, query=(0.5, 0.5, 1.2))
