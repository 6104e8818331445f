#!/usr/bin/env python
"""timm's window models with and without `zoo.accelerate`, in one run: forward pass and training step.

    python scripts/bench/timm_windows.py [--batch 8] [--seconds 20] [--json FILE] [MODEL ...]

Both run in turns in one process on one thread; the fastest turn of each counts, in CPU time. Above 1 the
accelerated model is the faster one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
from torch import nn

import zoo
from zoo.analysis import bench

MODELS = [
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_nano_rw_256", "twins_svt_small",
    "gcvit_xxtiny",
]  # fmt: skip


def ratios(name: str, batch: int, seconds: float) -> dict[str, float]:
    """How many times as fast the accelerated model is."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    accelerated = copy.deepcopy(model)
    zoo.accelerate(accelerated)
    side = model.default_cfg["input_size"][1]
    images = torch.randn(batch, 3, side, side)

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(images)

    def training(model: nn.Module) -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    found = {}
    for what, run in (("forward", forward), ("training", training)):
        runs = {"timm": partial(run, model), "zoo": partial(run, accelerated)}
        times = bench.time_in_turns(runs, seconds, torch.device("cpu"))
        found[what] = min(times["timm"]) / min(times["zoo"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each comparison (default: 20)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in options.models:
        rows[name] = ratios(name, options.batch, options.seconds)
        print(
            f"{name:32} " + "  ".join(f"{what} {ratio:.2f}x" for what, ratio in rows[name].items()),
            flush=True,
        )
    if options.json:
        facts = {**bench.machine(), "batch": options.batch, "threads": 1, "times faster": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
