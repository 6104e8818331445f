"""A token map as regions: a grid of equal rectangles, counted row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def to_regions(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """[B, Y, X, ...] to [B, regions, tokens of a region, ...]."""
    rows, columns = regions
    x = x.unflatten(2, (columns, x.shape[2] // columns)).unflatten(1, (rows, x.shape[1] // rows))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def to_map(x: Tensor, regions: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[B, regions, tokens of a region, ...] back to [B, Y, X, ...]."""
    rows, columns = regions
    x = x.unflatten(2, (grid[0] // rows, grid[1] // columns)).unflatten(1, regions)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def region_of(regions: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """The region of every token of a grid, [Y * X]."""
    numbers = torch.arange(regions[0] * regions[1], device=device).view(regions)
    numbers = numbers.repeat_interleave(grid[0] // regions[0], 0)
    return numbers.repeat_interleave(grid[1] // regions[1], 1).flatten()
