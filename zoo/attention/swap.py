"""Any hierarchical body under any attention: the zoo's modules in the place of a model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.attention.neighborhood import NeighborhoodAttention
from zoo.errors import ConfigError, did_you_mean
from zoo.layers.backbone import Backbone, init_as_published


@dataclass(frozen=True)
class Place:
    """Where an attention module stands: its width, its map at the model's own input size, its position."""

    dim: int
    num_heads: int
    size: tuple[int, int]  # rows and columns of the map
    stage: int
    index: int  # among the attention modules of its stage


# What a mechanism puts in a place: the class, and the arguments that follow from the place.
Choice = tuple[type[nn.Module], dict[str, Any]]


def _neighborhood(place: Place) -> Choice:
    return NeighborhoodAttention, {}


MECHANISMS: dict[str, tuple[tuple[type[nn.Module], ...], Callable[[Place], Choice]]] = {
    "neighborhood": ((NeighborhoodAttention,), _neighborhood),
}


def swap_attention(
    model: nn.Module, attention: str, attention_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Replace every attention module of a hierarchical model by a new one of another mechanism, in place.

    Widths and head counts stay; everything else is the mechanism's, or `attention_kwargs`, where a list
    holds one value for each stage. The new modules are initialised, whatever weights the model had.
    Raises: ConfigError for an unknown mechanism or argument, and for a model that has no stages of falling
    resolution.
    """
    if attention not in MECHANISMS:
        near = did_you_mean(str(attention), MECHANISMS)
        raise ConfigError(f"unknown attention {attention!r}; use {', '.join(MECHANISMS)}{near}")
    classes, choose = MECHANISMS[attention]
    arguments = dict(attention_kwargs or {})
    allowed = {name for kind in classes for name in _arguments(kind)}
    for name in arguments:
        if name not in allowed:
            raise ConfigError(
                f"unknown argument {name!r} in attention_kwargs of {attention!r}; "
                f"use {', '.join(sorted(allowed))}{did_you_mean(name, allowed)}"
            )
    reductions = [stage["reduction"] for stage in model.feature_info] if isinstance(model, Backbone) else []
    if len(set(reductions)) < 2:
        raise ConfigError(
            f"attention={attention!r} needs a model whose stages fall in resolution; "
            f"{type(model).__name__} has one resolution throughout"
        )
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) != len(reductions):
            raise ConfigError(
                f"attention_kwargs {name!r} must have one value for each of {len(reductions)} stages, "
                f"found {len(value)}"
            )
    height, width = model.default_cfg["input_size"][-2:]
    for i, stage in enumerate(model.stages_):
        size = (-(-height // reductions[i]), -(-width // reductions[i]))
        own = {k: v[i] if isinstance(v, list) else v for k, v in arguments.items()}
        sites = [name for name, module in stage.named_modules() if hasattr(module, "attention_weights")]
        for index, name in enumerate(sites):
            old = stage.get_submodule(name)
            kind, defaults = choose(Place(old.dim, old.num_heads, size, i, index))
            known = _arguments(kind)
            parameter = next(old.parameters())
            new = kind(
                old.dim,
                old.num_heads,
                **defaults | {k: v for k, v in own.items() if k in known},
                device=parameter.device,
                dtype=parameter.dtype,
            )
            stage.set_submodule(name, new.apply(init_as_published))


def _arguments(kind: type[nn.Module]) -> set[str]:
    """What a mechanism's module takes beside its place."""
    return set(inspect.signature(kind.__init__).parameters) - {"self", "dim", "num_heads", "device", "dtype"}
