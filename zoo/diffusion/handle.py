"""What all training-free methods share: find layers, swap processors, watch each forward, give all back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.diffusion.adapters import ADAPTERS, Adapter
from zoo.diffusion.layout import TokenLayout
from zoo.errors import ConfigError, did_you_mean


class Config(Protocol):
    """What a handle asks of a method's settings."""

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that do not suit a token grid of so many axes."""
        ...

    def pairs(self, layout: TokenLayout) -> int:
        """Query-key pairs that one head computes."""
        ...

    def chosen_backend(self, sequence: Tensor, layout: TokenLayout) -> str:
        """Name of the backend for a joint sequence [B, N, H, D] of this type and device."""
        ...


@dataclass
class State:
    """What the processors of one handle read; a step number would recompile the model at every step."""

    sparse: bool = False
    layout: TokenLayout | None = None


class Processor:
    """An attention processor that projects as its model does and attends in a sparse way of its own.

    A sub-class writes `attend`. It is a plain object: a module would add keys to the model's state dict.
    The parameters of `__call__` have names because diffusers drops every keyword without one.
    """

    # diffusers' `set_attention_backend` and `enable_parallelism` write to these two names.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, adapter: Adapter, state: State, config: Any) -> None:
        self.adapter = adapter
        self.state = state
        self.config = config

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = self.adapter.project(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )  # [B, N, H, D]
        layout = self.state.layout
        if layout is None or query.shape[1] != layout.tokens:
            raise ConfigError(
                f"{type(self).__name__} got {query.shape[1]} tokens, found the geometry {layout}; call the "
                "transformer itself, neither its forward method nor its blocks"
            )
        if not self.state.sparse:
            out = self.dense(query, key, value, attention_mask)
        elif attention_mask is None:
            out = self.attend(query, key, value, layout)
        else:
            raise ConfigError(
                f"attention_mask must be None for {type(self).__name__}, found one of shape "
                f"{tuple(attention_mask.shape)}; leave it out or remove the handle"
            )
        return self.adapter.output(attn, out.flatten(2, 3).to(query.dtype), encoder_hidden_states)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend as the model itself would, on the backend chosen in diffusers; all [B, N, H, D]."""
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        """Attend sparsely over the joint sequence; all [B, N, H, D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stats:
    """Attention of the changed layers so far, dense steps included, as planned before each forward.

    `calls` and `sparse_calls` count attention calls; `keep` is the fraction of query-key pairs computed;
    `flops_saved` counts both matrix products, a multiply-add as two; `backend` is that of the latest sparse
    call.
    """

    calls: int
    sparse_calls: int
    keep: float
    flops_saved: int
    backend: str | None


@dataclass
class Site:
    """One transformer to change; `entry` is what the user calls: the compiled wrapper, if there is one."""

    entry: nn.Module
    model: nn.Module
    adapter: Adapter
    layers: dict[str, nn.Module]
    originals: dict[str, Any] = field(default_factory=dict)
    processors: dict[str, Processor] = field(default_factory=dict)
    hook: RemovableHandle | None = None


class Handle:
    """A method applied to a pipeline or transformer, until `remove()` or the end of a `with` block."""

    def __init__(
        self, sites: list[Site], processor: type[Processor], config: Config, method: str, dense_steps: int
    ) -> None:
        self.method = method
        self.config = config
        self.dense_steps = dense_steps
        self._sites = sites
        self._state = State()
        self._active = True
        self._calls = self._sparse_calls = self._flops = self._dense_flops = 0
        self._backend: str | None = None
        self.reset()
        try:
            for site in sites:
                for name, layer in site.layers.items():
                    original, ours = layer.processor, processor(site.adapter, self._state, config)
                    ours._attention_backend = getattr(original, "_attention_backend", None)
                    site.originals[name], site.processors[name] = original, ours
                    layer.set_processor(ours)
                site.hook = site.entry.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        except BaseException:
            self.remove()
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the changed attention layers, in the order they run."""
        return tuple(name for site in self._sites for name in site.layers)

    @property
    def step(self) -> int:
        """Denoising step of the latest forward, counted from 0; -1 before the first."""
        return self._step

    def reset(self) -> None:
        """Start counting steps anew; needed only after a generation that was broken off."""
        self._step, self._timestep = -1, float("-inf")

    def stats(self) -> Stats:
        """Say how much was computed and saved so far."""
        keep = self._flops / self._dense_flops if self._dense_flops else 1.0
        saved = self._dense_flops - self._flops
        return Stats(self._calls, self._sparse_calls, keep, saved, self._backend)

    def remove(self) -> None:
        """Put back the very same processor objects; a second call does nothing.

        A layer whose processor somebody else has replaced since then keeps that one.
        """
        for site in self._sites:
            if site.hook is not None:
                site.hook.remove()
            for name, original in site.originals.items():
                if site.layers[name].processor is site.processors.get(name):
                    site.layers[name].set_processor(original)
        self._active = False

    def __enter__(self) -> Handle:
        if not self._active:
            raise ConfigError(f"this handle was removed already; call apply_{self.method} again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        what = f"{len(self.layers)} layers" if self._active else "removed"
        return f"<{self.method}: {what}, {self.config}>"

    @torch.compiler.disable  # traced, the step would be a constant of the graph
    def _before_forward(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = next(site for site in self._sites if site.entry is entry)
        refuse_context_parallel(site.model, self.method)
        for name, layer in site.layers.items():
            if layer.processor is not site.processors[name]:
                raise ConfigError(
                    f"{name} has a {type(layer.processor).__name__}, set after apply_{self.method}; remove "
                    "the handle before changing processors"
                )
        arguments = inspect.signature(type(site.model).forward).bind(site.model, *args, **kwargs).arguments
        layout = site.adapter.layout(arguments)
        self._count_step(arguments["timestep"])
        self._state.layout = layout
        self._state.sparse = self._step >= self.dense_steps and layout.image > 1  # one token has no neighbor
        self._count_work(site, arguments["hidden_states"], layout)

    def _count_step(self, timestep: Tensor) -> None:
        """Count changes, not calls: guidance calls the model twice per step. A rise is a new generation."""
        now = float(timestep.detach().flatten()[0])
        if now > self._timestep:
            self._step = 0
        elif now < self._timestep:
            self._step += 1
        self._timestep = now

    def _count_work(self, site: Site, hidden_states: Tensor, layout: TokenLayout) -> None:
        """Count here, not in the processors: a counter there would recompile the model at every step."""
        batch, layers = len(hidden_states), len(site.layers)
        heads, width = site.model.config.num_attention_heads, site.model.config.attention_head_dim
        pairs = dense_pairs = layout.tokens**2
        if self._state.sparse:
            pairs = self.config.pairs(layout)
            sequence = hidden_states.new_empty(()).expand(batch, layout.tokens, heads, width)
            self._backend = self.config.chosen_backend(sequence, layout)
            self._sparse_calls += layers
        self._calls += layers
        self._flops += 4 * width * heads * batch * layers * pairs
        self._dense_flops += 4 * width * heads * batch * layers * dense_pairs


def apply(
    target: Any,
    processor: type[Processor],
    config: Config,
    *,
    method: str,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
) -> Handle:
    """Check everything, then give the layers of `target` processors of the class `processor`.

    Raises: ConfigError, with nothing changed.
    """
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise ConfigError(f"dense_steps must be a whole number >= 0, found {dense_steps!r}")
    sites = find_sites(target, method, dense_layers)
    for site in sites:
        config.check(site.adapter.axes)
    return Handle(sites, processor, config, method, dense_steps)


def find_sites(target: Any, method: str, dense_layers: int | Sequence[int | str] = 0) -> list[Site]:
    """Return the transformers of `target` and the layers to change, or raise ConfigError; change nothing."""
    if isinstance(target, nn.Module):
        entries = [target]
    else:
        parts = (getattr(target, name, None) for name in ("transformer", "transformer_2"))
        entries = [part for part in parts if isinstance(part, nn.Module)]
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
        layers = select(adapter.layers(model), dense_layers)
        for name, layer in layers.items():
            refuse_foreign_processor(name, layer.processor, adapter)
        sites.append(Site(entry, model, adapter, layers))
    return sites


def select(layers: dict[str, nn.Module], dense_layers: int | Sequence[int | str]) -> dict[str, nn.Module]:
    """Return the layers but for the first n, or for those given by index, name, path or pattern."""
    names = list(layers)
    if isinstance(dense_layers, bool) or (
        isinstance(dense_layers, int) and not 0 <= dense_layers < len(names)
    ):
        raise ConfigError(f"dense_layers must lie in 0..{len(names) - 1}, found {dense_layers!r}")
    selectors = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    dense = set()
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        if isinstance(selector, int):
            hits = names[selector : selector + 1] if selector >= 0 else []
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
        raise ConfigError(f"{name} has a {found} already; call remove() of its handle first")
    if type(processor) not in adapter.stock:
        allowed = ", ".join(cls.__name__ for cls in adapter.stock)
        raise ConfigError(
            f"{name} must have a {allowed}, found a {found}, whose effect would be lost; unload what "
            "set it or list the layer in dense_layers"
        )


def refuse_context_parallel(model: nn.Module, method: str) -> None:
    """Raise ConfigError where each process holds only a part of the sequence."""
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ConfigError(
            f"{method} attention cannot run with context parallelism, found it enabled on "
            f"{type(model).__name__}; load the model without it"
        )
