"""Maps cut into windows and put together again, for any way to attend inside them.

Windows that start `shift` tokens into a map leave shorter ones at its ends. Rolling the map and masking what
the roll brought together is the same attention; here nothing is rolled and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# q, k, v [windows, H, T, D] and a bias [H, T, T] or None, to the output [windows, H, T, Dv] and, where asked
# for, the natural-log LSE [windows, H, T, 1].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]

BYTES_AT_ONCE = 1 << 20  # of queries; measured on one core with 2 MB of its own


class Run(NamedTuple):
    """Neighbouring windows of one length along one axis, in tokens."""

    start: int
    end: int
    length: int  # of each window
    place: int  # where its first token stands in a whole window, which the bias goes by


def runs(length: int, window: int, shift: int) -> list[Run]:
    """Cut an axis of `length` tokens, a multiple of `window`, at shift, shift + window, ...

    So the first window has only the last `shift` places of a whole one, and the last window the others.
    """
    if shift == 0:
        return [Run(0, length, window, 0)]
    last = length - window + shift
    cut = (
        Run(0, shift, shift, window - shift),
        Run(shift, last, window, 0),
        Run(last, length, window - shift, 0),
    )
    return [run for run in cut if run.start < run.end]


def in_windows(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend inside every window of [B, Y, X, H, D]: the output [B, Y, X, H, Dv] and the LSE [B, Y, X, H]."""
    k, v = _all_heads(q, k, v)
    rows, columns = (runs(*axis) for axis in zip(q.shape[1:3], window_size, shift, strict=True))
    bands = []
    for y, *maps in zip(rows, *(_split(x, rows, dim=1) for x in (q, k, v)), strict=True):
        parts = []
        for x, *tokens in zip(columns, *(_split(band, columns, dim=2) for band in maps), strict=True):
            windows = attend(*(_cut(each, y, x) for each in tokens), _own(bias, window_size, y, x))
            parts.append([None if each is None else _join(each, y, x) for each in windows])
        bands.append([_cat(same, dim=2) for same in zip(*parts, strict=True)])
    out, lse = (_cat(same, dim=1) for same in zip(*bands, strict=True))
    return out, None if lse is None else lse.squeeze(-1)


def in_some_windows(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias: Tensor | None,
) -> tuple[Tensor, None]:
    """What `in_windows` does, without gradients and LSE: windows together that fit a core's own cache."""
    k, v = _all_heads(q, k, v)
    rows, columns = (runs(*axis) for axis in zip(q.shape[1:3], window_size, shift, strict=True))
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for y, x in product(rows, columns):
        own = _own(bias, window_size, y, x)
        line = y.length * (x.end - x.start) * q.shape[3:].numel() * q.element_size()  # a row of windows
        lines = (y.end - y.start) // y.length
        images, lines = max(1, BYTES_AT_ONCE // (line * lines)), min(lines, max(1, BYTES_AT_ONCE // line))
        step = lines * y.length
        for image, start in product(range(0, len(q), images), range(y.start, y.end, step)):
            at = slice(image, image + images), slice(start, min(start + step, y.end)), slice(x.start, x.end)
            windows, _ = attend(*(_cut(each[at], y, x) for each in (q, k, v)), own)
            place = _windows(out[at], y, x)
            place.copy_(windows.transpose(1, 2).view(place.transpose(2, 3).shape).transpose(2, 3))
    return out, None


def _all_heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """k and v with a head for each of q's."""
    shared = q.shape[-2] // k.shape[-2]
    return [x.repeat_interleave(shared, -2) if shared > 1 else x for x in (k, v)]


def _own(bias: Tensor | None, window_size: tuple[int, int], y: Run, x: Run) -> Tensor | None:
    """What a bias [H, T, T] of whole windows is for those of two runs."""
    if bias is None:
        return None
    bias = bias.unflatten(2, window_size).unflatten(1, window_size)  # [H, row, column, row, column]
    at_y, at_x = slice(y.place, y.place + y.length), slice(x.place, x.place + x.length)
    return bias[:, at_y, at_x, at_y, at_x].flatten(3).flatten(1, 2)


def _split(x: Tensor, parts: list[Run], dim: int) -> tuple[Tensor, ...]:
    """The runs of one axis; unlike slices, their gradients are put together by one copy."""
    return x.split([run.end - run.start for run in parts], dim) if len(parts) > 1 else (x,)


def _windows(tokens: Tensor, y: Run, x: Run) -> Tensor:
    """[B, Y, X, H, D] seen as [B, windows, row, windows, column, H, D]."""
    return tokens.unflatten(2, (-1, x.length)).unflatten(1, (-1, y.length))


def _cut(tokens: Tensor, y: Run, x: Run) -> Tensor:
    """[B, Y, X, H, D] to [B * windows, H, rows * columns, D], by one copy in the order that products read."""
    if tokens.shape[1:3] == (y.length, x.length):
        return tokens.flatten(1, 2).transpose(1, 2)
    return _windows(tokens, y, x).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def _join(windows: Tensor, y: Run, x: Run) -> Tensor:
    """[B * windows, H, rows * columns, D] back to [B, Y, X, H, D]."""
    down, across = (y.end - y.start) // y.length, (x.end - x.start) // x.length
    windows = windows.transpose(1, 2).unflatten(1, (y.length, x.length)).unflatten(0, (-1, down, across))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _cat(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim)
