"""What all training-free methods share: find layers, swap processors, watch each forward, give all back."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from zoo import ops
from zoo.diffusion.adapters import ADAPTERS, Adapter
from zoo.errors import ConfigError, did_you_mean
from zoo.layers.tokens import TokenLayout

PLANS = 16  # geometries of which a handle keeps the plan
PROMPTS = 4  # of one step: with and without guidance, and those of a generation that was broken off


class Config:
    """What a handle asks of a method's settings; a frozen dataclass of each method is one."""

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that do not suit a token grid of so many axes."""
        raise NotImplementedError

    def layout(self, adapter: Adapter, model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
        """Where the tokens of this forward lie."""
        return adapter.layout(model, arguments)

    def phase(self, step: int) -> Any:
        """What a plan depends on beside the geometry; asked at every forward."""
        return None

    def prompt(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """What tells calls of one step apart, where the processors remember something from step to step."""
        return None

    def plan(self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any) -> Any:
        """Say what is seen of `text` text tokens (no padding) and the image; None: everything by all."""
        raise NotImplementedError

    def pairs(self, layout: TokenLayout, text: int, plan: Any) -> int:
        """Query-key pairs that one head computes."""
        raise NotImplementedError

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: Any) -> str:
        """Name of the backend for a joint sequence [B, N, H, D] of this type and device."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Group:
    """Samples whose prompts are padded alike: `rows` of the batch, `tokens` of the sequence but the padding.

    `rows` and `tokens` are None where all belong to the group and nothing is padding. `text` counts the text
    tokens among `tokens`; `plan` is what the method made of this geometry.
    """

    rows: Tensor | None
    tokens: Tensor | None
    text: int
    plan: Any


@dataclass
class State:
    """What the processors of one handle read; a step number would recompile the model at every step.

    A model in training gets timesteps that are samples, no steps of a generation. While the handle compares
    with dense attention, `errors` takes what each layer finds. `is_removed`: none of it holds any more.
    `task` is the backward in which this forward runs, -1 for none, and `kind` what it shares with others
    that attend alike; `live` are those kinds of forwards with a gradient that backward may still ask for.
    """

    sparse: bool = False
    is_training: bool = False
    layout: TokenLayout | None = None
    groups: tuple[Group, ...] = ()
    errors: dict[str, float] | None = None
    is_removed: bool = False
    task: int = -1
    kind: Any = None
    live: list[State] = field(default_factory=list)

    @contextmanager
    def as_in(self, then: State) -> Iterator[None]:
        """Be for a while what it was then."""
        now = copy(self)
        vars(self).update(vars(then))
        try:
            yield
        finally:
            vars(self).update(vars(now))

    def keep_for_backward(self) -> None:
        """Keep what a block needs that somebody else's checkpoint computes again: two kinds are a doubt."""
        if self.live and self.live[0].task != -1:  # a backward has asked for it
            self.live.clear()
        if len(self.live) < 2 and all(then.kind != self.kind for then in self.live):
            self.live.append(copy(self))

    def of_this_backward(self, *, remembers: bool) -> State:
        """The state of the forward whose block backward computes again, or ConfigError where that is open."""
        if len(self.live) != 1 or (remembers and self.live[0].kind != self.kind):
            raise ConfigError(
                "a checkpoint around a block computes it again in backward, found forwards of several "
                "geometries, steps or modes before it; use enable_gradient_checkpointing() of the model, or "
                "call backward after each of them"
            )
        self.live[0].task = running_backward()
        return self.live[0]


def running_backward() -> int:
    """Number of the backward that is running, -1 for none."""
    return torch._C._current_graph_task_id()


@dataclass(frozen=True)
class Call:
    """Which of the calls of a step a forward is: guidance may need several, with prompts of their own.

    `prompt` numbers the prompt; `has_prompt` says that it is that of the step's first call. A call that
    compares with dense attention is none of a generation.
    """

    prompt: int = 0
    has_prompt: bool = True
    is_first_step: bool = True
    is_first_call: bool = True
    is_comparing: bool = False


