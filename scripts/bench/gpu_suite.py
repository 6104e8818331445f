#!/usr/bin/env python
"""Every Triton kernel on one GPU in under 9 minutes: right against float64, then timed against named peers.

    python scripts/bench/gpu_suite.py                    all of it
    python scripts/bench/gpu_suite.py --only segments    the cases whose names contain this
    python scripts/bench/gpu_suite.py --list             the cases and whether they have a Triton kernel
    python scripts/bench/gpu_suite.py --compile-only     no GPU: compile all that would be launched
    python scripts/bench/gpu_suite.py --adopt FILE       take the tile sizes that a run found best

Needs torch, Triton and NumPy; a checkout need not be installed (`import zoo` finds the kernels beside it).
A kernel that breaks the device's context is noted, and the run begins again behind it with a new one.
Steps: ceilings of the device; compilation in parallel, in processes that see no GPU; every case at small
sizes against the definition in float64, and no clock for a case that is wrong; tile sizes; times, each the
median of CUDA-graph replays over fresh inputs, ours and the peers' in turn. The results are written after
every figure, to scripts/bench/results/<device>.json unless said.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402
from gpu_cases import CASES, Case, Leaves, Maker, Problem, installed  # noqa: E402
from torch import Tensor  # noqa: E402

from zoo.kernels import configs, dispatch  # noqa: E402

RESULTS = ROOT / "scripts" / "bench" / "results"
SECONDS = 520  # the whole run; what does not fit is listed as left out
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUT_SETS = 3  # in turn, so that none is still in the cache
EXPS = 3.7e12  # exponentials a second of one H200, from its 16 per clock and multiprocessor


# Results ----------------------------------------------------------------------------------------------------


class Results:
    """What is known so far; on the disk after every figure. `end` is that of a run that goes on."""

    def __init__(self, path: Path, about: dict[str, Any], end: float | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "about": about, "ceilings": {}, "compiled": {}, "checks": [], "tuned": None, "rows": [],
            "left_out": [],
        }  # fmt: skip
        if end is not None:
            self.found = json.loads(path.read_text())
        self.end = time.monotonic() + SECONDS if end is None else end

    def seconds_left(self) -> float:
        """Until the run must end."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Write what is known."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def keep(self, compiled: dict[str, dict[str, Any]]) -> None:
        """Write what was compiled so far."""
        self.found["compiled"] = compiled
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        """Note what was not done."""
        print(f"left out: {what}: {why}", flush=True)
        self.found["left_out"].append({"what": what, "why": why})
        self.save()


def about_device() -> dict[str, Any]:
    """Versions, device and clocks, so that figures can be compared."""
    versions = {name: _version(name) for name in ("torch", "triton", "natten", "xformers", "flash-attn")}
    clocks = "clocks.max.sm,clocks.max.mem,power.limit,driver_version"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "processors": torch.cuda.get_device_properties(0).multi_processor_count,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        clocks: _output("nvidia-smi", f"--query-gpu={clocks}", "--format=csv,noheader"),
        **{name: found for name, found in versions.items() if found},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# The clock --------------------------------------------------------------------------------------------------


