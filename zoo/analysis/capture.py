"""The attention of every block of a zoo model, or of a timm model whose attention is known, in one form."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn

from zoo import ops
from zoo.analysis.tokens import GroupAttention, TokenAttention, from_record, in_float32
from zoo.attention import AttentionRecord, capture_attention
from zoo.errors import ConfigError

BlockAttention = TokenAttention | GroupAttention

# timm's classes, told by where they stand: the newest versions moved some and kept the old names.
_GLOBAL = tuple(
    {
        kind
        for kind in (
            vision_transformer.Attention,
            beit.Attention,
            eva.EvaAttention,
            getattr(timm.layers, "AttentionRope", None),
        )
        if kind is not None
    }
)
_WINDOWS = (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)
_SUPPORTED = "the zoo's own models, and timm's ViT, DeiT, BEiT, EVA, Swin and SwinV2"


def block_attention(model: nn.Module, images: Tensor) -> dict[str, BlockAttention]:
    """Run the model and return the attention of every block that ran, by module name in running order.

    Shapes: `images` [B, C, height, width], normalised as the model wants them. The model is run in evaluation
    mode and left as it was. Of a timm model the fused path is switched off meanwhile, because it never forms
    the weights.
    Raises: ConfigError for a model whose attention is unknown, or a record that does not say where keys lie.
    """
    with torch.no_grad():
        return run_with_attention(model, images)[1]


def run_with_attention(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, BlockAttention]]:
    """The model's output beside the attention of every block that ran."""
    _check_images(images)
    training = model.training
    model.eval()
    try:
        if _is_zoo(model):
            with capture_attention(model) as records:
                output = model(images)
            blocks = {
                name: from_record(name, record, mechanism_of(model.get_submodule(name)))
                for name, record in records.items()
            }
        else:
            with _timm_weights(model) as found:
                output = model(images)
            blocks = {name: _from_timm(model, name, place, images) for name, place in found.items()}
    finally:
        model.train(training)
    return output, blocks


@contextmanager
def weights_with_gradient(
    model: nn.Module,
) -> Iterator[Callable[[Tensor, Tensor], dict[str, TokenAttention]]]:
    """Inside the block the model runs once; the function given then maps its images and a score [B] of its
    output to the attention of every block, with weights replaced by weight times gradient of the score,
    negative products as 0.

    The gradient of a weight is the product of the output's gradient and the value it weighs, so it needs the
    values and outputs of the operations, not the weights' own graph: any backend serves. Blocks that attend
    between channels are left out.
    """
    if not _is_zoo(model):
        with _timm_weights(model) as found:

            def from_timm(images: Tensor, score: Tensor) -> dict[str, TokenAttention]:
                gradients = torch.autograd.grad(score.sum(), [weights for weights, _ in found.values()])
                return {
                    name: _from_timm(model, name, ((weights * gradient).clamp(min=0).detach(), block), images)
                    for (name, (weights, block)), gradient in zip(found.items(), gradients, strict=True)
                }

            yield from_timm
        return

    with capture_attention(model) as records, _watched_products(model) as products:

        def from_zoo(images: Tensor, score: Tensor) -> dict[str, TokenAttention]:
            between_tokens = {name: r for name, r in records.items() if "channel" not in r.axes}
            for name in between_tokens:
                if len(products.get(name, ())) != 1:
                    raise ConfigError(
                        f"relevance follows blocks with one attention product; {name} has "
                        f"{len(products.get(name, ()))} that are known"
                    )
            outputs = [products[name][0][1] for name in between_tokens]
            gradients = torch.autograd.grad(score.sum(), outputs) if outputs else ()
            found = {}
            for (name, record), gradient in zip(between_tokens.items(), gradients, strict=True):
                mechanism = mechanism_of(model.get_submodule(name))
                found[name] = _times_gradient(name, record, mechanism, *products[name][0], gradient)
            return found

        yield from_zoo


def mechanism_of(module: nn.Module) -> str:
    """One word for what a module does: "neighborhood" for NeighborhoodAttention, and so on."""
    words = {
        "neighborhood": "neighborhood",
        "window": "window",
        "deformable": "deformable",
        "routing": "bilevel",
        "agent": "agent",
        "channel": "channel",
        "global": "global",
        "cswin": "stripes",
    }
    names = [kind.__name__.lower() for kind in type(module).__mro__]  # families name subclasses as they like
    found = (word for name in names for part, word in words.items() if part in name)
    return next(found, names[0].removesuffix("attention"))


