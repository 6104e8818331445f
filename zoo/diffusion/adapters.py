"""What the processors must know about each diffusion transformer: one row of `ADAPTERS` per model class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    JointAttnProcessor2_0,
    MochiAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as apply_rotary_emb_ltx
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layers.tokens import TokenLayout

QKV = tuple[Tensor, Tensor, Tensor]


def given_mask(attention_mask: Tensor | None, text_mask: Tensor | None, image: int) -> Tensor | None:
    """The mask as the model hands it to its processors."""
    return attention_mask


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One supported transformer class.

    `methods` are the techniques it can take; `stock` are the processors that may be replaced (others, such as
    an IP-Adapter's, have effects of their own); `axes` counts the axes of its token grid. `layers` names the
    joint attention modules in the order they run; `image_only` ends the names of those that see no text.
    `layout` reads the geometry from the arguments of forward, `text_mask` which text tokens [B, text] are no
    padding. `project` returns query, key and value of the joint sequence, [B, N, H, D], after norm and rotary
    embedding; `mask` what the model's own processor would mask them with; `output` turns the result,
    [B, N, C], into what that processor returns. `drops_padding`: padding has no queries either.
    `timestep_rises` from step to step. `rotary_name`: what the model's own processor calls the angles.
    `refused`: processors that no attention of the model may have, the cross-attentions included.
    """

    model: type[nn.Module]
    methods: frozenset[str]
    stock: tuple[type, ...]
    axes: int
    layers: Callable[[nn.Module], dict[str, nn.Module]]
    layout: Callable[[nn.Module, Mapping[str, Any]], TokenLayout]
    project: Callable[[nn.Module, Tensor, Tensor | None, Any], QKV]
    output: Callable[[nn.Module, Tensor, Tensor | None], Any]
    image_only: str | None = None
    text_mask: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    mask: Callable[[Tensor | None, Tensor | None, int], Tensor | None] = given_mask
    drops_padding: bool = False
    timestep_rises: bool = False
    rotary_name: str = "image_rotary_emb"
    refused: tuple[type, ...] = ()

    def __reduce__(self) -> tuple[Callable[..., Adapter], tuple[type[nn.Module]]]:
        """Pickle as a name: a row is the same object everywhere."""
        return adapter_of, (self.model,)


# Shared ----------------------------------------------------------------------------------------------------
# All call the modules, never their weights, so that LoRA, quantisation and offloading keep working.


def layers_of(*paths: str) -> Callable[[nn.Module], dict[str, nn.Module]]:
    """Name the attention modules at paths such as "blocks.attn1"; a block may lack one."""

    def layers(transformer: nn.Module) -> dict[str, nn.Module]:
        found = {}
        for stack in dict.fromkeys(path.split(".")[0] for path in paths):
            for index, block in enumerate(getattr(transformer, stack)):
                for path in paths:
                    name = path.split(".")[1]
                    if path.startswith(stack + ".") and getattr(block, name, None) is not None:
                        found[f"{stack}.{index}.{name}"] = getattr(block, name)
        return found

    return layers


def projections(attn: nn.Module, x: Tensor, *, added: bool = False, fusible: bool = True) -> list[Tensor]:
    """Query, key and value of one stream, [B, N, C]; `added`: by the projections of the text.

    `fusible`: whether the model's own processor heeds `fuse_qkv_projections`.
    """
    if fusible and getattr(attn, "fused_projections", False):
        return list((attn.to_added_qkv if added else attn.to_qkv)(x).chunk(3, dim=-1))
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    return [getattr(attn, name)(x) for name in names]


def stream(attn: nn.Module, x: Tensor, *, added: bool = False, fusible: bool = True) -> list[Tensor]:
    """Query, key and value of one stream, [B, N, H, D]; queries and keys normed over each head."""
    parts = projections(attn, x, added=added, fusible=fusible)
    # By their width, not their number: a tensor-parallel rank holds some of the heads.
    query, key, value = (part.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for part in parts)
    norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    query, key = (x if norm is None else norm(x) for norm, x in zip(norms, (query, key), strict=True))
    return [query, key, value]


