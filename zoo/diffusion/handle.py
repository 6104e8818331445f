"""A method applied to a pipeline: swap processors, watch each forward, give all back."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.diffusion.adapters import Adapter
from zoo.diffusion.processor import (
    Config,
    Group,
    Processor,
    State,
    relative_error,
    running_backward,
    stock_of,
)
from zoo.diffusion.sites import Site, entries_of, find_sites, refuse_context_parallel
from zoo.diffusion.steps import Steps
from zoo.errors import ConfigError
from zoo.layers.tokens import TokenLayout

PLANS = 16  # geometries of which a handle keeps the plan


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


@dataclass(frozen=True)
class Comparison:
    """How far a sparse forward is from the dense one: |sparse - dense| / |dense|, 0 where they are equal.

    `output` is that of the whole transformer; `layers` that of each changed attention, given the queries,
    keys and values of the dense forward; `keep` is the fraction of query-key pairs computed.
    """

    output: float
    layers: dict[str, float]
    keep: float


class Handle:
    """A method applied to a pipeline or transformer, until `remove()` or the end of a `with` block.

    A model in training mode is sparse at every call, `dense_steps` or not: it is trained at random times, and
    what was counted or remembered of a generation before is forgotten.
    Steps are counted by changes of the timestep, which guidance does not make; where the scheduler of the
    pipeline that was changed evaluates several times in a step (Heun, KDPM2) or has timesteps that are equal
    in bfloat16, by the scheduler. (Another pipeline that shares the transformer has a scheduler that is not
    asked.)
    """

    def __init__(
        self,
        sites: list[Site],
        processor: type[Processor],
        config: Config,
        method: str,
        dense_steps: int,
        target: Any = None,
    ) -> None:
        self.method = method
        self.config = config
        self.dense_steps = dense_steps
        self._target = target
        self._sites = sites
        self._state = State()
        self._plans: OrderedDict[Any, Any] = OrderedDict()
        self._active = True
        self._calls = self._sparse_calls = self._flops = self._dense_flops = 0
        self._backend: str | None = None
        self._forced: bool | None = None  # sparse or dense whatever the step, while comparing
        self.reset()
        try:
            for site in sites:
                for name, layer in site.layers.items():
                    original = stock_of(layer.processor)
                    ours = processor(name, site.adapter, original, self._state, config)
                    ours.handle = self
                    ours.dispatches = hasattr(original, "_attention_backend")
                    ours._attention_backend = getattr(original, "_attention_backend", None)
                    site.originals[name], site.processors[name] = original, ours
                    layer.processor = ours  # not every attention module has a set_processor
                    site.hooks += ours.hooks(site.model)
                hook = partial(self._before_forward, site)
                site.hooks.append(site.entry.register_forward_pre_hook(hook, with_kwargs=True))
                site.hooks.append(site.entry.register_forward_hook(self._after_forward))
        except BaseException:
            self.remove()
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the changed attention layers, in the order they run."""
        return tuple(name for site in self._sites for name in site.layers)

    @property
    def _function(self) -> str:
        return "apply_radial_attention" if self.method == "radial" else f"apply_{self.method}"

    @property
    def step(self) -> int:
        """Denoising step of the latest forward, counted from 0; -1 before the first, and in training."""
        return self._steps.step

    def reset(self) -> None:
        """Start counting steps anew.

        Needed where no scheduler tells where a generation begins (a transformer without its pipeline, a
        scheduler without a `step_index`): after one that was broken off, and before one that starts less
        noisy than the last one ended, such as image to image of low strength. Both look like going on.
        """
        self._steps = Steps()
        self._state.live.clear()

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
            for hook in site.hooks:
                hook.remove()
            for name, original in site.originals.items():
                ours = site.processors.get(name)
                if site.layers[name].processor is ours:
                    site.layers[name].processor = original
                    # What was set for the model meanwhile: without its config the original would attend
                    # to one rank's part of the sequence.
                    for setting in ("_attention_backend", "_parallel_config"):
                        if hasattr(original, setting):
                            setattr(original, setting, getattr(ours, setting))
            # What `unfuse_qkv_projections` would put back.
            fused = getattr(site.model, "original_attn_processors", None) or {}
            for name, processor in fused.items():
                if isinstance(processor, Processor) and processor.state is self._state:
                    fused[name] = processor.original
        self._active = False
        for site in self._sites:
            for module, function in checkpointing_of(site.model):
                while isinstance(function, Checkpointing) and not function.handle._active:
                    function = function.original
                module._gradient_checkpointing_func = function
        self._state.is_removed = True

    def compare_dense(self, *args: Any, transformer: nn.Module | None = None, **kwargs: Any) -> Comparison:
        """Run a transformer once dense and once sparse and say how far apart they are.

        Arguments are those of the transformer's forward, whose step does not matter here; `transformer` says
        which one of several, the first by default. Neither `stats()` nor `step` notices.
        """
        known = [site for site in self._sites if transformer in (None, site.entry, site.model)]
        if not self._active or not known:
            raise ConfigError("compare_dense needs a transformer that this handle changes, before remove()")
        if getattr(known[0].model, "is_cache_enabled", False):
            raise ConfigError(
                "compare_dense needs every attention computed twice, found a cache enabled on "
                f"{type(known[0].model).__name__}; call disable_cache() first"
            )
        entry, state = known[0].entry, self._state
        outputs = {}
        try:
            with torch.no_grad():
                # Sparse and dense at every layer, going on with dense: each layer is judged by itself.
                for name in ("dense", "sparse"):
                    self._forced, state.errors = True, {} if name == "dense" else None
                    result = entry(*args, **kwargs)
                    result = result[0] if isinstance(result, tuple) else result.sample
                    outputs[name] = result
                    if name == "dense":
                        layers = state.errors
        finally:
            self._forced = state.errors = None
        keep, whole = self._pairs(known[0], 1) if state.sparse else (1, 1)
        return Comparison(relative_error(outputs["sparse"], outputs["dense"]), layers, keep / whole)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model must not take the pipeline along."""
        return {**vars(self), "_target": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        made = memo[id(self)] = object.__new__(type(self))
        made.__setstate__(deepcopy(self.__getstate__(), memo))
        made._target = memo.get(id(self._target))  # a pipeline that is copied as a whole counts the steps
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for processor in self._processors:
            processor.handle = self

    def __enter__(self) -> Handle:
        if not self._active:
            raise ConfigError(f"this handle was removed already; call {self._function} again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        what = f"{len(self.layers)} layers" if self._active else "removed"
        return f"<{self.method}: {what}, {self.config}>"

    @torch.compiler.disable  # traced, the step would be a constant of the graph
    def _before_forward(
        self, site: Site, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # `entry` may be a shallow copy with the same layers, as accelerate's compile_regions makes one.
        refuse_context_parallel(site.model, self.method)
        for name, layer in site.layers.items():
            if layer.processor is not site.processors[name]:
                raise ConfigError(
                    f"{name} has a {type(layer.processor).__name__}, set after {self._function}; remove "
                    "the handle before changing processors"
                )
        arguments = inspect.signature(type(site.model).forward).bind(site.model, *args, **kwargs).arguments
        layout = self.config.layout(site.adapter, site.model, arguments)
        hidden_states = arguments["sample" if "sample" in arguments else "hidden_states"]
        if torch.is_grad_enabled():
            self._watch_checkpoints(site)
        state, batch = self._state, len(hidden_states)
        state.task, state.is_training = running_backward(), site.model.training
        if self._forced is None and state.is_training:
            self._steps = Steps()
        elif self._forced is None:
            scheduler = getattr(self._target, "scheduler", None)
            self._steps.count(arguments["timestep"], scheduler, rises=site.adapter.timestep_rises)
        prompt = self.config.prompt(arguments)
        if prompt is not None:
            self._prepare(prompt, layout, batch, hidden_states.device)
        sparse = state.is_training or self.step >= self.dense_steps
        sparse = sparse if self._forced is None else self._forced
        mask = self._text_mask(site.adapter, arguments, batch)
        state.layout = layout
        state.groups = self._groups(site.adapter, layout, mask, hidden_states.device)
        state.sparse = sparse and any(group.plan is not None for group in state.groups)
        state.kind, state.is_read = None, True
        if torch.is_grad_enabled() and state.task == -1:
            padding = None if mask is None else mask.numpy().tobytes()
            call = None if prompt is None else self._steps.call
            phase = self._phase
            state.kind = (site.adapter.model, layout, state.sparse, state.is_training, phase, padding, call)
            state.keep_for_backward()
        if self._forced is None:
            self._count_work(site, hidden_states, layout)

    @torch.compiler.disable
    def _after_forward(self, *args: Any) -> None:
        self._state.is_read = False  # a forward that passes by the hooks is not one more of this kind

    def _watch_checkpoints(self, site: Site) -> None:
        """Go between a model and its gradient checkpointing, which may be enabled at any time."""
        for module, function in checkpointing_of(site.model):
            if self not in handles_of(function):
                module._gradient_checkpointing_func = Checkpointing(self, function)

    def _checkpoint(self, original: Callable[..., Any], block: Callable[..., Any], *args: Any) -> Any:
        """Let a block be computed again for its gradient by the state of its own forward.

        There may have been others since then: of another geometry, step or mode.
        """
        if not self._active or torch.compiler.is_compiling():  # a graph has taken the state in already
            return original(block, *args)
        then, memories = copy(self._state), [processor.memory for processor in self._processors]

        def compute(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                raise ConfigError(
                    "gradient checkpointing computes blocks again in backward, found the handle of "
                    f"{self._function} removed; call backward before remove()"
                )
            now = [processor.memory for processor in self._processors]
            with self._state.as_in(replace(then, task=running_backward())):
                try:
                    self._remember(memories)
                    return block(*args, **kwargs)
                finally:
                    self._remember(now)

        return original(compute, *args)

    @property
    def _phase(self) -> Any:
        return self.config.phase(max(self.step, 0))

    @property
    def _processors(self) -> list[Processor]:
        return [processor for site in self._sites for processor in site.processors.values()]

    def _remember(self, memories: list[Any]) -> None:
        for processor, memory in zip(self._processors, memories, strict=True):
            processor.memory = memory

    def _prepare(self, prompt: Tensor, layout: TokenLayout, batch: int, device: torch.device) -> None:
        """Let the processors remember the latest forward and tell them which call this one is."""
        for processor in self._processors:
            processor.keep()
            if self._state.is_training:
                processor.memory = None
        if self._state.is_training:
            return
        if self._forced is None:
            self._steps.number_prompt(prompt)
        call = replace(self._steps.call, is_comparing=self._forced is not None)
        for processor in self._processors:
            processor.prepare(call, layout, batch, device)

    def _text_mask(self, adapter: Adapter, arguments: Mapping[str, Any], batch: int) -> Tensor | None:
        """Which text tokens are no padding, bool [B, text] on the CPU; None where none is."""
        mask = None if adapter.text_mask is None else adapter.text_mask(arguments)
        if mask is None:
            return None
        mask = mask.bool().cpu().expand(batch, -1)  # several videos of a prompt share its mask
        return None if bool(mask.all()) else mask

    def _groups(
        self, adapter: Adapter, layout: TokenLayout, mask: Tensor | None, device: torch.device
    ) -> tuple[Group, ...]:
        if mask is None:
            return (Group(None, None, layout.text, self._plan(adapter, layout, layout.text, device)),)
        kinds, which = mask.unique(dim=0, return_inverse=True)
        groups = []
        for number, kept in enumerate(kinds):
            tokens = torch.ones(layout.tokens, dtype=torch.bool, device="cpu")
            tokens[layout.text_slice] = kept
            text = int(kept.sum())
            queries = replace(layout, text=text) if adapter.drops_padding else layout
            rows = (which == number).nonzero().flatten()
            plan = self._plan(adapter, queries, text, device)
            groups.append(Group(rows.to(device), tokens.nonzero().flatten().to(device), text, plan))
        return tuple(groups)

    def _plan(self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device) -> Any:
        """Make a plan once for each geometry: every layer and step uses the same tensors."""
        phase = self._phase
        key = (adapter.model, layout, text, str(device), phase)
        if key not in self._plans:
            # A plan made under torch.inference_mode must serve training as well. It is made on the CPU
            # whatever the default device: its generators live there.
            with torch.inference_mode(False), torch.device("cpu"):
                self._plans[key] = self.config.plan(adapter, layout, text, device, phase)
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _count_work(self, site: Site, hidden_states: Tensor, layout: TokenLayout) -> None:
        """Count here, not in the processors: a counter there would recompile the model at every step."""
        work, dense_work = self._pairs(site, len(hidden_states), weighted=True)
        self._dense_flops += 4 * dense_work
        self._flops += 4 * (work if self._state.sparse else dense_work)
        self._calls += len(site.layers)
        if self._state.sparse:
            self._sparse_calls += len(site.layers)
            self._backend = self._chosen_backend(site, hidden_states, layout)

    def _pairs(self, site: Site, batch: int, *, weighted: bool = False) -> tuple[int, int]:
        """Query-key pairs of one head over all layers and samples, planned and dense; times the width."""
        kept = dense = 0
        for name, layer in site.layers.items():
            layout, factor = site.processors[name].layout, layer.inner_dim if weighted else 1
            for group in self._state.groups:
                samples = factor * (batch if group.rows is None else len(group.rows))
                text = min(group.text, layout.text)
                queries = replace(layout, text=text) if site.adapter.drops_padding else layout
                kept += samples * self.config.pairs(queries, text, group.plan)
                dense += samples * queries.tokens**2
        return kept, dense

    def _chosen_backend(self, site: Site, hidden_states: Tensor, layout: TokenLayout) -> str:
        group = next(group for group in self._state.groups if group.plan is not None)
        layer = next(iter(site.layers.values()))
        batch = len(hidden_states) if group.rows is None else len(group.rows)
        queries = group.text if site.adapter.drops_padding else layout.text
        query, key = (
            hidden_states.new_empty(()).expand(
                batch, layout.image + text, layer.heads, layer.inner_dim // layer.heads
            )
            for text in (queries, group.text)
        )
        return self.config.chosen_backend(query, key, replace(layout, text=queries), group.plan)


@dataclass(frozen=True, eq=False)
class Checkpointing:
    """What a model checkpoints its blocks with while a handle is applied."""

    handle: Handle
    original: Callable[..., Any]

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        return self.handle._checkpoint(self.original, block, *args)


def checkpointing_of(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules that can checkpoint their blocks, and with what."""
    functions = ((x, vars(x).get("_gradient_checkpointing_func")) for x in model.modules())
    return [(module, function) for module, function in functions if function is not None]


def handles_of(function: Callable[..., Any]) -> list[Handle]:
    """The handles between a model and its gradient checkpointing."""
    handles = []
    while isinstance(function, Checkpointing):
        handles.append(function.handle)
        function = function.original
    return handles


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
    return Handle(sites, processor, config, method, dense_steps, target)


def handles(pipe_or_transformer: Any) -> list[Handle]:
    """Return the handles applied to a pipeline or transformer, also those that nobody has kept."""
    modules = (module for entry in entries_of(pipe_or_transformer) for module in entry.modules())
    processors = (getattr(module, "processor", None) for module in modules)
    found = (p.handle for p in processors if isinstance(p, Processor) and not p.state.is_removed)
    return list({id(handle): handle for handle in found if handle is not None}.values())
