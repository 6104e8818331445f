"""Which keys a query sees: the windows of neighborhood attention, one axis at a time, as plain numbers.

What is cached is numpy: a cached tensor would belong to whoever asked first, a tracer for example.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Axis(NamedTuple):
    """One axis of the token grid: its length in tokens and the window that slides along it."""

    length: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last key of every query, in positions of the query's dilation group.

        A window never leaves the axis: at a border it shifts inward and keeps its size, except that a causal
        window ends at its query and is shorter near the start. Every query sees itself.
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

    def seen(self) -> np.ndarray:
        """Does the query see the key, of all tokens: bool [length, length]."""
        first, end = self.windows()
        position, group = np.divmod(np.arange(self.length), self.dilation)
        same = group[:, None] == group
        return same & (first[:, None] <= position) & (position < end[:, None])

    def group_length(self, group: np.ndarray) -> np.ndarray:
        """Tokens in the dilation group that starts at token `group`."""
        return -(-(self.length - group) // self.dilation)


class Keys(NamedTuple):
    """The keys of every query of a grid: slots = prod(kernel_size)."""

    index: Tensor  # [N, slots] flat token; an empty slot repeats the query itself
    visible: Tensor  # [N, slots] False where a slot is empty: causal windows near the start


@lru_cache(maxsize=64)
def _keys(axes: tuple[Axis, ...]) -> tuple[np.ndarray, np.ndarray]:
    index, visible = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for axis in axes:
        start, end = axis.windows()
        slots = start[:, None] + np.arange(axis.kernel_size)
        keys = slots * axis.dilation + (np.arange(axis.length) % axis.dilation)[:, None]
        index = outer(index * axis.length, keys, np.add)
        visible = outer(visible, slots < end[:, None], np.logical_and)
    return np.where(visible, index, np.arange(len(index))[:, None]), visible


def as_tensors(arrays: Iterable[np.ndarray]) -> list[Tensor]:
    """Wrap cached arrays, sharing their memory: read only. For functions that a tracer takes as constant."""
    tensors = [torch.from_numpy(array) for array in arrays]
    for tensor in tensors:
        # What torch._dynamo.mark_static sets, which does nothing here because a tracer is at work: without it
        # compiling with dynamic=True makes symbols of the sizes of constants.
        tensor._dynamo_static_indices = set(range(tensor.ndim))
    return tensors


# A tracer keeps the tables as constants of its graph.
@torch.compiler.assume_constant_result
def _key_tensors(axes: tuple[Axis, ...]) -> list[Tensor]:
    return as_tensors(_keys(axes))


def keys_of(axes: tuple[Axis, ...]) -> Keys:
    """Return the keys of every query, on the CPU, to be read only."""
    return Keys(*_key_tensors(axes))


def outer(left: np.ndarray, right: np.ndarray, join: np.ufunc) -> np.ndarray:
    """Join every entry of `left` with every one of `right`: [a, b, ..] and [c, d, ..] to [a * c, b * d, ..].

    The tables of two axes become the table of their grid, in row-major order.
    """
    rank = left.ndim
    left = left.reshape([n for size in left.shape for n in (size, 1)])
    right = right.reshape([n for size in right.shape for n in (1, size)])
    joined = join(left, right)
    return joined.reshape([joined.shape[2 * i] * joined.shape[2 * i + 1] for i in range(rank)])
