#!/usr/bin/env python
"""Sparse attention in published video and image generators: pairs kept, and time against dense attention.

    python scripts/bench/diffusion.py                  the table, measured at a size that suits the device
    python scripts/bench/diffusion.py --scale 4        rows and columns divided by 4 (frames stay)
    python scripts/bench/diffusion.py --plan           published sizes, planned only, nothing measured
    python scripts/bench/diffusion.py --json FILE      the figures, with versions and date

Each row is self-attention of one block of a generator at its published geometry, with random inputs: `keep`
is the fraction of query-key pairs, `expected` its inverse, `attention` the time of torch's dense
scaled_dot_product_attention over ours, in turns in one process, the fastest turn of each. `block` is what
that means for a whole block, whose projections and MLP cost the same in both: attention's share there is
computed from the products. Ratios below 1 are slower than dense and are printed like the others. At a reduced
size windows and blocks are reduced as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import zoo
from zoo.diffusion import NeighborhoodConfig, RadialConfig
from zoo.diffusion.adapters import ADAPTERS
from zoo.diffusion.handle import Config, Processor, State
from zoo.diffusion.neighborhood import NeighborhoodProcessor
from zoo.diffusion.radial import RadialProcessor
from zoo.layers.tokens import TokenLayout


@dataclass(frozen=True)
class Case:
    """One published geometry; `mlp_ratio` is the width of the block's MLP in widths of the model."""

    name: str
    model: str
    grid: tuple[int, ...]
    method: str
    settings: dict[str, Any]
    heads: int
    text: int = 0
    width: int = 128
    mlp_ratio: float = 4.0

    def reduced(self, scale: int) -> Case:
        """Rows and columns divided by `scale`, and with them windows and blocks; frames stay."""
        by = [1 if axis == 0 and len(self.grid) == 3 else scale for axis in range(len(self.grid))]
        smaller = lambda sizes, least: tuple(  # noqa: E731
            max(least, n // s) for n, s in zip(sizes, by, strict=True)
        )
        if self.method == "radial":
            size = max(8, 128 // scale)
            settings = {**self.settings, "block_size": size, "decimation_threshold": size}
        else:
            least = {"kernel_size": 2, "stride": 1}
            settings = {name: smaller(sizes, least[name]) for name, sizes in self.settings.items()}
        return replace(self, grid=smaller(self.grid, 1), settings=settings)


# Grids in tokens, after patching. Settings: the papers and their code, see zoo/diffusion.
WAN, HUNYUAN = {"heads": 40, "mlp_ratio": 2.7}, {"heads": 24, "text": 256}
CASES = [
    Case("Wan 2.1 69 f 768p", "Wan", (18, 48, 80), "radial", {"decay_factor": 0.2}, **WAN),
    Case("Wan 2.1 161 f 768p", "Wan", (41, 48, 80), "radial", {}, **WAN),
    Case("Hunyuan 117 f 768p", "Hunyuan", (30, 48, 80), "radial", {"decay_factor": 0.95}, **HUNYUAN),
    Case("Hunyuan 253 f 720p", "Hunyuan", (64, 45, 80), "radial", {"sink": True}, **HUNYUAN),
    Case(
        "Hunyuan 117 f GNA", "Hunyuan", (30, 48, 80), "neighborhood",
        {"kernel_size": (18, 24, 24), "stride": (16, 8, 8)}, **HUNYUAN,
    ),
    Case(
        "Flux 4K GNA", "Flux", (256, 256), "neighborhood",
        {"kernel_size": (80, 80), "stride": (16, 16)}, heads=24, text=512,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a case showed; times in seconds, None where nothing was measured."""

    name: str
    tokens: int
    keep: float
    attention_share: float
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    backend: str | None = None


def processor_of(case: Case, layout: TokenLayout) -> Processor:
    """The processor that `apply_*` would set, without a model around it."""
    adapter = next(a for a in ADAPTERS if case.model in a.model.__name__)
    kind, config = {
        "radial": (RadialProcessor, RadialConfig),
        "neighborhood": (NeighborhoodProcessor, NeighborhoodConfig),
    }[case.method]
    return kind("layer", adapter, State(layout=layout), config(**case.settings))


def measure(case: Case, heads: int | None, device: torch.device, turns: int, plan_only: bool) -> Row:
    """Plan a case and, unless `plan_only`, run both sides in turns."""
    layout = TokenLayout(case.text, case.grid, text_last=case.model == "Hunyuan")
    processor = processor_of(case, layout)
    config: Config = processor.config
    plan = config.plan(processor.adapter, layout, layout.text, device, None)
    keep = config.pairs(layout, layout.text, plan) / layout.tokens**2
    # Products per token: all pairs twice, four projections and two layers of the MLP.
    attention, rest = 2 * layout.tokens, (4 + 2 * case.mlp_ratio) * case.heads * case.width
    share = attention / (attention + rest)
    if plan_only or plan is None:
        return Row(case.name, layout.tokens, keep, share)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, layout.tokens, heads or case.heads, case.width)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))

    def dense() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v)

    def sparse() -> Tensor:
        return processor.attend(query, key, value, layout, plan)

    best = {dense: float("inf"), sparse: float("inf")}
    with torch.no_grad():
        for side in best:
            side()  # warm
        for _ in range(turns):
            for side in best:
                best[side] = min(best[side], clock(side, device))
    backend = config.chosen_backend(query, key, layout, plan)
    return Row(case.name, layout.tokens, keep, share, best[dense], best[sparse], backend)


def clock(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one run: CPU time on a CPU, which others on the machine do not lengthen."""
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", type=int, help="divide rows and columns; by default 1 on a GPU, 4 elsewhere"
    )
    parser.add_argument("--heads", type=int, help="heads to measure; all on a GPU, 1 elsewhere")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="measure nothing, plan the published sizes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    if not has_gpu:
        torch.set_num_threads(1)
    scale = arguments.scale or (1 if has_gpu or arguments.plan else 4)
    heads = arguments.heads or (None if has_gpu else 1)

    cases = [case if scale == 1 else case.reduced(scale) for case in CASES]
    rows = [measure(case, heads, device, arguments.turns, arguments.plan) for case in cases]
    table = Table("case", "tokens", "keep", "expected", "attention", "share", "block", "backend")
    for row in rows:
        ratio = row.dense_seconds / row.sparse_seconds if row.sparse_seconds else None
        block = None if ratio is None else 1 / (1 - row.attention_share + row.attention_share / ratio)
        table.add_row(
            row.name, f"{row.tokens:,}", f"{row.keep:.3f}", f"{1 / row.keep:.2f}x",
            "-" if ratio is None else f"{ratio:.2f}x", f"{row.attention_share:.0%}",
            "-" if block is None else f"{block:.2f}x", row.backend or "-",
        )  # fmt: skip
    name = torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine()
    Console().print(table, f"{name}, torch {torch.__version__}, rows and columns divided by {scale}")
    if arguments.json:
        figures = {
            "device": name, "torch": torch.__version__, "zoo": zoo.__version__, "scale": scale,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
