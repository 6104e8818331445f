"""Window models of timm with our window attention in place: no parameter changes, and all is reversible."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.errors import ConfigError


class Acceleration:
    """What `accelerate` did to a model; usable as a `with` block, which undoes it at its end.

    changed: names of the modules that now compute with `zoo.ops.window_attention`. kept: names of those that
    could not be changed, with the reason.
    """

    def __init__(self, changed: dict[str, tuple[nn.Module, str]], kept: dict[str, str]) -> None:
        self._changed = changed
        self.kept = kept

    @classmethod
    def of(cls, model: nn.Module) -> Acceleration:
        """What is accelerated in a model, also in a copy of one, or in one that was loaded."""
        ways = {kind: method for kind, (method, _) in _ways().items()}
        modules = ((name, module, ways.get(type(module))) for name, module in model.named_modules())
        return cls({name: (module, way) for name, module, way in modules if way in module.__dict__}, {})

    @property
    def changed(self) -> list[str]:
        """Names of the modules that were changed."""
        return list(self._changed)

    def remove(self) -> None:
        """Give every module its own way to compute back; a second call does nothing."""
        for module, method in self._changed.values():
            module.__dict__.pop(method, None)
        self._changed = {}

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        kept = "".join(f"\n  {name} keeps its own: {reason}" for name, reason in self.kept.items())
        return f"{len(self._changed)} modules compute with zoo.ops.window_attention{kept}"


def accelerate(model: nn.Module) -> Acceleration:
    """Let the window attention of a timm model compute with `zoo.ops.window_attention`, in place.

    For Swin, Swin V2, MaxViT (block and grid), Twins-SVT and GCViT, or any model that holds their blocks (not
    Swin V2-CR and the parallel blocks of maxvit_*_pm, which are others). Outputs and gradients stay equal up
    to rounding, but for the places that `proj_drop` hits in training; the state dict is untouched, and a copy
    of the model made now is accelerated too (`Acceleration.of` it undoes that). Returns a handle that says
    what was changed and undoes it.

    Modules that drop attention weights at random keep their own way, and so does a shifted block on a map
    that its windows do not divide, call by call: timm pads such a map after the shift.
    Raises: ConfigError where nothing in the model can be changed.
    """
    ways = _ways()
    changed, kept = {}, {}
    for name, module in model.named_modules():
        if type(module) not in ways:
            continue
        method, _ = ways[type(module)]
        if method in module.__dict__:
            raise ConfigError(
                f"{name or type(module).__name__} is accelerated already; call remove() of its handle, which "
                "zoo.acceleration.Acceleration.of(model) finds"
            )
        dropout = getattr(module, "attn", module).attn_drop.p
        if dropout:
            kept[name] = f"attn_drop={dropout:g} drops attention weights, which the operation does not"
        else:
            changed[name] = (module, method)
    if not changed:
        reason = "; ".join(f"{name}: {why}" for name, why in kept.items()) or (
            "it holds no window attention of timm's Swin, Swin V2 (not V2-CR), MaxViT (not its parallel "
            "blocks), Twins-SVT or GCViT"
        )
        raise ConfigError(f"nothing in {type(model).__name__} can be accelerated: {reason}")
    for module, method in changed.values():
        # A bound method would be looked up in the class of the module when a pickled one is loaded.
        setattr(module, method, partial(ways[type(module)][1], module))
    return Acceleration(changed, kept)


def _ways() -> dict[type[nn.Module], tuple[str, Callable[..., Tensor]]]:
    """By class of timm: the method that is replaced, and by what."""
    from timm.models import gcvit, maxxvit, swin_transformer, swin_transformer_v2, twins

    return {
        swin_transformer.SwinTransformerBlock: ("_attn", _swin),
        swin_transformer_v2.SwinTransformerV2Block: ("_attn", _swin_v2),
        maxxvit.PartitionAttentionCl: ("_partition_attn", _maxvit),
        twins.LocallyGroupedAttn: ("forward", _twins),
        gcvit.GlobalContextVitBlock: ("_window_attn", _gcvit),
    }


def _output(attention: nn.Module, x: Tensor) -> Tensor:
    """[B, Y, X, H, D] to [B, Y, X, C]."""
    return attention.proj_drop(attention.proj(x.flatten(3)))


def _pad(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Zeros to the right of and below a map [B, Y, X, C], up to whole windows."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))


def _shifted(block: nn.Module, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """What a Swin block of either version does around its attention."""
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    height, width = x.shape[1:3]
    if any(shift) and (height % window[0] or width % window[1]):
        return type(block)._attn(block, x)
    out = attend(_pad(x, window), window, shift)
    return _output(block.attn, out)[:, :height, :width]


def _swin(block: nn.Module, x: Tensor) -> Tensor:
    attention = block.attn

    def attend(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
        bias = attention._get_rel_pos_bias()[0]
        return ops.window_attention(q, k, v, window, shift=shift, bias=bias, scale=attention.scale)

    return _shifted(block, x, attend)


def _swin_v2(block: nn.Module, x: Tensor) -> Tensor:
    attention = block.attn

    def attend(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
        bias = attention.qkv.bias
        if attention.q_bias is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        q, k, v = (
            F.linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
        )
        temperature = attention.logit_scale.clamp(max=math.log(100)).exp().flatten()[:, None]  # of each head
        q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
        table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, -2)
        bias = 16 * table[attention.relative_position_index].sigmoid().permute(2, 0, 1)
        q, k, bias = (each.to(v.dtype) for each in (q, k, bias))
        return ops.window_attention(q, k, v, window, shift=shift, bias=bias, scale=1.0)

    return _shifted(block, x, attend)


def _maxvit(block: nn.Module, x: Tensor) -> Tensor:
    attention, (rows, columns) = block.attn, block.partition_size
    height, width = x.shape[1:3]
    if height % rows or width % columns:
        return type(block)._partition_attn(block, x)  # which says what is wrong
    if not block.partition_block:  # tokens of one grid side by side are a window
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 1, 4, 3, 5)
        x = x.flatten(3, 4).flatten(1, 2)
    if attention.head_first:
        q, k, v = attention.qkv(x).unflatten(-1, (attention.num_heads, 3, -1)).unbind(4)
    else:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
    bias = None if attention.rel_pos is None else attention.rel_pos.get_bias()
    bias = bias[0] if bias is not None and bias.ndim == 4 else bias
    out = _output(attention, ops.window_attention(q, k, v, (rows, columns), bias=bias, scale=attention.scale))
    if not block.partition_block:
        out = out.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 2, 1, 4, 3, 5)
        out = out.flatten(3, 4).flatten(1, 2)
    return out


def _twins(attention: nn.Module, x: Tensor, size: Any) -> Tensor:
    height, width = size
    window = (attention.ws, attention.ws)
    qkv = attention.qkv(_pad(x.unflatten(1, (height, width)), window))
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
    out = ops.window_attention(q, k, v, window, scale=attention.scale)[:, :height, :width]
    return _output(attention, out).flatten(1, 2)


def _gcvit(block: nn.Module, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    attention, (rows, columns) = block.attn, block.window_size
    down, right = x.shape[1] // rows, x.shape[2] // columns
    if attention.use_global and q_global is not None:
        k, v = attention.qkv(x).unflatten(-1, (2, attention.num_heads, -1)).unbind(3)
        # One window of queries for each image, the same in all its windows.
        q = q_global.reshape(len(x), rows, columns, attention.num_heads, -1).repeat(1, down, right, 1, 1)
    else:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(3)
    bias = attention.rel_pos.get_bias()[0]
    return _output(
        attention, ops.window_attention(q, k, v, (rows, columns), bias=bias, scale=attention.scale)
    )
