#!/usr/bin/env python
"""Operations on a CPU against the usual ways to write them: time and memory, as ratios.

    python scripts/bench/ops_cpu.py                  the table
    python scripts/bench/ops_cpu.py --check          exit status 1 where a goal is missed
    python scripts/bench/ops_cpu.py --json FILE      the figures, with versions and date

Each side has processes of its own, in turns: as in a program that uses only one of them, what it finds in the
caches and which memory it gets back is its own doing. One thread, CPU time, and the median of all calls, on a
machine that does nothing else: whether a copy finds memory at hand or waits for pages differs from process
to process, so the fastest call is not the usual one. Where both sides make nearly the same calls, processes
differ by more than the sides do: those, "in turns", share processes and take turns, call by call. "In the
model" is the time inside the operation, all its calls of a forward pass together, while the model runs around
it and uses caches and memory. Only ratios mean something. Memory is what one forward pass adds to the peak of
a fresh process (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from published import (
    attend_between_channels,
    attend_in_windows,
    attend_through_agents,
    attend_to_samples,
    gather_regions,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import zoo
from zoo import ops

torch.set_num_threads(1)

WIDTH = 32  # channels per head
ROUNDS = 3  # processes of either side


@dataclass(frozen=True)
class Case:
    """One shape; a goal is the least ratio that `--check` accepts."""

    name: str
    grid: tuple[int, ...]
    heads: int
    kernel_size: int = 7
    dilation: int = 1
    rpb: bool = False
    batch: int = 1
    forward_goal: float | None = None
    training_goal: float | None = None


CASES = [
    Case("56x56", (56, 56), 2, forward_goal=7.0, training_goal=6.0),
    Case("56x56, batch 8", (56, 56), 2, batch=8),
    Case("56x56 with bias", (56, 56), 2, rpb=True),
    Case("56x56 with bias, batch 8", (56, 56), 2, rpb=True, batch=8),
    Case("56x56 dilation 8", (56, 56), 2, dilation=8),
    Case("28x28", (28, 28), 4),
    Case("14x14", (14, 14), 8),
    Case("14x14 with bias, batch 8", (14, 14), 8, rpb=True, batch=8),
    Case("1-D 4096, kernel 33", (4096,), 2, kernel_size=33),
    Case("3-D 8x16x16, kernel 3", (8, 16, 16), 2, kernel_size=3),
]


@dataclass(frozen=True)
class RoutedCase:
    """One shape of bi-level routing attention, 7 x 7 regions."""

    name: str
    side: int
    heads: int
    topk: int
    batch: int = 2
    forward_goal: float | None = None
    training_goal: float | None = None


ROUTED_CASES = [
    RoutedCase("routed 56x56, 1 region", 56, 2, 1, training_goal=4.5),
    RoutedCase("routed 56x56, 1 region, batch 8", 56, 2, 1, batch=8, training_goal=4.5),
    RoutedCase("routed 56x56, 4 regions", 56, 2, 4),
    RoutedCase("routed 56x56, 4 regions, batch 8", 56, 2, 4, batch=8, forward_goal=2.4, training_goal=4.5),
    RoutedCase("routed 28x28, 4 regions", 28, 4, 4),
    RoutedCase("routed 14x14, 16 regions", 14, 8, 16, forward_goal=2.4, training_goal=4.5),
]
REGIONS = 7
MEMORY_GRID, MEMORY_GOAL = (112, 112), 4.0
ROUTED_MEMORY, ROUTED_MEMORY_GOAL = RoutedCase("", 112, 2, 16, batch=1), 4.0


@dataclass(frozen=True)
class ModelCase:
    """A model on images of 224 x 224: all of it, or its attention on maps of one size alone."""

    name: str
    model: str
    op: str
    grid: tuple[int, int] | None = None
    batch: int = 8
    forward_goal: float | None = None
    training_goal: float | None = None


MODEL_CASES = [
    ModelCase("nat_mini, 8 images", "nat_mini", "neighborhood_attention", forward_goal=2.5),
    ModelCase("biformer_tiny, 8 images", "biformer_tiny", "bilevel_routing_attention"),
    ModelCase(
        "routed 56x56, 1 region, batch 8, in the model",
        "biformer_tiny",
        "bilevel_routing_attention",
        grid=(56, 56),
        forward_goal=2.4,
    ),
    ModelCase("14x14 with bias, in the model", "nat_mini", "neighborhood_attention", (14, 14), batch=1),
    *(
        ModelCase(
            f"routed {side}x{side}, in the model",
            "biformer_tiny",
            "bilevel_routing_attention",
            (side, side),
            2,
        )
        for side in (56, 28, 14)
    ),
]


@dataclass(frozen=True)
class PlainCase:
    """An operation on a square map, as a model's projection leaves q, k and v, against another form of it."""

    op: str
    form: str
    side: int
    heads: int
    count: int  # of agents, samples or other keys, or the side of a window; no matter to channels
    batch: int = 2
    in_turns: bool = False  # both sides in the same processes
    forward_goal: float | None = None
    training_goal: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        batch = "" if self.batch == 2 else f", batch {self.batch}"
        turns = ", in turns" if self.in_turns else ""
        return f"{self.op.removesuffix('_attention')} {self.side}x{self.side}{batch}, {self.form}{turns}"


