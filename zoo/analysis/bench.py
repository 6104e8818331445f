"""What models, attention modules and operations cost: time in turns with a peer, peak memory, multiply-adds.

On a CPU time is that of the processor on one thread, so that a busy machine does not count; on a GPU it is
that between two events. Whatever is compared runs in turns in the same process: only ratios carry over to
other machines.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import ops
from zoo.errors import ConfigError, ResourceError, did_you_mean
from zoo.layers import count_macs

WIDTH = 32  # channels of a head, where nothing else is asked
PERCENTILES = (10, 50, 90)
MECHANISMS = ("neighborhood", "window", "bilevel", "deformable", "agent", "channel", "global")


@dataclass(frozen=True)
class Subject:
    """Something to measure: a function of nothing, and what is known of it without running it."""

    name: str
    run: Callable[[], Any]
    side: int  # of the image or the map
    tokens: int | None = None  # that attend, where it is one map
    macs: int | None = None  # of one pass forward of the whole batch
    parameters: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Cost of one subject: times in milliseconds, memory in bytes above what it stood at before the pass."""

    name: str
    side: int
    batch: int
    what: str  # forward or training
    milliseconds: dict[str, float]  # least, p10, p50, p90
    turns: int
    memory: int | None
    tokens: int | None = None
    macs: int | None = None
    parameters: int | None = None

    @property
    def median(self) -> float:
        """The middle of all times."""
        return self.milliseconds["p50"]


