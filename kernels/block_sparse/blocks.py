"""Which key blocks every query block sees: lists for the forward pass and, turned round, for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import index

import torch
from torch import Tensor

from zoo.kernels.checks import shows_values, tensors

BlockSize = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class BlockList:
    """The pairs of blocks that attend, in compressed rows: made once, used by every layer and step.

    Tokens are cut into blocks of `query_size` queries and `key_size` keys; the last block may be shorter.
    Row i of list (b, h) is `indices[b, h, offsets[b, h, i] : offsets[b, h, i + 1]]`. The first two axes are 1
    where a list is shared by the batch or by the heads. With segments, a query also sees only the keys of its
    own segment.

    Shapes: offsets [b, h, query blocks + 1], indices [b, h, entries], both int32; entries past the last
        row are not read. inverse_offsets [b, h, key blocks + 1] and inverse_indices list the query blocks of
        every key block. query_segments [N] and key_segments [M] int32, or None.
    """

    query_size: int
    key_size: int
    offsets: Tensor
    indices: Tensor
    inverse_offsets: Tensor
    inverse_indices: Tensor
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_size: BlockSize = 128) -> BlockList:
        """List the pairs where `mask` is True.

        Shapes: mask [query blocks, key blocks] shared by all, or [H, ..] per head, or [B, H, ..] with 1 for B
            or H where it is shared. block_size: tokens, one number or (queries, keys).
        Raises: ValueError for a mask that is not boolean or has another rank.
        """
        tensors(mask=mask)
        if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
            raise ValueError(
                "mask must be boolean [query blocks, key blocks], with a head or batch and head axes before, "
                f"found {mask.dtype} {tuple(mask.shape)}"
            )
        mask = mask[(None,) * (4 - mask.ndim)]
        offsets = _offsets(mask.sum(dim=-1))
        # A stable sort brings the pairs to the front in row order and need not know how many there are.
        order = mask.flatten(2).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        if shows_values(mask):
            order = order[..., : int(offsets.max()) if offsets.numel() else 0]
        return cls._from_rows(offsets, order % max(mask.shape[-1], 1), mask.shape[-1], block_size)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        offsets: Tensor | None = None,
        *,
        key_blocks: int,
        block_size: BlockSize = 128,
        check: bool = True,
    ) -> BlockList:
        """List the key blocks of every query block by number.

        Shapes: indices [.., query blocks, S] without offsets: S key blocks each, negative ones are left out;
            with offsets [.., query blocks + 1]: indices [.., entries] in compressed rows. The axes before are
            as in `from_mask`.
        Units: key_blocks counts the blocks of the keys; block_size in tokens, one number or (queries, keys).
        Raises: ValueError for wrong shapes; for a number outside the keys or twice in a row, unless `check`
            is False (looking at the values waits for the device).
        """
        if isinstance(key_blocks, bool) or not hasattr(key_blocks, "__index__"):
            raise ValueError(f"key_blocks must be a whole number, found {key_blocks!r}")
        key_blocks = index(key_blocks)
        if key_blocks < 0:
            raise ValueError(f"key_blocks must be a whole number from 0, found {key_blocks}")
        tensors(indices=indices, **({} if offsets is None else {"offsets": offsets}))
        for name, x in (("indices", indices), ("offsets", offsets)):
            if x is not None and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
                raise ValueError(f"{name} must be whole numbers, found {x.dtype}")
        if offsets is None:
            if not 2 <= indices.ndim <= 4:
                raise ValueError(
                    f"indices without offsets must be [.., query blocks, S], found {tuple(indices.shape)}"
                )
            indices = indices[(None,) * (4 - indices.ndim)]
            listed = indices >= 0
            offsets = _offsets(listed.sum(dim=-1))
            front = (~listed).flatten(2).to(torch.uint8).argsort(dim=-1, stable=True)
            indices = indices.flatten(2).gather(-1, front)
        else:
            agree = offsets.shape[:-1] == indices.shape[:-1] and 0 not in offsets.shape[-1:]
            if not 1 <= indices.ndim <= 3 or offsets.ndim == 0 or not agree:
                raise ValueError(
                    "offsets [.., query blocks + 1] and indices [.., entries] must agree in the axes before, "
                    f"found {tuple(offsets.shape)} and {tuple(indices.shape)}"
                )
            offsets, indices = (x[(None,) * (3 - x.ndim)] for x in (offsets, indices))
        if check:
            _check_rows(offsets, indices, key_blocks)
        return cls._from_rows(offsets, indices, key_blocks, block_size)

    @classmethod
    def from_segments(
        cls,
        lengths: Sequence[int] | Tensor,
        key_lengths: Sequence[int] | Tensor | None = None,
        *,
        block_size: BlockSize = 64,
        device: torch.device | str | None = None,
    ) -> BlockList:
        """Let tokens attend inside their group: ragged groups that follow each other in one sequence.

        Shapes: lengths [groups], tokens of every group; key_lengths likewise where the keys are others. A
            group may be empty; queries of a group without keys see nothing.
        Raises: ValueError for negative lengths or different numbers of groups.
        """
        if device is None:
            device = lengths.device if isinstance(lengths, Tensor) else "cpu"
        queries = torch.as_tensor(lengths, device="cpu")
        keys = queries if key_lengths is None else torch.as_tensor(key_lengths, device="cpu")
        for name, x in (("lengths", queries), ("key_lengths", keys)):
            if x.ndim != 1 or (len(x) and (x.is_floating_point() or x.dtype == torch.bool)):
                raise ValueError(f"{name} must be [groups] whole numbers, found {x.tolist()}")
        queries, keys = queries.long(), keys.long()
        for name, x in (("lengths", queries), ("key_lengths", keys)):
            if x.ndim != 1 or x.shape != queries.shape or bool((x < 0).any()):
                raise ValueError(
                    f"{name} must hold one length, at least 0, for each of {queries.shape[0]} groups, "
                    f"found {x.tolist()}"
                )
        query_size, key_size = _sizes(block_size)
        groups = torch.arange(len(queries), device="cpu")
        query_segments = groups.repeat_interleave(queries)
        key_segments = groups.repeat_interleave(keys)
        # Groups follow each other, so a query block sees the key blocks from its first group to its last.
        starts = torch.arange(0, len(query_segments), query_size, device="cpu")
        stops = (starts + query_size).clamp(max=len(query_segments)) - 1
        ends = keys.cumsum(0)
        first_token, end_token = (ends - keys)[query_segments[starts]], ends[query_segments[stops]]
        first = first_token // key_size
        count = torch.where(end_token > first_token, -(-end_token // key_size) - first, 0)
        offsets = _offsets(count)
        row = torch.arange(len(count), device="cpu").repeat_interleave(count)
        indices = torch.arange(len(row), device="cpu") - offsets[row] + first[row]
        rows = cls._from_rows(
            offsets[None, None],
            indices[None, None],
            -(-len(key_segments) // key_size),
            (query_size, key_size),
        )
        segments = {"query_segments": query_segments.int(), "key_segments": key_segments.int()}
        return cls(**{**_items(rows), **segments}).to(device)

    @classmethod
    def _from_rows(cls, offsets: Tensor, indices: Tensor, key_blocks: int, size: BlockSize) -> BlockList:
        query_size, key_size = _sizes(size)
        entries = torch.arange(indices.shape[-1], device=indices.device).expand(indices.shape).contiguous()
        offsets = offsets.long().contiguous()
        row = torch.searchsorted(offsets, entries, right=True) - 1
        column = indices.long().masked_fill(entries >= offsets[..., -1:], key_blocks)
        sorted_columns, order = column.sort(dim=-1, stable=True)
        edges = torch.arange(key_blocks + 1, device=indices.device).expand(*indices.shape[:-1], -1)
        inverse_offsets = torch.searchsorted(sorted_columns, edges.contiguous())
        lists = (offsets, indices, inverse_offsets, row.gather(-1, order))
        return cls(query_size, key_size, *(x.to(torch.int32).contiguous() for x in lists))

    @property
    def query_blocks(self) -> int:
        """How many blocks the queries have."""
        return self.offsets.shape[-1] - 1

    @property
    def key_blocks(self) -> int:
        """How many blocks the keys have."""
        return self.inverse_offsets.shape[-1] - 1

    @property
    def keep(self) -> float:
        """The listed fraction of all pairs of blocks; segments may hide part of it."""
        pairs = self.query_blocks * self.key_blocks
        return float(self.offsets[..., -1].double().mean()) / pairs if pairs else 0.0

    def to_mask(self) -> Tensor:
        """Return the pairs as a mask, bool [b, h, query blocks, key blocks]."""
        offsets, indices = self.offsets.long(), self.indices.long()
        entries = torch.arange(indices.shape[-1], device=indices.device).expand(indices.shape).contiguous()
        read = entries < offsets[..., -1:]
        row = torch.where(read, torch.searchsorted(offsets, entries, right=True) - 1, self.query_blocks)
        # What is not read goes to a row of its own, which is dropped.
        place = row * self.key_blocks + torch.where(read, indices, 0)
        shape = (*offsets.shape[:2], self.query_blocks + 1, self.key_blocks)
        mask = torch.zeros(shape, dtype=torch.bool, device=indices.device)
        return mask.flatten(2).scatter(-1, place, True).view(shape)[:, :, :-1]

    def to(self, device: torch.device | str) -> BlockList:
        """Return the lists on another device."""
        return BlockList(**{n: x.to(device) if isinstance(x, Tensor) else x for n, x in _items(self).items()})


def _items(blocks: BlockList) -> dict:
    return {field.name: getattr(blocks, field.name) for field in fields(blocks)}


def _offsets(count: Tensor) -> Tensor:
    """Where the rows begin: [.., rows] to [.., rows + 1]."""
    return torch.nn.functional.pad(count.cumsum(dim=-1), (1, 0))


def _sizes(size: BlockSize) -> tuple[int, int]:
    sizes = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sizes) != 2 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in sizes):
        raise ValueError(
            f"block_size must be a whole number of tokens, at least 1, or two of them, found {size!r}"
        )
    return index(sizes[0]), index(sizes[1])


def _check_rows(offsets: Tensor, indices: Tensor, key_blocks: int) -> None:
    if bool((offsets[..., 0] != 0).any() | (offsets.diff(dim=-1) < 0).any()):
        raise ValueError("offsets must begin with 0 and never fall")
    if bool((offsets[..., -1] > indices.shape[-1]).any()):
        raise ValueError(
            f"offsets must not exceed the {indices.shape[-1]} entries of indices, found {int(offsets.max())}"
        )
    entries = torch.arange(indices.shape[-1], device=indices.device).expand(indices.shape).contiguous()
    read = entries < offsets[..., -1:]
    if bool((read & ((indices < 0) | (indices >= key_blocks))).any()):
        wrong = indices[read & ((indices < 0) | (indices >= key_blocks))][0]
        raise ValueError(
            f"indices must be between 0 and key_blocks - 1 = {key_blocks - 1}, found {int(wrong)}"
        )
    row = torch.searchsorted(offsets.long().contiguous(), entries, right=True)
    pair = torch.where(read, row * key_blocks + indices, -1 - entries).sort(dim=-1).values
    if bool((pair.diff(dim=-1) == 0).any()):
        raise ValueError("indices must not list a key block twice for one query block")


# A program exported with lists among its inputs takes them apart into tensors.
torch.export.register_dataclass(BlockList, serialized_type_name="zoo.BlockList")
