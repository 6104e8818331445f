"""Any hierarchical body under any attention: the zoo's modules in the place of a model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn

from zoo.attention import (
    AgentAttention,
    BilevelRoutingAttention,
    ChannelAttention,
    DeformableAttention,
    GlobalAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from zoo.errors import ConfigError, below_one, did_you_mean
from zoo.layers.backbone import Backbone, init_as_published
from zoo.rows import fitted


@dataclass(frozen=True)
class Place:
    """Where an attention module stands: its width, its map at the model's own input size, its position."""

    dim: int
    num_heads: int
    size: tuple[int, int]  # rows and columns of the map
    stage: int
    index: int  # among the attention modules of its stage
    number: int  # among those of the model


# What a mechanism puts in a place: the class, and the arguments that follow from the place and those given.
Choice = tuple[type[nn.Module], dict[str, Any]]


def _of_stage(place: Place, published: tuple[int, ...]) -> int:
    """The number that the mechanism's own models have in this stage; later stages are as the last."""
    return published[min(place.stage, len(published) - 1)]


def _neighborhood(place: Place, given: Mapping[str, Any]) -> Choice:
    # A neighborhood wider than the map would be padded to its width.
    return NeighborhoodAttention, {"kernel_size": max(3, min(7, (min(place.size) - 1) // 2 * 2 + 1))}


def _window(place: Place, given: Mapping[str, Any]) -> Choice:
    """Windows of 7 tokens, every second block shifted by half of one, as in Swin."""
    size = given.get("window_size", 7)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    shift = tuple(side // 2 for side in sides) if place.index % 2 else 0
    return WindowAttention, {"shift": shift, "clamp_window": True}


def _dual(place: Place, given: Mapping[str, Any]) -> Choice:
    """Windows and channels in turn, as in DaViT; channels have no order for a positional bias to follow."""
    if place.number % 2:
        return ChannelAttention, {}
    return WindowAttention, {"rel_pos_bias": False}


def _bilevel(place: Place, given: Mapping[str, Any]) -> Choice:
    """BiFormer's numbers of regions attended; as many regions as divide the map, at most 7 a side."""
    sides = [n for n in range(2, 8) if not any(side % n for side in place.size)]
    n_win = given.get("n_win", sides[-1] if sides else min(7, *place.size))
    return BilevelRoutingAttention, {"n_win": n_win, "topk": min(_of_stage(place, (1, 4, 16, 49)), n_win**2)}


def _deformable(place: Place, given: Mapping[str, Any]) -> Choice:
    """DAT++'s strides, smaller where fewer than two keys a side would be left."""
    stride = given.get("stride", _of_stage(place, (8, 4, 2, 1)))
    while "stride" not in given and stride > 1 and min(place.size) <= stride:
        stride //= 2
    kernel_size = {8: 9, 4: 7, 2: 5, 1: 3}.get(stride, stride + 1 + stride % 2)  # odd, and more than it
    return DeformableAttention, {"stride": stride, "kernel_size": kernel_size, "map_size": place.size}


def _agent(place: Place, given: Mapping[str, Any]) -> Choice:
    """Agent-Swin's numbers of agents, at most as many as the map has tokens."""
    side = min(_of_stage(place, (3, 4, 7)), *place.size)
    return AgentAttention, {"agent_num": side**2, "map_size": place.size}


def _global(place: Place, given: Mapping[str, Any]) -> Choice:
    return GlobalAttention, {}


MECHANISMS: dict[str, tuple[tuple[type[nn.Module], ...], Callable[[Place, Mapping[str, Any]], Choice]]] = {
    "neighborhood": ((NeighborhoodAttention,), _neighborhood),
    "bilevel": ((BilevelRoutingAttention,), _bilevel),
    "deformable": ((DeformableAttention,), _deformable),
    "agent": ((AgentAttention,), _agent),
    "window": ((WindowAttention,), _window),
    "dual": ((WindowAttention, ChannelAttention), _dual),
    "global": ((GlobalAttention,), _global),
}


def swap_attention(
    model: nn.Module, attention: str, attention_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Replace every attention module of a hierarchical model by a new one of another mechanism, in place.

    Widths, head counts and `proj_drop` stay; everything else is the mechanism's, or `attention_kwargs`, where
    a list holds one value for each stage. The new modules are initialised, whatever weights the model had.
    Raises: ConfigError for an unknown mechanism or argument, and for a model that has no stages of falling
    resolution.
    """
    if not isinstance(attention, str) or attention not in MECHANISMS:
        near = did_you_mean(str(attention), MECHANISMS)
        raise ConfigError(f"unknown attention {attention!r}; use {', '.join(MECHANISMS)}{near}")
    classes, choose = MECHANISMS[attention]
    if not isinstance(attention_kwargs, Mapping | None):
        raise ConfigError(f"attention_kwargs must be a dictionary of arguments, found {attention_kwargs!r}")
    given = dict(attention_kwargs or {})
    allowed = {name: hint for kind in classes for name, hint in _arguments(kind).items()}
    for name in given:
        if name not in allowed:
            raise ConfigError(
                f"unknown argument {name!r} in attention_kwargs of {attention!r}; "
                f"use {', '.join(sorted(allowed))}{did_you_mean(name, allowed)}"
            )
    stages = len(model.feature_info) if isinstance(model, Backbone) else 0
    for name, value in given.items():
        if isinstance(value, list) and len(value) != stages:
            raise ConfigError(
                f"attention_kwargs {name!r} must have one value for each of {stages} stages, "
                f"found {len(value)}"
            )
        values = value if isinstance(value, list) else [value]
        if allowed[name] is not None:
            inside = f" in attention_kwargs of {attention!r}"
            values = [fitted(name, one, allowed[name], inside) for one in values]
        if name == "proj_drop":
            for rate in values:
                below_one(proj_drop=rate)
        given[name] = values if isinstance(value, list) else values[0]
    for place, owner, name in list(_places(model, attention)):
        own = {k: v[place.stage] if isinstance(v, list) else v for k, v in given.items()}
        kind, defaults = choose(place, own)
        known = _arguments(kind)
        old = owner.get_submodule(name)
        parameter = next(old.parameters())
        keeps = "proj_drop" in known and hasattr(old, "proj_drop")
        kept = {"proj_drop": old.proj_drop.p} if keeps else {}
        new = kind(
            place.dim,
            place.num_heads,
            **kept | defaults | {k: v for k, v in own.items() if k in known},
            device=parameter.device,
            dtype=parameter.dtype,
        )
        new.apply(init_as_published)
        # Where a block and its attention are one module, the block says what is left of it without.
        owner.set_submodule(name, old.with_attention(new) if hasattr(old, "with_attention") else new)
    model.as_published = False


def _places(model: nn.Module, attention: str) -> Iterator[tuple[Place, nn.Module, str]]:
    """Every place of a model with the stage that owns it and the module's name there."""
    reductions = [stage["reduction"] for stage in model.feature_info] if isinstance(model, Backbone) else []
    if len(set(reductions)) < 2:
        raise ConfigError(
            f"attention={attention!r} needs a model whose stages fall in resolution; "
            f"{type(model).__name__} has one resolution throughout"
        )
    height, width = model.default_cfg["input_size"][-2:]
    number = 0
    for i, stage in enumerate(model.stages_):
        size = (-(-height // reductions[i]), -(-width // reductions[i]))
        sites = [name for name, module in stage.named_modules() if hasattr(module, "attention_weights")]
        for index, name in enumerate(sites):
            old = stage.get_submodule(name)
            yield Place(old.dim, old.num_heads, size, i, index, number), stage, name
            number += 1


def _arguments(kind: type[nn.Module]) -> dict[str, Any]:
    """What a mechanism's module takes beside its place, and of which type (None where it does not say)."""
    # A map has no class token.
    place = {"self", "dim", "num_heads", "class_token", "device", "dtype"}
    hints = get_type_hints(kind.__init__)
    names = inspect.signature(kind.__init__).parameters.keys() - place
    return {name: hints.get(name) for name in names}
