"""Which frames and blocks of a video radial attention keeps, as tensors and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.analysis.pictures import HEAT, QUERY, _array, _figure
from zoo.errors import ConfigError
from zoo.layers.radial import radial_block_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FRAMES = 8


@dataclass(frozen=True)
class VideoView:
    """What a mask keeps of a video of T frames of Y x X tokens, text behind it.

    `blocks` says which block of queries (rows) sees which block of keys, `frames` which share of the pairs of
    tokens of two frames is kept, `seen` which tokens the one at `query` (frame, row, column) sees.
    """

    blocks: Tensor  # bool [blocks, blocks]
    frames: Tensor  # [T, T], 0 to 1
    seen: Tensor  # bool [T, Y, X]
    query: tuple[int, int, int]
    block_size: int
    text_tokens: int
    kept: float  # share of all pairs of tokens, text included


def radial_view(
    grid: tuple[int, int, int],
    *,
    query: tuple[float, float, float] = (0.5, 0.5, 0.5),
    text_tokens: int = 0,
    block_size: int = 128,
    **rules: Any,
) -> VideoView:
    """What radial attention keeps of a video of `grid` (frames, rows, columns) of tokens.

    Units: `query` is (time, down, right) as fractions, 0 to 1; `rules` and the rest as in
    `radial_block_mask`. Raises: ConfigError for a query outside the video, or as that function.
    """
    if len(query) != 3 or not all(0.0 <= fraction <= 1.0 for fraction in query):
        raise ConfigError(f"query must be three fractions between 0 and 1 (time, down, right), found {query}")
    place = tuple(min(int(f * side), side - 1) for f, side in zip(query, grid, strict=True))
    frames, tokens = grid[0], grid[1] * grid[2]
    mask = radial_block_mask(frames, tokens, text_tokens=text_tokens, block_size=block_size, **rules)
    token = torch.arange(frames * tokens + text_tokens)
    sizes = torch.bincount(token // block_size).double()
    # Tokens of every frame (and of the text, last) in every block.
    held = torch.zeros(frames + 1, len(mask), dtype=torch.float64)
    owner = (token // tokens).clamp(max=frames)
    held.index_put_((owner, token // block_size), torch.ones((), dtype=torch.float64), accumulate=True)
    pairs = held @ mask.double() @ held.T
    number = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    seen = mask[number // block_size][token[: frames * tokens] // block_size].view(grid)
    kept = float(sizes @ mask.double() @ sizes) / len(token) ** 2
    return VideoView(mask, pairs[:frames, :frames] / tokens**2, seen, place, block_size, text_tokens, kept)


def draw_video(view: VideoView, *, title: str = "") -> Figure:
    """Draw the mask of blocks, the share kept of every two frames, and what one token sees in some frames."""
    count, rows, columns = view.seen.shape
    shown = sorted({round(i * (count - 1) / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)} | {view.query[0]})
    figure = _figure((9.6, 5.8))  # says what is missing where matplotlib is
    from matplotlib.ticker import MaxNLocator

    upper, lower = figure.subfigures(2, 1, height_ratios=(2.4, 1))
    left, right = upper.subplots(1, 2)
    left.imshow(_array(view.blocks), cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
    video = count * rows * columns / view.block_size - 0.5
    if view.text_tokens:
        for line in (left.axhline, left.axvline):
            line(video, color=QUERY, linewidth=1, label="text begins")
        left.legend(*([each[0]] for each in left.get_legend_handles_labels()), fontsize=7, loc="upper right")
    left.set(xlabel="block of keys", ylabel="block of queries")
    left.set_title(f"{len(view.blocks)} blocks of {view.block_size} tokens; dark: kept", fontsize=8)
    drawn = right.imshow(_array(view.frames), cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(drawn, ax=right, label="share of token pairs kept", fraction=0.045)
    right.set(xlabel="frame of keys", ylabel="frame of queries")
    right.set_title(f"{count} frames of {rows} x {columns} tokens", fontsize=8)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    panels = lower.subplots(1, len(shown), squeeze=False)[0]
    for axis, frame in zip(panels, shown, strict=True):
        # Kept is the bright end of the scale and left out the dark one.
        axis.imshow(_array(view.seen[frame].float()), cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_title(f"frame {frame}\n{float(view.seen[frame].float().mean()):.0%}", fontsize=7)
        if frame == view.query[0]:
            for colour, size in (("white", 9), (QUERY, 6)):
                axis.plot(view.query[2], view.query[1], "s", color=colour, markersize=size)
            for side in axis.spines.values():
                side.set(color=QUERY, linewidth=2)
    lower.suptitle("what the marked token sees: bright is kept", fontsize=8)
    figure.suptitle(title or f"radial attention keeps {view.kept:.0%} of all pairs of tokens", fontsize=9)
    return figure
