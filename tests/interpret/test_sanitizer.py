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


@triton.jit
def add(X, Y, N, T: tl.constexpr, MASKED: tl.constexpr):
    o = tl.program_id(0) * T + tl.arange(0, T)
    if MASKED:
        tl.atomic_add(Y + o, tl.load(X + o, mask=o < N, other=0.0), mask=o < N, sem="relaxed")
    else:
        tl.atomic_add(Y + o, 1.0, sem="relaxed")


def test_an_atomic_addition_outside_is_seen():
    x, y = torch.randn(50), torch.zeros(50)
    add[(4,)](x, y, 50, T=16, MASKED=True)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match="atomic: 14 of 16 lanes outside") as caught:
        add[(4,)](x, y, 50, T=16, MASKED=False)
    assert OutOfBounds.__name__ in repr(caught.value)


@triton.jit
def shifted(X, BACK: tl.constexpr, T: tl.constexpr):
    o = (tl.program_id(0) + 1) * T + tl.arange(0, T)
    tl.store(X + o, tl.load(X + o - BACK))


def test_a_program_that_reads_what_another_wrote_is_seen():
    shifted[(3,)](torch.randn(64), BACK=0, T=16)
    with pytest.raises(Exception, match="16 addresses read that another program wrote") as caught:
        shifted[(3,)](torch.randn(64), BACK=16, T=16)
    assert Race.__name__ in repr(caught.value)


def test_what_is_not_written_is_nan():
    assert torch.zeros(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
