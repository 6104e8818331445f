"""Tiny diffusers pipelines with random weights, one for every supported model: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

TEXT = 7


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


@dataclass(frozen=True, eq=False)
class Tiny:
    """How to build a model, the arguments of its forward and of its pipeline, and where its tokens lie.

    `small`, `large`, `odd` and `single` (one frame or one row) are (frames, rows, columns) or (rows, columns)
    in tokens; `text` counts the text tokens of joint attention and `text_last` says where they are.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    pipe: Callable[..., Any]
    prompt: Callable[[], dict[str, Any]]
    size: Callable[..., dict[str, int]]
    small: tuple[int, ...] = (5, 4, 4)
    large: tuple[int, ...] = (3, 4, 6)
    odd: tuple[int, ...] = (4, 3, 5)
    single: tuple[int, ...] = (1, 3, 5)
    text: int = 0
    text_last: bool = False
    guidance: dict[str, Any] = field(default_factory=dict)  # what makes the pipeline use guidance

    def __repr__(self) -> str:
        return self.name

    def generate(
        self, pipe: Any, grid: tuple[int, ...] | None = None, *, steps: int = 4, **kwargs: Any
    ) -> Tensor:
        """Latents of one generation from a fixed seed and prompt."""
        pipe.set_progress_bar_config(disable=True)
        arguments = {**self.prompt(), **self.size(*(grid or self.small)), **kwargs}
        return pipe(
            **arguments,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            return_dict=False,
        )[0]


def embeds(width: int, name: str = "prompt_embeds", text: int = TEXT) -> dict[str, Tensor]:
    """A prompt and a negative one."""
    return {name: noise(1, text, width), f"negative_{name}": noise(1, text, width, seed=1)}


def masks(name: str = "prompt_attention_mask", *, kept: int = TEXT - 2) -> dict[str, Tensor]:
    """The last tokens of both prompts are padding, more of them in the negative one."""
    positions = torch.arange(TEXT)[None]
    return {name: positions < kept, f"negative_{name}": positions < kept - 2}


def finish(model: nn.Module, **attributes: Any) -> nn.Module:
    """Give weights that start at zero or one a value, so that nothing is switched off."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            value = noise(*parameter.shape, seed=number)
            if "norm_q" in name or "norm_k" in name:
                parameter.copy_(1 + 0.2 * value)
            elif "pos_frequencies" in name:
                parameter.copy_(0.3 * value)
            elif parameter.abs().max() == 0:
                parameter.copy_(0.1 * value)
    return model.eval()


# Wan -------------------------------------------------------------------------------------------------------


def build_wan(layers: int = 2, width: int = 12) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return finish(
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=width, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=32, ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
        )
    )  # fmt: skip


def video_inputs(
    grid: tuple[int, ...],
    patch: tuple[int, ...],
    channels: int,
    text_width: int,
    *,
    batch: int,
    timestep: float,
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, channels, *(n * p for n, p in zip(grid, patch, strict=True))),
        "encoder_hidden_states": noise(batch, TEXT, text_width, seed=1),
        "timestep": torch.full((batch,), timestep),
        "return_dict": False,
    }


def wan_inputs(
    grid: tuple[int, ...] = (3, 4, 4), *, batch: int = 2, timestep: float = 900.0
) -> dict[str, Any]:
    return video_inputs(grid, (1, 2, 2), 4, 16, batch=batch, timestep=timestep)


def wan_pipe(layers: int = 2, *, two: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=build_wan(layers), transformer_2=build_wan(layers + 1) if two else None,
        boundary_ratio=0.875 if two else None,
    )  # fmt: skip


def video_size(
    frames: int, rows: int, columns: int, *, pixels: int = 16, per_frame: int = 4
) -> dict[str, int]:
    return {"num_frames": (frames - 1) * per_frame + 1, "height": rows * pixels, "width": columns * pixels}


# HunyuanVideo ----------------------------------------------------------------------------------------------


def build_hunyuan(layers: int = 1) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    return finish(
        HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=layers,
            num_single_layers=layers, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
            pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), guidance_embeds=True,
        )
    )  # fmt: skip


def hunyuan_inputs(
    grid: tuple[int, ...] = (3, 4, 4), *, batch: int = 2, timestep: float = 900.0, padded: bool = True
) -> dict[str, Any]:
    kept = torch.tensor([TEXT - 2 * (i + 1) * padded for i in range(batch)])
    return {
        **video_inputs(grid, (1, 2, 2), 4, 16, batch=batch, timestep=timestep),
        "encoder_attention_mask": torch.arange(TEXT) < kept[:, None],
        "pooled_projections": noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan_pipe(layers: int = 1) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    return HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=build_hunyuan(layers),
    )  # fmt: skip


def hunyuan_prompt() -> dict[str, Any]:
    return {
        **embeds(16),
        **masks(),
        "pooled_prompt_embeds": noise(1, 8),
        "negative_pooled_prompt_embeds": noise(1, 8),
    }


# Mochi -----------------------------------------------------------------------------------------------------


def build_mochi(layers: int = 2) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    return finish(
        MochiTransformer3DModel(
            in_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=layers,
            pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=16, max_sequence_length=TEXT,
        )
    )  # fmt: skip


def mochi_inputs(
    grid: tuple[int, ...] = (3, 4, 4), *, batch: int = 2, timestep: float = 900.0, padded: bool = True
) -> dict[str, Any]:
    kept = torch.tensor([TEXT - 2 * (i + 1) * padded for i in range(batch)])
    return {
        # This model's time runs the other way.
        **video_inputs(grid, (1, 2, 2), 4, 16, batch=batch, timestep=1000 - timestep),
        "encoder_attention_mask": torch.arange(TEXT) < kept[:, None],
    }


def mochi_pipe(layers: int = 2) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None, text_encoder=None,
        tokenizer=None, transformer=build_mochi(layers),
    )  # fmt: skip


# CogVideoX -------------------------------------------------------------------------------------------------


def build_cogvideox(layers: int = 2, *, rotary: bool = True) -> nn.Module:
    """Positions are rotary, as in the model of 5 B parameters, or added to the tokens, as in that of 2 B."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return finish(
        CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=layers, sample_width=12, sample_height=8, sample_frames=17,
            patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=rotary,
        )
    )  # fmt: skip


