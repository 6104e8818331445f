"""Which model to take: candidates within limits on this machine, measured, the best published one first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis.bench import check_device, clock_of, machine, one_pass, peak_memory, percentiles
from zoo.errors import ConfigError, did_you_mean

TASKS = {"classification": "top1", "segmentation": "top1", "generation": "fid"}
LATENT = 8  # pixels of an image along one side of a latent pixel
CLASSES = 150  # of a segmentation, as in ADE20K
MARGIN = 1.5  # a rough estimate may be wrong by this factor before a candidate is left out
PASSES = 7  # that measuring one candidate takes at the least: warm-up, three for time, three for memory


@dataclass(frozen=True)
class Candidate:
    """One model: what its authors publish, what was measured here, and what keeps it out.

    `published` is ImageNet-1k top-1 in percent (of a segmentation's backbone too) or, for generation, FID.
    Times are milliseconds of one pass; memory is bytes of the weights and of what a pass adds to the peak.
    """

    name: str
    parameters: int
    size: int  # side of the image in pixels
    metric: str
    published: float | None
    source: str | None  # where the figure and the weights come from
    licence: str | None
    milliseconds: dict[str, float] | None = None
    memory: int | None = None
    reason: str | None = None  # why it is not in the list, or was not measured


@dataclass(frozen=True)
class Choice:
    """What fits, the best first; what was measured and does not fit; what was not measured, and why."""

    limits: dict[str, Any]
    about: dict[str, str]
    ranked: list[Candidate]
    missed: list[Candidate]
    unmeasured: list[Candidate]

    def plain(self) -> dict[str, Any]:
        """As dictionaries and lists, for JSON."""
        return asdict(self)


def choose(
    task: str = "classification",
    *,
    size: int | None = None,
    latency: float | None = None,
    memory: float | None = None,
    among: str = "*",
    most: int = 5,
    batch: int = 1,
    training: bool = False,
    device: str = "cpu",
    seconds: float = 1.0,
    patience: float = 120.0,
    told: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Find the models with the best published figure that keep within the limits on this machine.

    Candidates are measured, with random weights, in the order of their published figures until `most` of
    them fit; those without a figure come last. A CPU's time is that on the wall; where PyTorch has one thread
    it is the thread's own, which others' work disturbs less. `size` None measures each at the size that its
    figure was published for; at any other the figure is only a hint. The smallest model of each family is
    run first: what would miss the limit by half at its speed for each parameter is not measured. A
    segmentation is the backbone under UPerNet, a generation one pass of the transformer on latents.

    Units: `size` in pixels of the image's side, `latency` in milliseconds for the batch, `memory` in MB;
        `seconds` of measuring for each candidate, `patience` for all of them. `among`: a glob of names.
    Raises: ConfigError for an unknown task, no candidate, or limits that are not positive.
    """
    check_device(device)
    limits = {"task": task, "size": size, "latency_ms": latency, "memory_mb": memory, "batch": batch}
    limits |= {"training": training, "among": among}
    for name, value in (("size", size), ("latency", latency), ("memory", memory), ("most", most)):
        if value is not None and not value > 0:  # NaN too, which would be no limit
            raise ConfigError(f"{name} must be above 0, found {value}")
    waiting = _candidates(task, size, among)
    trial = _Trial(task, latency, memory, batch, training, torch.device(device), seconds)
    about = machine(device)
    if device == "cpu":
        threads = torch.get_num_threads()
        about["device"] = "one CPU thread" if threads == 1 else f"{threads} CPU threads, time on the wall"
    end = perf_counter() + patience
    speeds = trial.scout(waiting, until=perf_counter() + patience / 2)
    ranked, missed, unmeasured = [], [], []
    for candidate in waiting:
        reason = None
        left = end - perf_counter()
        about_ms = speeds.get(_family(candidate.name), 0) * candidate.parameters
        if len(ranked) >= most:
            reason = f"not needed: {most} others with a better published figure fit"
        elif left < 0:
            reason = f"not reached within {patience:g} s"
        elif about_ms > MARGIN * (latency or 0) > 0:
            reason = f"about {about_ms:.0f} ms, by its family's speed for each parameter"
        elif PASSES * about_ms > 1000 * left:
            reason = f"about {PASSES * about_ms / 1000:.0f} s to measure, {left:.0f} left of {patience:g}"
        elif memory is not None and 4 * candidate.parameters > memory * 2**20:
            reason = f"its weights alone are {4 * candidate.parameters / 2**20:.0f} MB"
        if reason is not None:
            unmeasured.append(replace(candidate, reason=reason))
            continue
        found = trial.measure(candidate)
        if found.milliseconds is not None:
            family = _family(candidate.name)
            speed = found.milliseconds["least"] / candidate.parameters
            speeds[family] = min(speed, speeds.get(family, speed))
        kind = unmeasured if found.milliseconds is None else missed if found.reason else ranked
        kind.append(found)
        told(f"{found.name}: {found.reason or 'fits'}")
    return Choice(limits, about, ranked, missed, unmeasured)


class _Trial:
    """The conditions under which candidates are measured."""

    def __init__(
        self,
        task: str,
        latency: float | None,
        memory: float | None,
        batch: int,
        training: bool,
        device: torch.device,
        seconds: float,
    ) -> None:
        self.task, self.latency, self.memory = task, latency, memory
        self.batch, self.training, self.device, self.seconds = batch, training, device, seconds
        self.clock = clock_of(device, wall=torch.get_num_threads() > 1)

    def scout(self, candidates: Iterable[Candidate], until: float) -> dict[str, float]:
        """Milliseconds for each parameter of the smallest candidate with a figure, by family, until then."""
        smallest: dict[str, Candidate] = {}
        for each in sorted(candidates, key=lambda each: each.parameters):
            if each.published is not None:
                smallest.setdefault(_family(each.name), each)
        speeds = {}
        for family, each in smallest.items():
            if perf_counter() > until:
                break
            try:
                run = self._pass(each)
                run()
                speeds[family] = min(self.clock(run) for _ in range(2)) / each.parameters
            except (RuntimeError, ValueError):
                continue  # a size that this one does not take says nothing of the others
        return speeds

    def measure(self, candidate: Candidate) -> Candidate:
        """The candidate with its times and memory, and with the limit that it misses if it does."""
        gc.collect()
        try:
            run = self._pass(candidate)
            run()
        except (RuntimeError, ValueError) as error:
            line = str(error).splitlines()[0]
            return replace(candidate, reason=f"does not run at {candidate.size} pixels: {line}")
        times = [self.clock(run)]
        end = perf_counter() + self.seconds
        # What misses the limit twofold is not measured to the decimal.
        hopeless = self.latency is not None and times[0] > 2 * self.latency
        while not hopeless and (len(times) < 3 or perf_counter() < end):
            times.append(self.clock(run))
        peak = None if hopeless else peak_memory(run, self.device)
        weights = candidate.parameters * 4
        total = None if peak is None else weights * (2 if self.training else 1) + peak
        misses = []
        if self.latency is not None and median(times) > self.latency:
            misses.append(f"{median(times):.1f} ms of {self.latency:g}")
        if self.memory is not None and total is not None and total > self.memory * 2**20:
            misses.append(f"{total / 2**20:.0f} MB of {self.memory:g}")
        if self.memory is not None and total is None and not hopeless:
            misses.append("memory cannot be measured on this system")
        found = {"milliseconds": percentiles(times), "memory": total}
        return replace(candidate, **found, reason=", ".join(misses) or None)

    def _pass(self, candidate: Candidate) -> Callable[[], None]:
        model, inputs = _build(self.task, candidate, self.batch)
        model = model.to(self.device).train(self.training)
        inputs = [each.to(self.device) for each in inputs]
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return one_pass(model, inputs, leaves, self.training, nullcontext)


def _build(task: str, candidate: Candidate, batch: int) -> tuple[nn.Module, list[Tensor]]:
    """The model with random weights, and what its forward takes."""
    from zoo.heads import Segmenter
    from zoo.registry import create_model, generator

    torch.manual_seed(0)
    side = candidate.size
    if task == "generation":
        model, inputs = generator(candidate.name, side // LATENT)
        return model, [each.expand(batch, *each.shape[1:]).clone() for each in inputs]
    model = create_model(candidate.name)
    if task == "segmentation":
        model = Segmenter(model, CLASSES)
    return model, [torch.randn(batch, 3, side, side)]


def _candidates(task: str, size: int | None, among: str) -> list[Candidate]:
    """Every model for the task, the best published figure first, those without one last."""
    from zoo.registry import create_model, generator, list_models
    from zoo.weights.manifest import entries_of

    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; use {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    metric = TASKS[task]
    names = list_models(task="generation" if task == "generation" else "classification")
    found = []
    for name in (name for name in names if fnmatchcase(name, among)):
        with torch.device("meta"):
            if task == "generation":
                model, inputs = generator(name)
                own = inputs[0].shape[-1] * LATENT
            else:
                model = create_model(name)
                own = model.default_cfg["input_size"][-1]
        weights = [each for each in entries_of(name) if each.metric and metric in each.metric]
        best = weights[0] if weights else None
        found.append(
            Candidate(
                name,
                sum(parameter.numel() for parameter in model.parameters()),
                size or own,
                metric,
                best.metric[metric] if best else None,
                f"{best.tag}, {best.metric['dataset']} at {own}: {best.source}" if best else None,
                best.license if best else None,
            )
        )
    if not found:
        raise ConfigError(f"no model for {task} matches {among!r}; zoo list shows all names")
    sign = 1 if metric == "fid" else -1  # of FID the least is best
    return sorted(
        found, key=lambda each: (each.published is None, sign * (each.published or 0), each.parameters)
    )


def _family(name: str) -> str:
    """The first words of a name: agent_swin and agent_cswin cost differently for each parameter."""
    from zoo.registry import family_of

    first = name.split("_")
    return "_".join(first[:2]) if family_of(name) == "agent" else first[0]