PLAIN_CASES = [
    PlainCase("window_attention", "published", 56, 3, 7, forward_goal=1.0, training_goal=1.0),
    PlainCase("window_attention", "published", 56, 3, 7, batch=8, forward_goal=1.0, training_goal=1.0),
    *(
        PlainCase("channel_attention", form, side, heads, 0, batch, form == "einsum", forward_goal=0.95)
        for batch, side, heads in ((2, 56, 3), (8, 56, 3), (8, 28, 6), (8, 14, 12))
        for form in ("published", "einsum")
    ),
    *(
        PlainCase("agent_attention", form, side, heads, count, batch, form == "fused", forward_goal=0.95)
        for batch, side, heads, count in ((2, 56, 3, 9), (8, 56, 3, 9), (8, 28, 6, 16), (8, 14, 12, 49))
        for form in ("published", "fused")
    ),
    PlainCase("attention", "fused", 64, 8, 77, 2, in_turns=True, forward_goal=1.0, training_goal=1.0),
    PlainCase("deformable_attention", "published", 56, 2, 49, forward_goal=1.0, training_goal=1.0),
]
ALL_CASES = {case.name: case for case in (*CASES, *ROUTED_CASES, *MODEL_CASES, *PLAIN_CASES)}


# The implementation to beat ---------------------------------------------------------------------------------


