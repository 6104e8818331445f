"""Compiled blocks: at most one graph for dense and one for sparse steps, whatever the method remembers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from tiny_diffusion import (
    FLUX,
    HUNYUAN,
    SD15,
    TEXT,
    WAN,
    Tiny,
    conditioned_inputs,
    noise,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from zoo import diffusion

pytestmark = pytest.mark.slow

STEPS = 8
RADIAL = {"block_size": 4, "decimation_threshold": 8}
CONDITIONS = {"conditions": ("spatial", "subject")}
KEYWORDS = {**CONDITIONS, "keywords": [[2, 3]], "epsilon": 0.5}


@dataclass(frozen=True)
class Case:
    """A method on a model. Agent attention has two sparse phases: it is counted without dense steps."""

    name: str
    tiny: Tiny
    apply: Callable[..., Any]
    dense_steps: int = 3
    guidance: tuple[str, ...] = ("batched", "split")

    def __repr__(self) -> str:
        return self.name

    @property
    def has_conditions(self) -> bool:
        return self.name.startswith(("pka", "group"))

    def inputs(self, step: int, seed: int, batch: int) -> dict[str, Any]:
        timestep = 900.0 - 100 * step
        if self.has_conditions:
            inputs = conditioned_inputs(timestep=timestep / 1000, batch=batch)
        else:
            inputs = self.tiny.inputs(self.tiny.small, timestep=timestep, batch=batch)
        width = inputs["encoder_hidden_states"].shape[-1]
        return {**inputs, "encoder_hidden_states": noise(batch, TEXT, width, seed=seed)}


CASES = [
    Case("radial-wan", WAN, lambda m, **k: diffusion.apply_radial_attention(m, **RADIAL, **k)),
    Case(
        "radial-hunyuan", HUNYUAN, lambda m, **k: diffusion.apply_radial_attention(m, **RADIAL, **k),
        guidance=("batched",),
    ),
    Case("neighborhood-flux", FLUX, lambda m, **k: diffusion.apply_neighborhood(m, 3, **k)),
    Case("pka-every-step", FLUX, lambda m, **k: diffusion.apply_pka(m, **KEYWORDS, **k)),
    Case(
        "pka-first-step", FLUX,
        lambda m, **k: diffusion.apply_pka(m, **KEYWORDS, refresh="once", share_routing=True, **k),
        guidance=("split",),
    ),
    Case("group-mask", FLUX, lambda m, **k: diffusion.apply_group_mask(m, "omini", **CONDITIONS, **k)),
    Case("agent", SD15, lambda m, **k: diffusion.apply_agent(m, early_steps=3, **k), dense_steps=0),
]  # fmt: skip


@torch.no_grad()
def generate(case: Case, model: nn.Module, guidance: str, handle: Any, *, steps: int = STEPS) -> list[Tensor]:
    """A generation with both prompts in a batch, or one after the other."""
    calls = [(1, 2)] if guidance == "batched" else [(1, 1), (2, 1)]
    with handle:
        return [
            model(**case.inputs(step, seed, batch))[0].clone()
            for step in range(steps)
            for seed, batch in calls
        ]


def compiled(model: nn.Module) -> tuple[nn.Module, dict[str, CompileCounter]]:
    """As `compile_repeated_blocks`, but the graphs of each kind of block with attention are counted apart."""
    counters = {}
    for module in model.modules():
        kind = type(module).__name__
        if kind in model._repeated_blocks and any(hasattr(m, "processor") for m in module.modules()):
            counter = counters.setdefault(kind, CompileCounter())
            module.compile(backend=counter, fullgraph=True)
    return model, counters


@cache
def stock_graphs(tiny: Tiny, has_conditions: bool, guidance: str) -> dict[str, int]:
    """Of each kind of block of the model alone."""
    case = Case("pka" if has_conditions else "stock", tiny, nullcontext)
    model, counters = compiled(tiny.build(2))
    generate(case, model, guidance, nullcontext(), steps=2)
    torch.compiler.reset()
    return {kind: counter.frame_count for kind, counter in counters.items()}


@pytest.mark.parametrize(
    ("case", "guidance"),
    [(case, guidance) for case in CASES for guidance in case.guidance],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_each_kind_of_block_has_one_graph_for_dense_and_one_for_sparse_steps(case, guidance):
    stock = stock_graphs(case.tiny, case.has_conditions, guidance)
    model, counters = compiled(case.tiny.build(2))
    found = generate(case, model, guidance, case.apply(model, dense_steps=case.dense_steps))
    torch.compiler.reset()
    for kind, counter in counters.items():
        # The stock model needs more than one where blocks of a kind get inputs of other shapes or strides.
        assert 1 <= counter.frame_count <= 2 * stock[kind], kind
    model = case.tiny.build(2)
    wanted = generate(case, model, guidance, case.apply(model, dense_steps=case.dense_steps))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5
