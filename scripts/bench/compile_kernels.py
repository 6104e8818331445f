"""Compile the Triton kernels for a GPU that need not be there, and tell what each would cost.

    python scripts/bench/compile_kernels.py sm_90              every case, as JSON on standard output
    python scripts/bench/compile_kernels.py sm_90 blocks       the cases whose names begin so
    python scripts/bench/compile_kernels.py sm_90 --choose     write kernels/configs/sm_90.json
    python scripts/bench/compile_kernels.py --budget           every case for every architecture: write
                                                               tests/aot/budget.json, kernels/README.md
    python scripts/bench/compile_kernels.py --check            the same, only compared with what is there
    python scripts/bench/compile_kernels.py all norms --budget     or --check: of these cases alone

The launchers run as users run them, on CPU tensors; only the launch itself is replaced. `--choose` takes for
every kernel, width and dtype the first tile size of `WISHES` that neither spills a register nor exceeds the
shared memory, in the hungriest cases. One process for each architecture: Triton caches kernels by device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from math import inf
from pathlib import Path
from unittest import mock

import torch
import triton
from without_gpu import compile_for, compiling, on_a_device

from zoo import ops
from zoo.kernels import configs
from zoo.kernels.block_sparse import triton as block_sparse
from zoo.kernels.block_sparse.cpu import Lists
from zoo.kernels.neighborhood import triton as neighborhood
from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.tile import launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROOT = Path(__file__).resolve().parents[2]
BUDGET, README = ROOT / "tests" / "aot" / "budget.json", ROOT / "kernels" / "README.md"
MATRIX = re.compile(r"\b(?:UTC\w*MMA|HGMMA|HMMA|v_mfma\w*)\b")  # on sm_100, sm_90, sm_80, gfx942
# Bytes of shared memory that a program can have; the table of sm_80 also serves 8.6 and 8.9, which have less.
BUDGETED = ("sm_80", "sm_90", "sm_100", "gfx942")
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

# Best guesses first: queries and keys in a tile, warps, stages. By bytes per number.
WISHES = {
    "forward": {
        2: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 1), (64, 32, 4, 2),
            (64, 32, 8, 1), (32, 32, 4, 1)],
        4: [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1),
            (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "dq": {
        2: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1), (32, 32, 4, 1),
            (16, 32, 4, 1)],
        4: [(64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "dkv": {
        2: [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1),
            (16, 32, 4, 1)],
        4: [(32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "dtable": {
        2: [(64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
        4: [(64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "dpairs": {
        2: [(64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1), (64, 32, 8, 1),
            (32, 32, 4, 1)],
        4: [(64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "drelative": {
        2: [(64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 4, 1)],
        4: [(32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    },
}  # fmt: skip
for _name in ("forward", "dq", "dkv"):
    WISHES[f"{_name} with bias"] = WISHES[_name]
WIDTHS = (32, 64, 128, 256)


# What a kernel costs ----------------------------------------------------------------------------------------


def cost(kernel) -> dict[str, int]:
    """Registers of a thread, spills in bytes, shared memory in bytes, matrix instructions, all instructions
    of the hot loop."""
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        read = lambda name: int(re.search(rf"{name}:?\s*(\d+)", code)[1])  # noqa: E731
        registers, spills = read(r"\.vgpr_count"), read(r"\.vgpr_spill_count") * 4
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            code = _tool("nvdisasm", "-c", file.name)
        registers, spills = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "matrix": len(MATRIX.findall(code)),
        "loop": hot_loop(code),
    }


def hot_loop(code: str) -> int:
    """Instructions of the innermost loop that has the most matrix instructions; 0 where no loop has any."""
    labels, places, jumps, matrix = {}, 0, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = places
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/|\s+[sv]_|\s+(?:ds|global|buffer|flat)_", line):
            if jump := re.search(r"(?:BRA|s_c?branch).*?(\.L\w+)", line):
                jumps.append((places, jump[1]))
            matrix.append(bool(MATRIX.search(line)))
            places += 1
    loops = [(labels[label], end + 1) for end, label in jumps if labels.get(label, places) <= end]
    inner = [
        (begin, end)
        for begin, end in loops
        if any(matrix[begin:end])
        and not any(begin <= b and e <= end and (b, e) != (begin, end) and any(matrix[b:e]) for b, e in loops)
    ]
    begin, end = max(inner, key=lambda loop: (sum(matrix[slice(*loop)]), loop[0] - loop[1]), default=(0, 0))
    return end - begin


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


# What is compiled ------------------------------------------------------------------------------------------


def blocks(
    width: int,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    segments: bool = False,
    biased: bool = False,
    tokens: int = 1024,
) -> None:
    """Block-sparse attention, forward and backward."""
    q, k, v = torch.zeros(3, 1, tokens, 2, width, dtype=dtype)
    count = -(-tokens // size)
    if segments:
        lists = ops.BlockList.from_segments([tokens // 2, tokens // 2], block_size=size)
    else:
        lists = ops.BlockList.from_mask(torch.ones(count, count).bool(), block_size=size)
    inverse = (lists.inverse_offsets, lists.inverse_indices)
    lists = Lists(lists.offsets, lists.indices, size, size, lists.query_segments, lists.key_segments)
    bias = torch.zeros(1, 2, tokens, tokens) if biased else None
    out, lse = block_sparse.forward(q, k, v, bias, lists, 0.1)
    block_sparse.backward(out, lse, q, k, v, bias, out, lse, lists, 0.1, biased, *inverse)


def near(
    width: int,
    axes: tuple[Axis, ...],
    dtype: torch.dtype = torch.bfloat16,
    *,
    biased: bool = False,
    extra: bool = False,
) -> None:
    """Neighborhood attention, forward and backward."""
    tokens = 1
    for axis in axes:
        tokens *= axis.length
    q, k, v = torch.zeros(3, 1, tokens, 2, width, dtype=dtype)
    rpb = torch.zeros(2, *(2 * axis.kernel_size - 1 for axis in axes)) if biased else None
    more = torch.zeros(2, 1, 8, 2, width, dtype=dtype).unbind(0) if extra else (None, None)
    out, lse = neighborhood.forward(q, k, v, rpb, *more, axes, 0.1)
    neighborhood.backward(out, None, q, k, v, rpb, *more, out, lse, axes, 0.1, biased)


def windows(width: int, size: int, *, biased: bool = True, shift: int = 0) -> None:
    """Window attention, forward and backward."""
    q, k, v = (torch.zeros(1, 8 * size, 8 * size, 2, width, dtype=torch.bfloat16, requires_grad=True),) * 3
    bias = torch.zeros(2, size**2, size**2, requires_grad=True) if biased else None
    ops.window_attention(q, k, v, size, shift=shift, bias=bias).sum().backward()


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Tensors that want gradients."""
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def everything(width: int, *, masked: bool = False) -> None:
    """Attention of all to all with its LSE, forward and backward."""
    mask = torch.ones(2, 1000, dtype=torch.bool) if masked else None
    leaf = leaves((2, 4096, 2, width), *[(2, 1000, 2, width)] * 2)
    out, lse = ops.attention(*leaf, key_mask=mask, return_lse=True)
    (out.sum() + lse.sum()).backward()


