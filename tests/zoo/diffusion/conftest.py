"""Tiny diffusers models with random weights, built from a config: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")


def build_flux(layers: int = 2, single_layers: int = 2) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model.eval()


def build_inputs(
    grid: tuple[int, int] = (6, 7), *, text: int = 5, batch: int = 2, timestep: float = 1.0
) -> dict:
    rows, columns = grid
    generator = torch.Generator().manual_seed(rows * columns + text)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return {
        "hidden_states": torch.randn(batch, rows * columns, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def build_pipe() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build_flux(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, *, steps: int = 4, height: int = 16, width: int = 12, **kwargs: Any) -> torch.Tensor:
    """Latents of one generation from a fixed seed and prompt."""
    generator = torch.Generator().manual_seed(1)
    prompt = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "prompt_embeds": (1, 5, 32),
            "pooled_prompt_embeds": (1, 32),
            "negative_prompt_embeds": (1, 5, 32),
            "negative_pooled_prompt_embeds": (1, 32),
        }.items()
    }
    return pipe(
        **prompt,
        **kwargs,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        return_dict=False,
    )[0]


@pytest.fixture
def make_flux() -> Callable[[], torch.nn.Module]:
    return build_flux


@pytest.fixture
def flux() -> torch.nn.Module:
    return build_flux()


@pytest.fixture
def inputs() -> Callable[..., dict]:
    return build_inputs


@pytest.fixture
def make_pipe() -> Callable[[], Any]:
    return build_pipe


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    return generate
