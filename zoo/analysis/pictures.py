"""The pictures of `zoo.analysis`: matplotlib figures of what the other files compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoo.analysis.maps import HeadStatistics, QueryView, attention_map, on_image
from zoo.analysis.tokens import TokenAttention
from zoo.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT = "viridis"  # ordered in lightness: read the same without colour vision and in print
QUERY = "#D55E00"  # the palette of Okabe and Ito, made to be told apart by everyone
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_HEADS = 11


def draw_maps(
    image: Tensor, attention: TokenAttention, *, query: tuple[float, float] | None = None, title: str = ""
) -> Figure:
    """Draw what each head of a block attends to over the image, beside their mean.

    Shapes: `image` is [C, height, width]. Units: `query` is (down, right) as fractions of the image; without
    one it is the class token's map or the mean over queries. At most eleven heads are drawn.
    """
    heads = attention_map(attention, query).cpu()
    shown = min(len(heads), MOST_HEADS)
    panels = [("mean of heads", heads.mean(0)), *((f"head {i}", heads[i]) for i in range(shown))]
    columns = min(4, len(panels) + 1)
    figure, axes = _panels(len(panels) + 1, columns)
    whose = "of the query" if query is not None else "of the class token" if attention.prefix else "received"
    _show(axes[0], image, "image", colour=True)
    if query is not None:
        _mark(axes[0], query, image)
    for axis, (name, heat) in zip(axes[1:], panels, strict=False):
        _show(axis, image, f"{name}, largest {float(heat.max()):.3f}")
        _overlay(axis, heat, image)
        if query is not None:
            _mark(axis, query, image)
    rest = f", {shown} of {len(heads)} heads" if shown < len(heads) else ""
    rows, columns = attention.grid
    figure.suptitle(
        title
        or f"{attention.name}: {attention.mechanism} attention {whose}, {rows} x {columns} tokens{rest}",
        fontsize=9,
    )
    return figure


def draw_query(image: Tensor, views: Sequence[QueryView], *, title: str = "") -> Figure:
    """Draw what one place of the image sees in each of some blocks.

    Cells outside what the token can see are darkened; the weights of the mean head lie over the rest. Sampled
    points are circles as large as their weights. Of agents, the four that the token listens to most have a
    panel each with what they gather. Under channel attention the panel is the matrix of the first group.
    """
    panels = [(view, None) for view in views]
    for view in views:
        if view.agent_weights is not None:
            top = view.agent_weights.mean(0).topk(min(4, view.agent_weights.shape[1])).indices
            panels += [(view, int(agent)) for agent in top]
    figure, axes = _panels(len(panels) + 1, min(4, len(panels) + 1))
    _show(axes[0], image, "query", colour=True)
    for axis, (view, agent) in zip(axes[1:], panels, strict=False):
        head = f"{view.block}\n{view.mechanism}, {view.grid[0]} x {view.grid[1]} tokens"
        if view.groups is not None:
            axis.imshow(_array(view.groups[0]), cmap=HEAT)
            axis.set_title(f"{head}; group 0 of {len(view.groups)}", fontsize=7)
            axis.set_xlabel("channel that gives", fontsize=7)
            axis.set_ylabel("channel that takes", fontsize=7)
            axis.tick_params(labelsize=6)
            continue
        axis.set_axis_off()
        if agent is not None:
            share = float(view.agent_weights[:, agent].mean())
            _show(axis, image, f"{view.block}\nagent {agent}, weight {share:.3f}")
            _overlay(axis, view.agent_maps[:, agent].mean(0), image)
            continue
        seen = int(view.cells.sum())
        _show(axis, image, f"{head}, {seen} seen" if view.points is None else head)
        _overlay(axis, view.heat.mean(0), image)
        _darken(axis, view.cells, image)
        if view.points is not None:
            _points(axis, view, image)
        _cell(axis, view, image)
    for axis in axes[:1]:
        query = next((view.query for view in views if view.query is not None), None)
        if query is not None:
            _cell(axis, views[0], image)
    figure.suptitle(title or "what one query sees; weights are means of the heads", fontsize=9)
    return figure


def draw_heat(image: Tensor, heat: Tensor, *, title: str, label: str) -> Figure:
    """Draw one map [Y, X] beside and over the image, with its scale."""
    return draw_heats(image, {title: heat}, label=label)


def draw_heats(image: Tensor, heats: Mapping[str, Tensor], *, label: str) -> Figure:
    """Draw the image, then several maps [Y, X] over it under their names, each with its scale."""
    figure, axes = _panels(1 + len(heats), 1 + len(heats), side=3.2 if len(heats) == 1 else 2.4)
    _show(axes[0], image, "image", colour=True)
    for axis, (title, heat) in zip(axes[1:], heats.items(), strict=True):
        _show(axis, image, title)
        drawn = _overlay(axis, heat, image)
        figure.colorbar(drawn, ax=axis, label=label if axis is axes[-1] else None, fraction=0.045)
    return figure


def draw_statistics(statistics: Sequence[HeadStatistics], *, title: str = "") -> Figure:
    """Draw mean attention distance and entropy of every head over the blocks."""
    figure = _figure((10, 3.8))  # says what is missing where matplotlib is
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2)
    mechanisms = list(dict.fromkeys(each.mechanism for each in statistics))
    for axis, attribute, label in (
        (left, "distance", "mean attention distance (pixels)"),
        (right, "entropy", "entropy of the weights (nats)"),
    ):
        for i, mechanism in enumerate(mechanisms):
            points = [
                (number, float(value))
                for number, each in enumerate(statistics)
                if each.mechanism == mechanism
                for value in getattr(each, attribute)
            ]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.scatter(*zip(*points, strict=True), s=16, color=colour, marker=marker, label=mechanism)
        means = [float(getattr(each, attribute).mean()) for each in statistics]
        axis.plot(means, color="#777777", linewidth=1, zorder=0, label="mean of heads")
        axis.set(xlabel="block", ylabel=label)
        axis.set_ylim(0, 1.08 * max(float(getattr(each, attribute).max()) for each in statistics))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title or "one point for each head", fontsize=9)
    return figure


def draw_field(field: Tensor, *, title: str = "") -> Figure:
    """Draw an effective receptive field [height, width], and its means of its rows and columns."""
    figure = _figure((8.4, 3.6))
    left, right = figure.subplots(1, 2)
    values = field.detach().cpu().float()
    # Gradients fall off over orders of magnitude; the square root shows the rim without hiding the peak.
    drawn = left.imshow(_array(values.sqrt()), cmap=HEAT, vmin=0, vmax=1)
    figure.colorbar(drawn, ax=left, label="square root of the share of the peak", fraction=0.045)
    left.set(xlabel="column (pixels)", ylabel="row (pixels)")
    share = float((values > 0.01).float().mean())
    left.set_title(f"{share:.0%} of the pixels above 1 % of the peak", fontsize=8)
    for axis, name, colour, style in ((0, "down", COLOURS[0], "-"), (1, "across", COLOURS[1], "--")):
        right.plot(_array(values.mean(1 - axis)), color=colour, linestyle=style, label=f"mean, {name}")
    right.set(xlabel="position (pixels)", ylabel="share of the peak")
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(title or "effective receptive field", fontsize=9)
    return figure


def displayable(image: Tensor) -> Tensor:
    """A normalised [C, height, width] image as [height, width, 3] between 0 and 1."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ConfigError(f"image must be [1 or 3, height, width], found shape {tuple(image.shape)}")
    image = image.detach().float().cpu()
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp_min(1e-12)
    return image.expand(3, -1, -1).permute(1, 2, 0)