def cogvideox_inputs(
    grid: tuple[int, ...] = (3, 4, 4), *, batch: int = 2, timestep: float = 900.0, rotary: bool = True
) -> dict[str, Any]:
    arguments = video_inputs(grid, (1, 2, 2), 4, 16, batch=batch, timestep=timestep)
    angles = 3 * noise(grid[0] * grid[1] * grid[2], 8).repeat_interleave(2, dim=1)
    return {
        **arguments,
        "hidden_states": arguments["hidden_states"].transpose(1, 2),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rotary else None,
    }


def cogvideox_pipe(layers: int = 2, *, rotary: bool = True) -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=build_cogvideox(layers, rotary=rotary),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


# LTX -------------------------------------------------------------------------------------------------------


def build_ltx(layers: int = 2) -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    return finish(
        LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=layers, caption_channels=16,
        )
    )  # fmt: skip


def ltx_inputs(
    grid: tuple[int, ...] = (3, 4, 4), *, batch: int = 2, timestep: float = 900.0
) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames * height * width, 4),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": torch.arange(TEXT)[None].repeat(batch, 1) < TEXT - 2,
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def ltx_pipe(layers: int = 2) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=build_ltx(layers),
    )  # fmt: skip


# Stable Diffusion 3 ----------------------------------------------------------------------------------------


def build_sd3(layers: int = 2, *, dual: bool = False) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return finish(
        SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=layers,
            attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
            pooled_projection_dim=8, pos_embed_max_size=16, dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
    )  # fmt: skip


def sd3_inputs(grid: tuple[int, ...] = (5, 6), *, batch: int = 2, timestep: float = 900.0) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "pooled_projections": noise(batch, 8),
        "timestep": torch.full((batch,), timestep),
        "return_dict": False,
    }


def sd3_pipe(layers: int = 2, *, dual: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    nothing = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    )
    return StableDiffusion3Pipeline(
        **nothing, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=build_sd3(layers, dual=dual)
    )