class Processor:
    """An attention processor that projects as its model does and attends in a sparse way of its own.

    A sub-class writes `attend`. It is a plain object: a module would add keys to the model's state dict.
    Once its handle is removed it does what the `original` does: diffusers may still have it, to be put back
    by `unfuse_qkv_projections`.
    The parameters of `__call__` have names because diffusers drops every keyword without one.
    """

    # diffusers' `set_attention_backend` and `enable_parallelism` write to these two names.
    _attention_backend = None
    _parallel_config = None
    # Older processors of diffusers know no backends: the process-wide default must not reach them either.
    dispatches = True
    handle: Any = None
    # What `prepare` gave to this forward and what `attend` found in it: another object for every forward.
    memory: Any = None

    def __init__(
        self,
        name: str = "",
        adapter: Adapter | None = None,
        original: Any = None,
        state: State | None = None,
        config: Any = None,
    ) -> None:
        if adapter is None or state is None:
            raise ConfigError(
                f"diffusers wants to make new processors, as for an IP-Adapter, found {type(self).__name__}; "
                "remove the handle before that"
            )
        self.name = name
        self.adapter = adapter
        self.original = original
        self.state = state
        self.config = config
        self.image_only = adapter.image_only is not None and name.endswith(adapter.image_only)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Any:
        if self.state.is_removed:
            given = {
                "encoder_hidden_states": encoder_hidden_states,
                "attention_mask": attention_mask,
                self.adapter.rotary_name: image_rotary_emb,
                "encoder_hidden_states_mask": encoder_hidden_states_mask,
            }
            return self.original(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        compute = partial(
            self.compute, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb,
            encoder_hidden_states_mask,
        )  # fmt: skip
        if torch.compiler.is_compiling() or running_backward() == self.state.task:
            return compute()
        with self.state.as_in(self.state.of_this_backward(remembers=self.memory is not None)):
            return compute()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a block must not take the whole model along."""
        return {**vars(self), "handle": None}

    def compute(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: Any,
        encoder_hidden_states_mask: Tensor | None,
    ) -> Any:
        """Do what the model's own processor does, sparsely where this forward is sparse."""
        query, key, value = self.adapter.project(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )  # [B, N, H, D]
        layout = self.layout_for(query)
        mask = self.adapter.mask(attention_mask, encoder_hidden_states_mask, layout.image)
        if not self.state.sparse:
            out = self.dense_as_model(query, key, value, mask, layout)
        elif mask is None or self.adapter.text_mask is not None:
            out = self.by_group(self.attend, query, key, value, layout)
            if self.state.errors is not None:
                dense = self.dense_as_model(query, key, value, mask, layout)
                error = (out.float() - dense.float()).norm() / dense.float().norm().clamp_min(1e-30)
                self.state.errors[self.name] = float(error)
                out = dense
        else:
            raise ConfigError(
                f"attention_mask must be None for {type(self).__name__}, found one of shape "
                f"{tuple(mask.shape)}; leave it out or remove the handle"
            )
        return self.adapter.output(attn, out.flatten(2, 3).to(query.dtype), encoder_hidden_states)

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Register what this layer needs beside its processor; the handle removes it."""
        return []

    def prepare(self, call: Call, layout: TokenLayout, batch: int, device: torch.device) -> None:
        """Before each forward of a generation, outside of any graph: set `memory`, for methods with one."""

    def keep(self) -> None:
        """Before the next forward: remember what the latest one found."""

    def forget(self, prompt: int) -> None:
        """A generation may begin with this prompt: what is remembered of it is of one before."""

    @property
    def layout(self) -> TokenLayout | None:
        """Where this layer's tokens lie."""
        layout = self.state.layout
        return replace(layout, text=0) if layout is not None and self.image_only else layout

    def layout_for(self, query: Tensor) -> TokenLayout:
        """The layout, if it is that of these tokens, [B, N, ..]."""
        layout = self.layout
        if layout is None or query.shape[1] != layout.tokens:
            raise ConfigError(
                f"{type(self).__name__} got {query.shape[1]} tokens, found the geometry {layout}; call the "
                "transformer itself, neither its forward method nor its blocks"
            )
        return layout

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend as the model would, on the backend chosen in diffusers if it heeds that; [B, N, H, D]."""
        if self.dispatches:
            return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        # Not `ops.attention`: this is the stock processor's own call, bit for bit, with whatever mask it has,
        # and no backend of ours may stand in for it.
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2)

    def dense_as_model(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layout: TokenLayout
    ) -> Tensor:
        """Attend as the model itself would; all [B, N, H, D]."""
        if not self.adapter.drops_padding:
            return self.dense(query, key, value, mask)
        attend = lambda query, key, value, layout, plan: self.dense(query, key, value)  # noqa: E731
        return self.by_group(attend, query, key, value, layout)

    def by_group(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Attend for samples that are padded alike at once, without their padding; all [B, N, H, D]."""
        out = None
        for group in self.state.groups:
            plan = group.plan
            if group.rows is None or self.image_only:
                return attend(query, key, value, layout, plan)
            # Offloading moves the inputs after the groups were made.
            rows, tokens = group.rows.to(query.device), group.tokens.to(query.device)
            part_query, part_key, part_value = (x[rows] for x in (query, key, value))
            part_key, part_value = (x.index_select(1, tokens) for x in (part_key, part_value))
            if self.adapter.drops_padding:
                part_layout = replace(layout, text=group.text)
                part = attend(part_query.index_select(1, tokens), part_key, part_value, part_layout, plan)
                # What is left of the text comes first, zeros after it: as the model does.
                part = functional.pad(part, (0, 0, 0, 0, 0, layout.text - group.text))
            else:
                part = attend(part_query, part_key, part_value, layout, plan)
            out = (torch.zeros_like(query) if out is None else out).index_copy(0, rows, part)
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Any) -> Tensor:
        """Attend sparsely over the joint sequence; keys may hold fewer text tokens; all [B, N, H, D]."""
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


