"""Deformable attention as a module: queries predict where to look; what lies there is attended."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.attention.capture import AttentionRecord
from zoo.attention.layers import ChannelNorm, Convolution, Pointwise
from zoo.errors import ConfigError, at_least
from zoo.kernels.checks import without_autocast
from zoo.kernels.deformable.reference import displacements, query_points

POSITION_BIASES = ("table", "log_cpb", "fixed", "dwc", None)


class DeformableAttention(nn.Module):
    """Multi-head attention of every token to keys sampled from the map at predicted positions.

    A small network reads the queries on a grid that is `stride` times coarser and shifts the reference points
    of that grid; keys and values are projected from the map sampled there. Heads share the positions of their
    group, and the groups share the network.

    `version` is the published form, 1 for DAT and 2 for DAT++, which the names of the weights do not tell.
    Along an axis of n keys, with f for `offset_range_factor`:

        version                     1                    2
        reference point i           (2i + 1) / n - 1     (2i + 1) / (n - 1) - 1, in the middle for n = 1
        shift o, f > 0              tanh(o) f / n        tanh(o) f / (n - 1)
        position, f < 0             tanh(point + o)      point + o, clamped to the map
        queries, for the bias       at cell centres      from the first at -1 to the last at 1

    `position_bias`: "table" reads a learned table, made for maps of `map_size`, at the displacement of query
    and key (other maps stretch it; None is 7 x 7); "log_cpb" computes the bias from the displacement; "fixed"
    is a number for every pair, on maps of `map_size` only; "dwc" adds a depthwise convolution of the queries
    to the output. Without `offsets`, keys are averages of `stride` x `stride` tokens.

    Shapes: [B, Y, X, C] in and out. Units: map_size, stride and kernel_size (of the network's convolution) in
    tokens. `groups` None is half as many as heads. Numerics: positions in at least float32.
    Raises: ConfigError for arguments that do not fit each other, or a map that "fixed" was not made for.
    Source: Xia et al. 2022 (arXiv:2201.00520) Sec. 3.2; version 2: Xia et al. 2023 (arXiv:2309.01430).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        version: int = 2,
        groups: int | None = None,
        stride: int = 1,
        kernel_size: int = 5,
        offset_range_factor: float = -1.0,
        offsets: bool = True,
        position_bias: str | None = "table",
        map_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ConfigError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        if groups is None:
            groups = 1 if num_heads % 2 else num_heads // 2
        if groups < 1 or num_heads % groups:
            raise ConfigError(f"groups must divide the {num_heads} heads, found {groups}")
        at_least(1, stride=stride, kernel_size=kernel_size)
        if version not in (1, 2):
            raise ConfigError(f"version must be 1 (DAT) or 2 (DAT++), found {version!r}")
        if position_bias not in POSITION_BIASES:
            raise ConfigError(f"position_bias must be one of {POSITION_BIASES}, found {position_bias!r}")
        if position_bias == "fixed" and map_size is None:
            raise ConfigError("position_bias 'fixed' needs the map_size that it is made for")
        if not offsets and position_bias not in ("dwc", None):
            raise ConfigError(
                f"without offsets there is no displacement for position_bias {position_bias!r}; "
                "use 'dwc' or None"
            )
        self.dim, self.num_heads, self.groups = dim, num_heads, groups
        self.version = version
        self.stride, self.kernel_size = stride, kernel_size
        self.padding = 0 if version == 2 and kernel_size == stride else kernel_size // 2
        self.offset_range_factor = offset_range_factor
        self.position_bias = position_bias
        self.map_size = (7, 7) if map_size is None else tuple(map_size)
        self.conv_offset = None
        if offsets:
            width = dim // groups
            self.conv_offset = nn.Sequential(
                Convolution(width, width, kernel_size, stride, self.padding, groups=width, **factory),
                ChannelNorm(width, **factory),
                nn.GELU(),
                Pointwise(width, 2, bias=False, **factory),
            )
        self.proj_q = Pointwise(dim, dim, bias=qkv_bias, **factory)
        self.proj_k = Pointwise(dim, dim, bias=qkv_bias, **factory)
        self.proj_v = Pointwise(dim, dim, bias=qkv_bias, **factory)
        self.proj_out = Pointwise(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        # Published files keep whatever tells positions apart under this one name.
        self.rpe_table: nn.Parameter | nn.Module | None = None
        if position_bias == "dwc":
            self.rpe_table = Convolution(dim, dim, 3, padding=1, groups=dim, **factory)
        elif position_bias == "log_cpb":
            self.rpe_table = nn.Sequential(
                nn.Linear(2, 32, **factory),
                nn.ReLU(),
                nn.Linear(32, num_heads // groups, bias=False, **factory),
            )
        elif position_bias is not None:
            rows, columns = self.map_size
            shape = (2 * rows - 1, 2 * columns - 1)
            if position_bias == "fixed":
                shape = (rows * columns, self.key_count(rows, columns))
            self.rpe_table = nn.Parameter(torch.empty(num_heads, *shape, **factory))
            nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def key_count(self, rows: int, columns: int) -> int:
        """How many keys are sampled from a map of this size."""
        if self.conv_offset is None:
            return max(1, rows // self.stride) * max(1, columns // self.stride)
        spare = 2 * self.padding - self.kernel_size
        return ((rows + spare) // self.stride + 1) * ((columns + spare) // self.stride + 1)

    def _positions(self, q: Tensor) -> Tensor:
        """Where the queries [B, Y, X, C] let each group look: [B, G, N, 2] in at least float32."""
        by_group = q.unflatten(-1, (self.groups, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        hidden = self.conv_offset[:3](by_group)
        last = self.conv_offset[3]
        # A position in low precision is wrong by a part of a token.
        with without_autocast(q):
            shift = last(hidden.to(last.weight.dtype))
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32))  # [B * G, rows, columns, 2]
        factor = self.offset_range_factor
        bounded = factor > 0 or (self.version == 2 and factor == 0)
        points = []
        for axis in (0, 1):
            count = shift.shape[1 + axis]
            cells = count if self.version == 1 else max(count - 1, 1)
            point = (2 * torch.arange(count, dtype=shift.dtype, device=shift.device) + 1) / cells - 1
            o = shift[..., axis]
            o = o.tanh() * (factor / cells) if bounded else o
            points.append(o + (point[:, None] if axis == 0 else point))
        positions = torch.stack(points, dim=-1)
        if factor < 0:
            positions = positions.tanh() if self.version == 1 else positions.clamp(-1, 1)
        return positions.flatten(1, 2).unflatten(0, (-1, self.groups))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | str | None]]:
        """Queries [B, Y, X, H, D], sampled keys and values [B, N, H, D], and the rest of the operation."""
        rows, columns = x.shape[1:3]
        if self.conv_offset is not None and min(rows, columns) + 2 * self.padding < self.kernel_size:
            raise ConfigError(
                f"the map of {rows} x {columns} tokens is smaller than kernel_size={self.kernel_size} of the "
                f"offsets, which has no padding where it is the stride; give {self.kernel_size + 2} or more"
            )
        q = self.proj_q(x)
        options: dict[str, Tensor | str | None] = {"positions": None}
        if self.conv_offset is None:
            window = (min(self.stride, rows), min(self.stride, columns))
            tokens = F.avg_pool2d(x.permute(0, 3, 1, 2), window).flatten(2).transpose(1, 2)
        else:
            positions = self._positions(q)
            options["positions"] = positions
            options["query_grid"] = grid = "centres" if self.version == 1 else "corners"
            tokens = ops.deformable_sample(x, positions)
            if self.position_bias == "table":
                options["table"] = self.rpe_table
            elif self.position_bias == "log_cpb":
                apart = 8 * displacements(query_points((rows, columns), grid, positions), positions)
                apart = apart.sign() * (apart.abs() + 1).log2() / 3
                bias = self.rpe_table(apart.to(self.rpe_table[0].weight.dtype))  # [B, G, Q, N, H / G]
                options["bias"] = bias.permute(0, 1, 4, 2, 3).flatten(1, 2)
            elif self.position_bias == "fixed":
                if (rows, columns) != self.map_size:
                    raise ConfigError(
                        f"position_bias 'fixed' is made for a map of {self.map_size}, "
                        f"found {(rows, columns)}; use 'table'"
                    )
                options["bias"] = self.rpe_table
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)) for y in (q, self.proj_k(tokens), self.proj_v(tokens))
        )
        return q, k, v, options

    def forward(self, x: Tensor) -> Tensor:
        """[B, Y, X, C] to [B, Y, X, C]."""
        q, k, v, options = self._project(x)
        x = ops.deformable_attention(q, k, v, **options).flatten(-2)
        if self.position_bias == "dwc":
            x = x + self.rpe_table(q.flatten(-2))
        return self.proj_drop(self.proj_out(x))

    def attention_weights(self, x: Tensor) -> AttentionRecord:
        """Weights of every query over the sampled keys for the input [B, Y, X, C] of `forward`, and where
        those lie."""
        q, k, _, options = self._project(x)
        q, k = q.float(), k.float()
        each = torch.eye(k.shape[1], device=k.device)[None, :, None].expand(*k.shape[:3], -1)
        with without_autocast(x):
            weights = ops.deformable_attention(
                q, k, each, **options
            )  # keys as values: what is left is weights
        axes = ("batch", "row", "column", "head", "key")
        grid = tuple(x.shape[1:3])
        return AttentionRecord(weights, axes, grid, grid, positions=options["positions"])

    def attention_macs(self, shape: torch.Size) -> int:
        """Multiply-adds of the two products for an input of this shape, [B, Y, X, C]."""
        batch, rows, columns, channels = shape
        return 2 * batch * rows * columns * channels * self.key_count(rows, columns)

    def extra_repr(self) -> str:
        return (
            f"version={self.version}, num_heads={self.num_heads}, groups={self.groups}, stride={self.stride}"
        )