def concatenate(first: Sequence[Tensor], second: Sequence[Tensor]) -> QKV:
    """Make one sequence of two."""
    query, key, value = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    return query, key, value


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighboring channels by an angle: rotary embedding as Wan and Mochi have it."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def project_out(attn: nn.Module, hidden_states: Tensor) -> Tensor:
    """Output projection of the image."""
    for module in attn.to_out:
        hidden_states = module(hidden_states)
    return hidden_states


def image_output(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    """Output of attention without text."""
    return project_out(attn, hidden_states)


def plain_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> QKV:
    """Nothing but tokens of one map, positions within them."""
    query, key, value = stream(attn, hidden_states)
    return query, key, value


def text_of(arguments: Mapping[str, Any]) -> int:
    """Text tokens of this call."""
    return arguments["encoder_hidden_states"].shape[1]


def text_mask_of(name: str) -> Callable[[Mapping[str, Any]], Tensor | None]:
    """Read the mask of the text from an argument of forward."""
    return lambda arguments: arguments.get(name)


# Flux ----------------------------------------------------------------------------------------------------


def flux_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Read rows and columns from `img_ids` [N, 3] (index, row, column), the text length from the prompt.

    Rows and columns are counted, not read off the largest id: bfloat16 pipelines round ids above 256.
    Raises ConfigError for ids that are not one row-major grid (a Kontext reference image is a second one).
    """
    ids = arguments["img_ids"]
    ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu()  # one synchronisation for all questions below
    index, row, column = ids.unbind(-1)
    columns = int((row == row[0]).sum())
    is_grid = len(ids) % columns == 0 and bool((index == index[0]).all())
    if is_grid:
        row, column = row.unflatten(0, (-1, columns)), column.unflatten(0, (-1, columns))
        counts = columns == 1 or bool(column[0, 0] != column[0, -1])
        is_grid = counts and bool((row == row[:, :1]).all() and (column == column[:1]).all())
    if not is_grid:
        raise ConfigError(
            f"img_ids must be one row-major grid of image tokens, found {len(ids)} ids of another order (a "
            "reference image beside the image?); remove the handle to run this pipeline"
        )
    return TokenLayout(text=text_of(arguments), grid=(len(ids) // columns, columns))


def flux_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> QKV:
    """Text first; a single stream block gets text and image as one sequence already."""
    query, key, value = stream(attn, hidden_states)
    if encoder_hidden_states is not None:
        query, key, value = concatenate(stream(attn, encoder_hidden_states, added=True), (query, key, value))
    if rotary is not None:
        query = apply_rotary_emb(query, rotary, sequence_dim=1)
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
    return query, key, value


def flux_output(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Any:
    """Split text and image again; a single stream block projects the output itself, together with its MLP."""
    if encoder_hidden_states is None:
        return hidden_states
    return text_first_output(attn, hidden_states, encoder_hidden_states)


def text_first_output(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Split text and image, each with an output projection of its own."""
    text = encoder_hidden_states.shape[1]
    image = project_out(attn, hidden_states[:, text:].contiguous())
    return image, attn.to_add_out(hidden_states[:, :text].contiguous())


# Stable Diffusion 3 ----------------------------------------------------------------------------------------


def patches_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, C, height, width] in square patches; no text among the tokens."""
    size = model.config.patch_size
    return TokenLayout(text=0, grid=tuple(n // size for n in arguments["hidden_states"].shape[-2:]))


def sd3_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents in square patches; the text follows the image."""
    return replace(patches_layout(model, arguments), text=text_of(arguments), text_last=True)


def sd3_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> QKV:
    """No rotary embedding; the second attention of a dual block has no text."""
    query, key, value = stream(attn, hidden_states)
    if encoder_hidden_states is None:
        return query, key, value
    return concatenate((query, key, value), stream(attn, encoder_hidden_states, added=True))


