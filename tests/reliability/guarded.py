"""Tensors between pages that nobody may touch, and tensors that reach beyond 2**31 numbers.

Run by test_e_addresses.py with TRITON_INTERPRET=1, in a process of its own: what reads or writes outside its
tensors ends it by a signal.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from interpret.sanitizer import hasten
from test_e_operations import CASES, call
from torch import Tensor

from zoo.kernels.configs import Config
from zoo.kernels.dispatch import OPERATIONS
from zoo.kernels.tile import launch

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
NORESERVE = 0x4000  # of Linux: pages that are not touched need no memory
NOTHING = 0  # no access
FAR = 2**31 + 64  # numbers apart
# Beside what the cases hold.
BIASES = {
    "agent_attention": {"bias_in": (2, 2, 5)},
    "neighborhood_attention": {"rpb": (2, 5, 5)},
    "window_attention": {"bias": (2, 9, 9)},
}


def pages(size: int) -> int:
    """Return the address of so many bytes of untouched memory; they are never given back."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    address = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no {size} bytes of address space")
    return address


def over(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """A tensor of so many numbers at an address."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """A tensor that begins right after a forbidden page or ends right before one."""
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    inside = -(-max(size, 1) // PAGE) * PAGE
    begin = pages(inside + 2 * PAGE)
    for forbidden in (begin, begin + PAGE + inside):
        if LIBC.mprotect(forbidden, PAGE, NOTHING):
            raise OSError(ctypes.get_errno(), "mprotect")
    return over(begin + PAGE + (inside - size if at_end else 0), count, dtype).view(shape)


def far(x: Tensor, axis: int) -> Tensor:
    """The same numbers, the first and the last along an axis more than 2**31 numbers apart."""
    if x.shape[axis] == 1:
        return x
    apart = -(-FAR // (x.shape[axis] - 1))
    strides = list(x.contiguous().stride())
    strides[axis] = apart
    reach = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, strides, strict=True))
    y = over(pages(reach * x.element_size()), reach, x.dtype).as_strided(x.shape, strides)
    return y.copy_(x)


@contextmanager
def allocating(at_end: bool) -> Iterator[None]:
    """What the launchers allocate lies between forbidden pages too, and is NaN until it is written."""

    original = torch.Tensor.new_empty

    def new_empty(x: Tensor, *shape: object, dtype: torch.dtype | None = None, **rest: object) -> Tensor:
        if rest:  # the interpreter's own
            return original(x, *shape, dtype=dtype, **rest)
        shape = shape if isinstance(shape[0], int) else shape[0]
        return guarded(tuple(shape), dtype or x.dtype, at_end).fill_(float("nan"))

    def empty_like(x: Tensor, memory_format: object = None) -> Tensor:
        return guarded(tuple(x.shape), x.dtype, at_end).fill_(float("nan"))

    with (
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield


def everything(op: str, leaves: dict[str, Tensor], backend: str, grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = call(op, leaves, backend)
    return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]


def check(op: str) -> None:
    """The operation at both ends of its memory and beyond 2**31, against the definition."""
    torch.manual_seed(0)
    inputs = CASES[op].inputs()
    inputs |= {name: torch.randn(shape) for name, shape in BIASES.get(op, {}).items()}
    grad = torch.randn_like(call(op, inputs, "reference"))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    expected = everything(op, leaves, "reference", grad)
    places: dict[str, Callable[[Tensor], Tensor]] = {
        "first page": lambda x: guarded(tuple(x.shape), x.dtype, False).copy_(x),
        "last page": lambda x: guarded(tuple(x.shape), x.dtype, True).copy_(x),
        "images far apart": lambda x: far(x, 0),
        "tokens far apart": lambda x: far(x, 1) if x.ndim > 2 else x,
    }
    for name, place in places.items():
        moved = {key: place(x.detach()).requires_grad_() for key, x in leaves.items()}
        with allocating(name == "last page") if "page" in name else nullcontext():
            found = everything(op, moved, "triton", place(grad))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        print(f"{op}, {name}", flush=True)


if __name__ == "__main__":
    hasten(pytest.MonkeyPatch())
    launch.choose = lambda *key: Config(16, 16, 4, 1)
    for operation, backends in OPERATIONS.items():
        if any(backend.name == "triton" for backend in backends):
            check(operation)