def _array(values: Tensor) -> np.ndarray:
    """What matplotlib reads without copying by way of an old protocol."""
    return values.detach().cpu().numpy()


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("pictures need matplotlib: pip install 'attnzoo[recipes]'") from error
    return Figure(figsize=size, layout="constrained")


def _panels(count: int, columns: int, side: float = 2.7) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure = _figure((side * columns, (side + 0.3) * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _show(axis: Axes, image: Tensor, title: str, *, colour: bool = False) -> None:
    picture = _array(displayable(image))
    # Under an overlay the image is grey, so that every colour is one of the scale.
    axis.imshow(picture if colour else picture.mean(-1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=7)
    axis.set_axis_off()


def _overlay(axis: Axes, heat: Tensor, image: Tensor) -> object:
    spread = on_image(heat.detach().cpu(), tuple(image.shape[-2:]))
    return axis.imshow(_array(spread), cmap=HEAT, alpha=0.7, vmin=0, vmax=max(float(spread.max()), 1e-12))


def _darken(axis: Axes, cells: Tensor, image: Tensor) -> None:
    hidden = on_image((~cells).float().cpu(), tuple(image.shape[-2:]))
    black = torch.zeros(*hidden.shape, 4)
    black[..., 3] = 0.55 * hidden
    axis.imshow(_array(black))


def _cell(axis: Axes, view: QueryView, image: Tensor) -> None:
    from matplotlib.patches import Rectangle

    height, width = (pixels / side for pixels, side in zip(image.shape[-2:], view.grid, strict=True))
    row, column = view.query
    corner = (column * width - 0.5, row * height - 0.5)
    for colour, thickness in (("white", 3.0), (QUERY, 1.6)):  # seen on light and on dark
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=thickness))


def _points(axis: Axes, view: QueryView, image: Tensor) -> None:
    height, width = (pixels / side for pixels, side in zip(image.shape[-2:], view.grid, strict=True))
    points = view.points.detach().cpu().float()
    weights = view.point_weights.detach().cpu().float() / view.point_weights.max().cpu().clamp_min(1e-12)
    # Heads share the points of their group: draw each group's once, as large as its heads' mean weight.
    groups = torch.unique(points.flatten(1), dim=0, return_inverse=True)[1]
    for i, group in enumerate(groups.unique().tolist()):
        mine = groups == group
        places, sizes = points[mine][0], weights[mine].mean(0)
        axis.scatter(
            _array((places[:, 1] + 0.5) * width - 0.5),
            _array((places[:, 0] + 0.5) * height - 0.5),
            s=_array(4 + 60 * sizes),
            facecolors="none",
            edgecolors=COLOURS[(1 + i) % len(COLOURS)],
            linewidths=1.2,
        )
    axis.set_xlim(-0.5, image.shape[-1] - 0.5)
    axis.set_ylim(image.shape[-2] - 0.5, -0.5)


def _mark(axis: Axes, query: tuple[float, float], image: Tensor) -> None:
    down, right = (f * pixels - 0.5 for f, pixels in zip(query, image.shape[-2:], strict=True))
    axis.plot(right, down, "+", color="white", markersize=13, markeredgewidth=4)
    axis.plot(right, down, "+", color=QUERY, markersize=12, markeredgewidth=2)
