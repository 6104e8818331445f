"""Radial attention in a pretrained video generator: the further apart two frames, the narrower the band.

Source: Li et al. 2025, Radial Attention (arXiv:2506.19852); the released rule is that of the authors' code,
which differs from the printed equation (`rule` says which one is meant).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, prod
from operator import index
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from zoo import ops
from zoo.diffusion.adapters import Adapter
from zoo.diffusion.handle import Config, Handle, Processor, apply, check_backend
from zoo.diffusion.layout import TokenLayout
from zoo.errors import ConfigError, did_you_mean

MODEL_TYPES = {"wan": True, "hunyuan": False}  # whether everything sees the first frame
RULES = ("released", "printed")

# Masks -----------------------------------------------------------------------------------------------------


def radial_block_mask(
    num_frames: int,
    tokens_per_frame: int,
    *,
    text_tokens: int = 0,
    block_size: int = 128,
    decay_factor: float = 1.0,
    decimation_threshold: float = 128,
    model_type: str = "wan",
    sink: bool | None = None,
    keep_diagonal: bool = True,
    rule: str = "released",
) -> Tensor:
    """Return which blocks of keys every block of queries sees, for the sequence [video, text].

    Two frames d apart see each other in a band around the same place, half as wide for every doubling of d;
    where that band would be narrower than `decimation_threshold`, some frame pairs are left out instead. A
    block is kept where the band covers it well enough. Blocks that hold text (or its padding) see and are
    seen by all.

    Shapes: bool [blocks, blocks], blocks = ceil((num_frames * tokens_per_frame + text_tokens) / block_size).
    Units: `tokens_per_frame`, `text_tokens` (padding included), `block_size` and `decimation_threshold` in
        tokens; `decay_factor` multiplies the band, below 1 is sparser. `sink`: everything sees the first
        frame, which is the default for `model_type` "wan". `keep_diagonal=False` is the released rule to the
        bit: it loses blocks, even whole rows, where frames are shorter than a block or straddle one.
        `rule="printed"` is equation 4 of the paper, which knows neither threshold nor factor: a block is kept
        where the equation keeps any pair of its tokens.
    Raises: ConfigError for numbers out of range and unknown names.
    Source: Li et al. 2025 (arXiv:2506.19852), Sec. 4.2 and its code.
    """
    sink = check_rule(
        num_frames=num_frames, tokens_per_frame=tokens_per_frame, text_tokens=text_tokens,
        block_size=block_size, decay_factor=decay_factor, decimation_threshold=decimation_threshold,
        model_type=model_type, sink=sink, rule=rule,
    )  # fmt: skip
    video = num_frames * tokens_per_frame
    blocks = -(-(video + text_tokens) // block_size)
    mask = np.zeros((blocks, blocks), dtype=bool)
    if text_tokens or rule == "released":
        mask[video // block_size :] = mask[:, video // block_size :] = True

    if rule == "released":
        widths = list(released_widths(num_frames, tokens_per_frame, block_size, decay_factor,
                                      decimation_threshold))  # fmt: skip
    else:
        widths = list(printed_widths(num_frames, tokens_per_frame))

    # Frame pairs of equal width that lie alike against the blocks are equal: a handful of different ones.
    @cache
    def pair(width: int, row_start: int, column_start: int) -> np.ndarray:
        return _blocks_of_band(tokens_per_frame, width, row_start, column_start, block_size, rule)

    for i in range(num_frames):
        row, row_start = divmod(i * tokens_per_frame, block_size)
        for j in range(num_frames):
            width = tokens_per_frame if sink and j == 0 else widths[abs(i - j)]
            if width < 0:
                continue
            column, column_start = divmod(j * tokens_per_frame, block_size)
            part = pair(width, row_start, column_start)
            place = mask[row : row + part.shape[0], column : column + part.shape[1]]
            place |= part[: place.shape[0], : place.shape[1]]
    if keep_diagonal:
        np.fill_diagonal(mask, True)
    return torch.from_numpy(mask)


def radial_token_mask(num_frames: int, tokens_per_frame: int, *, sink: bool = False) -> Tensor:
    """Return the printed equation token by token; for small sizes, it is quadratic.

    Frames d apart, with r = floor(log2 max(d, 1)): tokens k and l see each other where |k - l| + 1 <= s / 2^r
    while the band is at least one token wide, and where k = l in every ceil(2^r / s)-th frame after that.

    Shapes: bool [N, N], N = num_frames * tokens_per_frame = num_frames * s.
    Source: Li et al. 2025 (arXiv:2506.19852), Eq. 4.
    """
    frames, tokens = torch.arange(num_frames), torch.arange(tokens_per_frame)
    widths = torch.tensor(list(printed_widths(num_frames, tokens_per_frame)))
    width = widths[(frames[:, None] - frames).abs()]
    if sink:
        width[:, 0] = tokens_per_frame
    apart = (tokens[:, None] - tokens).abs()
    mask = apart[None, :, None, :] <= width[:, None, :, None]
    return mask.flatten(2, 3).flatten(0, 1)


def released_widths(
    num_frames: int, tokens_per_frame: int, block_size: int, decay_factor: float, decimation_threshold: float
) -> Iterator[int]:
    """Half width in tokens of the band between frames d apart, for every d; -1 where the pair is left out.

    `|k - l| <= half width` compares whole numbers, so that the fraction of a width does not matter.
    """
    for distance in range(num_frames):
        # The powers of two lie above the length and the distance: the band is half of the printed one.
        length = 2 ** (tokens_per_frame.bit_length() - distance.bit_length())
        is_kept = length >= decimation_threshold or distance % int(decimation_threshold / length) == 0
        if not is_kept:
            yield -1
        elif distance <= 1:
            yield tokens_per_frame
        else:
            yield floor(max(block_size, length * decay_factor))


def printed_widths(num_frames: int, tokens_per_frame: int) -> Iterator[int]:
    """Half width in tokens of the printed band between frames d apart, for every d; -1: no band at all."""
    for distance in range(num_frames):
        halved = 2 ** (max(distance, 1).bit_length() - 1)
        if halved <= tokens_per_frame:
            yield tokens_per_frame // halved - 1
        else:
            yield 0 if distance % ceil(halved / tokens_per_frame) == 0 else -1


def _blocks_of_band(
    tokens: int, width: int, row_start: int, column_start: int, block_size: int, rule: str
) -> np.ndarray:
    """Which blocks the band |k - l| <= width of one frame pair keeps.

    The first token of the frame lies at `row_start` of its first block of rows, `column_start` of columns.
    """
    any_is_enough = rule == "printed"
    # The released rule looks at as many blocks as the frame fills, also where it straddles one more.
    spans = [tokens + start if any_is_enough else tokens for start in (row_start, column_start)]
    rows, columns = (-(-span // block_size) for span in spans)

    key = np.arange(columns * block_size, dtype=np.int32) - column_start
    first = np.arange(rows, dtype=np.int32)[:, None] * block_size - row_start
    # How many rows of each block the band covers in each column.
    low = np.maximum(np.maximum(key - width, 0), first)
    high = np.minimum(np.minimum(key + width, tokens - 1), first + block_size - 1)
    covered = np.where((key >= 0) & (key < tokens), np.maximum(high - low + 1, 0), 0)
    covered = covered.reshape(rows, columns, block_size)
    touched = (covered > 0).sum(axis=-1)
    if any_is_enough:
        return touched > 0
    # More than 3/5 of the columns that the band touches must be covered by more than a third.
    well = (3 * covered > block_size).sum(axis=-1)
    return 5 * well > 3 * touched


def check_rule(
    *,
    num_frames: int,
    tokens_per_frame: int,
    text_tokens: int,
    block_size: int,
    decay_factor: float,
    decimation_threshold: float,
    model_type: str,
    sink: bool | None,
    rule: str,
) -> bool:
    """Return whether there is a sink, or raise ConfigError for settings that make no mask."""
    for name, value, least in (
        ("num_frames", num_frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("text_tokens", text_tokens, 0),
        ("block_size", block_size, 1),
    ):
        if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < least:
            raise ConfigError(f"{name} must be a whole number >= {least}, found {value!r}")
    for name, value in (("decay_factor", decay_factor), ("decimation_threshold", decimation_threshold)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a finite number above 0, found {value!r}")
    for name, value, names in (("model_type", model_type, MODEL_TYPES), ("rule", rule, RULES)):
        if value not in names:
            raise ConfigError(
                f"{name} must be one of {', '.join(names)}, found {value!r}{did_you_mean(str(value), names)}"
            )
    if sink not in (None, True, False):
        raise ConfigError(f"sink must be True, False or None, found {sink!r}")
    return MODEL_TYPES[model_type] if sink is None else bool(sink)


# Processors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RadialPlan:
    """The lists of one geometry and the query-key pairs that they hold, per head."""

    blocks: ops.BlockList
    pairs: int


@dataclass(frozen=True, kw_only=True)
class RadialConfig(Config):
    """The arguments of `radial_block_mask` that no geometry decides; `sink` None: as the model's family."""

    decay_factor: float = 1.0
    block_size: int = 128
    decimation_threshold: float = 128
    sink: bool | None = None
    keep_diagonal: bool = True
    rule: str = "released"
    backend: str = "auto"

    def rules(self) -> dict[str, Any]:
        """Return the arguments of `radial_block_mask`, the sink apart."""
        names = ("decay_factor", "block_size", "decimation_threshold", "keep_diagonal", "rule")
        return {name: getattr(self, name) for name in names}

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that make no mask."""
        radial_block_mask(1, 1, sink=self.sink, **self.rules())
        check_backend(self.backend, "block_sparse_attention")

    def plan(
        self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any
    ) -> RadialPlan | None:
        """Return which blocks see which in the sequence [video, text]; None where all see all."""
        frames, tokens = layout.grid[0], prod(layout.grid[1:])
        model_type = "wan" if adapter.model is WanTransformer3DModel else "hunyuan"
        mask = radial_block_mask(
            frames, tokens, text_tokens=layout.text, model_type=model_type, sink=self.sink, **self.rules()
        )
        # Padding is no key, so there are fewer blocks of keys.
        mask = mask[:, : -(-(layout.image + text) // self.block_size)]
        if bool(mask.all()):
            return None
        rows, columns = (
            torch.full((count,), self.block_size, dtype=torch.int64).clamp_(
                max=total - self.block_size * torch.arange(count)
            )
            for count, total in zip(mask.shape, (layout.tokens, layout.image + text), strict=True)
        )
        pairs = int((rows[:, None] * columns)[mask].sum())
        return RadialPlan(ops.BlockList.from_mask(mask, block_size=self.block_size).to(device), pairs)

    def pairs(self, layout: TokenLayout, text: int, plan: RadialPlan | None) -> int:
        """Query-key pairs of one head, counted in the lists."""
        return layout.tokens * (layout.image + text) if plan is None else plan.pairs

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: RadialPlan) -> str:
        """Name of the backend for a joint sequence [B, N, H, D] of this type and device."""
        arguments = (query, key, key, plan.blocks)
        return ops.explain("block_sparse_attention", *arguments, backend=self.backend).backend


class RadialProcessor(Processor):
    """Frames see each other in a band that narrows with their distance; text sees and is seen by all."""

    config: RadialConfig

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: RadialPlan | None
    ) -> Tensor:
        if plan is None:
            return self.dense(query, key, value)
        turned = not layout.text_last and layout.text > 0
        if turned:  # the rule wants [video, text], so that blocks and frames begin together
            query, key, value = (torch.cat(layout.split(x)[::-1], dim=1) for x in (query, key, value))
        blocks = plan.blocks
        if blocks.offsets.device != query.device:  # offloading moves the inputs after the geometry was read
            blocks = blocks.to(query.device)
        out = ops.block_sparse_attention(query, key, value, blocks, backend=self.config.backend)
        return torch.cat([out[:, layout.image :], out[:, : layout.image]], dim=1) if turned else out


def apply_radial_attention(
    pipe_or_transformer: Any,
    *,
    decay_factor: float = 1.0,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
    block_size: int = 128,
    decimation_threshold: float = 128,
    sink: bool | None = None,
    keep_diagonal: bool = True,
    rule: str = "released",
    backend: str = "auto",
) -> Handle:
    """Let frames of a diffusers video pipeline or transformer see the less of each other, the further apart.

    Works for Wan 2.1, Wan 2.2 (both transformers, steps counted over both), HunyuanVideo, Mochi, CogVideoX
    and LTX-Video. Frames, sizes, text and padding are read at every call; any length works.

    Units: as in `radial_block_mask`. `sink` None: Wan has one, the others do not. The first `dense_steps`
        denoising steps stay dense, and so do `dense_layers`: the first n layers, or a list of indices, names
        ("blocks.0") or patterns ("single_*"). A video whose every block would be kept is left dense.
    Returns: a handle with `remove()`, `stats()` and `compare_dense()`, also a context manager.
    Raises: ConfigError, with nothing changed, for a class or a processor that is not supported, wrong
        settings, context parallelism, or a second call before `remove()`.
    Source: Li et al. 2025 (arXiv:2506.19852). Published settings: Wan 2.1 14B at 69 frames 768 x 1280 has
        decay_factor=0.2, dense_layers=1, dense_steps=12 of 50; HunyuanVideo at 117 frames 0.95, 0 and 12;
        Wan 2.2 at 77 frames 0.8 with block_size=64, 1 and 11 of 40.
    """
    config = RadialConfig(
        decay_factor=decay_factor, block_size=block_size, decimation_threshold=decimation_threshold,
        sink=sink, keep_diagonal=keep_diagonal, rule=rule, backend=backend,
    )  # fmt: skip
    return apply(
        pipe_or_transformer,
        RadialProcessor,
        config,
        method="radial",
        dense_steps=dense_steps,
        dense_layers=dense_layers,
    )