@dataclass(frozen=True)
class Report:
    """Measurements of one run, and where and how they were made."""

    title: str
    about: dict[str, str]
    rows: list[Measurement]
    exponents: dict[str, dict[str, float]] = field(default_factory=dict)  # by name: time, memory, macs

    def plain(self) -> dict[str, Any]:
        """As dictionaries and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Report:
        """What `plain` wrote. Raises: ConfigError for anything else."""
        try:
            rows = [Measurement(**row) for row in data["rows"]]
            return cls(data["title"], dict(data["about"]), rows, dict(data["exponents"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"this is no benchmark of zoo bench: {error}") from None


# Measuring --------------------------------------------------------------------------------------------------


def measure(
    subjects: Sequence[Subject],
    *,
    device: str = "cpu",
    batch: int = 1,
    what: str = "forward",
    seconds: float = 5.0,
    memory: bool = True,
) -> list[Measurement]:
    """Time all subjects in turns for about `seconds` (at least three turns) and measure each one's memory.

    Names must differ. One pass of each comes before the clock starts.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise ConfigError(f"subjects need different names, found {', '.join(names)}")
    device = torch.device(device)
    with one_thread() if device.type == "cpu" else nullcontext():
        times = time_in_turns({subject.name: subject.run for subject in subjects}, seconds, device)
        peaks = {subject.name: peak_memory(subject.run, device) if memory else None for subject in subjects}
    return [
        Measurement(
            subject.name,
            subject.side,
            batch,
            what,
            percentiles(times[subject.name]),
            len(times[subject.name]),
            peaks[subject.name],
            subject.tokens,
            subject.macs,
            subject.parameters,
        )
        for subject in subjects
    ]


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]],
    seconds: float,
    device: torch.device,
    most: int = 200,
    *,
    wall: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of every turn of every function: CPU time on a CPU (or with `wall` what a clock on the
    wall shows), between events on a GPU."""
    clock = clock_of(device, wall)
    for run in runs.values():
        clock(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 3 or (time.perf_counter() < end and turns < most):
        for name, run in runs.items():
            times[name].append(clock(run))
        turns += 1
    return times


def clock_of(device: torch.device, wall: bool = False) -> Callable[[Callable[[], Any]], float]:
    """The function that runs another and returns the milliseconds it took, see `time_in_turns`."""
    if device.type == "cuda":
        return _cuda_clock
    return _wall_clock if wall else _cpu_clock


def _wall_clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _cpu_clock(run: Callable[[], Any]) -> float:
    start = time.process_time_ns()
    run()
    return (time.process_time_ns() - start) / 1e6


def _cuda_clock(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Least, 10th, 50th and 90th percentile, interpolated between the nearest ranks."""
    found = {"least": min(times)}
    ordered = sorted(times)
    for percent in PERCENTILES:
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{percent}"] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call adds to the peak, or None where the system does not tell.

    On a CPU it is the resident memory of a forked process (Linux only), scratch of libraries included. The
    system counts it in steps that grow with its processors: a few megabytes are within the error.
    """
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux" or not Path("/proc/self/clear_refs").exists():
        return None
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if not child:
        try:
            library = ctypes.CDLL(None)
            library.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: large tensors come from the system one by one
            run()
            added = []
            for _ in range(2):  # a system short of memory takes pages away, which come back in one of them
                library.malloc_trim(0)  # what the heap kept of earlier passes would hide new memory
                before = _resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
                run()
                added.append(max(0, _resident("VmHWM") - before))
            os.write(writing, str(min(added)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of cost over size, both in logarithms: cost grows as size to that power (least squares).

    Raises: ConfigError for fewer than two sizes, or anything that is not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ConfigError(f"an exponent needs two sizes and positive costs, found {sizes} and {costs}")
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope


# Subjects ---------------------------------------------------------------------------------------------------


def subject(
    spec: str,
    *,
    size: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    compiled: bool = False,
    heads: int = 2,
    arguments: Mapping[str, Any] | None = None,
) -> Subject:
    """Make something to measure from its name, `NAME` or `NAME@backend`.

    A name is a model of the zoo or of timm (`size` is the side of its images; weights are random), or an
    attention operation such as `neighborhood_attention` (`size` is the side of its map, 56 by default, heads
    are 32 wide). "sdpa" is PyTorch's attention of every token to every token. `arguments` go to the model or
    the operation. `training` adds the backward pass.
    Raises: ConfigError for an unknown name or one of a generator; ResourceError for a GPU that is not there.
    """
    import timm

    from zoo import list_models

    name, _, backend = spec.partition("@")
    check_device(device)
    inside = (lambda: ops.use_backend(backend)) if backend else nullcontext
    options = {"device": device, "dtype": dtype}
    given = dict(arguments or {})
    models = list_models(task="classification")
    if name in OPERATIONS:
        side = 56 if size is None else size
        function, inputs, macs = OPERATIONS[name](side, batch, heads, given, options)
        inputs = [x.requires_grad_(training and x.is_floating_point()) for x in inputs]
        call: Callable[..., Tensor] = function
        parameters: list[Tensor] = [x for x in inputs if x.requires_grad]
        count, tokens = None, side * side
    elif name in models or timm.is_model(name):
        model, side = _model(name, name in models, size, given)
        channels = getattr(model, "in_chans", 3)
        macs = batch * _macs(model, (channels, side, side))
        model = model.to(**options).train(training)
        inputs = [torch.randn(batch, channels, side, side, **options)]
        parameters = list(model.parameters())
        call, count, tokens = model, sum(p.numel() for p in parameters), None
    elif name in list_models(task="generation"):
        raise ConfigError(f"{name} makes images; bench runs classifiers and operations")
    else:
        # timm lists the zoo's classifiers too.
        choices = dict.fromkeys([*OPERATIONS, *models, *timm.list_models()])
        raise ConfigError(f"unknown model or operation {name!r}{did_you_mean(name, choices)}")
    if compiled:
        call = torch.compile(call)
    label = spec + (" compiled" if compiled else "")
    return Subject(label, one_pass(call, inputs, parameters, training, inside), side, tokens, macs, count)


def module_subject(
    mechanism: str,
    side: int,
    *,
    batch: int = 1,
    dim: int = 64,
    heads: int = 2,
    training: bool = False,
    **options: Any,
) -> Subject:
    """One attention module of a mechanism on a map of `side` x `side` tokens, sized as its models keep it.

    Neighborhoods and windows are 7 x 7. Regions are 7 x 7 tokens and every query attends to four of them, so
    their number grows with the map. Deformable attention samples 7 x 7 keys of any map, as every stage of
    DAT++ at its own size; agents are 49.
    """
    from zoo import attention as kinds

    makers: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "neighborhood": (kinds.NeighborhoodAttention, {"kernel_size": 7}),
        "window": (kinds.WindowAttention, {"window_size": 7}),
        "bilevel": (kinds.BilevelRoutingAttention, {"n_win": max(1, side // 7), "topk": 4}),
        "deformable": (kinds.DeformableAttention, _sampling(side)),
        "agent": (kinds.AgentAttention, {"agent_num": 49, "map_size": (side, side)}),
        "channel": (kinds.ChannelAttention, {}),
        "global": (kinds.GlobalAttention, {}),
    }
    if mechanism not in makers:
        near = did_you_mean(mechanism, makers)
        raise ConfigError(f"unknown attention {mechanism!r}; use {', '.join(makers)}{near}")
    device = options.get("device", "cpu")
    check_device(device)
    kind, arguments = makers[mechanism]
    module = kind(dim, heads, **arguments).to(**options).train(training)
    x = torch.randn(batch, side, side, dim, requires_grad=training, **options)
    weights = list(module.parameters())
    macs = batch * count_macs(_OnImages(kind(dim, heads, **arguments, device="meta")), (dim, side, side))
    run = one_pass(module, [x], [x, *weights], training, nullcontext)
    return Subject(mechanism, run, side, side * side, macs, sum(p.numel() for p in weights))


class _OnImages(nn.Module):
    """A module of token maps [B, Y, X, C] behind images [B, C, Y, X], as `count_macs` gives them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1))