def agents(width: int, tokens: int, count: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Attention through agents with both biases, forward and backward."""
    q, k, v, few = leaves(*[(2, tokens, 2, width)] * 3, (2, count, 2, width), dtype=dtype)
    bias_in, bias_out = leaves((2, count, tokens), (2, tokens, count))
    ops.agent_attention(q, k, v, few, bias_in=bias_in, bias_out=bias_out).sum().backward()


def sampled_keys(width: int, side: int, count: int) -> None:
    """Attention to sampled keys with the table's bias, forward and backward, and the sampling itself."""
    q, k, v = leaves((2, side, side, 2, width), (2, count, 2, width), (2, count, 2, width))
    positions, table = torch.zeros(2, 2, count, 2), torch.zeros(2, 2 * side - 1, 2 * side - 1)
    positions.requires_grad_(), table.requires_grad_()
    ops.deformable_attention(q, k, v, positions, table=table).sum().backward()


def samples(channels: int, side: int, count: int) -> None:
    """A map read between its tokens, forward and backward."""
    (x,) = leaves((2, side, side, channels))
    ops.deformable_sample(x, torch.zeros(2, 2, count, 2, requires_grad=True)).sum().backward()


def own_places(width: int, side: int, radius: int) -> None:
    """Attention to the keys around a query's own place, forward and backward."""
    ops.aligned_attention(*leaves(*[(1, side, side, 2, width)] * 3), radius=radius).sum().backward()


def norms(channels: int, norm: str) -> None:
    """The modulated norm, forward and backward."""
    ops.modulated_norm(*leaves((2, 1024, channels), (2, channels), (2, channels)), norm=norm).sum().backward()


def residuals(channels: int) -> None:
    """The gated residual, forward and backward."""
    x = leaves((2, 1024, channels), (2, 1024, channels), (2, channels))
    ops.gated_residual(*x).sum().backward()


def turns(width: int) -> None:
    """Norm and rotary positions, forward and backward."""
    angles = torch.zeros(2, 1024, width // 2).unbind()
    ops.rotary_norm(*leaves((2, 1024, 24, width), (width,)), *angles).sum().backward()


def channels(width: int, tokens: int) -> None:
    """Channel attention, forward and backward."""
    ops.channel_attention(*leaves(*[(2, tokens, 2, width)] * 3)).sum().backward()


def regions(width: int, side: int, topk: int) -> None:
    """Attention to routed regions, 7 x 7 of them, forward and backward."""
    routes = torch.zeros(2, 49, topk, dtype=torch.int64) + torch.arange(topk)
    ops.bilevel_routing_attention(*leaves(*[(2, side, side, 2, width)] * 3), routes, 7).sum().backward()


NAT = (Axis(56, 7), Axis(56, 7))
DILATED = (Axis(56, 7, 8), Axis(56, 7, 8))
IMAGE = (Axis(64, 25, 1, 8), Axis(64, 25, 1, 8))
VIDEO = (Axis(13, 5, 1, 1, True), Axis(30, 7), Axis(52, 7))
SOUND = (Axis(4096, 255),)
CASES: dict[str, Callable[[], None]] = {
    "blocks of 128, 64 wide": lambda: blocks(64, 128),
    "blocks of 128, 128 wide": lambda: blocks(128, 128),
    "blocks of 49, 32 wide": lambda: blocks(32, 49, tokens=49 * 49),
    "blocks of 64, 80 wide, float16": lambda: blocks(80, 64, torch.float16),
    "blocks of 64, 64 wide, float32": lambda: blocks(64, 64, torch.float32),
    "blocks of 64, 64 wide, with bias": lambda: blocks(64, 64, biased=True),
    "blocks of 128, 256 wide": lambda: blocks(256, 128),
    "segments, 64 wide": lambda: blocks(64, 64, segments=True),
    "all keys, 64 wide, masked": lambda: everything(64, masked=True),
    "all keys, 128 wide": lambda: everything(128),
    "neighborhood 56x56, 32 wide, with bias": lambda: near(32, NAT, biased=True),
    "neighborhood 56x56, 32 wide, float32, with bias": lambda: near(32, NAT, torch.float32, biased=True),
    "neighborhood 56x56 dilated, 32 wide": lambda: near(32, DILATED),
    "neighborhood 64x64, 128 wide, with extra keys": lambda: near(128, IMAGE, extra=True),
    "neighborhood 13x30x52, 128 wide": lambda: near(128, VIDEO),
    "neighborhood 4096, 64 wide": lambda: near(64, SOUND),
    "windows of 7x7, 32 wide, with bias": lambda: windows(32, 7, shift=3),
    "windows of 8x8, 64 wide": lambda: windows(64, 8, biased=False),
    "49 agents, 32 wide, with biases": lambda: agents(32, 3136, 49),
    "channels, 32 wide": lambda: channels(32, 3136),
    "4 of 49 regions of 4x4, 32 wide": lambda: regions(32, 28, 4),
    "49 sampled keys, 32 wide": lambda: sampled_keys(32, 56, 49),
    "samples of 96 channels": lambda: samples(96, 56, 49),
    "own places 32x32, radius 1, 128 wide": lambda: own_places(128, 32, 1),
    "norms of 1152, rms": lambda: norms(1152, "rms"),
    "norms of 5120": lambda: norms(5120, "layer"),
    "residuals of 3072": lambda: residuals(3072),
    "rotary norms, 128 wide": lambda: turns(128),
}
# What the table of kernels/README.md shows.
MAIN = (
    "all keys, 128 wide",
    "blocks of 128, 64 wide",
    "blocks of 128, 128 wide",
    "segments, 64 wide",
    "neighborhood 56x56, 32 wide, with bias",
    "neighborhood 13x30x52, 128 wide",
    "windows of 7x7, 32 wide, with bias",
    "channels, 32 wide",
    "4 of 49 regions of 4x4, 32 wide",
    "49 sampled keys, 32 wide",
    "norms of 5120",
    "residuals of 3072",
    "rotary norms, 128 wide",
)
# What needs the most registers, by kernel.
HUNGRY = {
    **dict.fromkeys(WISHES, lambda width, dtype: near(width, NAT, dtype, biased=True)),
    **dict.fromkeys(("forward", "dq", "dkv"), lambda width, dtype: near(width, VIDEO, dtype)),
    "dtable": lambda width, dtype: blocks(width, 128, dtype, biased=True),
    "dpairs": lambda width, dtype: agents(width, 3136, 49, dtype),
}


def report(wanted: list[str]) -> dict[str, dict[str, object]]:
    """What every kernel of every wanted case costs."""
    table = {}
    for name, run in CASES.items():
        if not _wanted(name, wanted):
            continue
        with compiling() as compiled, on_a_device():
            run()
        for kernel, options, result in compiled:
            row = {"warps": options["num_warps"], "stages": options["num_stages"], **cost(result)}
            same = sum(
                re.fullmatch(re.escape(f"{name}: {kernel}") + r"( \d+)?", key) is not None for key in table
            )
            table[f"{name}: {kernel}" + (f" {same + 1}" if same else "")] = row
    return table


def choose(architecture: str) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """The first wish that spills nothing, for every kernel, bytes per number and width.

    Where all spill, which happens to float32 heads of more than 128 channels, the one that spills least.
    """
    table = {}
    for kernel, dtype, width in product(WISHES, (torch.bfloat16, torch.float32), WIDTHS):
        spills = {}
        for wish in WISHES[kernel][dtype.itemsize]:
            spills[wish] = _spills(architecture, kernel, width, dtype, wish)
            if spills[wish] == 0:
                break
        best = min(spills, key=spills.get)
        if spills[best] == inf:
            raise RuntimeError(f"no wish of {kernel} fits {architecture}, {width} wide, {dtype}")
        table.setdefault(kernel, {}).setdefault(str(dtype.itemsize), {})[str(width)] = best
        print(architecture, kernel, dtype, width, best, spills[best], file=sys.stderr, flush=True)
    return table


def _spills(
    architecture: str, kernel: str, width: int, dtype: torch.dtype, wish: tuple[int, int, int, int]
) -> float:
    """Bytes that the kernel spills; infinity where it needs more shared memory than there is."""
    try:
        with (
            mock.patch.object(launch, "choose", lambda *key: configs.Config(*wish)),
            compiling(kernel.removesuffix(" with bias")) as compiled,
            on_a_device(),
        ):
            HUNGRY[kernel](width, dtype)
    except triton.runtime.errors.OutOfResources:
        return inf
    used = [cost(result) for *_, result in compiled]
    fits = all(row["shared"] <= SHARED[architecture] for row in used)
    return max(row["spills"] for row in used) if fits else inf


# The budget and its table -----------------------------------------------------------------------------------


def measure(architectures: Sequence[str], cases: list[str]) -> dict[str, object]:
    """What the cases, all without any, cost on the architectures, each in a process of its own."""
    costs = {}
    for architecture in architectures:
        print(f"compiling for {architecture}", file=sys.stderr, flush=True)
        command = [sys.executable, "-W", "ignore", __file__, architecture, *cases]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        costs[architecture] = json.loads(answer.stdout)
    return {"triton": triton.__version__, "costs": costs}


def as_json(budget: dict[str, object]) -> str:
    """The budget, one kernel in a line."""
    parts = []
    for architecture, rows in budget["costs"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        parts.append(f"  {json.dumps(architecture)}: {{\n{lines}\n  }}")
    costs = ",\n".join(parts)
    return f'{{\n "triton": {json.dumps(budget["triton"])},\n "costs": {{\n{costs}\n }}\n}}\n'


def as_table(budget: dict[str, object]) -> str:
    """The main policies as a Markdown table: registers, shared memory, matrix instructions, hot loop."""
    costs = budget["costs"]
    lines = [
        f"| kernel | {' | '.join(costs)} |",
        f"| --- |{' --- |' * len(costs)}",
    ]
    for name in next(iter(costs.values())):
        if name.partition(": ")[0] in MAIN:
            rows = (costs[architecture].get(name) for architecture in costs)
            lines.append(f"| {name} | {' | '.join(map(_cell, rows))} |")
    return "\n".join(lines)


def _cell(row: dict[str, int] | None) -> str:
    if row is None:
        return "-"
    spilled = f", {row['spills']} B spilled" if row["spills"] else ""
    memory = f"{row['shared'] / 1024:.0f} KB"
    return f"{row['registers']} / {memory} / {row['matrix']} / {row['loop'] or '-'}{spilled}"


def with_table(text: str, budget: dict[str, object]) -> str:
    """The text with the table of the budget between its two marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    said = f"Triton {budget['triton']}, `python scripts/bench/compile_kernels.py --budget`:"
    return f"{head}{BEGIN}\n{said}\n\n{as_table(budget)}\n{END}{tail}"


def merged(known: dict[str, object], found: dict[str, object], cases: list[str]) -> dict[str, object]:
    """The known budget with the figures of these cases as found, in the order of the cases."""
    if known["triton"] != found["triton"]:
        raise RuntimeError(f"the budget was made with Triton {known['triton']}: write all of it again")
    order, costs = list(CASES), {}
    for architecture, rows in known["costs"].items():
        new = found["costs"].get(architecture)
        if new is not None:
            rows = {name: row for name, row in rows.items() if not _wanted(name, cases)} | new
        costs[architecture] = dict(sorted(rows.items(), key=lambda row: order.index(row[0].split(": ")[0])))
    return {"triton": known["triton"], "costs": costs}


def _wanted(name: str, cases: list[str]) -> bool:
    return not cases or name.startswith(tuple(cases))


def check_budget(found: dict[str, object], cases: list[str]) -> list[str]:
    """What differs between the figures found and the committed ones of these cases."""
    known = json.loads(BUDGET.read_text())
    if known["triton"] != found["triton"]:
        return [f"the budget was made with Triton {known['triton']}, this is {found['triton']}"]
    differences = []
    for architecture, rows in found["costs"].items():
        committed = known["costs"].get(architecture, {})
        committed = {name: row for name, row in committed.items() if _wanted(name, cases)}
        for name in dict.fromkeys([*rows, *committed]):
            if rows.get(name) != committed.get(name):
                differences.append(f"{architecture}, {name}: {committed.get(name)} became {rows.get(name)}")
    text = README.read_text()
    if with_table(text, known) != text:
        differences.append("the table of kernels/README.md is not that of the budget")
    return differences


def main() -> int:
    """Print the report, or choose and write the table of configurations, or write or check the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("architecture", nargs="?", choices=(*SHARED, "all"))
    parser.add_argument("cases", nargs="*", help="beginnings of names of cases; all without any")
    parser.add_argument("--choose", action="store_true", help="write the table of configurations")
    parser.add_argument("--budget", action="store_true", help="write the budget and the table of the README")
    parser.add_argument("--check", action="store_true", help="compare them; status 1 where they differ")
    arguments = parser.parse_args()
    if arguments.budget or arguments.check:
        architectures = (arguments.architecture,) if arguments.architecture in BUDGETED else BUDGETED
        found = measure(architectures, arguments.cases)
        if arguments.check:
            differences = check_budget(found, arguments.cases)
            print("\n".join(differences) or "as committed")
            return int(bool(differences))
        if arguments.architecture is not None:
            found = merged(json.loads(BUDGET.read_text()), found, arguments.cases)
        BUDGET.write_text(as_json(found))
        README.write_text(with_table(README.read_text(), found))
        return 0
    if arguments.architecture in (None, "all"):
        parser.error(f"name an architecture ({', '.join(SHARED)}), or --budget or --check for all")
    compile_for(arguments.architecture)
    if not arguments.choose:
        json.dump(report(arguments.cases), sys.stdout, indent=1)
        return 0
    provenance = f"the first that fits, compiled with Triton {triton.__version__}; not yet timed on a GPU"
    text = json.dumps({"provenance": provenance, "configurations": choose(arguments.architecture)}, indent=1)
    # The numbers of one configuration stay in a line.
    text = re.sub(r"\[[^\]]*\]", lambda found: " ".join(found[0].split()), text)
    (Path(configs.__file__).parent / f"{arguments.architecture}.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
