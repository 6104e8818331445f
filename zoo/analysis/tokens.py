"""What every mechanism's weights have in common: how much each token takes from each other token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.attention import AttentionRecord
from zoo.errors import ConfigError

ROWS_AT_ONCE = 256  # dense rows are made for that many queries at a time


@dataclass(frozen=True)
class TokenAttention:
    """How much every token of one block takes from every other, in one form for all mechanisms.

    Tokens are counted along the rows of `grid`, behind `prefix` tokens (such as a class token) that lie
    nowhere in the image. The matrix from tokens to tokens is never stored: `weights` hold what a query gives
    to each of its slots, `keys` which token a slot is (-1: none, such as padding). Where `inner` is given,
    the slots are agents, and `inner` is what these take from the tokens.
    """

    name: str
    mechanism: str  # neighborhood, window, bilevel, deformable, agent, global ...
    weights: Tensor  # [B, H, queries, slots]
    grid: tuple[int, int]
    keys: Tensor | None = None  # broadcasts to `weights`; None: slots are the tokens in their order
    inner: Tensor | None = None  # [B, H, slots, tokens]
    prefix: int = 0
    points: Tensor | None = None  # [B, groups, keys, 2] where sampled keys lie: rows and columns, in tokens

    @property
    def tokens(self) -> int:
        """How many tokens there are, with those before the map."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def heads(self) -> int:
        """How many heads attend."""
        return self.weights.shape[1]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What queries `start` to `stop` take from every token, [B, H, queries, tokens]."""
        weights = self.weights[:, :, start:stop]
        if self.inner is not None:
            return weights @ self.inner
        if self.keys is None:
            return weights
        keys = self.keys if self.keys.shape[2] == 1 else self.keys[:, :, start:stop]
        keys = torch.where(keys < 0, self.tokens, keys).expand_as(weights)  # one more place, for no token
        rows = weights.new_zeros(*weights.shape[:3], self.tokens + 1)
        return rows.scatter_add_(-1, keys, weights)[..., :-1]

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The rows of all queries, a few at a time, with the number of the first."""
        for start in range(0, self.tokens, ROWS_AT_ONCE):
            yield start, self.rows(start, start + ROWS_AT_ONCE)

    def pull(self, mass: Tensor, fuse: str = "mean") -> Tensor:
        """Hand what lies on the queries to the tokens it is taken from: mass times matrix, [B, tokens].

        `fuse` says how heads become one matrix: "mean", or "max" and "min" of each pair.
        """
        if fuse == "mean" and self.inner is not None:
            passed = torch.einsum("bq,bhqs->bhs", mass, self.weights)
            return torch.einsum("bhs,bhst->bt", passed, self.inner) / self.heads
        if fuse == "mean" and self.keys is not None:
            keys = torch.where(self.keys < 0, self.tokens, self.keys).expand_as(self.weights)
            parts = mass[:, None, :, None] * self.weights / self.heads
            out = mass.new_zeros(len(mass), self.tokens + 1)
            return out.scatter_add_(1, keys.flatten(1), parts.flatten(1))[:, :-1]
        if fuse == "mean":
            return torch.einsum("bq,bhqt->bt", mass, self.weights) / self.heads
        if fuse not in ("max", "min"):
            raise ConfigError(f"fuse must be 'mean', 'max' or 'min', found {fuse!r}")
        out = mass.new_zeros(len(mass), self.tokens)
        for start, rows in self.chunks():
            fused = rows.amax(1) if fuse == "max" else rows.amin(1)
            out += torch.einsum("bq,bqt->bt", mass[:, start : start + ROWS_AT_ONCE], fused)
        return out

    def on_map(self, values: Tensor) -> Tensor:
        """The part of [.., tokens] that lies on the map, as [.., Y, X]."""
        return values[..., self.prefix :].unflatten(-1, self.grid)


@dataclass(frozen=True)
class GroupAttention:
    """How much every channel of a group takes from the others, the same for every token."""

    name: str
    mechanism: str
    weights: Tensor  # [B, groups, channels, channels]
    grid: tuple[int, int]

    @property
    def heads(self) -> int:
        """How many groups of channels there are."""
        return self.weights.shape[1]


