"""Tile-sparse attention in Triton: one template for forward and backward, policies that say which tiles.

`kernels.py` knows tiles only; `policies.py` says where a tile lies, which tiles it meets and which pairs of
tokens are allowed; `launch.py` starts them. Importing any of the three imports Triton; this file does not: it
says whether they can run.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from zoo.kernels import dispatch

OLDEST = (3, 6)  # of Triton
WIDEST = 256  # channels of a head


# A tracer takes the answers as they are at that time: neither Triton nor a device comes or goes, and Triton
# itself looks at the environment once.
@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Say why no Triton kernel can run on this machine, None where one can."""
    return _missing()


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return _is_interpreted()


@cache  # a look at the environment, the packages and the devices takes longer than many a small call
def _missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:  # some builds come under another name, with PyTorch
        found = ""
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST:
        return f"triton {'.'.join(map(str, OLDEST))} or newer is needed, found {found}"
    if not (_interpreted() or torch.cuda.is_available()):
        return "no GPU that PyTorch can use; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests only"
    return None


@cache
def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Say why the template cannot take these tensors, None where it can."""
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads of more than {WIDEST} channels, found {max(q.shape[-1], v.shape[-1])}"
    return why_not_here(q)


def why_not_here(q: Tensor) -> str | None:
    """Say why no Triton kernel can take a tensor of this dtype where it is, None where one can."""
    wanted = "cpu" if _interpreted() else "cuda"
    if q.device.type != wanted:
        return f"the tensors are on {q.device}" + (", TRITON_INTERPRET=1 is set" if wanted == "cpu" else "")
    if wanted == "cuda" and q.dtype == torch.float64:
        return "float64 tensors"
    if wanted == "cpu" and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if wanted == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 0):
            return f"compute capability 8.0 or newer is needed, found {'.'.join(map(str, capability))}"
    return dispatch.why_not_opaque()