@lru_cache
def _indices(grid: tuple[int, ...], kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Keys of every query and their places in the bias table, both [N, kernel_size ** rank]."""
    keys = ops.neighborhood_indices(grid, kernel_size, dilation=dilation)
    place, step = torch.zeros_like(keys), len(keys)
    for length in grid:
        step //= length
        apart = keys // step % length - torch.arange(len(keys))[:, None] // step % length
        place = place * (2 * kernel_size - 1) + apart // dilation + kernel_size - 1
    return keys, place


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    *,
    dilation: int = 1,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """Copy the keys and values of every query side by side, then two products: how it is usually written.

    Of five ways to write the copies this was the fastest; the indices are counted as known.
    """
    grid = tuple(q.shape[1:-2])
    keys, place = _indices(grid, kernel_size, dilation)
    q, k, v = (x.flatten(1, -3).transpose(1, 2).contiguous() for x in (q, k, v))  # [B, H, N, D]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhnd,bhnkd->bhnk", q * scale, k[:, :, keys])
    if rpb is not None:
        logits = logits + rpb.flatten(1)[:, place]
    out = torch.einsum("bhnk,bhnkd->bhnd", logits.softmax(-1), v[:, :, keys])
    return out.transpose(1, 2).unflatten(1, grid)


def channels_by_einsum(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention between channels without a transposed copy, the fastest plain form where heads are wide."""
    weights = (torch.einsum("bnhd,bnhe->bhde", q, k) * scale).softmax(dim=-1)
    return torch.einsum("bhde,bnhe->bnhd", weights, v)


def agents_by_fused_calls(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, bias_in: Tensor, bias_out: Tensor
) -> Tensor:
    """Attention through agents as two calls of PyTorch's own attention."""
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    gathered = scaled_dot_product_attention(agents, k, v, attn_mask=bias_in)
    return scaled_dot_product_attention(q, agents, gathered, attn_mask=bias_out).transpose(1, 2)


def attend_by_fused_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention, heads last."""
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


SIDES = ("usual", "cpu")
OPERATIONS = {
    "neighborhood_attention": {"usual": gather, "cpu": ops.neighborhood_attention},
    "bilevel_routing_attention": {"usual": gather_regions, "cpu": ops.bilevel_routing_attention},
    "window_attention": {"published": attend_in_windows, "cpu": ops.window_attention},
    "channel_attention": {
        "published": attend_between_channels,
        "einsum": channels_by_einsum,
        "cpu": ops.channel_attention,
    },
    "agent_attention": {
        "published": attend_through_agents,
        "fused": agents_by_fused_calls,
        "cpu": ops.agent_attention,
    },
    "attention": {"fused": attend_by_fused_call, "cpu": ops.attention},
    "deformable_attention": {"published": attend_to_samples, "cpu": ops.deformable_attention},
}


def routed_inputs(case: RoutedCase) -> list[Tensor]:
    """q, k and v of the case and random routes, the same at every call."""
    torch.manual_seed(0)
    shape, parts = (case.batch, case.side, case.side, case.heads, WIDTH), REGIONS**2
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    return [*inputs, torch.rand(case.batch, parts, parts).argsort(-1)[..., : case.topk]]


# Time -------------------------------------------------------------------------------------------------------


class Clock:
    """CPU time of this process, in milliseconds."""

    def __init__(self) -> None:
        self.spent = 0.0

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.spent += 1e3 * (time.process_time() - self.start)


def calls(case: Case | RoutedCase | ModelCase, side: str, clock: Clock) -> dict[str, Callable[[], Tensor]]:
    """What is timed of one side, by `clock`: `forward` and `training`, both return the output."""
    torch.manual_seed(0)
    if isinstance(case, ModelCase):
        return _model_calls(case, side, clock)
    if isinstance(case, PlainCase):
        leaves, function = _plain_call(case, side)
    elif isinstance(case, RoutedCase):
        *leaves, routes = routed_inputs(case)
        function = partial(OPERATIONS["bilevel_routing_attention"][side], *leaves, routes, REGIONS)
    else:
        shape = (case.batch, *case.grid, case.heads, WIDTH)
        leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        function = partial(OPERATIONS["neighborhood_attention"][side], *leaves, case.kernel_size)
        function = partial(function, dilation=case.dilation)
        if case.rpb:
            sides = (2 * case.kernel_size - 1,) * len(case.grid)
            leaves.append(torch.randn(case.heads, *sides, requires_grad=True))
            function = partial(function, rpb=leaves[-1])
    with torch.no_grad():
        grad = torch.randn_like(function())

    def forward() -> Tensor:
        with clock, torch.no_grad():
            return function()

    def training() -> Tensor:
        with clock:
            out = function()
            torch.autograd.grad(out, leaves, grad)
        return out

    return {"forward": forward, "training": training}


def _plain_call(case: PlainCase, side: str) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """What wants gradients, and the operation of it as a model calls it: biases come from tables."""
    tokens, heads, count = case.side**2, case.heads, case.count
    packed = torch.randn(case.batch, case.side, case.side, 3, heads, WIDTH)
    keys, leaves = torch.randn(2, case.batch, count, heads, WIDTH), [packed]
    operation = OPERATIONS[case.op]["cpu" if side == "cpu" else case.form]
    if case.op == "window_attention":
        leaves.append(torch.randn(heads, count**2, count**2))
    elif case.op == "agent_attention":
        leaves += [keys[0], torch.randn(1, heads, count, tokens), torch.randn(1, heads, tokens, count)]
    elif case.op == "attention":  # to a text, say
        leaves += [*keys]
    elif case.op == "deformable_attention":
        reach = 2 * case.side - 1
        # A small table, as models have: the two sides round where they read it differently.
        table = 0.1 * torch.randn(heads, reach, reach)
        leaves += [*keys, torch.rand(case.batch, 1, count, 2) * 2 - 1, table]

    def call() -> Tensor:
        q, k, v = packed.unbind(3)
        others = [x * 1.0 for x in leaves[1:]]  # what a model has computed is no parameter
        if case.op == "window_attention":
            return operation(q, k, v, count, bias=others[0])
        if case.op == "attention":
            return operation(q.flatten(1, 2), *others)
        if case.op == "deformable_attention":
            return operation(q, *others)
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
        if case.op == "channel_attention":
            return operation(q, k, v, scale=tokens**-0.5)
        return operation(q, k, v, others[0], bias_in=others[1], bias_out=others[2])

    return [x.requires_grad_() for x in leaves], call


def _model_calls(case: ModelCase, side: str, clock: Clock) -> dict[str, Callable[[], Tensor]]:
    """The model with this side inside, which stays there."""
    model = zoo.create_model(case.model).eval()
    images = torch.randn(case.batch, 3, 224, 224)
    attention = OPERATIONS[case.op][side]

    def attend(q: Tensor, *others: object, **options: object) -> Tensor:
        given = {name: option for name, option in options.items() if option is not None}
        with clock if tuple(q.shape[1:3]) == case.grid else nullcontext():
            return attention(q, *others, **given)

    setattr(ops, case.op, attend)
    whole = clock if case.grid is None else nullcontext()

    def forward() -> Tensor:
        with whole, torch.no_grad():
            return model(images)

    def training() -> Tensor:
        model.zero_grad()
        with whole:
            out = model(images)
            out.square().mean().backward()
        return out

    return {"forward": forward} if case.grid else {"forward": forward, "training": training}


def times(name: str, sides: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """CPU time of every call in milliseconds, `cpu forward` and so on, each kind for so long, three times at
    least. Several sides take turns."""
    taken, clock = defaultdict(list), Clock()
    kinds = {side: calls(ALL_CASES[name], side, clock) for side in sides}
    for what in kinds[sides[0]]:
        for side in sides:
            kinds[side][what]()
        turns, end = 0, time.perf_counter() + seconds * len(sides)
        while turns < 3 or (time.perf_counter() < end and turns < 100):
            for side in sides if turns % 2 else sides[::-1]:
                clock.spent = 0.0
                kinds[side][what]()
                taken[f"{side} {what}"].append(clock.spent)
            turns += 1
    return taken


def measure_times(name: str, seconds: float) -> dict[str, float]:
    """Milliseconds of both sides, `cpu forward` and so on, in processes of their own or in turns."""
    taken = defaultdict(list)
    in_turns = getattr(ALL_CASES[name], "in_turns", False)
    for sides in [",".join(SIDES)] * ROUNDS if in_turns else SIDES * ROUNDS:
        for what, some in _ask("--time", name, sides, str(seconds / len(SIDES) / ROUNDS / 2)).items():
            taken[what] += some
    outs = _ask("--compare", name)
    if outs["error"] is not None:
        raise AssertionError(f"{name}: {outs['error']}")
    return {what: median(all_calls) for what, all_calls in taken.items()}


def compare(name: str) -> str | None:
    """How the outputs of both sides differ, None where they agree."""
    outs = [calls(ALL_CASES[name], side, Clock())["forward"]() for side in SIDES]
    try:
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    except AssertionError as error:
        return str(error)
    return None


def _ask(*question: str) -> dict:
    """What a fresh process answers."""
    answer = subprocess.run([sys.executable, __file__, *question], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(question)} failed:\n{answer.stderr}")
    return json.loads(answer.stdout)


# Memory -----------------------------------------------------------------------------------------------------


def peak_of_forward(side: str) -> int:
    """Bytes that one forward pass adds to the peak of this process; call it in a fresh one."""
    small, large = ([torch.randn(1, *grid, 2, WIDTH) for _ in range(3)] for grid in ((28, 28), MEMORY_GRID))
    attention = OPERATIONS["neighborhood_attention"][side]
    with torch.no_grad():
        attention(*small, 7)  # loads what is loaded once
        _indices(MEMORY_GRID, 7, 1)  # either side's tables count as known
        ops.explain("neighborhood_attention", *large, 7)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        attention(*large, 7)
        return _memory("VmHWM") - before


def peak_of_routed_training(side: str) -> int:
    """Bytes that forward and backward of attention to regions add to the peak of this process."""
    attention = OPERATIONS["bilevel_routing_attention"][side]
    for case in (replace(ROUTED_MEMORY, side=28), ROUTED_MEMORY):
        *leaves, routes = routed_inputs(case)
        grad = torch.ones_like(leaves[0])
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        torch.autograd.grad(attention(*leaves, routes, REGIONS), leaves, grad)
    return _memory("VmHWM") - before


PEAKS = {"neighborhood": peak_of_forward, "routed": peak_of_routed_training}


def _memory(field: str) -> int:
    """Bytes of this process. (`ru_maxrss` would include the peak of the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_memory(of: str) -> dict[str, float]:
    """Megabytes of both sides."""
    return {f"{side} peak": _ask("--peak", of, side)["bytes"] / 2**20 for side in SIDES}


# Report -----------------------------------------------------------------------------------------------------


def _row(name: str, what: str, figures: dict[str, float], unit: str, goal: float | None) -> dict:
    theirs, ours = figures[f"usual {what}"], figures[f"cpu {what}"]
    ratio = theirs / max(ours, 1e-3)
    return {
        "case": name,
        "what": what,
        "unit": unit,
        "usual": round(theirs, 2),
        "cpu": round(ours, 2),
        "ratio": round(ratio, 2),
        "goal": goal,
        "reached": goal is None or ratio >= goal,
    }


def measure(only: str | None, seconds: float) -> list[dict]:
    """All rows of the report; `only` keeps the cases whose name contains it."""
    rows = []
    for name, case in ALL_CASES.items():
        if only is None or only in name:
            figures = measure_times(name, seconds)
            for what, goal in (("forward", case.forward_goal), ("training", case.training_goal)):
                if f"cpu {what}" in figures:
                    rows.append(_row(name, what, figures, "ms", goal))
    side, topk = ROUTED_MEMORY.side, ROUTED_MEMORY.topk
    memory = {
        "neighborhood": (f"memory at {'x'.join(map(str, MEMORY_GRID))}", MEMORY_GOAL),
        "routed": (f"routed memory of training at {side}x{side}, {topk} regions", ROUTED_MEMORY_GOAL),
    }
    for of, (name, goal) in memory.items():
        if sys.platform == "linux" and (only is None or only in name):
            rows.append(_row(name, "peak", measure_memory(of), "MB", goal))
    return rows


def _processor() -> str:
    """The processor's name where Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each case (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--time", nargs=3, help=argparse.SUPPRESS)  # these three are asked of fresh processes
    parser.add_argument("--compare", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        name, sides, seconds = options.time
        print(json.dumps(times(name, sides.split(","), float(seconds))))
        return 0
    if options.compare:
        print(json.dumps({"error": compare(options.compare)}))
        return 0
    if options.peak:
        of, side = options.peak
        print(json.dumps({"bytes": PEAKS[of](side)}))
        return 0

    rows = measure(options.only, options.seconds)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "torch": torch.__version__,
        "threads": 1,
        "cases": [asdict(case) for case in ALL_CASES.values()],
    }
    title = (
        f"the usual way and cpu, one thread of {about['processor']}, torch {about['torch']}, {about['date']}"
    )
    table = Table("case", "what", "usual", "cpu", "unit", "times less", "goal", title=title)
    for row in rows:
        colour = "green" if row["reached"] else "red"
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        ratio = f"[{colour}]{row['ratio']:.1f}[/]"
        table.add_row(
            row["case"], row["what"], f"{row['usual']:.1f}", f"{row['cpu']:.1f}", row["unit"], ratio, goal
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    missed = [f"{row['case']} {row['what']}" for row in rows if not row["reached"]]
    if missed and options.check:
        print(f"goal missed: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
