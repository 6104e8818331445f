"""What the attention processors of all methods share: project as the model does, attend by a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from zoo import ops
from zoo.diffusion.adapters import Adapter
from zoo.diffusion.steps import Call
from zoo.errors import ConfigError, did_you_mean
from zoo.layers.tokens import TokenLayout


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
    with dense attention, `errors` takes what each layer finds. `is_read`: this is of the forward that runs,
    not of one before. `is_removed`: none of it holds any more.
    `task` is the backward in which this forward runs, -1 for none, and `kind` what it shares with others
    that attend alike; `live` are those kinds of forwards with a gradient that backward may still ask for.
    """

    sparse: bool = False
    is_training: bool = False
    layout: TokenLayout | None = None
    groups: tuple[Group, ...] = ()
    errors: dict[str, float] | None = None
    is_read: bool = False
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
        if torch.compiler.is_compiling():
            return compute()
        task = running_backward()
        if task == self.state.task:
            if task == -1 and not self.state.is_read:
                raise self.unread(hidden_states.shape[1])
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
                out = self.compared(out, self.dense_as_model(query, key, value, mask, layout))
        else:
            raise ConfigError(
                f"attention_mask must be None for {type(self).__name__}, found one of shape "
                f"{tuple(mask.shape)}; leave it out or remove the handle"
            )
        return self.adapter.output(attn, out.flatten(2, 3).to(query.dtype), encoder_hidden_states)

    def compared(self, out: Tensor, dense: Tensor) -> Tensor:
        """Write down how far a sparse result is from the dense one, and go on with that."""
        self.state.errors[self.name] = relative_error(out, dense)
        return dense

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Register what this layer needs beside its processor; the handle removes it."""
        return []

    def prepare(self, call: Call, layout: TokenLayout, batch: int, device: torch.device) -> None:
        """Before each forward of a generation, outside of any graph: set `memory`, for methods with one."""

    def keep(self) -> None:
        """Before the next forward: remember what the latest one found."""

    @property
    def layout(self) -> TokenLayout | None:
        """Where this layer's tokens lie."""
        layout = self.state.layout
        return replace(layout, text=0) if layout is not None and self.image_only else layout

    def layout_for(self, query: Tensor) -> TokenLayout:
        """The layout, if it is that of these tokens, [B, N, ..]."""
        layout = self.layout
        if layout is None or query.shape[1] != layout.tokens:
            raise self.unread(query.shape[1])
        return layout

    def unread(self, tokens: int) -> ConfigError:
        """For tokens that came without the transformer being called."""
        layout = self.layout if self.state.is_read else None
        return ConfigError(
            f"{type(self).__name__} got {tokens} tokens, found the geometry {layout}; call the transformer "
            "itself, as it was when the handle was applied (compiled?), neither its forward nor its blocks"
        )

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
        samples = sum(len(group.rows) for group in self.state.groups if group.rows is not None)
        if samples not in (0, len(query)):
            raise ConfigError(
                f"{type(self).__name__} got {len(query)} samples, found {samples} prompts with padding (does "
                "FasterCache leave some out?); call disable_cache() or remove the handle"
            )
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


def relative_error(out: Tensor, dense: Tensor) -> float:
    """|out - dense| / |dense|, 0 where they are equal."""
    out, dense = out.float(), dense.float()
    return float((out - dense).norm() / dense.norm().clamp_min(1e-30))


def stock_of(processor: Any) -> Any:
    """What a processor stands for: itself, or the original where its handle was removed."""
    is_removed = isinstance(processor, Processor) and processor.state.is_removed
    return processor.original if is_removed else processor


def check_backend(name: str, op: str) -> None:
    """Raise ConfigError for a backend that an operation does not have."""
    names = ["auto", *(row.backend for row in ops.backends() if row.op == op)]
    if name not in names:
        near = did_you_mean(str(name), names)
        raise ConfigError(f"backend must be one of {', '.join(names)}, found {name!r}{near}")