def from_record(name: str, record: AttentionRecord, mechanism: str) -> TokenAttention | GroupAttention:
    """Bring a record of `capture_attention` into the common form, in float32, without queries of padding.

    Raises: ConfigError for a record that does not say where its keys lie.
    """
    record = in_float32(record)
    if "channel" in record.axes:
        return GroupAttention(name, mechanism, record.weights, record.grid)
    if len(record.grid) != 2:
        raise ConfigError(f"{name} attends on a grid of {len(record.grid)} axes; pictures need two")
    weights = record.weights
    if record.axes[1] == "token":  # [B, tokens, H, slots], a class token first
        by_query = weights.transpose(1, 2)
    elif record.axes[1:4] == ("row", "column", "head"):
        by_query = weights[:, : record.image[0], : record.image[1]].permute(0, 3, 1, 2, 4).flatten(2, 3)
    else:
        raise ConfigError(f"{name} has weights with axes {record.axes}, which say no query and key tokens")
    tokens = record.image[0] * record.image[1]
    prefix = by_query.shape[2] - tokens
    common = {"name": name, "mechanism": mechanism, "grid": record.image, "prefix": prefix}
    if record.agents is not None:
        inner = record.agents.transpose(1, 2)
        if inner.shape[-1] != prefix + tokens:
            raise ConfigError(
                f"the agents of {name} attend to {inner.shape[-1]} reduced keys, no tokens of its "
                f"{record.image[0]} x {record.image[1]} map"
            )
        return TokenAttention(weights=by_query, inner=inner, **common)
    if record.positions is not None:
        return _from_points(by_query, record, common)
    if record.keys is None:
        if by_query.shape[-1] != prefix + tokens:
            raise ConfigError(f"the record of {name} does not say where its {by_query.shape[-1]} keys lie")
        return TokenAttention(weights=by_query, **common)
    keys = record.keys if record.keys.ndim == 3 else record.keys[None]
    rows, columns = keys // record.grid[1], keys % record.grid[1]
    inside = (keys >= 0) & (rows < record.image[0]) & (columns < record.image[1])
    keys = torch.where(inside, rows * record.image[1] + columns, -1)
    keys = keys.unflatten(1, record.grid)[:, : record.image[0], : record.image[1]].flatten(1, 2)
    return TokenAttention(weights=by_query, keys=keys[:, None], **common)


def in_float32(record: AttentionRecord) -> AttentionRecord:
    """The record with weights in float32: those of a model in float64 are, by mechanism, in either."""
    agents = None if record.agents is None else record.agents.float()
    return replace(record, weights=record.weights.float(), agents=agents)


def _from_points(weights: Tensor, record: AttentionRecord, common: dict[str, object]) -> TokenAttention:
    """A key sampled between four tokens is, bilinearly, a sum of them: its weight goes to them in parts."""
    groups, heads = record.positions.shape[1], weights.shape[1]
    last = torch.tensor(record.image, dtype=record.positions.dtype, device=weights.device) - 1
    points = (record.positions + 1) / 2 * last  # [B, G, K, 2] in tokens
    corner = points.floor()
    keys, parts = [], []
    for down in (0, 1):
        for right in (0, 1):
            place = corner + torch.tensor([down, right], dtype=corner.dtype, device=corner.device)
            parts.append((1 - (points - place).abs()).clamp(min=0).prod(-1))
            inside = ((place >= 0) & (place <= last)).all(-1)
            keys.append(torch.where(inside, place[..., 0] * record.image[1] + place[..., 1], -1).long())
    keys, parts = (torch.cat(x, dim=-1).repeat_interleave(heads // groups, 1) for x in (keys, parts))
    weights = weights.repeat(1, 1, 1, 4) * parts[:, :, None].to(weights.dtype)
    return TokenAttention(weights=weights, keys=keys[:, :, None], points=points, **common)
