"""Window attention as a module: padding, projections, relative positional bias around the operation."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.errors import ConfigError, at_least


class WindowAttention(nn.Module):
    """Multi-head attention of every token to the tokens of its window.

    Shapes: [B, Y, X, C] in and out. A map that is no multiple of the window is padded with zeros at the
    bottom and right before the projection, so padded tokens carry its bias and are attended, as the published
    models do. With `clamp_window`, an axis of the map that is not longer than the window is one window of its
    length without a shift instead, which is Swin's rule.

    `shift` moves the windows right and down by so many tokens; tokens that only a rolled map would bring
    together do not see each other. `rel_pos_bias` adds a learned number for every head and displacement.
    Units: window_size and shift in tokens, one number or (rows, columns). Raises: ConfigError when num_heads
    does not divide dim, or for a shift as long as the window.
    Source: Liu et al. 2021 (arXiv:2103.14030) Sec. 3.2.
    """

    # What the published keys call the two projections.
    qkv_name = "qkv"
    proj_name = "proj"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | tuple[int, int] = 7,
        shift: int | tuple[int, int] = 0,
        rel_pos_bias: bool = True,
        clamp_window: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.window_size, self.shift = _pair(window_size), _pair(shift)
        for side in self.window_size:
            at_least(1, window_size=side)
        if any(not 0 <= s < w for s, w in zip(self.shift, self.window_size, strict=True)):
            raise ConfigError(f"shift must be from 0 to less than window_size {window_size}, found {shift}")
        self.clamp_window = clamp_window
        self.scale = scale
        setattr(self, self.qkv_name, nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory))
        self.register_parameter("relative_position_bias_table", None)
        if rel_pos_bias:
            rows, columns = self.window_size
            table = torch.empty((2 * rows - 1) * (2 * columns - 1), num_heads, **factory)
            self.relative_position_bias_table = nn.Parameter(table)
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        setattr(self, self.proj_name, nn.Linear(dim, dim, **factory))
        self.proj_drop = nn.Dropout(proj_drop)

    def window_for(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Window and shift, both as rows and columns, on a map of this size."""
        if not self.clamp_window:
            return self.window_size, self.shift
        axes = tuple(zip((rows, columns), self.window_size, self.shift, strict=True))
        window = tuple(min(length, window) for length, window, _ in axes)
        return window, tuple(shift if length > window else 0 for length, window, shift in axes)

    def relative_position_bias(self, window_size: tuple[int, int] | None = None) -> Tensor | None:
        """The bias of every pair of tokens in a window, [H, T, T]; None without one.

        A window smaller than the module's reads the displacements that it has.
        """
        table = self.relative_position_bias_table
        if table is None:
            return None
        (rows, columns), (all_rows, all_columns) = window_size or self.window_size, self.window_size
        y, x = torch.arange(rows, device=table.device), torch.arange(columns, device=table.device)
        down = (y[:, None] - y + all_rows - 1)[:, None, :, None]  # query minus key, from 0
        right = (x[:, None] - x + all_columns - 1)[:, None, :]
        index = down * (2 * all_columns - 1) + right  # [row, column, row of the key, its column]
        return table[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """Whole windows of zeros and tokens, and window and shift."""
        rows, columns = x.shape[1:3]
        window, shift = self.window_for(rows, columns)
        down, right = -rows % window[0], -columns % window[1]
        return (F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x), window, shift

    def _attend(self, x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        """Attention of whole windows before the last projection, [B, Y, X, C] in and out."""
        qkv = self._project(x)
        bias = self.relative_position_bias(window)
        return ops.window_attention(*qkv, window, shift=shift, bias=bias, scale=self.scale).flatten(-2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as [B, Y, X, H, D]."""
        return getattr(self, self.qkv_name)(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        rows, columns = x.shape[1:3]
        x, window, shift = self._pad(x)
        if x.device.type == "cpu" and not any(shift):
            # Windows have to lie in one piece here. As maps of their own they are cut before the projection,
            # when they are a third as much to copy.
            down, across = x.shape[1] // window[0], x.shape[2] // window[1]
            x = x.unflatten(2, (across, -1)).unflatten(1, (down, -1)).transpose(2, 3).flatten(0, 2)
            x = self._attend(x, window, shift)
            x = x.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        else:
            x = self._attend(x, window, shift)
        return self.proj_drop(getattr(self, self.proj_name)(x[:, :rows, :columns]))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over the places of its window for the input [B, Y, X, C] of `forward`."""
        image = tuple(x.shape[1:3])
        x, window, shift_by = self._pad(x)
        q, k, _ = self._project(x)
        grid = tuple(q.shape[1:3])
        keys, places = [], []
        for length, size, shift in zip(grid, window, shift_by, strict=True):
            token, slot = torch.arange(length, device=q.device), torch.arange(size, device=q.device)
            place = (token - shift) % size
            places.append(place)
            keys.append((token - place)[:, None] + slot)  # off the map in shorter windows
        y, x_ = keys[0][:, None, :, None], keys[1][:, None, :]
        inside = (y >= 0) & (y < grid[0]) & (x_ >= 0) & (x_ < grid[1])
        index = torch.where(inside, y * grid[1] + x_, -1).flatten(2).flatten(0, 1)
        place = places[0][:, None] * window[1] + places[1]
        # The values are the places of the keys, so what comes out are the weights.
        q, k = q.float(), k.float()
        each = torch.eye(window[0] * window[1], device=q.device)[place]
        each = each[None, :, :, None].expand(*k.shape[:-1], -1)
        with torch.autocast(x.device.type, enabled=False):
            bias = self.relative_position_bias(window)
            weights = ops.window_attention(q, k, each, window, shift=shift_by, bias=bias, scale=self.scale)
        axes = ("batch", "row", "column", "head", "key")
        return AttentionRecord(weights, axes, grid, image, index)

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, channels = shape
        window, _ = self.window_for(rows, columns)
        tokens = (rows + -rows % window[0]) * (columns + -columns % window[1])
        return 2 * batch * tokens * channels * window[0] * window[1]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"


def resize_relative_position_bias(
    table: Tensor, window_size: int | tuple[int, int], old: int | tuple[int, int] | None = None
) -> Tensor:
    """Fit a table of relative positional biases to another window by bicubic interpolation.

    Shapes: [(2 * rows - 1) * (2 * columns - 1), H] of the `old` window, square where None is given, to that
    of `window_size`. Raises: ConfigError for a table that is none of the old window's.
    """
    entries, heads = table.shape
    if old is None:
        old = (isqrt(entries) + 1) // 2
    sides, wanted = ([2 * n - 1 for n in _pair(window)] for window in (old, window_size))
    if sides[0] * sides[1] != entries:
        raise ConfigError(
            f"a table of {entries} displacements is not that of a window of {_pair(old)} tokens"
        )
    if sides == wanted:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    maps = table.T.to(dtype).unflatten(1, sides)[None]
    maps = F.interpolate(maps, size=wanted, mode="bicubic", align_corners=False)
    return maps[0].flatten(1).T.to(table.dtype).contiguous()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
