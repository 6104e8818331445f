"""Operations as published, which the benchmarks compare with: they compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from zoo import ops

BENCH = Path(__file__).resolve().parents[3] / "scripts" / "bench"


@pytest.mark.parametrize("topk", [1, 3])
def test_gathering_regions_is_the_reference(monkeypatch, topk):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    from published import gather_regions

    q, k, v = torch.randn(3, 2, 6, 6, 2, 8, dtype=torch.float64)
    routes = torch.rand(2, 9, 9).argsort(-1)[..., :topk]
    expected = ops.bilevel_routing_attention(q, k, v, routes, 3, backend="reference")
    torch.testing.assert_close(gather_regions(q, k, v, routes, 3), expected)