def _is_zoo(model: nn.Module) -> bool:
    return any(hasattr(module, "attention_weights") for module in model.modules())


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ConfigError(f"images must be [B, channels, height, width], found shape {tuple(images.shape)}")


# timm -------------------------------------------------------------------------------------------------------


@contextmanager
def _timm_weights(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Collect the weights of every known attention of a timm model; with windows, the block and map size."""
    modules = dict(model.named_modules())
    sites: dict[str, tuple[nn.Module, nn.Module | None]] = {
        f"{name}.attn".lstrip("."): (module.attn, module)
        for name, module in modules.items()
        if isinstance(module, _WINDOWS)
    }
    sites |= {
        name: (module, None)
        for name, module in modules.items()
        if isinstance(module, _GLOBAL) and name not in sites
    }
    if not sites:
        raise ConfigError(f"{type(model).__name__} has no attention known here; known are {_SUPPORTED}")
    found: dict[str, tuple[Tensor, Any]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def collect(name: str, block: nn.Module | None):  # noqa: ANN202
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = (output, None if block is None else (block, sizes[name]))

        return hook

    def measure(name: str):  # noqa: ANN202
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sizes[name] = tuple(arguments[0].shape[1:3])

        return hook

    fused = {name: module.fused_attn for name, (module, _) in sites.items() if hasattr(module, "fused_attn")}
    hooks = []
    try:
        for name, (module, block) in sites.items():
            if name in fused:
                module.fused_attn = False
            # Dropout sees the weights; in evaluation it hands on what it is given.
            hooks.append(module.attn_drop.register_forward_hook(collect(name, block)))
            if block is not None:
                hooks.append(block.register_forward_pre_hook(measure(name)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in fused.items():
            sites[name][0].fused_attn = value


def _from_timm(model: nn.Module, name: str, place: tuple[Tensor, Any], images: Tensor) -> TokenAttention:
    weights, window = place
    weights = weights.float()
    if window is not None:
        return _from_windows(name, weights, *window)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise ConfigError(f"{type(model).__name__} has no patches of one size; known are {_SUPPORTED}")
    sides = patch if isinstance(patch, tuple | list) else (patch, patch)
    grid = tuple(length // side for length, side in zip(images.shape[-2:], sides, strict=True))
    prefix = weights.shape[-1] - grid[0] * grid[1]
    if prefix != getattr(model, "num_prefix_tokens", prefix) or prefix < 0:
        raise ConfigError(
            f"{name} attends over {weights.shape[-1]} tokens, which are not the {grid[0]} x {grid[1]} "
            "patches of the image and a prefix"
        )
    return TokenAttention(name, "global", weights, grid, prefix=prefix)


def _from_windows(name: str, weights: Tensor, block: nn.Module, grid: tuple[int, int]) -> TokenAttention:
    """Weights [B * windows, H, T, T] of a map that was rolled by the shift, then padded, then cut."""
    places, tokens, counts = [], [], []
    for length, window, shift in zip(grid, block.window_size, block.shift_size, strict=True):
        count = -(-length // window)
        rolled = torch.arange(count * window, device=weights.device)
        tokens.append(torch.where(rolled < length, (rolled + shift) % length, -1).view(count, window))
        places.append((torch.arange(length, device=weights.device) - shift) % length)
        counts.append(count)
    y, x = tokens[0][:, None, :, None], tokens[1][None, :, None, :]
    members = torch.where((y >= 0) & (x >= 0), y * grid[1] + x, -1).flatten(2).flatten(0, 1)  # [windows, T]
    (window_y, window_x), (row, column) = block.window_size, places
    cut = (row // window_y)[:, None] * counts[1] + column // window_x  # the window of every token
    slot = (row % window_y)[:, None] * window_x + column % window_x
    weights = weights.unflatten(0, (-1, counts[0] * counts[1]))[:, cut.flatten(), :, slot.flatten()]
    # Advanced indices around a slice come first: [tokens, B, H, T].
    return TokenAttention(
        name, "window", weights.permute(1, 2, 0, 3), grid, keys=members[cut.flatten()][None, None]
    )


# Zoo: weights times gradients -------------------------------------------------------------------------------

_PRODUCTS = (
    "neighborhood_attention",
    "window_attention",
    "bilevel_routing_attention",
    "deformable_attention",
    "agent_attention",
    "attention",
)
_watching = threading.Lock()


@contextmanager
def _watched_products(model: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor, bool]]]]:
    """Collect values and output of every attention product by module, and whether heads stand first in them.

    Modules call operations by their names in `zoo.ops`, so these names stand for watching functions
    meanwhile; calls of other threads pass through them untouched.
    """
    found: dict[str, list[tuple[Tensor, Tensor, bool]]] = {}
    running: list[str | None] = []
    thread = threading.get_ident()

    def watch(function: Callable[..., Any], heads_first: bool) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Any:
            ours = running and threading.get_ident() == thread and torch.is_grad_enabled()
            if not ours or running[-1] is None:
                return function(q, k, v, *arguments, **options)
            running.append(None)  # a backend may call another of these functions inside
            try:
                out = function(q, k, v, *arguments, **options)
            finally:
                running.pop()
            found.setdefault(running[-1], []).append((v.detach(), out, heads_first))
            return out

        return call

    def enter(name: str):  # noqa: ANN202
        return lambda module, arguments: running.append(name)

    with _watching:
        owners = [(ops, name, False) for name in _PRODUCTS if hasattr(ops, name)]
        owners.append((F, "scaled_dot_product_attention", True))
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in owners]
        hooks = []
        try:
            for name, module in model.named_modules():
                if hasattr(module, "attention_weights"):
                    hooks.append(module.register_forward_pre_hook(enter(name)))
                    # The recorder of weights, added before, runs without gradients and is not collected.
                    hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
            for owner, name, heads_first in owners:
                setattr(owner, name, watch(getattr(owner, name), heads_first))
            yield found
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)
            for hook in hooks:
                hook.remove()


def _times_gradient(
    name: str,
    record: AttentionRecord,
    mechanism: str,
    v: Tensor,
    out: Tensor,
    heads_first: bool,
    gradient: Tensor,
) -> TokenAttention:
    """The attention of a record with (weight * gradient)+ for weights."""
    record = in_float32(record)
    if heads_first:
        v, out, gradient = (x.transpose(1, 2) for x in (v, out, gradient))
    elif len(v) != len(record.weights):
        v, out, gradient = (_whole_maps(x, record.grid) for x in (v, out, gradient))
    heads = out.shape[-2:]
    by_query = record.weights if record.axes[1] == "token" else record.weights.flatten(1, 2)  # [B, Q, H, K]
    v, out, gradient = (x.float().reshape(len(x), -1, *heads) for x in (v, out.detach(), gradient))
    if record.agents is not None:
        taken = torch.einsum("bahk,bkhd->bahd", record.agents, v)
        given = torch.einsum("bqha,bqhd->bahd", by_query, gradient)
        own = torch.einsum("bqhd,bahd->bqha", gradient, taken)
        inner = torch.einsum("bahd,bkhd->bahk", given, v)
        _check_product(name, torch.einsum("bqha,bahd->bqhd", by_query, taken), out)
        record = replace(record, agents=(record.agents * inner).clamp(min=0))
    elif record.keys is None:
        if v.shape[1] != by_query.shape[-1]:
            raise ConfigError(f"{name} has {v.shape[1]} values for {by_query.shape[-1]} weights of a query")
        own = torch.einsum("bqhd,bkhd->bqhk", gradient, v)
        _check_product(name, torch.einsum("bqhk,bkhd->bqhd", by_query, v), out)
    else:
        keys = (record.keys if record.keys.ndim == 3 else record.keys[None]).expand(len(v), -1, -1)
        image = torch.arange(len(v), device=v.device)[:, None, None]
        own, product = torch.empty_like(by_query), torch.empty_like(out)
        for start in range(0, by_query.shape[1], 256):  # the gathered values of all queries would be many
            part = slice(start, start + 256)
            values = v[image, keys[:, part].clamp(min=0)]  # [B, q, K, H, D]
            own[:, part] = torch.einsum("bqhd,bqkhd->bqhk", gradient[:, part], values)
            product[:, part] = torch.einsum("bqhk,bqkhd->bqhd", by_query[:, part], values)
        _check_product(name, product, out)
    weighted = (by_query * own).clamp(min=0).view(record.weights.shape)
    return from_record(name, replace(record, weights=weighted), mechanism)


def _whole_maps(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Windows [B * windows, y, x, H, D] that were cut into maps of their own, as maps [B, Y, X, H, D]."""
    down, across = (length // side for length, side in zip(grid, windows.shape[1:3], strict=True))
    return windows.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _check_product(name: str, product: Tensor, out: Tensor) -> None:
    """Relevance stands on output = weights times values; refuse where the record does not give the output."""
    error = (product - out).norm() / out.norm().clamp_min(1e-12)
    if error > 1e-2:
        raise ConfigError(
            f"the recorded weights of {name} do not give its output (relative error {error:.1e}), so it has "
            "no gradient relevance"
        )
