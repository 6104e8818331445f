"""Let the Triton backends run on a machine without a GPU up to the launch, which only compiles.

Public operations run as users run them, on CPU tensors; what they would launch is compiled for the
architecture of `NoDevice`. One process for each architecture: Triton caches kernels by device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from zoo import ops  # noqa: F401  fills the tables of backends
from zoo.kernels import dispatch


class NoDevice:
    """Answers what Triton asks a driver before a launch."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that nothing is sent to."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        """Return a type's name for a launcher that is never built."""
        return name


def compile_for(architecture: str) -> None:
    """Let this process compile for an architecture, once for good."""
    driver.set_active(NoDevice(architecture))
    if not architecture.startswith("sm_"):
        torch.version.hip = "none"  # the launchers ask PyTorch whose GPU it is


@contextmanager
def compiling(only: str | None = None) -> Iterator[list[tuple[str, dict, object]]]:
    """Turn every launch into a compilation; the list receives (kernel, launch options, what was compiled)."""
    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        name = self.fn.__name__.removesuffix("_kernel")
        if only in (None, name):
            compiled.append((name, options, run(self, *args, grid=grid, warmup=True, **options)))

    with mock.patch.object(triton.JITFunction, "run", compile_only):
        yield compiled


@contextmanager
def on_a_device() -> Iterator[None]:
    """Let operations run Triton, whatever its backends would say of a machine without a GPU."""
    tables = {
        op: tuple(
            replace(backend, missing=lambda: None, why_not=lambda call: None)
            for backend in table
            if backend.name == "triton"
        )
        for op, table in dispatch.OPERATIONS.items()
    }
    with mock.patch.dict(dispatch.OPERATIONS, tables):
        yield
