"""All that attends in zoo/ does it through zoo.ops; PyTorch's own call stands only where it is named here."""

from __future__ import annotations

import ast
from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "zoo"
NAMES = (
    "scaled_dot_product_attention",
    "flex_attention",
    "memory_efficient_attention",
    "multi_head_attention_forward",
)
# Module and the function that makes the call, and why.
ALLOWED = {
    ("analysis/bench.py", "_sdpa"),  # a peer, to compare with
    ("diffusion/processor.py", "dense"),  # what the stock processor itself would do, bit for bit
}


def calls(tree: ast.AST, inside: str = "") -> set[str]:
    """Innermost functions that call, or hand on, one of the names."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.add(inside)
        if isinstance(node, ast.ImportFrom) and any(alias.name in NAMES for alias in node.names):
            found.add(inside)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        found |= calls(node, node.name if is_function else inside)
    return found


def test_nothing_calls_the_attention_of_pytorch_on_its_own():
    files = sorted(ZOO.rglob("*.py"))
    assert len(files) > 30
    found = {
        (path.relative_to(ZOO).as_posix(), function)
        for path in files
        for function in calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


def test_a_call_is_found_however_it_is_written():
    sources = (
        "def f(q):\n return torch.nn.functional.scaled_dot_product_attention(q, q, q)",
        "def f(q):\n from torch.nn.functional import scaled_dot_product_attention as call\n return call(q)",
        "class A:\n def f(self, q):\n  return partial(F.scaled_dot_product_attention, q)",
    )
    assert all(calls(ast.parse(source)) == {"f"} for source in sources)
