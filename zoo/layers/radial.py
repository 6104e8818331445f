"""Which blocks of a video see each other in radial attention: the further apart two frames, the less.

Source: Li et al. 2025, Radial Attention (arXiv:2506.19852); the released rule is that of the authors' code,
which differs from the printed equation (`rule` says which one is meant).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import ceil, floor
from operator import index

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean

MODEL_TYPES = {"wan": True, "hunyuan": False}  # whether everything sees the first frame
RULES = ("released", "printed")
LARGEST_BLOCK = 1 << 16  # tokens; a mask is made token by token


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
        model_type=model_type, sink=sink, keep_diagonal=keep_diagonal, rule=rule,
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
    keep_diagonal: bool,
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
    if block_size > LARGEST_BLOCK:
        raise ConfigError(f"block_size must be at most {LARGEST_BLOCK} tokens, found {block_size}")
    for name, value in (("decay_factor", decay_factor), ("decimation_threshold", decimation_threshold)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a finite number above 0, found {value!r}")
    for name, value, names in (("model_type", model_type, MODEL_TYPES), ("rule", rule, RULES)):
        if value not in names:
            raise ConfigError(
                f"{name} must be one of {', '.join(names)}, found {value!r}{did_you_mean(str(value), names)}"
            )
    if not isinstance(keep_diagonal, bool):
        raise ConfigError(f"keep_diagonal must be True or False, found {keep_diagonal!r}")
    if sink not in (None, True, False):
        raise ConfigError(f"sink must be True, False or None, found {sink!r}")
    return MODEL_TYPES[model_type] if sink is None else bool(sink)
