"""Backbones with every operation forced into Triton against the definitions, features and gradients."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo import ops

SMALLEST = ("agent_digits", "biformer_digits", "dat_digits", "davit_digits", "nat_digits")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_backbone_computes_the_same_through_triton(name):
    model = zoo.create_model(name).double().eval()
    image = torch.randn(1, 3, 20, 24, dtype=torch.float64)
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            out = model(image)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9)