def pooled_prompt() -> dict[str, Any]:
    return {**embeds(16), "pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8)}


def image_size(rows: int, columns: int) -> dict[str, int]:
    return {"height": rows * 16, "width": columns * 16}


# PixArt ----------------------------------------------------------------------------------------------------


def build_pixart(layers: int = 2) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return finish(
        PixArtTransformer2DModel(
            sample_size=16, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=layers, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        )
    )  # fmt: skip


def pixart_inputs(
    grid: tuple[int, ...] = (5, 6), *, batch: int = 2, timestep: float = 900.0
) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "encoder_attention_mask": torch.arange(TEXT)[None].repeat(batch, 1) < TEXT - 2,
        "timestep": torch.full((batch,), timestep),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def pixart_pipe(layers: int = 2) -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=build_pixart(layers),
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip


# Qwen-Image ------------------------------------------------------------------------------------------------


def build_qwen(layers: int = 2) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return finish(
        QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def qwen_inputs(
    grid: tuple[int, ...] = (5, 6), *, batch: int = 2, timestep: float = 0.9, padded: bool = True
) -> dict[str, Any]:
    timestep = timestep / 1000 if timestep > 1 else timestep
    kept = torch.tensor([TEXT - 2 * (i + 1) * padded for i in range(batch)])
    return {
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "encoder_hidden_states_mask": torch.arange(TEXT) < kept[:, None],
        "timestep": torch.full((batch,), timestep),
        "img_shapes": [[(1, *grid)]] * batch,
        "return_dict": False,
    }


def qwen_pipe(layers: int = 2) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=build_qwen(layers),
    )  # fmt: skip


# Flux ------------------------------------------------------------------------------------------------------


def build_flux(layers: int = 1, **config: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return finish(
        FluxTransformer2DModel(
            in_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
            **config,
        )
    )  # fmt: skip


def flux_inputs(grid: tuple[int, ...] = (5, 6), *, batch: int = 2, timestep: float = 0.9) -> dict[str, Any]:
    ids = torch.zeros(*grid, 3)
    ids[..., 1], ids[..., 2] = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    return {
        "hidden_states": noise(batch, grid[0] * grid[1], 4),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "pooled_projections": noise(batch, 8),
        "timestep": torch.full((batch,), timestep / 1000 if timestep > 1 else timestep),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def conditioned_inputs(
    grid: tuple[int, int] = (3, 4),
    lengths: tuple[int, ...] = (12, 5),
    timestep: float = 0.9,
    batch: int = 2,
) -> dict[str, Any]:
    """An image and conditions of so many tokens after it; the image is another one at every step."""
    inputs = flux_inputs(grid, batch=batch, timestep=timestep)
    parts = [noise(*inputs["hidden_states"].shape, seed=int(100 * timestep))]
    ids = [inputs["img_ids"]]
    for number, length in enumerate(lengths, start=1):
        parts.append(noise(batch, length, 4, seed=number))
        place = torch.arange(length)
        ids.append(torch.stack([torch.full((length,), number), place // 4, place % 4], dim=-1).float())
    return {**inputs, "hidden_states": torch.cat(parts, dim=1), "img_ids": torch.cat(ids)}


def flux_pipe(layers: int = 1) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    return FluxPipeline(
        **nothing, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=build_flux(layers)
    )


# Stable Diffusion ------------------------------------------------------------------------------------------


def build_unet(layers: int = 1, *, xl: bool = False, **config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    down = ["DownBlock2D" if xl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D" if xl else "CrossAttnUpBlock2D"]
    more = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 8 + 6 * 8, "transformer_layers_per_block": (1, 2, 1),
    } if xl else {}  # fmt: skip
    return finish(
        UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=layers,
            block_out_channels=(8, 16, 16), norm_num_groups=4, down_block_types=down, up_block_types=up,
            cross_attention_dim=16, **{"attention_head_dim": 2, **more, **config},
        )
    )  # fmt: skip


def unet_inputs(
    grid: tuple[int, ...] = (16, 12), *, batch: int = 2, timestep: float = 900.0, xl: bool = False
) -> dict[str, Any]:
    more = {"text_embeds": noise(batch, 8), "time_ids": noise(batch, 6)}
    return {
        "sample": noise(batch, 4, *grid),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=1),
        "return_dict": False,
        **({"added_cond_kwargs": more} if xl else {}),
    }


def sd_pipe(layers: int = 1, *, xl: bool = False, **config: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    nothing = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    parts = {
        **nothing,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "unet": build_unet(layers, xl=xl, **config),
    }
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)


WAN = Tiny(
    "wan", build_wan, wan_inputs, wan_pipe, lambda: embeds(16), video_size, guidance={"guidance_scale": 3.0}
)
WAN22 = Tiny(
    "wan22", build_wan, wan_inputs, lambda layers=2: wan_pipe(layers, two=True), lambda: embeds(16),
    video_size, guidance={"guidance_scale": 3.0},
)  # fmt: skip
HUNYUAN = Tiny(
    "hunyuan", build_hunyuan, hunyuan_inputs, hunyuan_pipe, hunyuan_prompt, video_size, text=TEXT,
    text_last=True, guidance={"true_cfg_scale": 3.0},
)  # fmt: skip
MOCHI = Tiny(
    "mochi", build_mochi, mochi_inputs, mochi_pipe, lambda: {**embeds(16), **masks()},
    lambda *grid: video_size(*grid, per_frame=6), text=TEXT, text_last=True, guidance={"guidance_scale": 3.0},
)  # fmt: skip
COGVIDEOX = Tiny(
    "cogvideox", build_cogvideox, cogvideox_inputs, cogvideox_pipe, lambda: embeds(16), video_size, text=TEXT,
    guidance={"guidance_scale": 3.0},
)  # fmt: skip
COGVIDEOX_2B = Tiny(
    "cogvideox-2b", lambda layers=2: build_cogvideox(layers, rotary=False),
    lambda *args, **kwargs: cogvideox_inputs(*args, **kwargs, rotary=False),
    lambda layers=2: cogvideox_pipe(layers, rotary=False), lambda: embeds(16), video_size,
    text=TEXT, guidance={"guidance_scale": 3.0},
)  # fmt: skip
LTX = Tiny(
    "ltx", build_ltx, ltx_inputs, ltx_pipe, lambda: {**embeds(16), **masks()},
    lambda *grid: video_size(*grid, pixels=32, per_frame=8), guidance={"guidance_scale": 3.0},
)  # fmt: skip

IMAGE = {"small": (5, 6), "large": (7, 4), "odd": (3, 7), "single": (1, 9)}
SD3 = Tiny(
    "sd3", build_sd3, sd3_inputs, sd3_pipe, pooled_prompt, image_size, **IMAGE, text=TEXT, text_last=True,
    guidance={"guidance_scale": 3.0},
)  # fmt: skip
SD35 = Tiny(
    "sd35", lambda layers=2: build_sd3(layers, dual=True), sd3_inputs,
    lambda layers=2: sd3_pipe(layers, dual=True), pooled_prompt, image_size, **IMAGE, text=TEXT,
    text_last=True, guidance={"guidance_scale": 3.0},
)  # fmt: skip
QWEN = Tiny(
    "qwen", build_qwen, qwen_inputs, qwen_pipe,
    lambda: {**embeds(16), **masks("prompt_embeds_mask")}, image_size, **IMAGE, text=TEXT,
    guidance={"true_cfg_scale": 3.0},
)  # fmt: skip
FLUX = Tiny(
    "flux", build_flux, flux_inputs, flux_pipe, pooled_prompt, image_size, **IMAGE, text=TEXT,
    guidance={"true_cfg_scale": 3.0},
)  # fmt: skip
PIXART = Tiny(
    "pixart", build_pixart, pixart_inputs, pixart_pipe,
    lambda: {**embeds(16), **masks(), "prompt": None, "negative_prompt": None,
             "use_resolution_binning": False},
    image_size, **IMAGE, guidance={"guidance_scale": 3.0},
)  # fmt: skip

SD15 = Tiny(
    "sd15", build_unet, unet_inputs, sd_pipe, lambda: embeds(16),
    lambda rows, columns: {"height": 8 * rows, "width": 8 * columns}, small=(16, 12), large=(8, 16),
    guidance={"guidance_scale": 3.0},
)  # fmt: skip
OF_SD21 = {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (1, 2, 2)}
SD21 = Tiny(
    "sd21", lambda layers=1: build_unet(layers, **OF_SD21), unet_inputs,
    lambda layers=1: sd_pipe(layers, **OF_SD21), lambda: embeds(16),
    lambda rows, columns: {"height": 8 * rows, "width": 8 * columns}, small=(16, 12), large=(8, 16),
    guidance={"guidance_scale": 3.0},
)  # fmt: skip
SDXL = Tiny(
    "sdxl", lambda layers=1: build_unet(layers, xl=True),
    lambda *args, **kwargs: unet_inputs(*args, **kwargs, xl=True), lambda layers=1: sd_pipe(layers, xl=True),
    pooled_prompt, lambda rows, columns: {"height": 8 * rows, "width": 8 * columns}, small=(16, 12),
    large=(8, 16), guidance={"guidance_scale": 3.0},
)  # fmt: skip

VIDEOS = (WAN, WAN22, HUNYUAN, MOCHI, COGVIDEOX, COGVIDEOX_2B, LTX)
IMAGES = (FLUX, SD3, SD35, QWEN, PIXART)


def train_lora(
    model: nn.Module, modules: list[str], predict: Callable[[], Tensor], *, steps: int = 12
) -> None:
    """Add an adapter and let it bring the prediction nearer to a fixed one; nothing else changes."""
    from peft import LoraConfig

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # An alpha equal to the rank, which is what a file without one stands for.
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.01), []
    for _ in range(steps):
        found = predict()
        loss = (found - noise(*found.shape, seed=3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())


@contextmanager
def masked_sdpa(mask_of: Callable[[int, int], Tensor | None]) -> Iterator[None]:
    """Put a mask under every attention of the stock processors: `mask_of(queries, keys)`, None for none."""
    original = functional.scaled_dot_product_attention

    def masked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        extra = mask_of(query.shape[-2], key.shape[-2])
        if extra is not None:
            attn_mask = extra if attn_mask is None else extra & attn_mask
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", masked):
        yield
