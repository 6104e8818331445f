"""Which backend computes an operation: what every operation shares.

An operation lists its backends, fastest first. `auto` takes the first that can run the call, but for peers
that are there to compare with; a named backend is obeyed or refused with its reason, never replaced. The
choice is made once per call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from zoo.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation; both functions take the operation's checked call."""

    name: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None]  # why it cannot run this call, None where it can
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine at all
    configuration: Callable[[Any], str] = lambda call: ""  # how it would run this call
    only_by_name: bool = False  # auto never takes it


@dataclass(frozen=True)
class Explanation:
    """The backend an operation would use for a call, how, and why not the faster ones."""

    op: str
    backend: str
    configuration: str
    reason: str


@dataclass(frozen=True)
class Availability:
    """One backend of one operation and why it cannot run here (None: it can)."""

    op: str
    backend: str
    reason: str | None


OPERATIONS: dict[str, tuple[Backend, ...]] = {}  # filled by every op.py, fastest backend first

_here = threading.local()  # torch.compile heeds it; of a ContextVar torch 2.11 makes no graph


def current_backend() -> str:
    """Return what `auto` stands for here; hand it to `use_backend` where work is repeated later."""
    return getattr(_here, "backend", "auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let `backend="auto"` mean `name` inside the block, in this thread only.

    Raises: ValueError when no operation has a backend of that name.
    """
    names = ["auto", *dict.fromkeys(backend.name for table in OPERATIONS.values() for backend in table)]
    if name not in names:
        raise ConfigError(f"unknown backend {name!r}; use {', '.join(names)}{did_you_mean(str(name), names)}")
    before = getattr(_here, "backend", None)
    _here.backend = name
    try:
        yield
    finally:
        if before is None:
            del _here.backend  # what was compiled without it is compiled for this
        else:
            _here.backend = before


def resolve(op: str, requested: str, call: Any) -> tuple[Backend, str]:
    """Choose the backend for a call and say why.

    Raises: ValueError for a name the operation does not have; RuntimeError when a named backend cannot run
    it.
    """
    table = OPERATIONS[op]
    name = current_backend() if requested == "auto" else requested
    refusals = []
    if name == "auto":
        for backend in table:
            if backend.only_by_name:
                continue
            reason = backend.missing() or backend.why_not(call)
            if reason is None:
                return backend, "; ".join(refusals) or "the fastest that can run"
            refusals.append(f"{backend.name} cannot: {reason}")
        raise RuntimeError(f"no backend of {op} can run this call: {'; '.join(refusals)}")
    for backend in table:
        if backend.name == name:
            reason = backend.missing() or backend.why_not(call)
            if reason is None:
                return backend, "asked for by name"
            others = [b for b in table if not b.only_by_name]
            able = [b.name for b in others if b.missing() is None and b.why_not(call) is None]
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}; use {' or '.join(able)}")
    names = ["auto", *(backend.name for backend in table)]
    raise ConfigError(f"{op} has no backend {name!r}; use {', '.join(names)}{did_you_mean(str(name), names)}")


def why_not_opaque() -> str | None:
    """Say why an operator that PyTorch cannot look into would be wrong here: it has a backward rule only."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is at work"
    return why_not_fused()  # a custom operator drops the tangents without a word


def why_not_fused() -> str | None:
    """Say why PyTorch's fused attention cannot run here: it knows no forward-mode differentiation."""
    return "forward-mode differentiation is at work" if forward_ad._current_level >= 0 else None


def backends() -> list[Availability]:
    """List every backend of every operation and, where it cannot run on this machine, why."""
    return [
        Availability(op, backend.name, backend.missing())
        for op, table in OPERATIONS.items()
        for backend in table
    ]
