"""Every custom operator of the package keeps what it promises to PyTorch: schema, fake, autograd."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.kernels.dispatch import OPERATIONS

sys.path.append(str(Path(__file__).resolve().parents[1] / "reliability"))
from test_e_operations import CASES, call, compare_in_a_row  # noqa: E402

# Beside what the cases hold, and gradients of biases come from kernels of their own.
BIASES = {
    "agent_attention": {"bias_in": (2, 2, 5)},
    "block_sparse_attention": {"bias": (2, 6, 6)},
    "neighborhood_attention": {"rpb": (2, 5, 5)},
    "window_attention": {"bias": (2, 9, 9)},
}
WITH_TRITON = [op for op, table in OPERATIONS.items() if any(b.name == "triton" for b in table)]


class Calls(TorchDispatchMode):
    """The calls of our operators under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[object, tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "zoo":
            copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.found[str(func)] = (func, tuple(copies), kwargs or {})
        return func(*args, **(kwargs or {}))


@cache
def calls(op: str) -> dict[str, tuple[object, tuple]]:
    """What the operation calls of ours, forward and backward, by name."""
    tensors = CASES[op].inputs()
    tensors |= {name: torch.randn(shape) for name, shape in BIASES.get(op, {}).items()}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with Calls() as recorded:
        out = call(op, leaves, "triton")
        torch.autograd.grad(out.sum(), list(leaves.values()), materialize_grads=True)
    return recorded.found


@pytest.mark.parametrize("op", WITH_TRITON)
def test_its_operators_pass_the_checks_of_pytorch(op, small_tiles):
    found = calls(op)
    assert any("backward" in name for name in found), found.keys()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for function, arguments, options in found.values():
        torch.library.opcheck(function, arguments, options, test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize("op", WITH_TRITON)
def test_gradients_are_those_of_finite_differences(op, small_tiles):
    tensors = CASES[op].inputs(torch.float64, B=1, H=1, D=4)
    leaves = tuple(x.requires_grad_() for x in tensors.values())
    run = lambda *leaves: call(op, dict(zip(tensors, leaves, strict=True)), "triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", WITH_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_widths_and_lengths_are_within_the_contract(op, dtype):
    # Weights are cast for their products.
    slack = 0.0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    # Whole windows stay in registers, so their heads are narrow.
    for length, width, keys in ((17, 33, 5), (2, 10, 97), (5, 59, 1)):
        width = min(width, 31) if op == "window_attention" else width
        compare_in_a_row(op, "triton", dtype, (length, width, keys), slack)


@pytest.mark.slow
@pytest.mark.parametrize("op", WITH_TRITON)
@given(length=st.integers(1, 20), width=st.integers(1, 20), keys=st.integers(1, 20))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size_is_exact(op, length, width, keys, small_tiles):
    compare_in_a_row(op, "triton", torch.float64, (length, width, keys))


def test_no_operator_is_left_out():
    found = {name.removesuffix(".default").replace(".", "::") for op in WITH_TRITON for name in calls(op)}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoo::")}
    assert registered <= found
