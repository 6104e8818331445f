"""Operations as published, which the benchmarks compare with: they compute the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from zoo import ops

BENCH = Path(__file__).resolve().parents[3] / "scripts" / "bench"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module("published")


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("topk", [1, 3])
def test_gathering_regions_is_the_reference(published, topk):
    q, k, v = random(3, 2, 6, 6, 2, 8)
    routes = torch.rand(2, 9, 9).argsort(-1)[..., :topk]
    expected = ops.bilevel_routing_attention(q, k, v, routes, 3, backend="reference")
    torch.testing.assert_close(published.gather_regions(q, k, v, routes, 3), expected)


def test_windows_channels_and_agents_are_the_reference(published):
    q, k, v = random(3, 2, 6, 9, 2, 8)
    bias = random(2, 9, 9)
    expected = ops.window_attention(q, k, v, 3, bias=bias, backend="reference")
    torch.testing.assert_close(published.attend_in_windows(q, k, v, 3, bias=bias), expected)

    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    expected = ops.channel_attention(q, k, v, scale=0.2, backend="reference")
    torch.testing.assert_close(published.attend_between_channels(q, k, v, scale=0.2), expected)

    agents, biases = random(2, 5, 2, 8), {"bias_in": random(1, 2, 5, 54), "bias_out": random(1, 2, 54, 5)}
    expected = ops.agent_attention(q, k, v, agents, **biases, backend="reference")
    torch.testing.assert_close(published.attend_through_agents(q, k, v, agents, **biases), expected)


def test_attention_to_samples_is_the_reference(published):
    (q, k, v), table = (random(2, 5, 6, 4, 8), *random(2, 2, 7, 4, 8)), random(4, 9, 11)
    positions = torch.rand(2, 2, 7, 2, dtype=torch.float64) * 2 - 1
    expected = ops.deformable_attention(q, k, v, positions, table, backend="reference")
    torch.testing.assert_close(published.attend_to_samples(q, k, v, positions, table), expected)
