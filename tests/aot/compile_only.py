"""Compile what the public launchers would launch on a GPU that is not there, and report what it would cost.

    python tests/aot/compile_only.py sm_90 [case ..]

writes one JSON object to standard output: for every case and kernel its registers, bytes spilled, shared
memory and tensor-core instructions. One process for each architecture: Triton caches kernels by device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = ("UTCHMMA", "HGMMA", "HMMA")


class NoDevice:
    """Answers what Triton asks a driver before a launch."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("sm_"):
            self.target = GPUTarget("cuda", int(architecture[3:]), 32)
        else:
            self.target = GPUTarget("hip", architecture, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def install(architecture: str) -> list:
    """Turn every launch into a compilation for `architecture`; the list receives (kernel, compiled)."""
    driver.set_active(NoDevice(architecture))
    compiled, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, options, kernel))
        return kernel

    triton.JITFunction.run = compile_only
    return compiled


def cost(kernel) -> dict[str, int]:
    """Registers, spills in bytes, shared memory in bytes, tensor-core instructions."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        read = lambda name: int(re.search(rf"{name}:?\s*(\d+)", text)[1])  # noqa: E731
        return {
            "registers": read(r"\.vgpr_count"),
            "spills": read(r"\.vgpr_spill_count"),
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
        "matrix": sum(len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORE),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    architecture, *wanted = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    compiled = install(architecture)
    from cases import CASES

    report = {}
    for name, run in CASES.items():
        if wanted and not any(name.startswith(part) for part in wanted):
            continue
        compiled.clear()
        run()
        for kernel, options, result in compiled:
            launched = f"{options['num_warps']} warps, {options['num_stages']} stages"
            report[f"{name} {kernel}"] = {"launch": launched, **cost(result)}
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
