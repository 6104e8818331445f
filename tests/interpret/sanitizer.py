"""What neither a GPU nor Triton's interpreter reports: reads and writes outside tensors, and two programs
that write one address. For interpreted kernels."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A lane that is not masked lies outside every tensor of the launch."""


class Race(AssertionError):
    """Two programs wrote one address, or one read what another had written."""


class Sanitizer:
    """Watches every launch between `install` and the end of the test."""

    def __init__(self) -> None:
        self.launches = 0
        self._ranges: list[tuple[int, int]] = []
        self._written: dict[tuple, list[np.ndarray]] = defaultdict(list)
        self._changed: set[int] = set()  # numbers of ranges

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap what the interpreter calls for a load, a store, an atomic addition and a launch."""
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
        atomic = builder.create_atomic_rmw

        def checked_load(inner, pointers, mask, *rest, **options):
            addresses = self._inside(pointers, mask.data, "load")
            self._not_of_others(addresses, inner.grid_idx)
            return load(inner, pointers, mask, *rest, **options)

        def checked_store(inner, pointers, value, mask, *rest, **options):
            addresses = self._inside(pointers, mask.data, "store")
            self._written[inner.grid_idx].append(addresses)
            return store(inner, pointers, value, mask, *rest, **options)

        def checked_atomic(inner, operation, pointers, value, mask, *rest, **options):
            self._inside(pointers, mask.data, "atomic")
            return atomic(inner, operation, pointers, value, mask, *rest, **options)

        def checked_run(executor_, *arguments, **options):
            self.launches += 1
            self._ranges, self._written, self._changed = [], defaultdict(list), set()
            self._add((*arguments, *options.values()))
            run(executor_, *arguments, **options)
            each = [np.unique(np.concatenate(stores)) for stores in self._written.values()]
            every = np.concatenate(each) if each else np.empty(0)
            if np.unique(every).size < every.size:
                raise Race(f"{every.size - np.unique(every).size} addresses written by several programs")

        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(builder, "create_atomic_rmw", checked_atomic)
        patch.setattr(executor, "__call__", checked_run)

    def _add(self, argument: object) -> None:
        if isinstance(argument, tuple):
            for part in argument:
                self._add(part)
        elif isinstance(argument, torch.Tensor):
            storage = argument.untyped_storage()
            both_ends = (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
            if both_ends not in self._ranges:  # views of one memory are one
                self._ranges.append(both_ends)

    def _not_of_others(self, lanes: np.ndarray, program: tuple) -> None:
        """Programs run one after the other here and in any order on a GPU. A program may read what it wrote
        itself; what earlier ones wrote it must not, and most read nothing that the launch writes."""
        ranges = [self._ranges[number] for number in self._changed]
        if not any(((lanes >= begin) & (lanes < end)).any() for begin, end in ranges):
            return
        others = [x for writer, stores in self._written.items() if writer != program for x in stores]
        if others and (seen := np.isin(lanes, np.concatenate(others))).any():
            raise Race(f"{seen.sum()} addresses read that another program wrote")

    def _inside(self, pointers, mask: np.ndarray, what: str) -> np.ndarray:
        lanes, mask = np.broadcast_arrays(pointers.data, mask)
        lanes = lanes[mask.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        good = np.zeros(lanes.shape, dtype=bool)
        for number, (begin, end) in enumerate(self._ranges):
            within = (lanes >= begin) & (lanes + size <= end)
            if what != "load" and within.any():
                self._changed.add(number)
            good |= within
        if not good.all():
            raise OutOfBounds(f"{what}: {(~good).sum()} of {lanes.size} lanes outside every tensor")
        return lanes


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter twice as fast: every call of a jit function prepares triton.language again, which
    the launch, or the first call from another file, has done already."""
    prepared = set()

    def call(function, *arguments, **options):
        if id(function.fn.__globals__) not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(id(function.fn.__globals__))
        return function.rewrite()(*arguments, **options)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)


def poison(patch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated without values with NaN: a result that is not written shows."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    spoil = lambda x: x.fill_(float("nan")) if x.is_floating_point() and type(x) is torch.Tensor else x  # noqa: E731
    patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(empty(*a, **k)))
    patch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))


def mend_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 numbers; give it their values."""
    dot = interpreter.InterpreterBuilder.create_dot

    def values(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended(inner, a, b, *rest):
        return dot(inner, values(a), values(b), *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", mended)
