#!/usr/bin/env python
"""Sparse attention in published video and image generators: pairs kept, and time against dense attention.

    python scripts/bench/diffusion.py                  the table, measured at a size that suits the device
    python scripts/bench/diffusion.py --scale 4        rows and columns divided by 4 (frames stay)
    python scripts/bench/diffusion.py --plan           published sizes, planned only, nothing measured
    python scripts/bench/diffusion.py --json FILE      the figures, with versions and date

Each row is one block of a generator at its published geometry, with random weights and inputs. `keep` is the
fraction of query-key pairs and `expected` its inverse. `attention` is the time of torch's dense
scaled_dot_product_attention over that of ours; `block` the time of diffusers' transformer with a single block
over that of the same with the method applied, embeddings included; both in turns in one process, the fastest
turn of each. `share` is the part of the dense block's time that dense attention takes, and with --plan the
part of the products that it has. Ratios below 1 are slower than dense and are printed like the others.

At a reduced size windows and blocks of tokens are reduced as well, and with fewer heads the block is narrower
than the published one, so that attention has a larger share of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo import diffusion
from zoo.diffusion import NeighborhoodConfig, RadialConfig
from zoo.diffusion.adapters import ADAPTERS
from zoo.diffusion.neighborhood import NeighborhoodProcessor
from zoo.diffusion.processor import Config, Processor, State
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
    """What a case showed; times in seconds, None where nothing was measured.

    `share_of_products` is attention's among all products of a block with all its heads.
    """

    name: str
    tokens: int
    keep: float
    share_of_products: float
    heads: int
    dense_attention: float | None = None
    sparse_attention: float | None = None
    dense_block: float | None = None
    sparse_block: float | None = None
    backend: str | None = None


def processor_of(case: Case, layout: TokenLayout) -> Processor:
    """The processor that `apply_*` would set, without a model around it."""
    adapter = next(a for a in ADAPTERS if case.model in a.model.__name__)
    kind, config = {
        "radial": (RadialProcessor, RadialConfig),
        "neighborhood": (NeighborhoodProcessor, NeighborhoodConfig),
    }[case.method]
    return kind("layer", adapter, None, State(layout=layout), config(**case.settings))


def one_block(case: Case, heads: int, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """diffusers' transformer with a single block of so many heads, and arguments for its forward."""
    narrow = 64  # of what encoders give, which costs next to nothing
    common = {"num_attention_heads": heads, "attention_head_dim": case.width, "num_layers": 1}
    text = torch.randn(1, case.text or 512, narrow)
    inputs = {"encoder_hidden_states": text, "return_dict": False}
    if case.model == "Flux":
        rope = (case.width // 8, case.width * 7 // 16, case.width * 7 // 16)
        build = lambda: FluxTransformer2DModel(  # noqa: E731
            **common, num_single_layers=0, joint_attention_dim=narrow, pooled_projection_dim=narrow,
            axes_dims_rope=rope,
        )  # fmt: skip
        ids = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in case.grid))
        inputs |= {"hidden_states": torch.randn(1, len(ids), 64), "timestep": torch.ones(1)}
        inputs |= {"img_ids": ids, "txt_ids": torch.zeros(case.text, 3)}
        inputs |= {"pooled_projections": torch.randn(1, narrow)}
    else:
        frames, rows, columns = case.grid
        inputs |= {"hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns)}
        inputs |= {"timestep": torch.full((1,), 900.0)}
    if case.model == "Wan":
        build = lambda: WanTransformer3DModel(  # noqa: E731
            **common, ffn_dim=int(case.mlp_ratio * heads * case.width), text_dim=narrow
        )
    if case.model == "Hunyuan":
        build = lambda: HunyuanVideoTransformer3DModel(  # noqa: E731
            **common, num_single_layers=0, num_refiner_layers=1, mlp_ratio=case.mlp_ratio,
            text_embed_dim=narrow, pooled_projection_dim=narrow, guidance_embeds=False,
        )  # fmt: skip
        inputs |= {
            "encoder_attention_mask": torch.ones(1, case.text, dtype=torch.bool),
            "pooled_projections": torch.randn(1, narrow),
        }
    dtype = dtype_of(device)
    exact = ("timestep", "img_ids", "txt_ids")
    with torch.device(device):
        model = build().eval()
    in_float32 = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():  # as from_pretrained(torch_dtype=dtype) leaves them
        if not set(name.split(".")) & set(in_float32):
            parameter.data = parameter.data.to(dtype)
    for name, x in inputs.items():
        if torch.is_tensor(x):
            inputs[name] = x.to(device, dtype if x.is_floating_point() and name not in exact else x.dtype)
    return model, inputs


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure_block(case: Case, heads: int, device: torch.device, turns: int) -> tuple[float, float]:
    """Seconds of a dense and of a sparse forward of one block."""
    model, inputs = one_block(case, heads, device)
    changed = copy.deepcopy(model)
    apply = {"radial": diffusion.apply_radial_attention, "neighborhood": diffusion.apply_neighborhood}
    with apply[case.method](changed, **case.settings) as handle:
        times = fastest([lambda: model(**inputs), lambda: changed(**inputs)], device, turns)
        if not handle.stats().sparse_calls:
            raise RuntimeError(f"{case.name}: nothing was sparse")
    return times[0], times[1]


@torch.no_grad()
def fastest(sides: list[Callable[[], Any]], device: torch.device, turns: int) -> list[float]:
    """Seconds of the fastest of so many turns of each side, after one to get warm."""
    for side in sides:
        side()
    return [min(times) for times in zip(*([clock(s, device) for s in sides] for _ in range(turns)),
                                        strict=True)]  # fmt: skip


def measure(case: Case, heads: int | None, device: torch.device, turns: int, plan_only: bool) -> Row:
    """Plan a case and, unless `plan_only`, run both sides in turns."""
    heads = heads or case.heads
    layout = TokenLayout(case.text, case.grid, text_last=case.model == "Hunyuan")
    processor = processor_of(case, layout)
    config: Config = processor.config
    plan = config.plan(processor.adapter, layout, layout.text, device, None)
    keep = config.pairs(layout, layout.text, plan) / layout.tokens**2
    # Products per token: all pairs twice, four projections and two layers of the MLP.
    attention, rest = 2 * layout.tokens, (4 + 2 * case.mlp_ratio) * case.heads * case.width
    share = attention / (attention + rest)
    if plan_only or plan is None:
        return Row(case.name, layout.tokens, keep, share, heads)

    shape = (1, layout.tokens, heads, case.width)
    inputs = [torch.randn(shape, device=device, dtype=dtype_of(device)) for _ in range(3)]

    def dense() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return functional.scaled_dot_product_attention(q, k, v)

    def sparse() -> Tensor:
        return processor.attend(*inputs, layout, plan)

    attention = fastest([dense, sparse], device, turns)
    backend = config.chosen_backend(*inputs[:2], layout, plan)
    inputs.clear()
    block = measure_block(case, heads, device, turns)
    return Row(case.name, layout.tokens, keep, share, heads, *attention, *block, backend)


def clock(run: Callable[[], Any], device: torch.device) -> float:
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
        attention = block = "-"
        share = row.share_of_products
        if row.sparse_block:
            attention = f"{row.dense_attention / row.sparse_attention:.2f}x"
            block = f"{row.dense_block / row.sparse_block:.2f}x"
            share = row.dense_attention / row.dense_block
        table.add_row(
            row.name, f"{row.tokens:,}", f"{row.keep:.3f}", f"{1 / row.keep:.2f}x", attention, f"{share:.0%}",
            block, row.backend or "-",
        )  # fmt: skip
    name = torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine()
    width = "all heads" if heads is None else f"{heads} head{'s' * (heads > 1)}"
    Console().print(table, f"{name}, torch {torch.__version__}, rows and columns divided by {scale}, {width}")
    if arguments.json:
        figures = {
            "device": name, "torch": torch.__version__, "zoo": zoo.__version__, "scale": scale,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