def milliseconds(runs: list[Callable[[], object]], seconds: float = 0.4) -> dict[str, Any]:
    """Median, 20th and 80th percentile of one run; the runs do the same on other inputs and go in turn."""
    for run in runs:
        run()  # compiles, and allocates what a graph may not
    torch.cuda.synchronize()
    try:
        replays, how = [_graph(run) for run in runs], "CUDA graph"
    except Exception as error:  # what waits for the device cannot be in a graph
        torch.cuda.synchronize()
        replays, how = runs, f"launched one by one, no graph: {type(error).__name__}"
    marks = []
    end = time.monotonic() + seconds
    while len(marks) < 12 or (time.monotonic() < end and len(marks) < 300):
        for replay in replays:
            begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            stop.record()
            marks.append((begin, stop))
        torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(stop) for begin, stop in marks)
    low, high = times[len(times) // 5], times[-1 - len(times) // 5]
    return {"ms": statistics.median(times), "p20": low, "p80": high, "how": how}


def _graph(run: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ceilings() -> dict[str, float]:
    """Bytes and floating point operations a second that this device reaches."""
    x = torch.randn(2**29, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copied = milliseconds([lambda: y.copy_(x)])["ms"]
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product_ms = milliseconds([lambda: a @ b])["ms"]
    return {
        "bytes": 2 * x.numel() * x.element_size() / copied * 1e3,
        "flops": 2 * 8192**3 / product_ms * 1e3,
        "exps": EXPS,
    }


def floor_of(problem: Problem, limits: dict[str, float]) -> tuple[float, str]:
    """Milliseconds that the forward pass takes at least, and what bounds it."""
    needs = {"bytes": problem.moved, "flops": problem.flops, "exps": problem.exps}
    what = max(needs, key=lambda name: needs[name] / limits[name])
    return needs[what] / limits[what] * 1e3, what


# Forward and training ---------------------------------------------------------------------------------------


def first(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output without its LSE."""
    return result if isinstance(result, Tensor) else result[0]


def forward(compute: Callable[[Leaves], Any], leaves: Leaves) -> Tensor:
    """One forward pass."""
    with torch.no_grad():
        return first(compute(leaves))


def training(compute: Callable[[Leaves], Any], leaves: Leaves, grad: Tensor | None = None) -> list[Tensor]:
    """Forward, and the gradients of all that the computation uses."""
    out = first(compute(leaves))
    grad = torch.empty_like(out) if grad is None else grad
    wanted = list(leaves.values())
    return torch.autograd.grad(out, wanted, grad, allow_unused=True)


STEPS = {"forward": forward, "training": training}


# Compiling in parallel, without a GPU -----------------------------------------------------------------------


Unit = tuple[str, int]  # a case and the number of one of its sizes, dtypes or tables of tile sizes


def units_of(case: Case, candidates: bool) -> list[tuple[dict[str, Any], torch.dtype, dict]]:
    """What the case launches: sizes with their dtypes, and the tile sizes that are tried."""
    units = [(size, dtype, {}) for size, dtype in product(case.small, DTYPES)]
    tables = candidate_tables() if candidates and case.tuned else []
    return [*units, *((case.large, torch.bfloat16, table) for table in ({}, *tables))]


def compile_unit(case: Case, number: int, candidates: bool) -> int:
    """Compile what one unit of the case launches, forward and training; return how many kernels it is."""
    from without_gpu import compiling, on_a_device

    size, dtype, table = units_of(case, candidates)[number]
    problem = case.build(Maker(torch.device("cpu"), dtype, empty=True), **size)
    with compiling() as compiled, on_a_device(), tile_sizes(table):
        training(lambda x: problem.run(x, "triton"), problem.leaves)
    return len({id(kernel) for *_, kernel in compiled})


def work(architecture: str, candidates: bool) -> None:
    """Compile one unit for every line of the standard input, answer each with a line."""
    from without_gpu import compile_for

    compile_for(architecture)
    for line in sys.stdin:
        name, number = json.loads(line)
        case, begin, answer = next(case for case in CASES if case.name == name), time.process_time(), {}
        try:
            answer["kernels"] = compile_unit(case, number, candidates)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"[-2000:]
        print(json.dumps({**answer, "seconds": time.process_time() - begin}), flush=True)


def compile_all(
    cases: list[Case],
    architecture: str,
    candidates: bool,
    tell: Callable[[dict[str, dict[str, Any]]], None] = lambda table: None,
) -> dict[str, dict[str, Any]]:
    """Compile every unit of the cases, a process for each processor; Triton's cache on the disk keeps the
    results. By case: kernels, CPU seconds and errors; `tell` gets the table after every unit."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--compile-worker", architecture]
    # What is compiled for the clock first, since its heads are the widest and take the longest.
    waiting: list[Unit] = sorted(
        ((case.name, n) for case in cases for n in range(len(units_of(case, candidates)))),
        key=lambda unit: unit[1],
    )
    table = {case.name: {"kernels": 0, "seconds": 0.0} for case in cases}
    lock = Lock()

    def serve(_: int) -> None:
        with subprocess.Popen(
            command + ["--candidates"] * candidates,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        ) as worker:  # fmt: skip
            while True:
                with lock:
                    if not waiting:
                        break
                    unit = waiting.pop()
                worker.stdin.write(json.dumps(unit) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                answer = json.loads(line) if line else {"error": f"the compiler died on unit {unit[1]}"}
                with lock:
                    row = table[unit[0]]
                    row["kernels"] += answer.get("kernels", 0)
                    row["seconds"] = round(row["seconds"] + answer.get("seconds", 0.0), 1)
                    if "error" in answer:
                        row.setdefault("error", answer["error"])
                    tell(table)
                if not line:
                    break
            worker.stdin.close()

    workers = min(os.cpu_count() or 1, len(waiting))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(serve, range(workers)))
    for name, number in waiting:  # every worker died
        table[name].setdefault("error", f"unit {number} was not compiled")
    return table


# The plan ---------------------------------------------------------------------------------------------------

# Seconds, guessed and generous: starting and ceilings; a comparison; a tile size tried; a time; what a peer
# takes to compile for a step. The run itself looks at the clock and leaves out what does not fit.
GUESSED = {"begin": 15.0, "check": 1.0, "tile size": 0.5, "time": 1.0, "compiled peer": 6.0}


def plan(cases: list[Case], tuning: bool, compiling: float, processors: int = 16) -> dict[str, float]:
    """Seconds of every step of a run with so many processors, where all kernels take `compiling` CPU
    seconds."""
    from compile_kernels import WISHES

    tried = sum(len(WISHES[name][2]) for name in ("forward", "dq", "dkv"))
    small = {case.build: case.small[0] for case in CASES if case.small}
    make = Maker(torch.device("cpu"), torch.float32, empty=True)
    peers = [name for case in cases for name in case.build(make, **small[case.build]).peers]
    slow = sum(map(compiles, peers))
    return {
        "begin": GUESSED["begin"],
        "compile": compiling / processors,
        "check": GUESSED["check"] * sum(len(case.small) * len(DTYPES) for case in cases),
        "tune": GUESSED["tile size"] * tried * tuning * sum(case.tuned for case in cases),
        "times": len(STEPS) * (GUESSED["time"] * (len(peers) + len(cases)) + GUESSED["compiled peer"] * slow),
    }


# Tile sizes -------------------------------------------------------------------------------------------------


def candidate_tables() -> list[dict[str, configs.Config]]:
    """Tile sizes to try, one for each kernel at a time."""
    from compile_kernels import WISHES

    names = ("forward", "dq", "dkv")
    most = max(len(WISHES[name][2]) for name in names)
    return [
        {name: configs.Config(*WISHES[name][2][min(n, len(WISHES[name][2]) - 1)]) for name in names}
        for n in range(most)
    ]


@contextmanager
def tile_sizes(table: dict[str, configs.Config]) -> Iterator[None]:
    """Let the template use these configurations, with a bias or without, and its own for other kernels."""
    from zoo.kernels.tile import launch

    own = launch.choose

    def choose(kernel: str, architecture: str, width: int, itemsize: int) -> configs.Config:
        given = table.get(f"{kernel}/{width}") or table.get(kernel.removesuffix(" with bias"))
        return given if given and itemsize == 2 else own(kernel, architecture, width, itemsize)

    with mock.patch.object(launch, "choose", choose):
        yield


def tune(cases: list[Case], results: Results) -> None:
    """Find the fastest tile sizes over the tuned cases, by kernel and width: `{"dq with bias/32": ...}`."""
    from compile_kernels import WISHES

    slower: dict[str, dict[configs.Config, list[float]]] = {}  # than the best of the case, by kernel
    for case in cases:
        try:
            problem = case.build(Maker(torch.device("cuda"), torch.bfloat16), **case.large)
        except Exception as error:
            results.leave_out(f"tuning of {case.name}", told(error))
            continue
        biased = " with bias" if problem.leaves.keys() & {"rpb", "bias"} else ""
        width = problem.leaves["q"].shape[-1]
        for kernel, step in (("forward", "forward"), ("dq", "training"), ("dkv", "training")):
            if results.seconds_left() < 0.4 * SECONDS:
                results.leave_out(f"tuning of {kernel}, {case.name}", "no time left")
                continue
            times = {}
            for wish in WISHES[kernel][2]:
                config = configs.Config(*wish)
                try:
                    with tile_sizes({kernel: config}):
                        run = lambda: STEPS[step](lambda x: problem.run(x, "triton"), problem.leaves)  # noqa: B023, E731, F821
                        times[config] = milliseconds([run], seconds=0.05)["ms"]
                except Exception as error:  # more shared memory than there is
                    print(f"{kernel} {wish}: {told(error)}", flush=True)
            for config, ms in times.items():
                known = slower.setdefault(f"{kernel}{biased}/{width}", {})
                known.setdefault(config, []).append(ms / min(times.values()))
        del problem
        free()
    # A configuration must have run in every case of its kernel and width.
    best = {}
    for key, table in slower.items():
        most = max(map(len, table.values()))
        able = {c: math.prod(ratios) for c, ratios in table.items() if len(ratios) == most}
        best[key] = min(able, key=able.get)
    results.found["tuned"] = best
    results.save()


def adopt(file: Path) -> Path:
    """Write the tile sizes that a run found best into the table of its architecture."""
    found = json.loads(file.read_text())
    about = found["about"]
    path = Path(configs.__file__).parent / f"sm_{about['capability'].replace('.', '')}.json"
    table = json.loads(path.read_text())
    tuned = found["tuned"] or {}
    for key, config in tuned.items():
        kernel, width = key.split("/")
        table["configurations"][kernel]["2"][width] = config
    keys = ", ".join(tuned)
    table["provenance"] += (
        f"; {keys}: fastest on {about['device']} with Triton {about['triton']}, {about['date']}"
    )
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\[[^\]]*\]", lambda part: " ".join(part[0].split()), text) + "\n")
    return path


# Right against float64 --------------------------------------------------------------------------------------


def check(case: Case, size: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Errors of outputs and gradients against the definition in float64, and what is allowed: twice the
    error of the definition in the same dtype, plus 1e-5 (gradients 2e-4), and half a unit in the last place
    of what 16-bit kernels round on their way."""
    torch.manual_seed(0)
    problem = case.build(Maker(device, dtype), **size)
    truth_leaves = {name: x.detach().double().requires_grad_() for name, x in problem.leaves.items()}
    grads = None

    def everything(leaves: Leaves, backend: str) -> list[Tensor]:
        nonlocal grads
        result = problem.run(leaves, backend)
        outs = [result] if isinstance(result, Tensor) else list(result)
        finite = [out.masked_fill(out.isinf(), 0.0) for out in outs]  # the LSE of a row that sees nothing
        if grads is None:
            grads = [torch.randn_like(out) for out in finite]
        pairs = [(out * grad.to(out.dtype)).sum() for out, grad in zip(finite, grads, strict=True)]
        return [*finite, *torch.autograd.grad(sum(pairs), list(leaves.values()))]

    truth = everything(truth_leaves, "reference")
    ours, theirs = (everything(problem.leaves, backend) for backend in ("triton", "reference"))
    names = ["out", "lse"][: len(truth) - len(problem.leaves)] + [f"d{name}" for name in problem.leaves]
    rounded = case.rounds * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    rows = []
    for name, exact, found, plain in zip(names, truth, ours, theirs, strict=True):
        error = _apart(found, exact)
        allowed = 2 * _apart(plain, exact) + (2e-4 if name[0] == "d" else 1e-5) + rounded
        rows.append({
            "case": case.name, "size": str(size), "dtype": str(dtype)[6:], "of": name, "error": error,
            "allowed": allowed, "right": error <= allowed,
        })  # fmt: skip
    return rows


def _apart(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm().clamp(min=1e-30))


# Times ------------------------------------------------------------------------------------------------------


class ContextLost(Exception):
    """This process can use the device no more."""


def free() -> None:
    """Give memory back between problems. Raises ContextLost where a kernel broke the device's context."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise ContextLost from error


def told(error: Exception) -> str:
    """One line about an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


def compiles(peer: str) -> bool:
    """Whether a peer takes PyTorch's compiler, and its time."""
    return "compiled" in peer or "flex" in peer


def bench(case: Case, results: Results) -> None:
    """Time ours and the peers, forward and training; one row for each that has none yet."""
    make = Maker(torch.device("cuda"), torch.bfloat16)
    try:
        problem = case.build(make, **case.large)
        sets = [problem.leaves, *(case.build(make, **case.large).leaves for _ in range(INPUT_SETS - 1))]
    except Exception as error:
        results.leave_out(f"times of {case.name}", told(error))
        free()
        return
    least, bound = floor_of(problem, results.found["ceilings"])
    runners = {"triton": lambda x: problem.run(x, "triton"), **problem.peers}
    timed = {(row["case"], row["step"], row["by"]) for row in results.found["rows"]}
    for step, (name, compute) in product(STEPS, runners.items()):
        if (case.name, step, name) in timed:
            continue
        if results.seconds_left() < (60 if compiles(name) else 20):
            results.leave_out(f"{case.name}, {step}, {name}", "no time left")
            continue
        row = {"case": case.name, "op": case.op, "step": step, "by": name}
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            STEPS[step](compute, problem.leaves)
            row["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row |= milliseconds([lambda x=x: STEPS[step](compute, x) for x in sets])  # noqa: B023
        except Exception as error:
            row["error"] = told(error)
        if name == "triton" and step == "forward" and "ms" in row:
            row |= {"floor": least, "bound": bound, "flops": problem.flops, "moved": problem.moved}
        print(f"{case.name}, {step}, {name}: {row.get('ms', row.get('error'))}", flush=True)
        results.found["rows"].append(row)
        results.save()
        free()


def judge(found: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """Every goal with the ratio measured, None where a side has no time."""
    times = {(row["case"], row["step"], row["by"]): row.get("ms") for row in found["rows"]}
    goals = []
    for case in cases:
        for goal in case.goals:
            ours, theirs = (times.get((case.name, goal.what, by)) for by in ("triton", goal.peer))
            ratio = theirs / ours if ours and theirs else None
            reached = None if ratio is None else ratio >= goal.ratio
            goals.append({"case": case.name, **asdict(goal), "measured": ratio, "reached": reached})
    return goals


# Run --------------------------------------------------------------------------------------------------------


def has_kernel(case: Case) -> bool:
    """Whether the operation has a Triton backend yet."""
    return any(backend.name == "triton" for backend in dispatch.OPERATIONS[case.op])


def measure(cases: list[Case], path: Path | None, tuning: bool, end: float | None = None) -> int:
    """The whole run, or with `end` the rest of one that must end then; 1 where something is wrong."""
    about = about_device()
    path = path or RESULTS / (re.sub(r"\W+", "_", about["device"].lower()) + ".json")
    results = Results(path, about, end)
    try:
        return _measure(cases, results, tuning)
    except ContextLost as error:
        print(f"the device's context is lost: {told(error.__cause__)}", flush=True)
        if results.seconds_left() < 30:
            return 1
        again = [*sys.argv[1:], "--out", str(path), "--until", str(results.end)]
        os.execv(sys.executable, [sys.executable, __file__, *again])


def _measure(cases: list[Case], results: Results, tuning: bool) -> int:
    found = results.found
    if not found["ceilings"]:
        for name in ("natten", "xformers.ops"):
            if installed(name) is None:
                results.leave_out(f"peer {name}", "not installed, or it does not load")
        found["ceilings"] = ceilings()
        results.save()
        architecture = "sm_" + found["about"]["capability"].replace(".", "")
        results.keep(compile_all(cases, architecture, tuning, results.keep))
        print(f"{results.seconds_left():.0f} s left after compiling", flush=True)
    checked = {row["case"] for row in found["checks"]}
    for case in cases:
        if case.name not in checked:
            compare(case, results)
    print(f"{results.seconds_left():.0f} s left after the checks", flush=True)
    failed = {row["case"] for row in found["checks"] if not row["right"]}
    failed_ops = {case.op for case in cases if case.name in failed}
    good = [case for case in cases if case.op not in failed_ops]
    if found["tuned"] is None:
        for case in cases:
            if case not in good:
                results.leave_out(f"times of {case.name}", "its operation is wrong")
        found["tuned"] = {}  # it is not tried again where it breaks the context
        results.save()
        if tuning:
            tune([case for case in good if case.tuned], results)
        print(f"{results.seconds_left():.0f} s left after tuning", flush=True)
    with tile_sizes({key: configs.Config(*config) for key, config in found["tuned"].items()}):
        for case in good:
            bench(case, results)
    found["goals"] = judge(found, cases)
    results.save()
    print(f"written: {results.path}", flush=True)
    for goal in found["goals"]:
        print(goal, flush=True)
    return int(bool(failed))


def compare(case: Case, results: Results) -> None:
    """Compare a case with float64 at its small sizes, in every dtype."""
    rows = []
    for size, dtype in product(case.small, DTYPES):
        try:
            rows += check(case, size, dtype, torch.device("cuda"))
        except Exception as error:
            if "cannot run" in str(error):  # a backend may refuse a size, with its reason
                results.leave_out(f"comparison of {case.name}, {size}, {dtype}", str(error))
                continue
            rows.append({"case": case.name, "size": str(size), "right": False, "error": told(error)})
    results.found["checks"] += rows
    wrong = [row for row in rows if not row["right"]]
    if wrong:
        print(f"WRONG: {case.name}: {wrong}", flush=True)
    results.save()
    free()


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks; the exit status is 1 where a kernel is wrong or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--out", type=Path, help="write the results to this file")
    parser.add_argument("--no-tuning", action="store_true", help="take the committed tile sizes")
    parser.add_argument("--compile-only", action="store_true", help="compile all, launch nothing")
    parser.add_argument("--architecture", default="sm_90", help="for --compile-only (default: sm_90)")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="take over the tile sizes of a run")
    parser.add_argument("--compile-worker", metavar="ARCHITECTURE", help=argparse.SUPPRESS)
    parser.add_argument("--candidates", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, metavar="CLOCK", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.adopt:
        print(adopt(given.adopt))
        return 0
    if given.compile_worker:
        work(given.compile_worker, given.candidates)
        return 0
    cases = [case for case in CASES if given.only in case.name]
    if not cases:
        parser.error(f"no case has {given.only!r} in its name; --list names them")
    if given.list:
        for case in cases:
            print(f"{case.name}: {case.op}{'' if has_kernel(case) else ', no Triton kernel yet'}")
        return 0
    for case in cases:
        if not has_kernel(case):
            print(f"left out: {case.name}: {case.op} has no Triton kernel yet", flush=True)
    cases = [case for case in cases if has_kernel(case)]
    if given.compile_only:
        tell = (lambda table: given.out.write_text(json.dumps(table, indent=1) + "\n")) if given.out else None
        options = {"tell": tell} if tell else {}
        compiled = compile_all(cases, given.architecture, not given.no_tuning, **options)
        for name, row in compiled.items():
            print(f"{name}: {row.get('error') or str(row['kernels']) + ' kernels'} in {row['seconds']} s")
        seconds = plan(cases, not given.no_tuning, sum(row["seconds"] for row in compiled.values()))
        steps = ", ".join(f"{name} {length:.0f}" for name, length in seconds.items())
        print(f"a run on 16 processors, in seconds: {steps}; {sum(seconds.values()):.0f} of {SECONDS}")
        return int(any("error" in row for row in compiled.values()))
    if not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --compile-only does what can be done without")
    return measure(cases, given.out, tuning=not given.no_tuning, end=given.until)


if __name__ == "__main__":
    sys.exit(main())
