"""Tables of Agent Transformers that are made for one image size, fitted to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DERIVED = ("relative_position_index", "attn_mask")  # in published files; ours are computed
LINES = ("ah_bias", "aw_bias", "ha_bias", "wa_bias")  # one entry for every row, or column, of a map


def fit_tables(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return a file's entries with the tables in the shapes of a model for another image size.

    Tables of rows and columns are interpolated linearly, window tables and position embeddings bicubically,
    a class token's own position being kept; what follows from the geometry is dropped.
    """
    fitted = {}
    for key, value in state.items():
        leaf = key.rpartition(".")[2]
        if leaf in DERIVED:
            continue
        wanted = tuple(shapes.get(key, value.shape))
        if tuple(value.shape) == wanted or value.ndim != len(wanted):
            fitted[key] = value
        elif leaf in LINES:
            fitted[key] = _line(value, wanted)
        elif leaf == "relative_position_bias_table":
            fitted[key] = _square(value[None], wanted[0])[0] if value.shape[1] == wanted[1] else value
        elif leaf.startswith("pos_embed") and value.shape[-1] == wanted[-1]:
            prefix = wanted[1] - math.isqrt(wanted[1]) ** 2  # 1 with a class token, 0 without
            places = _square(value[:, prefix:], wanted[1] - prefix)
            fitted[key] = torch.cat([value[:, :prefix], places], dim=1)
        else:
            fitted[key] = value
    return fitted


def _line(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize the one axis that differs; a table that differs in more comes back as it is."""
    axes = [i for i, (old, new) in enumerate(zip(table.shape, shape, strict=True)) if old != new]
    if len(axes) != 1:
        return table
    lines = table.movedim(axes[0], -1)
    flat = F.interpolate(lines.reshape(1, -1, lines.shape[-1]), size=shape[axes[0]], mode="linear")
    return flat.view(*lines.shape[:-1], -1).movedim(-1, axes[0]).contiguous()


def _square(table: Tensor, entries: int) -> Tensor:
    """Resize [1, n * n, C] to [1, entries, C], both square; another table comes back as it is."""
    side, wanted = math.isqrt(table.shape[1]), math.isqrt(entries)
    if side * side != table.shape[1] or wanted * wanted != entries:
        return table
    maps = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
