"""Compile the Triton kernels for a GPU that need not be there, and tell what each would cost.

    python scripts/bench/compile_kernels.py sm_90              every case, as JSON on standard output
    python scripts/bench/compile_kernels.py sm_90 blocks       the cases whose names begin so
    python scripts/bench/compile_kernels.py sm_90 --choose     write kernels/configs/sm_90.json

The launchers run as users run them, on CPU tensors; only the launch itself is replaced. `--choose` takes for
every kernel, width and dtype the first tile size of `WISHES` that neither spills a register nor exceeds the
shared memory, in the hungriest cases. One process for each architecture: Triton caches kernels by device.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from zoo import ops
from zoo.kernels import configs
from zoo.kernels.block_sparse import triton as block_sparse
from zoo.kernels.block_sparse.cpu import Lists
from zoo.kernels.neighborhood import triton as neighborhood
from zoo.kernels.neighborhood.geometry import Axis
from zoo.kernels.tile import launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("UTCHMMA", "HGMMA", "HMMA")  # tensor-core instructions of sm_100, sm_90, sm_80
# Bytes of shared memory that a program can have; the table of sm_80 also serves 8.6 and 8.9, which have less.
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

# Best guesses first: queries and keys in a tile, warps, stages. By bytes per number.
WISHES = {
    "forward": {
        2: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)],
        4: [(64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1)],
    },
    "dq": {
        2: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1)],
        4: [(64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1)],
    },
    "dkv": {
        2: [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1), (16, 32, 4, 1)],
        4: [(32, 64, 8, 2), (32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)],
    },
    "dtable": {
        2: [(64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1)],
        4: [(64, 32, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1)],
    },
    "drelative": {
        2: [(64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 4, 1)],
        4: [(32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)],
    },
}
WIDTHS = (32, 64, 128, 256)


# Compiling instead of launching ----------------------------------------------------------------------------


class NoDevice:
    """Answers what Triton asks a driver before a launch."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that nothing is sent to."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        """Return a type's name for a launcher that is never built."""
        return name


@contextmanager
def compiling(only: str | None = None) -> Iterator[list[tuple[str, dict, object]]]:
    """Turn every launch into a compilation; the list receives (kernel, launch options, what was compiled)."""
    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        name = self.fn.__name__.removesuffix("_kernel")
        if only in (None, name):
            compiled.append((name, options, run(self, *args, grid=grid, warmup=True, **options)))

    triton.JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        triton.JITFunction.run = run


def cost(kernel) -> dict[str, int]:
    """Registers of a thread, spills in bytes, shared memory in bytes, matrix instructions."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        read = lambda name: int(re.search(rf"{name}:?\s*(\d+)", text)[1])  # noqa: E731
        spills = read(r"\.vgpr_spill_count") * 4
        return {
            "registers": read(r"\.vgpr_count"),
            "spills": spills,
            "shared": kernel.metadata.shared,
            "matrix": text.count("v_mfma"),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spills": int(stack),
        "shared": kernel.metadata.shared,
        "matrix": sum(len(re.findall(rf"\b{name}\b", code)) for name in MATRIX),
    }


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
    "neighborhood 56x56, 32 wide, with bias": lambda: near(32, NAT, biased=True),
    "neighborhood 56x56, 32 wide, float32, with bias": lambda: near(32, NAT, torch.float32, biased=True),
    "neighborhood 56x56 dilated, 32 wide": lambda: near(32, DILATED),
    "neighborhood 64x64, 128 wide, with extra keys": lambda: near(128, IMAGE, extra=True),
    "neighborhood 13x30x52, 128 wide": lambda: near(128, VIDEO),
    "neighborhood 4096, 64 wide": lambda: near(64, SOUND),
}
# What needs the most registers, by kernel.
HUNGRY = {
    **dict.fromkeys(WISHES, lambda width, dtype: near(width, NAT, dtype, biased=True)),
    "dtable": lambda width, dtype: blocks(width, 128, dtype, biased=True),
}


def report(wanted: list[str]) -> dict[str, dict[str, object]]:
    """What every kernel of every wanted case costs."""
    table = {}
    for name, run in CASES.items():
        if wanted and not any(name.startswith(part) for part in wanted):
            continue
        with compiling() as compiled:
            run()
        for kernel, options, result in compiled:
            row = {"warps": options["num_warps"], "stages": options["num_stages"], **cost(result)}
            same = sum(key.startswith(f"{name}: {kernel}") for key in table)
            table[f"{name}: {kernel}" + (f" {same + 1}" if same else "")] = row
    return table


def choose(architecture: str) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """The first wish that fits, for every kernel, bytes per number and width."""
    table = {}
    for kernel, dtype, width in product(WISHES, (torch.bfloat16, torch.float32), WIDTHS):
        wishes = WISHES[kernel][dtype.itemsize]
        wish = next((w for w in wishes if _fits(architecture, kernel, width, dtype, w)), None)
        if wish is None:
            raise RuntimeError(f"no wish of {kernel} fits {architecture}, {width} wide, {dtype}")
        table.setdefault(kernel, {}).setdefault(str(dtype.itemsize), {})[str(width)] = wish
        print(architecture, kernel, dtype, width, wish, file=sys.stderr, flush=True)
    return table


def _fits(
    architecture: str, kernel: str, width: int, dtype: torch.dtype, wish: tuple[int, int, int, int]
) -> bool:
    """Whether the kernel spills nothing and needs no more shared memory than there is."""
    found = launch.choose
    launch.choose = lambda *key: configs.Config(*wish)
    try:
        with compiling(kernel) as compiled:
            HUNGRY[kernel](width, dtype)
    except triton.runtime.errors.OutOfResources:
        return False
    finally:
        launch.choose = found
    return all(
        used["spills"] == 0 and used["shared"] <= SHARED[architecture]
        for used in (cost(result) for *_, result in compiled)
    )


def main() -> None:
    """Print the report, or choose and write the table of configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("architecture", choices=SHARED)
    parser.add_argument("cases", nargs="*", help="beginnings of names of cases; all without any")
    parser.add_argument("--choose", action="store_true", help="write the table of configurations")
    arguments = parser.parse_args()
    driver.set_active(NoDevice(arguments.architecture))
    if not arguments.choose:
        json.dump(report(arguments.cases), sys.stdout, indent=1)
        return
    provenance = f"the first that fits, compiled with Triton {triton.__version__}; not yet timed on a GPU"
    text = json.dumps({"provenance": provenance, "configurations": choose(arguments.architecture)}, indent=1)
    # The numbers of one configuration stay in a line.
    text = re.sub(r"\[[^\]]*\]", lambda found: " ".join(found[0].split()), text)
    (Path(configs.__file__).parent / f"{arguments.architecture}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
