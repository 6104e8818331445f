#!/usr/bin/env python
"""Whole models on a CPU against a named peer, in one run: forward speed, and what training small rows costs.

    python scripts/bench/models.py                     all models against timm's swin_tiny, into results/
    python scripts/bench/models.py davit_tiny --peer davit_tiny --at-least 1.0
                                                       against timm's of that name; exit status 1 below 1.0

Both run in turns in one process on one thread and the fastest turn of each counts, in CPU time: that holds
on a busy machine too. Only ratios mean something. Every model sees images of its own input size, and is
compared by images in a second with the peer at the peer's size. Memory is what a training step adds at its
peak (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import zoo

torch.set_num_threads(1)

RESULTS = Path(__file__).resolve().parent / "results" / "models_cpu.json"
PEER = "swin_tiny_patch4_window7_224"
LARGE = 20e9  # multiply-adds above which one image a turn must do
TRAINING_BATCH = 32


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> tuple[float, float]:
    """The fastest of several turns of each, after one that does not count."""
    ours(), theirs()
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(turns)]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def images_for(model: nn.Module, batch: int) -> torch.Tensor:
    """Images of the size a model is made for."""
    return torch.randn(batch, *model.default_cfg["input_size"])


def forward_ratio(name: str, peer: nn.Module, batch: int, turns: int) -> float:
    """How many images a model computes while the peer computes one."""
    model = zoo.create_model(name).eval()
    count = 1 if zoo.model_info(name).macs > LARGE else batch
    images, peer_images = images_for(model, count), images_for(peer, batch)
    with torch.inference_mode():
        ours, theirs = in_turns(lambda: model(images), lambda: peer(peer_images), turns)
    return (count / ours) / (batch / theirs)


def training_step(name: str) -> dict[str, float]:
    """CPU seconds and memory (MB, what a step adds at its peak) of one training step."""
    code = f"""
import json, time
import torch, zoo
torch.set_num_threads(1)
torch.manual_seed(0)
model = zoo.create_model({name!r}).train()
optimizer = torch.optim.AdamW(model.parameters())
images = torch.randn({TRAINING_BATCH}, *model.default_cfg["input_size"])
labels = torch.randint(model.num_classes, ({TRAINING_BATCH},))
def step(count={TRAINING_BATCH}):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images[:count]), labels[:count]).backward()
    optimizer.step()
def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
step(2)  # loads what is loaded once
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
step()
memory = resident("VmHWM") - before
seconds = []
for _ in range(10):
    began = time.process_time()
    step()
    seconds.append(time.process_time() - began)
print(json.dumps({{"step_s": min(seconds), "step_mb": memory}}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="models or patterns; all, written to results/, without")
    parser.add_argument("--peer", default=PEER, help="a model of timm's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--at-least", type=float, help="the least ratio of every named model")
    arguments = parser.parse_args()
    names = [
        name
        for pattern in arguments.names or ["*"]
        for name in zoo.list_models(pattern, task="classification")
    ]
    if not names:
        parser.error(f"no model matches {' '.join(arguments.names)}")
    torch.manual_seed(0)
    peer = timm.create_model(arguments.peer).eval()
    console, rows = Console(), {}
    for number, name in enumerate(names, 1):
        ratio = forward_ratio(name, peer, arguments.batch, arguments.turns)
        rows[name] = {"relative_images_per_s": round(ratio, 3)}
        if name.endswith("_digits"):
            rows[name] |= {key: round(value, 4) for key, value in training_step(name).items()}
        console.print(f"{number}/{len(names)} {name}: {ratio:.3f}x", highlight=False)
    console.print(f"images/s in multiples of timm's {arguments.peer}; steps of {TRAINING_BATCH} images")
    table = Table("model", "images/s", "training step, CPU ms", "its memory, MB")
    for name, row in rows.items():
        step = (f"{1000 * row['step_s']:.1f}", f"{row['step_mb']:.0f}") if "step_s" in row else ("", "")
        table.add_row(name, f"{row['relative_images_per_s']:.3f}", *step)
    console.print(table)
    if not arguments.names:
        facts = {
            "peer": arguments.peer,
            "batch": arguments.batch,
            "training_batch": TRAINING_BATCH,
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "models": rows,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    below = [name for name in names if rows[name]["relative_images_per_s"] < (arguments.at_least or 0)]
    if below:
        print(f"error: below {arguments.at_least}: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
