"""Maps cut into windows and put together again, for any way to attend inside them.

Windows that start `shift` tokens into a map leave shorter ones at its ends. Rolling the map and masking what
the roll brought together is the same attention; here nothing is rolled and nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# q, k, v [windows, H, T, D] and a bias [H, T, T] or None, to the output [windows, H, T, Dv] and, where asked
# for, the natural-log LSE [windows, H, T, 1].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


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
    shared = q.shape[-2] // k.shape[-2]
    if shared > 1:
        k, v = (x.repeat_interleave(shared, -2) for x in (k, v))
    if bias is not None:
        bias = bias.unflatten(2, window_size).unflatten(1, window_size)  # [H, row, column, row, column]
    rows, columns = (runs(*axis) for axis in zip(q.shape[1:3], window_size, shift, strict=True))
    bands = []
    for y in rows:
        parts = []
        for x in columns:
            tokens = (slice(None), slice(y.start, y.end), slice(x.start, x.end))
            own = None
            if bias is not None:
                at_y, at_x = slice(y.place, y.place + y.length), slice(x.place, x.place + x.length)
                own = bias[:, at_y, at_x, at_y, at_x].flatten(3).flatten(1, 2)
            windows = attend(*(_cut(each[tokens], y.length, x.length) for each in (q, k, v)), own)
            grid = ((y.end - y.start) // y.length, y.length, (x.end - x.start) // x.length, x.length)
            parts.append([None if each is None else _join(each, grid) for each in windows])
        bands.append([_cat(same, dim=2) for same in zip(*parts, strict=True)])
    out, lse = (_cat(same, dim=1) for same in zip(*bands, strict=True))
    return out, None if lse is None else lse.squeeze(-1)


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """[B, Y, X, H, D] to [B * windows, H, rows * columns, D]."""
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [B, windows, row, windows, column, H, D]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def _join(x: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """[B * windows, H, rows * columns, D] back to [B, Y, X, H, D]."""
    down, rows, across, columns = grid
    x = x.transpose(1, 2).unflatten(1, (rows, columns)).unflatten(0, (-1, down, across))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _cat(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim)