def compare(
    mechanisms: Sequence[str],
    sides: Sequence[int] = (28, 56, 84, 112),
    *,
    seconds: float = 4.0,
    batch: int = 1,
    training: bool = False,
    device: str = "cpu",
    memory: bool = True,
    **options: Any,
) -> Report:
    """Cost of several mechanisms over the size of the map, with the exponent in the number of tokens.

    At every size all mechanisms run in turns for about `seconds`.
    """
    what = "training" if training else "forward"
    rows: list[Measurement] = []
    for side in sides:
        torch.manual_seed(0)
        found = [
            module_subject(name, side, batch=batch, training=training, device=device, **options)
            for name in mechanisms
        ]
        rows += measure(found, device=device, batch=batch, what=what, seconds=seconds, memory=memory)
    exponents = {}
    for name in mechanisms:
        mine = [row for row in rows if row.name == name]
        exponents[name] = {}
        for quantity, costs in (
            ("time", [row.median for row in mine]),
            ("memory", [row.memory for row in mine]),
            ("macs", [row.macs for row in mine]),
        ):
            if len(mine) > 1 and all(costs):
                exponents[name][quantity] = fit_exponent([row.tokens for row in mine], costs)
    return Report(f"attention over resolution, {what}", machine(device), rows, exponents)


