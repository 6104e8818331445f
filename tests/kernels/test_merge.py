"""Attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch

from zoo import ops
from zoo.ops import BlockList


def attend(q, k, v):
    blocks = BlockList.from_mask(torch.ones(1, 1).bool(), block_size=64)
    return ops.block_sparse_attention(q, k, v, blocks, return_lse=True)


@pytest.mark.parametrize("cuts", [[10], [4, 6], [1, 2, 7]])
def test_joined_parts_are_the_whole(cuts):
    q = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 10, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parts = [attend(q, a, b) for a, b in zip(k.split(cuts, 1), v.split(cuts, 1), strict=True)]
    whole = attend(q, k, v)
    joined = ops.merge_attentions(*zip(*parts, strict=True))
    for fast, truth in zip(joined, whole, strict=True):
        torch.testing.assert_close(fast, truth)
    for fast, truth in zip(
        torch.autograd.grad(joined[0].sin().sum() + joined[1].sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad(whole[0].sin().sum() + whole[1].sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(fast, truth)


def test_parts_that_see_nothing_have_no_weight_and_finite_gradients():
    out = torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[-math.inf, 1.0], [-math.inf, -math.inf]], dtype=torch.float64)[..., None]
    lse = lse[:, :, None].expand(2, 2, 3, 1).contiguous().requires_grad_()  # [part, image, token, head]
    joined, total = ops.merge_attentions([out, out * 2], list(lse))
    assert (joined[0] == 0).all() and (total[0] == -math.inf).all()
    torch.testing.assert_close(joined[1], out[1])
    for x in torch.autograd.grad(joined.sum(), (out, lse)):
        assert x.isfinite().all()


def test_low_precision_outputs_keep_their_dtype():
    out, lse = torch.randn(1, 3, 2, 4).bfloat16(), torch.randn(1, 3, 2)
    joined, total = ops.merge_attentions([out, out], [lse, lse])
    assert (joined.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(joined, out)
    torch.testing.assert_close(total, lse + math.log(2))


def test_parts_that_do_not_fit_are_refused():
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match="found 2 and 1"):
        ops.merge_attentions([out, out], [lse])
    with pytest.raises(ValueError, match=r"part 1 must have .* found \(1, 2, 2, 4\) and \(1, 3, 2\)"):
        ops.merge_attentions([out, out[:, :2]], [lse, lse])


def test_what_stands_in_an_output_that_saw_nothing_is_not_read():
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2)
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    joined, total = ops.merge_attentions(*zip((out, lse), nothing, strict=True))
    torch.testing.assert_close(joined, out)
    torch.testing.assert_close(total, lse)


def test_parts_may_be_stacked_and_must_be_floating_numbers():
    out, lse = torch.randn(2, 1, 3, 2, 4), torch.randn(2, 1, 3, 2)
    torch.testing.assert_close(ops.merge_attentions(out, lse), ops.merge_attentions([*out], [*lse]))
    with pytest.raises(ValueError, match=r"outputs\[0\] must be float64.* found torch.int32"):
        ops.merge_attentions(out.int(), lse)