def sd3_output(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Any:
    """The last block projects no text."""
    if encoder_hidden_states is None:
        return project_out(attn, hidden_states)
    image = hidden_states.shape[1] - encoder_hidden_states.shape[1]
    text = hidden_states[:, image:]
    if not attn.context_pre_only:
        text = attn.to_add_out(text)
    return project_out(attn, hidden_states[:, :image]), text


# Qwen-Image ------------------------------------------------------------------------------------------------


def qwen_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Read rows and columns from `img_shapes`: for every sample, one (frames, rows, columns) per image."""
    shapes = arguments.get("img_shapes") or ()
    images = {
        tuple(shape) for sample in shapes for shape in (sample if isinstance(sample, list) else [sample])
    }
    grid = next(iter(images), None)
    count = sum(len(sample) if isinstance(sample, list) else 1 for sample in shapes)
    if len(images) != 1 or grid[0] != 1 or count > max(len(shapes), 1):
        raise ConfigError(
            f"img_shapes must hold one image (1, rows, columns) per sample, found {shapes} (a reference "
            "image beside the image?); remove the handle to run this pipeline"
        )
    return TokenLayout(text=text_of(arguments), grid=grid[1:])


def qwen_project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: Any) -> QKV:
    """Text first; complex rotary embeddings, one for the image and one for the text."""
    image = stream(attn, hidden_states, fusible=False)
    text = stream(attn, encoder_hidden_states, added=True, fusible=False)
    if rotary is not None:
        for parts, frequencies in zip((image, text), rotary, strict=True):
            parts[:2] = [apply_rotary_emb_qwen(x, frequencies, use_real=False) for x in parts[:2]]
    return concatenate(text, image)


def qwen_mask(attention_mask: Tensor | None, text_mask: Tensor | None, image: int) -> Tensor | None:
    """Image tokens are never padding; the model has no other mask."""
    if attention_mask is not None:
        raise ConfigError("Qwen-Image takes no attention_mask, found one; mask the prompt's tokens instead")
    if text_mask is None:
        return None
    visible = text_mask.new_ones(len(text_mask), image)
    return torch.cat([text_mask, visible], dim=1)[:, None, None]


# Videos ----------------------------------------------------------------------------------------------------


def wan_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches; text has an attention of its own."""
    sizes = zip(arguments["hidden_states"].shape[2:], model.config.patch_size, strict=True)
    return TokenLayout(text=0, grid=tuple(n // size for n, size in sizes))


def wan_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> QKV:
    """Norms over all heads; cosines and sines are stored twice, once for each channel of a pair."""
    query, key, value = projections(attn, hidden_states)
    query, key, value = (
        x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value)
    )
    if rotary is not None:
        cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
        query, key = (rotate_pairs(x, cos, sin).type_as(x) for x in (query, key))
    return query, key, value


def hunyuan_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, C, frames, height, width] in patches; the text follows the video."""
    config, (frames, height, width) = model.config, arguments["hidden_states"].shape[2:]
    grid = (frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)
    return TokenLayout(text=text_of(arguments), grid=grid, text_last=True)


def hunyuan_text_mask(arguments: Mapping[str, Any]) -> Tensor:
    """The model counts the ones of the mask and takes as many tokens from the front."""
    mask = arguments["encoder_attention_mask"]
    return torch.arange(mask.shape[1], device=mask.device) < mask.sum(dim=1, keepdim=True)


def hunyuan_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: Any
) -> QKV:
    """Single stream blocks share the projections of video and text; rotary for the video alone."""
    video = hidden_states.shape[1]
    is_single = attn.add_q_proj is None
    if is_single:
        hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    query, key, value = stream(attn, hidden_states, fusible=False)
    if rotary is not None:
        query, key = (
            torch.cat([apply_rotary_emb(x[:, :video], rotary, sequence_dim=1), x[:, video:]], dim=1)
            for x in (query, key)
        )
    if is_single:
        return query, key, value
    text = stream(attn, encoder_hidden_states, added=True, fusible=False)
    return concatenate((query, key, value), text)


def hunyuan_output(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """A single stream block projects the output itself."""
    video = hidden_states.shape[1] - encoder_hidden_states.shape[1]
    hidden_states, text = hidden_states[:, :video], hidden_states[:, video:]
    if getattr(attn, "to_out", None) is not None:
        hidden_states = project_out(attn, hidden_states)
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return hidden_states, text


def mochi_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, C, frames, height, width], patches in space; the text follows the video."""
    size, (frames, height, width) = model.config.patch_size, arguments["hidden_states"].shape[2:]
    return TokenLayout(text=text_of(arguments), grid=(frames, height // size, width // size), text_last=True)


def mochi_project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: Any) -> QKV:
    """Every head has angles of its own, [N, H, D / 2]."""
    query, key, value = stream(attn, hidden_states, fusible=False)
    text = stream(attn, encoder_hidden_states, added=True, fusible=False)
    if rotary is not None:
        query, key = (rotate_pairs(x.float(), *rotary).to(x.dtype) for x in (query, key))
    return concatenate((query, key, value), text)


def cogvideox_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, frames, C, height, width] in patches, the last one in time filled up."""
    config, (frames, _, height, width) = model.config, arguments["hidden_states"].shape[1:]
    grid = (
        -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size,
    )  # fmt: skip
    return TokenLayout(text=text_of(arguments), grid=grid)


def cogvideox_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: Any
) -> QKV:
    """Text first, under the projections of the video; rotary for the video alone."""
    text = encoder_hidden_states.shape[1]
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    query, key, value = stream(attn, joint)
    if rotary is not None:
        query, key = (
            torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], rotary, sequence_dim=1)], dim=1)
            for x in (query, key)
        )
    return query, key, value


def cogvideox_output(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """One output projection for both."""
    text = encoder_hidden_states.shape[1]
    hidden_states = project_out(attn, hidden_states)
    return hidden_states[:, text:], hidden_states[:, :text]


def ltx_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """The caller says how the packed tokens [B, N, C] lie."""
    grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    tokens = arguments["hidden_states"].shape[1]
    layout = TokenLayout(text=0, grid=grid) if None not in grid else None
    if layout is None or layout.image != tokens:
        raise ConfigError(
            f"num_frames, height and width must tell how {tokens} tokens lie, found {grid} (conditioning "
            "frames beside the video?); remove the handle to run this pipeline"
        )
    return layout


def ltx_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> QKV:
    """Norms and rotary over all heads at once."""
    query, key, value = projections(attn, hidden_states)
    query, key = attn.norm_q(query), attn.norm_k(key)
    if rotary is not None:
        query, key = apply_rotary_emb_ltx(query, rotary), apply_rotary_emb_ltx(key, rotary)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
    return query, key, value


# Stable Diffusion 1.5, 2.1 and XL --------------------------------------------------------------------------


def unet_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Self-attention on the way down, in the middle and on the way up."""
    return {
        f"{name}.attn1": module.attn1
        for name, module in unet.named_modules()
        if ".transformer_blocks." in name and hasattr(module, "attn1") and not module.only_cross_attention
    }


def downsampling(unet: nn.Module, name: str) -> int:
    """How many times coarser than the latents the map of a layer is."""
    stack, _, rest = name.partition(".")
    last = len(unet.down_blocks) - 1
    if stack == "mid_block":
        return 2**last
    index = int(rest.partition(".")[0])
    return 2 ** (index if stack == "down_blocks" else last - index)


def unet_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
    """Latents [B, C, height, width]: the finest map."""
    return TokenLayout(text=0, grid=tuple(arguments["sample"].shape[-2:]))


def adapter_of(model: type[nn.Module]) -> Adapter:
    """The row of a model class."""
    return next(adapter for adapter in ADAPTERS if adapter.model is model)


ADAPTERS = (
    Adapter(
        model=FluxTransformer2DModel,
        methods=frozenset({"neighborhood", "pka"}),
        stock=(FluxAttnProcessor,),
        axes=2,
        layers=layers_of("transformer_blocks.attn", "single_transformer_blocks.attn"),
        layout=flux_layout,
        project=flux_project,
        output=flux_output,
    ),
    Adapter(
        model=SD3Transformer2DModel,
        methods=frozenset({"neighborhood"}),
        stock=(JointAttnProcessor2_0, FusedJointAttnProcessor2_0),
        axes=2,
        layers=layers_of("transformer_blocks.attn", "transformer_blocks.attn2"),
        layout=sd3_layout,
        project=sd3_project,
        output=sd3_output,
        image_only=".attn2",
    ),
    Adapter(
        model=QwenImageTransformer2DModel,
        methods=frozenset({"neighborhood"}),
        stock=(QwenDoubleStreamAttnProcessor2_0,),
        axes=2,
        layers=layers_of("transformer_blocks.attn"),
        layout=qwen_layout,
        project=qwen_project,
        output=text_first_output,
        text_mask=text_mask_of("encoder_hidden_states_mask"),
        mask=qwen_mask,
    ),
    Adapter(
        model=PixArtTransformer2DModel,
        methods=frozenset({"neighborhood"}),
        stock=(AttnProcessor2_0, FusedAttnProcessor2_0),
        axes=2,
        layers=layers_of("transformer_blocks.attn1"),
        layout=patches_layout,
        project=plain_project,
        output=image_output,
    ),
    Adapter(
        model=WanTransformer3DModel,
        methods=frozenset({"neighborhood", "radial"}),
        stock=(WanAttnProcessor,),
        axes=3,
        layers=layers_of("blocks.attn1"),
        layout=wan_layout,
        project=wan_project,
        output=image_output,
        rotary_name="rotary_emb",
    ),
    Adapter(
        model=HunyuanVideoTransformer3DModel,
        methods=frozenset({"neighborhood", "radial"}),
        stock=(HunyuanVideoAttnProcessor2_0,),
        axes=3,
        layers=layers_of("transformer_blocks.attn", "single_transformer_blocks.attn"),
        layout=hunyuan_layout,
        project=hunyuan_project,
        output=hunyuan_output,
        text_mask=hunyuan_text_mask,
    ),
    Adapter(
        model=MochiTransformer3DModel,
        methods=frozenset({"neighborhood", "radial"}),
        stock=(MochiAttnProcessor2_0,),
        axes=3,
        layers=layers_of("transformer_blocks.attn1"),
        layout=mochi_layout,
        project=mochi_project,
        output=hunyuan_output,
        text_mask=text_mask_of("encoder_attention_mask"),
        drops_padding=True,
        timestep_rises=True,
    ),
    Adapter(
        model=CogVideoXTransformer3DModel,
        methods=frozenset({"neighborhood", "radial"}),
        stock=(CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0),
        axes=3,
        layers=layers_of("transformer_blocks.attn1"),
        layout=cogvideox_layout,
        project=cogvideox_project,
        output=cogvideox_output,
    ),
    Adapter(
        model=LTXVideoTransformer3DModel,
        methods=frozenset({"neighborhood", "radial"}),
        stock=(LTXVideoAttnProcessor,),
        axes=3,
        layers=layers_of("transformer_blocks.attn1"),
        layout=ltx_layout,
        project=ltx_project,
        output=image_output,
    ),
    Adapter(
        model=UNet2DConditionModel,
        methods=frozenset({"agent"}),
        stock=(AttnProcessor2_0, FusedAttnProcessor2_0),
        axes=2,
        layers=unet_layers,
        layout=unet_layout,
        project=plain_project,
        output=image_output,
        refused=(IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor),
    ),
)
