"""What the processors must know about each diffusion transformer: one row of `ADAPTERS` per model class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from zoo.diffusion.layout import TokenLayout
from zoo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One supported transformer class.

    `methods` are the techniques it can take; `stock` are the processors that may be replaced (others, such as
    an IP-Adapter's, have effects of their own); `axes` counts the axes of its token grid. `layers` names the
    joint attention modules in the order they run; `layout` reads the geometry from the arguments of forward;
    `project` returns query, key and value of the joint sequence, [B, N, H, D], after norm and rotary
    embedding; `output` turns the result, [B, N, C], into what the model's own processor returns.
    """

    model: type[nn.Module]
    methods: frozenset[str]
    stock: tuple[type, ...]
    axes: int
    layers: Callable[[nn.Module], dict[str, nn.Module]]
    layout: Callable[[Mapping[str, Any]], TokenLayout]
    project: Callable[[nn.Module, Tensor, Tensor | None, Any], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[nn.Module, Tensor, Tensor | None], Any]


# Flux ----------------------------------------------------------------------------------------------------


def flux_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Double stream blocks, then single stream blocks."""
    return {
        f"{stack}.{index}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(transformer, stack))
    }


def flux_layout(arguments: Mapping[str, Any]) -> TokenLayout:
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
    return TokenLayout(text=arguments["encoder_hidden_states"].shape[1], grid=(len(ids) // columns, columns))


def flux_project(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None, rotary: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the modules, never their weights, so that LoRA, quantisation and offloading keep working."""

    def project(x: Tensor, fused: nn.Module | None, parts: Sequence[nn.Module]) -> list[Tensor]:
        projected = [part(x) for part in parts] if fused is None else fused(x).chunk(3, dim=-1)
        return [y.unflatten(-1, (-1, attn.head_dim)) for y in projected]  # [B, N, H, D]

    fused = attn.to_qkv if attn.fused_projections else None
    query, key, value = project(hidden_states, fused, (attn.to_q, attn.to_k, attn.to_v))
    query, key = attn.norm_q(query), attn.norm_k(key)

    # A single stream block gets text and image as one sequence already.
    if encoder_hidden_states is not None:
        fused = attn.to_added_qkv if attn.fused_projections else None
        parts = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = project(encoder_hidden_states, fused, parts)
        query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
        value = torch.cat([text_value, value], dim=1)

    if rotary is not None:
        query = apply_rotary_emb(query, rotary, sequence_dim=1)
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
    return query, key, value


def flux_output(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Any:
    """Split text and image again; a single stream block projects the output itself, together with its MLP."""
    if encoder_hidden_states is None:
        return hidden_states
    text = encoder_hidden_states.shape[1]
    linear, dropout = attn.to_out
    image = dropout(linear(hidden_states[:, text:].contiguous()))
    return image, attn.to_add_out(hidden_states[:, :text].contiguous())


ADAPTERS = (
    Adapter(
        model=FluxTransformer2DModel,
        methods=frozenset({"neighborhood"}),
        stock=(FluxAttnProcessor,),
        axes=2,
        layers=flux_layers,
        layout=flux_layout,
        project=flux_project,
        output=flux_output,
    ),
)
