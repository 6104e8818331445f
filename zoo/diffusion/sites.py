"""Where a method can be applied: transformers of a pipeline, their attention layers, and what forbids it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import nn
from torch.utils.hooks import RemovableHandle

from zoo.diffusion.adapters import ADAPTERS, Adapter
from zoo.diffusion.processor import Processor, stock_of
from zoo.errors import ConfigError, did_you_mean


@dataclass
class Site:
    """One transformer to change; `entry` is what the user calls: the compiled wrapper, if there is one."""

    entry: nn.Module
    model: nn.Module
    adapter: Adapter
    layers: dict[str, nn.Module]
    originals: dict[str, Any] = field(default_factory=dict)
    processors: dict[str, Processor] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)


def entries_of(target: Any) -> list[nn.Module]:
    """What of a pipeline may be changed, or the module itself."""
    if isinstance(target, nn.Module):
        return [target]
    parts = (getattr(target, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [part for part in parts if isinstance(part, nn.Module)]


def find_sites(target: Any, method: str, dense_layers: int | Sequence[int | str] = 0) -> list[Site]:
    """Return the transformers of `target` and the layers to change, or raise ConfigError; change nothing."""
    entries = entries_of(target)
    allowed = [adapter for adapter in ADAPTERS if method in adapter.methods]
    names = ", ".join(adapter.model.__name__ for adapter in allowed)
    if not entries:
        raise ConfigError(
            f"{method} attention needs a {names} or a pipeline with one, found {type(target).__name__}"
        )
    sites = []
    for entry in entries:
        model = getattr(entry, "_orig_mod", entry)  # what torch.compile wraps
        adapter = next((adapter for adapter in allowed if isinstance(model, adapter.model)), None)
        if adapter is None:
            raise ConfigError(
                f"{method} attention needs a {names} or a pipeline with one, found {type(model).__name__}"
            )
        refuse_context_parallel(model, method)
        for name, layer in model.named_modules() if adapter.refused else ():
            if isinstance(getattr(layer, "processor", None), adapter.refused):
                raise ConfigError(
                    f"{method} attention cannot run beside an IP-Adapter, found a "
                    f"{type(layer.processor).__name__} at {name}; call unload_ip_adapter() first"
                )
        layers = select(adapter.layers(model), dense_layers)
        for name, layer in layers.items():
            refuse_foreign_processor(name, stock_of(layer.processor), adapter)
            refuse_skipped_scores(name, layer, method)
        sites.append(Site(entry, model, adapter, layers))
    return sites


def select(layers: dict[str, nn.Module], dense_layers: int | Sequence[int | str]) -> dict[str, nn.Module]:
    """Return the layers but for the first n, or for those given by index, name, path or pattern."""
    names = list(layers)
    if isinstance(dense_layers, bool) or (
        isinstance(dense_layers, int) and not 0 <= dense_layers < len(names)
    ):
        raise ConfigError(f"dense_layers must lie in 0..{len(names) - 1}, found {dense_layers!r}")
    if not isinstance(dense_layers, (int, Iterable)):
        raise ConfigError(
            f"dense_layers must be a number of layers, or names, patterns or indices, found {dense_layers!r}"
        )
    selectors = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    dense = set()
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        if isinstance(selector, int):
            is_index = selector >= 0 and not isinstance(selector, bool)
            hits = names[selector : selector + 1] if is_index else []
        else:
            path = str(selector).removesuffix(".processor")
            hits = [name for name in names if fnmatchcase(name, path) or name.startswith(path + ".")]
        if not hits:
            near = did_you_mean(str(selector), names) or f"; they are {names[0]} ... {names[-1]}"
            raise ConfigError(f"dense_layers must name layers, found {selector!r}{near}")
        dense.update(hits)
    if len(dense) == len(names):
        raise ConfigError(f"dense_layers must leave out at least one layer, found all {len(names)}")
    return {name: layer for name, layer in layers.items() if name not in dense}


def refuse_foreign_processor(name: str, processor: Any, adapter: Adapter) -> None:
    """Raise ConfigError for a processor that cannot be replaced without losing what it does."""
    found = type(processor).__name__
    if isinstance(processor, Processor):
        raise ConfigError(
            f"{name} has a {found} already; call remove() of its handle (diffusion.handles finds it)"
        )
    if type(processor) not in adapter.stock:
        allowed = ", ".join(cls.__name__ for cls in adapter.stock)
        raise ConfigError(
            f"{name} must have a {allowed}, found a {found}, whose effect would be lost; unload what "
            "set it or list the layer in dense_layers"
        )


def refuse_skipped_scores(name: str, layer: nn.Module, method: str) -> None:
    """Raise ConfigError for perturbed attention: the hook replaces torch's own attention alone, not ours."""
    hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {}).values()
    if any(isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in hooks):
        raise ConfigError(
            f"{method} attention cannot leave out its scores, found skip_attention_scores=True at "
            f"{name}; remove that hook or list the layer in dense_layers"
        )


def refuse_context_parallel(model: nn.Module, method: str) -> None:
    """Raise ConfigError where each process holds only a part of the sequence."""
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ConfigError(
            f"{method} attention cannot run with context parallelism, found it enabled on "
            f"{type(model).__name__}; load the model without it"
        )
