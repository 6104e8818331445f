"""PyTorch's fused attention with keys made up to whole vectors: nothing but the time may tell."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from zoo import ops
from zoo.kernels.fused import VECTOR, fused_attention

NAME = "torch.nn.functional.scaled_dot_product_attention"
HIDDEN = float("-inf")


def inputs(queries=320, keys=9, *, dim=8, dtype=torch.float32):
    """q, k and v [B, H, N, D], as views of heads last, as operations hand them over."""
    return [torch.randn(2, n, 2, dim, dtype=dtype).transpose(1, 2) for n in (queries, keys, keys)]


def keys_that_pytorch_sees(q, k, v, bias):
    with mock.patch(NAME, wraps=F.scaled_dot_product_attention) as plain:
        fused_attention(q, k, v, bias, 0.3)
    return plain.call_args.args[1]


def hiding(shape):
    bias = torch.randn(shape)
    bias[..., 2] = HIDDEN
    return bias


BIASES = {
    "none": lambda q, k: None,
    "of all": lambda q, k: torch.randn(*q.shape[:3], k.shape[2]),
    "shared": lambda q, k: torch.randn(1, 1, q.shape[2], k.shape[2]),
    "of keys": lambda q, k: torch.randn(2, 1, 1, k.shape[2]),
    "hiding": lambda q, k: hiding((1, 2, q.shape[2], k.shape[2])),
    "bool": lambda q, k: torch.rand(2, 1, 1, k.shape[2]) < 0.7,
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("keys", [6, 9, 15, 77])
def test_values_and_gradients_are_those_of_the_keys_alone(keys, bias):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in inputs(320, keys))
    bias = BIASES[bias](q, k)
    assert keys_that_pytorch_sees(q, k, v, bias).shape[2] % VECTOR == 0
    out = fused_attention(q, k, v, bias, 0.3)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(out, plain)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = inputs()
    bias = torch.zeros(1, 1, q.shape[2], k.shape[2])
    bias[..., 5, :] = HIDDEN
    out = fused_attention(q, k, v, bias, 0.3)
    assert (out[:, :, 5] == 0).all() and (out[:, :, 6] != 0).all()


@pytest.mark.parametrize(
    ("queries", "keys", "dtype"),
    [
        (320, 16, torch.float32),  # whole vectors
        (320, 20, torch.float32),  # few beside them
        (30, 9, torch.float32),  # few queries: the copies would take longer
        (320, 9, torch.float64),  # of which the kernel takes the last ones as fast
    ],
)
def test_keys_stay_as_they_are_where_more_would_not_pay(queries, keys, dtype):
    q, k, v = inputs(queries, keys, dtype=dtype)
    assert keys_that_pytorch_sees(q, k, v, None) is k


@pytest.mark.parametrize("hide", [False, True])
def test_nine_agents_with_learned_biases_are_the_definition(hide):
    """Products along the queries where agents do not fill a vector; the other way where biases may hide."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 140, 2, 8, requires_grad=True) for _ in range(3))
    agents = torch.randn(2, 9, 2, 8, requires_grad=True)
    bias_in, bias_out = torch.randn(1, 2, 9, 140), torch.randn(1, 2, 140, 9)
    if hide:
        bias_out[..., 3, :] = HIDDEN
    leaves = [q, k, v, agents, bias_in.requires_grad_(), bias_out.requires_grad_()]
    results = []
    for backend in ("sdpa", "reference"):
        out = ops.agent_attention(*leaves[:4], bias_in=bias_in, bias_out=bias_out, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