@dataclass(frozen=True)
class Comparison:
    """How far a sparse forward is from the dense one: |sparse - dense| / |dense|, 0 where they are equal.

    `output` is that of the whole transformer; `layers` that of each changed attention, given the queries,
    keys and values of the dense forward; `keep` is the fraction of query-key pairs computed.
    """

    output: float
    layers: dict[str, float]
    keep: float


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


class Handle:
    """A method applied to a pipeline or transformer, until `remove()` or the end of a `with` block.

    A model in training mode is sparse at every call, `dense_steps` or not: it is trained at random times, and
    what was counted or remembered of a generation before is forgotten.
    Steps are counted by changes of the timestep, which guidance does not make; where the scheduler of the
    pipeline that was changed evaluates several times in a step (Heun, KDPM2), by the scheduler. (Another
    pipeline that shares the transformer has a scheduler that is not asked.)
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
                site.hooks.append(
                    site.entry.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                )
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
        return self._step

    def reset(self) -> None:
        """Start counting steps anew.

        Needed where no scheduler tells where a generation begins (a transformer without its pipeline, a
        scheduler without a `step_index`): after one that was broken off, and before one that starts less
        noisy than the last one ended, such as image to image of low strength. Both look like going on.
        """
        self._forget_generation()
        self._state.live.clear()

    def _forget_generation(self) -> None:
        self._step, self._timestep = -1, float("-inf")
        self._scheduler_calls, self._has_begun, self._is_driven = 0, False, False
        self._prompts: list[Tensor] = []
        self._first_prompt = self._next_prompt = 0
        self._call = Call()

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
                if site.layers[name].processor is site.processors.get(name):
                    site.layers[name].processor = original
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
        entry, state = known[0].entry, self._state
        outputs = {}
        try:
            with torch.no_grad():
                # Sparse and dense at every layer, going on with dense: each layer is judged by itself.
                for name in ("dense", "sparse"):
                    self._forced, state.errors = True, {} if name == "dense" else None
                    result = entry(*args, **kwargs)
                    result = result[0] if isinstance(result, tuple) else result.sample
                    outputs[name] = result.float()
                    if name == "dense":
                        layers = state.errors
        finally:
            self._forced = state.errors = None
        dense = outputs["dense"]
        error = (outputs["sparse"] - dense).norm() / dense.norm().clamp_min(1e-30)
        keep, whole = self._pairs(known[0], 1) if state.sparse else (1, 1)
        return Comparison(float(error), layers, keep / whole)

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
    def _before_forward(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = next(site for site in self._sites if site.entry is entry)
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
            self._forget_generation()
        elif self._forced is None:
            is_first_call = self._count_step(arguments["timestep"], rises=site.adapter.timestep_rises)
            self._call = Call(is_first_step=self._step == 0, is_first_call=is_first_call)
        prompt = self.config.prompt(arguments)
        if prompt is not None:
            self._prepare(prompt, layout, batch, hidden_states.device)
        sparse = state.is_training or self._step >= self.dense_steps
        sparse = sparse if self._forced is None else self._forced
        mask = self._text_mask(site.adapter, arguments, batch)
        state.layout = layout
        state.groups = self._groups(site.adapter, layout, mask, hidden_states.device)
        state.sparse = sparse and any(group.plan is not None for group in state.groups)
        state.kind = None
        if torch.is_grad_enabled() and state.task == -1:
            state.kind = (
                site.adapter.model, layout, state.sparse, state.is_training, self._phase,
                None if mask is None else mask.numpy().tobytes(), None if prompt is None else self._call,
            )  # fmt: skip
            state.keep_for_backward()
        if self._forced is None:
            self._count_work(site, hidden_states, layout)

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
        return self.config.phase(max(self._step, 0))

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
            self._number_prompt(prompt)
        call = replace(self._call, is_comparing=self._forced is not None)
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
            tokens = torch.ones(layout.tokens, dtype=torch.bool)
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
            # A plan made under torch.inference_mode must serve training as well.
            with torch.inference_mode(False):
                self._plans[key] = self.config.plan(adapter, layout, text, device, phase)
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _count_step(self, timestep: Any, *, rises: bool) -> bool:
        """Count changes, not calls: guidance calls the model twice per step. A step back is a new generation.

        Frames that are given, not made, may have a timestep of 0 of their own: the noisiest token counts.
        The pipeline's scheduler knows better where it drives the model, that is where it begins and goes on
        with the timesteps: when a generation begins, and how many evaluations a step has, whose timesteps may
        repeat or rise.
        Returns: whether this is the first call of a step.
        """
        now = float(torch.as_tensor(timestep).detach().max())
        now = -now if rises else now
        scheduler = getattr(self._target, "scheduler", None)
        order, begin = getattr(scheduler, "order", 1), getattr(scheduler, "begin_index", None) or 0
        calls = getattr(scheduler, "step_index", None)
        calls = begin if calls is None else calls  # some begin to count at the end of the first step
        goes_on = self._is_driven and calls != self._scheduler_calls
        begins = calls == begin and self._has_begun
        is_new = begins or (now > self._timestep and not goes_on)
        is_change, before = now != self._timestep, self._step
        if is_new:
            self._step, self._is_driven = 0, calls == begin
        elif is_change:
            self._step, self._is_driven = self._step + 1, goes_on
        self._timestep, self._scheduler_calls, self._has_begun = now, calls, calls != begin
        if order == 1 or not self._is_driven:
            return is_new or is_change
        self._step = (calls - begin) // order
        return is_new or self._step != before

    def _number_prompt(self, prompt: Tensor) -> None:
        """Tell prompts apart by what they are: a generation that follows one that was broken off in its first
        step, or had but one, begins at the same timestep and looks like a further call of that step.
        """
        call, prompts = self._call, self._prompts
        kind = lambda x: (x.shape, x.dtype, x.device)  # noqa: E731
        same = (i for i, x in enumerate(prompts) if kind(x) == kind(prompt) and torch.equal(x, prompt))
        number = next(same, None)
        if number is None and call.is_first_step:
            number, self._next_prompt = self._next_prompt, (self._next_prompt + 1) % PROMPTS
            prompts[number : number + 1] = [prompt.detach().clone()]
        elif number is None and call.is_first_call:
            # A prompt that changes on the way goes on with what is remembered of the step before.
            number = self._first_prompt
            prompts[number : number + 1] = [prompt.detach().clone()]
        if call.is_first_step:  # here, because dense steps do not ask the processors to attend
            for processor in self._processors:
                processor.forget(number)
        if call.is_first_call:
            self._first_prompt = number
        has_prompt = number == self._first_prompt
        number = self._first_prompt if number is None else number
        self._call = replace(call, prompt=number, has_prompt=has_prompt)

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


def check_backend(name: str, op: str) -> None:
    """Raise ConfigError for a backend that an operation does not have."""
    names = ["auto", *(row.backend for row in ops.backends() if row.op == op)]
    if name not in names:
        near = did_you_mean(str(name), names)
        raise ConfigError(f"backend must be one of {', '.join(names)}, found {name!r}{near}")


def stock_of(processor: Any) -> Any:
    """What a processor stands for: itself, or the original where its handle was removed."""
    is_removed = isinstance(processor, Processor) and processor.state.is_removed
    return processor.original if is_removed else processor


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


def refuse_context_parallel(model: nn.Module, method: str) -> None:
    """Raise ConfigError where each process holds only a part of the sequence."""
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ConfigError(
            f"{method} attention cannot run with context parallelism, found it enabled on "
            f"{type(model).__name__}; load the model without it"
        )
