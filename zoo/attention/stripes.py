"""Attention inside stripes of a map, with a depthwise convolution of the values inside them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.errors import ConfigError


class StripeMixing(nn.Module):
    """What cross-shaped window attention does between its projections, in one of its directions.

    `direction` "down" cuts the map into stripes of `width` columns and its full height, "across" into stripes
    of `width` rows and its full width; None is one stripe, the whole map. The last stripe is narrower where
    the width does not divide the map. To what is attended a depthwise convolution of the values (LePE) is
    added, which sees zeros beyond its stripe.

    Units: `width` in tokens. Raises: ConfigError for an unknown direction or a num_heads that does not divide
    dim.
    Source: Dong et al. 2022 (arXiv:2107.00652) Sec. 3.1 and 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        direction: str | None = None,
        width: int = 7,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if direction not in ("down", "across", None):
            raise ConfigError(f"direction must be 'down', 'across' or None, found {direction!r}")
        self.dim, self.num_heads = dim, num_heads
        self.direction, self.width = direction, width
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def _cuts(self, grid: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Start, end and width of the runs of equal stripes along the axis that is cut."""
        length = grid[1] if self.direction == "down" else grid[0]
        width = length if self.direction is None else min(self.width, length)
        whole = length - length % width
        yield 0, whole, width
        if whole < length:
            yield whole, length, length - whole

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values [B, Y, X, H, D] to outputs [B, Y, X, C]."""
        axis = 2 if self.direction == "down" else 1
        parts = []
        for start, end, width in self._cuts(tuple(q.shape[1:3])):
            own = [x.narrow(axis, start, end - start) for x in (q, k, v)]
            rows, columns = own[0].shape[1:3]
            window = (rows, width) if self.direction == "down" else (width, columns)
            attended = ops.window_attention(*own, window).flatten(3)
            parts.append(attended + self._local(own[2].flatten(3), window))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _local(self, v: Tensor, window: tuple[int, int]) -> Tensor:
        """The convolution of [B, Y, X, C] inside every window."""
        cut = v.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
        maps = self.get_v(cut.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return maps.view(cut.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def seen(self, grid: tuple[int, int]) -> Tensor:
        """Which tokens every token sees, [tokens, slots]; a narrower stripe is filled up with -1."""
        rows, columns = grid
        tokens = torch.arange(rows * columns).view(grid)
        if self.direction is None:
            return tokens.flatten().expand(rows * columns, -1)
        lines = tokens.T if self.direction == "down" else tokens  # one for each place along the cut axis
        width = min(self.width, len(lines))
        first = torch.arange(len(lines)) // width * width
        line = first[:, None] + torch.arange(width)  # [places, width]
        keys = torch.where(line[..., None] < len(lines), lines[line.clamp(max=len(lines) - 1)], -1)
        place = tokens % columns if self.direction == "down" else tokens // columns
        return keys.flatten(1)[place.flatten()]

    def mixing_macs(self, batch: int, grid: tuple[int, int]) -> int:
        """Multiply-adds of the two products."""
        pairs = sum(
            (end - start) * width * (grid[0] if self.direction == "down" else grid[1]) ** 2
            for start, end, width in self._cuts(grid)
        )
        return 2 * batch * pairs * self.dim

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, direction={self.direction!r}, width={self.width}"
