"""What a row of logits gives that sees nothing, or has no digits left."""

import pytest
import torch

from zoo import ops
from zoo.kernels.dispatch import OPERATIONS
from zoo.kernels.softmax import softmax

HUGE = -1e9  # float32 numbers of this size are 64 apart: the logarithm of a number of keys is lost


def test_a_row_that_sees_nothing_weighs_nothing_and_has_finite_gradients():
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[1] = float("-inf")
    logits.requires_grad_()
    weights, lse = softmax(logits)
    torch.testing.assert_close(weights[[0, 2]], logits[[0, 2]].softmax(-1))
    torch.testing.assert_close(lse[[0, 2]], logits[[0, 2]].logsumexp(-1))
    assert not weights[1].any() and lse[1] == float("-inf")
    (weights.square().sum() + lse[[0, 2]].sum()).backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


def test_a_row_of_no_keys_sees_nothing():
    weights, lse = softmax(torch.empty(2, 0))
    assert weights.shape == (2, 0) and lse.tolist() == [float("-inf")] * 2


def biased(op: str):
    """The operation with every key behind the same huge bias: that is the mean of the values."""
    whole = ops.BlockList.from_mask(torch.ones(1, 1, dtype=torch.bool), block_size=49)
    bias = torch.full((2, 49, 49), HUGE)
    return {
        "block_sparse_attention": lambda *x, **how: ops.block_sparse_attention(
            *(y.flatten(1, 2) for y in x), whole, bias=bias, **how
        ),
        "deformable_attention": lambda q, k, v, **how: ops.deformable_attention(
            q, k.flatten(1, 2), v.flatten(1, 2), bias=bias, **how
        ),
        "neighborhood_attention": lambda *x, **how: ops.neighborhood_attention(
            *x, 7, rpb=torch.full((2, 13, 13), HUGE), **how
        ),
        "window_attention": lambda *x, **how: ops.window_attention(*x, 7, bias=bias, **how),
    }[op]


CASES = [
    (op, backend.name)
    for op in ("block_sparse_attention", "deformable_attention", "neighborhood_attention", "window_attention")
    for backend in OPERATIONS[op]
    if not backend.only_by_name and backend.missing() is None
]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_huge_bias_of_all_keys_is_their_mean(op, backend):
    q, k, v = (torch.randn(2, 7, 7, 2, 16) for _ in range(3))
    out = biased(op)(q, k, v, backend=backend)
    mean = v.mean((1, 2), keepdim=True).expand_as(v)
    torch.testing.assert_close(out.reshape(v.shape), mean, rtol=1e-5, atol=1e-6)
