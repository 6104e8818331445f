"""Which keys a query sees: the windows of neighborhood attention, one axis at a time, as plain numbers.

What is cached is numpy: tensors in a cache would hold the memory of a device, or belong to a tracer. A
tracer sees the numbers as the result of one opaque operation, `zoo::neighborhood_geometry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of the token grid: its length in tokens and the window that slides along it."""

    length: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last key of every query, in positions of the query's dilation group.

        A window never leaves the axis: at a border it shifts inward and keeps its size, except that a causal
        window ends at its query and is shorter near the start.
        Source: Hassani et al. 2023 (arXiv:2204.07143) Sec. 3; dilation: arXiv:2209.15001; stride:
        arXiv:2504.16922.
        """
        tokens = np.arange(self.length)
        position = tokens // self.dilation
        last = self.group_length(tokens % self.dilation) - 1
        first_of_group = position // self.stride * self.stride
        if self.is_causal:
            leader = np.minimum(first_of_group + self.stride - 1, last)
            return np.maximum(leader - self.kernel_size + 1, 0), position + 1
        leader = np.minimum(first_of_group + self.stride // 2, last)
        start = np.clip(leader - self.kernel_size // 2, 0, last + 1 - self.kernel_size)
        return start, start + self.kernel_size

    def group_length(self, group: np.ndarray) -> np.ndarray:
        """Tokens in the dilation group that starts at token `group`."""
        return -(-(self.length - group) // self.dilation)


@lru_cache(maxsize=256)
def key_indices(axes: tuple[Axis, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For every query the flat indices of its keys, [N, slots], and which slots hold a key, [N, slots].

    An empty slot (causal windows near the start) repeats the query itself, which every query sees.
    """
    per_axis = []
    for axis in axes:
        start, end = axis.windows()
        tokens = np.arange(axis.length)
        slots = start[:, None] + np.arange(axis.kernel_size)
        visible = slots < end[:, None]
        per_axis.append(
            (np.where(visible, slots * axis.dilation + (tokens % axis.dilation)[:, None], 0), visible)
        )
    index, visible = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for axis, (keys, seen) in zip(axes, per_axis, strict=True):
        index = index[:, None, :, None] * axis.length + keys[None, :, None, :]
        visible = visible[:, None, :, None] & seen[None, :, None, :]
        shape = (index.shape[0] * index.shape[1], index.shape[2] * index.shape[3])
        index, visible = index.reshape(shape), visible.reshape(shape)
    index = np.where(visible, index, np.arange(index.shape[0])[:, None])
    return index, visible


TABLES: dict[str, Callable[[tuple[Axis, ...]], tuple[np.ndarray, ...]]] = {"keys": key_indices}


def tables(name: str, axes: tuple[Axis, ...]) -> list[Tensor]:
    """Return the arrays of `TABLES[name]` for a grid as CPU tensors, also while a tracer is watching."""
    if torch.compiler.is_compiling():
        return _traced_tables(name, [int(number) for axis in axes for number in astuple(axis)])
    return [torch.from_numpy(array) for array in TABLES[name](axes)]


@torch.library.custom_op("zoo::neighborhood_geometry", mutates_args=())
def _traced_tables(name: str, numbers: list[int]) -> list[Tensor]:
    return [torch.from_numpy(array).clone() for array in TABLES[name](_from_numbers(numbers))]


@_traced_tables.register_fake
def _(name: str, numbers: list[int]) -> list[Tensor]:
    arrays = TABLES[name](_from_numbers(numbers))
    return [torch.empty(array.shape, dtype=getattr(torch, str(array.dtype))) for array in arrays]


def _from_numbers(numbers: list[int]) -> tuple[Axis, ...]:
    return tuple(Axis(*numbers[i : i + 4], bool(numbers[i + 4])) for i in range(0, len(numbers), 5))
