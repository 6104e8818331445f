"""The watch itself: it sees what it is there for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpret.sanitizer import OutOfBounds, Race


@triton.jit
def copy(X, Y, N, T: tl.constexpr, MASKED: tl.constexpr, APART: tl.constexpr):
    o = tl.program_id(0) * T * APART + tl.arange(0, T)
    if MASKED:
        tl.store(Y + o, tl.load(X + o, mask=o < N), mask=o < N)
    else:
        tl.store(Y + o, tl.load(X + o), mask=o < N)


def test_a_good_kernel_passes(sanitizer):
    x, y = torch.randn(50), torch.zeros(50)
    copy[(4,)](x, y, 50, T=16, MASKED=True, APART=1)
    assert torch.equal(x, y)
    assert sanitizer.launches == 1


def test_a_lane_outside_is_seen():
    with pytest.raises(Exception, match="14 of 16 lanes outside") as caught:
        copy[(4,)](torch.randn(50), torch.zeros(50), 50, T=16, MASKED=False, APART=1)
    assert OutOfBounds.__name__ in repr(caught.value)


def test_two_programs_that_write_one_address_are_seen():
    with pytest.raises(Race, match="16 addresses"):
        copy[(2,)](torch.randn(50), torch.zeros(50), 50, T=16, MASKED=True, APART=0)


def test_what_is_not_written_is_nan():
    assert torch.zeros(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
