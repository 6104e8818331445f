"""Backbones with every operation forced into Triton against the definitions, features and gradients."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo import ops
from zoo.models.dit import DiT
from zoo.models.mmdit import MMDiT
from zoo.models.video_dit import VideoDiT

SMALLEST = ("agent_digits", "biformer_digits", "dat_digits", "davit_digits", "nat_digits")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_backbone_computes_the_same_through_triton(name):
    model = zoo.create_model(name).double().eval()
    same_through_triton(model, torch.randn(1, 3, 20, 24, dtype=torch.float64))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


class WithConditions(MMDiT):
    """Beside a map at the image's places and one elsewhere."""

    def forward(self, *inputs):
        latents = inputs[0]
        return super().forward(
            *inputs, spatial=[latents.flip(-1)], subjects=[latents[..., :4, :4]], paa_radius=1
        )


TINY = {"depth": 1, "hidden_size": 24, "num_heads": 2, "in_channels": 2}
TEXT_MASK = torch.tensor([[True, True, True, False, False]])
TRANSFORMERS = {
    "dit": lambda: (DiT(**TINY), (random(1, 2, 8, 8), torch.ones(1), torch.tensor([1]))),
    **{
        name: lambda build=build: (
            build(**TINY, text_dim=6, pooled_dim=5),
            (random(1, 2, 8, 8), torch.ones(1), random(1, 5, 6), random(1, 5)),
        )
        for name, build in {"mmdit": MMDiT, "mmdit with conditions": WithConditions}.items()
    },
    **{
        f"video_dit, {attention}": lambda attention=attention, kwargs=kwargs: (
            VideoDiT(**TINY, text_dim=6, attention=attention, attention_kwargs=kwargs),
            (random(1, 2, 3, 8, 8), torch.ones(1), random(1, 5, 6), TEXT_MASK),
        )
        for attention, kwargs in {
            "global": {}, "neighborhood": {"kernel_size": 3}, "radial": {"block_size": 16}
        }.items()
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_diffusion_transformer_computes_the_same_through_triton(name):
    model, inputs = TRANSFORMERS[name]()
    for parameter in model.parameters():  # as made, they predict zero
        torch.nn.init.normal_(parameter, std=0.3)
    same_through_triton(model.double().eval(), *inputs)


def same_through_triton(model, *inputs):
    """Output and the gradients of all parameters."""
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            out = model(*inputs)
            leaves = list(model.parameters())
            grads = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
            results.append([out, *grads])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9)