def machine(device: str = "cpu") -> dict[str, str]:
    """Where and with what a measurement is made."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else "one CPU thread",
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if hasattr(os, "getloadavg"):
        # Others' work beside the measurement: CPU time suffers from shared caches, wall time from waiting.
        about["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    for package in ("attnzoo", "torch", "timm", "triton"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return about


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def one_pass(
    call: Callable[..., Any],
    inputs: list[Tensor],
    leaves: list[Tensor],
    training: bool,
    inside: Callable[[], Any],
) -> Callable[[], None]:
    """A function that makes one pass; backward gives the gradients of `leaves` without keeping them."""

    def run() -> None:
        with torch.set_grad_enabled(training), inside():
            out = call(*inputs)
            if training:
                out = out[0] if isinstance(out, tuple) else out
                torch.autograd.grad(out.float().square().mean(), leaves, allow_unused=True)

    return run


def _model(name: str, ours: bool, size: int | None, arguments: dict[str, Any]) -> tuple[nn.Module, int]:
    import timm

    from zoo import create_model

    if ours:
        model = create_model(name, **arguments)
    else:
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        model = timm.create_model(name, **({"img_size": size} if size and fixed else {}), **arguments)
    return model, size or model.default_cfg["input_size"][-1]


def _macs(model: nn.Module, image: tuple[int, int, int]) -> int | None:
    """Multiply-adds: by the modules where they tell, else by PyTorch's counter of operations."""
    from torch.utils.flop_counter import FlopCounterMode

    if any(hasattr(module, "attention_macs") for module in model.modules()):
        return count_macs(model, image)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image))
    model.train(training)
    return counter.get_total_flops() // 2


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = device
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, found {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError("there is no GPU that PyTorch can use here; leave out --device")


def _sampling(side: int) -> dict[str, Any]:
    stride = max(1, side // 7)
    return {"stride": stride, "kernel_size": stride + 1 - stride % 2 if stride > 1 else 3}


def _heads(side: int, batch: int, heads: int, options: dict[str, Any], count: int = 3) -> list[Tensor]:
    return [torch.randn(batch, side, side, heads, WIDTH, **options) for _ in range(count)]


Made = tuple[Callable[..., Tensor], list[Tensor], int]


def _neighborhood(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    kernel = given.pop("kernel_size", 7)
    macs = 2 * batch * side * side * heads * WIDTH * kernel * kernel
    inputs = _heads(side, batch, heads, options)
    return lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel, **given), inputs, macs


def _window(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    window = given.pop("window_size", 7)
    macs = 2 * batch * side * side * heads * WIDTH * window * window
    inputs = _heads(side, batch, heads, options)
    return lambda q, k, v: ops.window_attention(q, k, v, window, **given), inputs, macs


def _bilevel(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    regions = given.pop("regions", max(1, side // 7))
    topk = min(given.pop("topk", 4), regions**2)
    tokens, each = side * side, (side // regions) ** 2
    macs = batch * heads * WIDTH * (2 * tokens * topk * each + regions**4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        means = (ops.region_means(x.detach(), regions) for x in (q, k))
        routes, _ = ops.route(*means, regions, topk)
        return ops.bilevel_routing_attention(q, k, v, routes, regions, **given)

    return call, _heads(side, batch, heads, options), macs


def _deformable(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    keys = given.pop("keys", 49)
    q = torch.randn(batch, side, side, heads, WIDTH, **options)
    k, v = (torch.randn(batch, keys, heads, WIDTH, **options) for _ in range(2))
    macs = 2 * batch * side * side * heads * WIDTH * keys
    return lambda q, k, v: ops.deformable_attention(q, k, v, **given), [q, k, v], macs


def _agent(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    count = given.pop("agents", 49)
    inputs = [torch.randn(batch, side * side, heads, WIDTH, **options) for _ in range(3)]
    inputs.append(torch.randn(batch, count, heads, WIDTH, **options))
    macs = 4 * batch * side * side * heads * WIDTH * count
    return lambda q, k, v, agents: ops.agent_attention(q, k, v, agents, **given), inputs, macs


def _channel(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    macs = 2 * batch * side * side * heads * WIDTH * WIDTH
    return lambda q, k, v: ops.channel_attention(q, k, v, **given), _heads(side, batch, heads, options), macs


def _sdpa(side: int, batch: int, heads: int, given: dict[str, Any], options: dict[str, Any]) -> Made:
    inputs = [torch.randn(batch, heads, side * side, WIDTH, **options) for _ in range(3)]
    macs = 2 * batch * (side * side) ** 2 * heads * WIDTH
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given), inputs, macs


OPERATIONS: dict[str, Callable[..., Made]] = {
    "neighborhood_attention": _neighborhood,
    "window_attention": _window,
    "bilevel_routing_attention": _bilevel,
    "deformable_attention": _deformable,
    "agent_attention": _agent,
    "channel_attention": _channel,
    "sdpa": _sdpa,
}
