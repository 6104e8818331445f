"""Letter E of the reliability checks, R42: no kernel touches what is not its own, near or beyond 2**31."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = [path for path in sorted((ROOT / "kernels").rglob("*.py")) if "triton.jit" in path.read_text()]
STRIDE = re.compile(r"(?:stride|d?[qkvox]|do|d?lse|dt|dlse|table)_(?:[bnhmyx])")


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (HERE, ROOT / "tests", ROOT)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the signals of Linux")
@pytest.mark.parametrize("at_end", [False, True])
def test_r42_a_guard_page_ends_who_touches_it(at_end):
    code = (
        "import torch, ctypes, guarded\n"
        f"x = guarded.guarded((5,), torch.float32, {at_end})\n"
        "x[:] = 1\n"
        "print('wrote its own', flush=True)\n"
        f"ctypes.c_char.from_address(x.data_ptr() + {20 if at_end else -1}).value\n"
        "print('read beyond')\n"
    )
    result = python("-c", code)
    assert result.stdout == "wrote its own\n", result.stderr
    assert result.returncode == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**40, reason="the memory map of 64-bit Linux")
def test_r42_guard_pages_and_tensors_beyond_2_to_the_31():
    result = python(HERE / "guarded.py")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    assert "neighborhood_attention, tokens far apart" in result.stdout


def narrow_products(source: str) -> list[str]:
    """Products of a stride and a number that nothing made 64 bits wide, in Triton functions."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or not any(
            "jit" in ast.unparse(decorator) for decorator in function.decorator_list
        ):
            continue
        wide: set[str] = set()

        def is_wide(node: ast.AST, wide: set[str] = wide) -> bool:
            return any(
                ast.unparse(part).endswith(".to(tl.int64)") or isinstance(part, ast.Name) and part.id in wide
                for part in ast.walk(node)
            )

        nodes = list(ast.walk(function))
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        for node in nodes:
            if isinstance(node, ast.Assign) and is_wide(node.value):
                wide |= {
                    name.id
                    for target in node.targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                }
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                sides = (node.left, node.right), (node.right, node.left)
                for stride, other in sides:
                    if isinstance(stride, ast.Name) and STRIDE.fullmatch(stride.id) and not is_wide(other):
                        found.append(f"{function.name}: {ast.unparse(node)}")
    return found


def test_r42_the_scan_sees_a_product_of_32_bits():
    bad = """
@triton.jit
def kernel(p_q, q_b, q_n, T: tl.constexpr):
    i = tl.program_id(0)
    i_b = (i // 2).to(tl.int64)
    o = tl.arange(0, T)
    x = tl.load(p_q + i_b * q_b + o * q_n)
    y = tl.load(p_q + i * q_b + o.to(tl.int64) * q_n)
"""
    assert narrow_products(bad) == ["kernel: o * q_n", "kernel: i * q_b"]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_r42_every_offset_is_64_bits_wide(path):
    assert not narrow_products(path.read_text())
