"""The GPU suite without a GPU: what it would run, how it judges, and the charts of its results.

All figures here are made up to test the arithmetic; none is a measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SUITE = ROOT / "scripts" / "bench" / "gpu_suite.py"
COMPILING = 1500  # CPU seconds of all kernels, more than a dry run takes
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(SUITE.parent)
    return import_module("gpu_suite")


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(SUITE.parent)
    return import_module("plot")


def run(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_needs_the_kernels_and_torch_only():
    absent = ["timm", "torchvision", "omegaconf", "typer", "rich", "yaml", "safetensors", "huggingface_hub"]
    code = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.partition('.')[0] in {absent}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv = ['gpu_suite.py', '--list']\n"
        f"sys.path.insert(0, {str(SUITE.parent)!r})\n"
        f"runpy.run_path({str(SUITE)!r}, run_name='__main__')\n"
    )
    answer = run("-c", code)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "dense, 16k tokens, 16 heads of 128: block_sparse_attention" in answer.stdout.splitlines()


def test_every_case_is_of_an_operation_and_every_goal_of_a_peer(suite):
    from zoo.kernels import dispatch

    names = [case.name for case in suite.CASES]
    assert len(set(names)) == len(names)
    for case in suite.CASES:
        assert case.op in dispatch.OPERATIONS
        if case.op in {other.op for other in suite.CASES if other.small}:
            peers = case.build(suite.Maker(torch.device("cpu"), torch.float32), **_small(suite, case)).peers
            assert {goal.peer for goal in case.goals} <= peers.keys() | {"flex in tiles", "flex"}, case.name


def _small(suite, case):
    return next(other.small[0] for other in suite.CASES if other.build is case.build and other.small)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nothing of this name"], "no case has"),
        pytest.param(
            [], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_what_it_cannot_do_is_told(suite, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        suite.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_flex_mask_of_a_neighborhood_is_the_definition(suite):
    from gpu_cases import _near_2d

    from zoo import ops

    grid, kernel, stride = (8, 12), 5, 2
    seen = torch.zeros(96, 96, dtype=torch.bool)
    seen.scatter_(1, ops.neighborhood_indices(grid, kernel, stride=stride), True)
    every = torch.arange(96)
    mask = _near_2d(grid, kernel, stride, (1, 12), None, None, every[:, None], every[None])
    torch.testing.assert_close(mask, seen)
    # The same with the tokens laid out in boxes of 4 x 3.
    order = every.view(2, 4, 4, 3).transpose(1, 2).flatten()
    mask = _near_2d(grid, kernel, stride, (4, 3), None, None, every[:, None], every[None])
    torch.testing.assert_close(mask, seen[order][:, order])


def results(suite) -> dict:
    """Made up: ours 2 ms forward, flex 5 ms, cuDNN refused."""
    case = suite.CASES[0]
    rows = [
        {"case": case.name, "op": case.op, "step": "forward", "by": "triton", "ms": 2.0, "floor": 1.0,
         "bound": "flops", "flops": 1e12, "moved": 1e9},
        {"case": case.name, "op": case.op, "step": "forward", "by": "flex", "ms": 5.0},
        {"case": case.name, "op": case.op, "step": "forward", "by": "sdpa cudnn", "error": "refused"},
    ]  # fmt: skip
    found = {
        "about": {"device": "made up", "torch": "0", "triton": "0", "date": "never", "commit": None,
                  "capability": "9.0"},
        "ceilings": {"bytes": 1e12, "flops": 1e15, "exps": 1e12},
        "checks": [{"right": True}, {"right": False}],
        "rows": rows,
        "tuned": {"forward/128": [64, 32, 4, 2]},
        "left_out": [{"what": "peer natten", "why": "not installed"}],
    }  # fmt: skip
    return {**found, "goals": suite.judge(found, [case])}


def test_goals_are_judged_by_ratios(suite):
    verdicts = {(g["what"], g["peer"]): (g["measured"], g["reached"]) for g in results(suite)["goals"]}
    assert verdicts["forward", "flex"] == (2.5, True)
    assert verdicts["forward", "sdpa cudnn"] == (None, None)
    assert verdicts["training", "flex"] == (None, None)


def test_the_floor_is_the_largest_need(suite):
    problem = suite.Problem({}, lambda x, backend: None, flops=4e12, moved=1e9, exps=1e9)
    assert suite.floor_of(problem, {"bytes": 1e12, "flops": 1e15, "exps": 1e12}) == (4.0, "flops")


def test_tables_go_between_the_marks(suite, plot, tmp_path, capsys):
    file, readme = tmp_path / "results.json", tmp_path / "README.md"
    file.write_text(json.dumps(results(suite)))
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    assert plot.main([str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 2 ms | 50% (flops) | flex 5 ms = 2.50x; sdpa cudnn refused |" in text
    assert "| flex | 1.05x | 2.50x | reached |" in text and "not measured" in text
    assert "1 of 2 comparisons" in text and "peer natten (not installed)" in text
    assert text.splitlines()[2] in capsys.readouterr().out
    with pytest.raises(ValueError, match="must hold the lines"):
        plot.with_report("no marks", results(suite))


def test_charts_are_drawn(suite, plot, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    for found in (results(suite), {**results(suite), "rows": [], "goals": []}):
        file.write_text(json.dumps(found))
        plot.main([str(file), "--charts", str(tmp_path)])
        assert {path.name for path in tmp_path.glob("*.svg")} == {"roofline.svg", "ratios.svg"}


def test_tile_sizes_of_a_run_are_taken_over(suite, tmp_path, monkeypatch):
    from zoo.kernels import configs

    table = (Path(configs.__file__).parent / "sm_90.json").read_text()
    (tmp_path / "sm_90.json").write_text(table)
    (tmp_path / "results.json").write_text(json.dumps(results(suite)))
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    suite.main(["--adopt", str(tmp_path / "results.json")])
    adopted = json.loads((tmp_path / "sm_90.json").read_text())
    assert adopted["configurations"]["forward"]["2"]["128"] == [64, 32, 4, 2]
    assert "fastest on made up" in adopted["provenance"]
    before = json.loads(table)["configurations"]
    before["forward"]["2"]["128"] = [64, 32, 4, 2]
    assert adopted["configurations"] == before


@pytest.mark.slow
def test_the_dry_run_compiles_a_case_at_all_its_sizes():
    answer = run(str(SUITE), "--compile-only", "--no-tuning", "--only", "segments")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # Three kernels: one small size in three dtypes, one large.
    assert "segments of 900 to 1300 tokens, 16 heads of 128: 12 kernels" in answer.stdout
    assert "a run on 16 processors, in seconds: begin 15, compile" in answer.stdout


def test_a_whole_run_is_planned_for_less_than_its_limit(suite):
    seconds = suite.plan(suite.CASES, tuning=True, compiling=COMPILING)
    assert set(seconds) == {"begin", "compile", "check", "tune", "times"}
    assert sum(seconds.values()) < suite.SECONDS < 540


def test_what_does_not_compile_is_told_and_the_rest_compiled(suite, monkeypatch):
    monkeypatch.setattr(suite, "work", None)
    cases = [case for case in suite.CASES if case.name.startswith("gated")]
    monkeypatch.setattr(suite, "__file__", str(Path(__file__).with_name("no_such_file.py")))
    told = []
    table = suite.compile_all(cases, "sm_90", False, lambda table: told.append(dict(table)))
    assert "died" in table[cases[0].name]["error"] and told


def test_a_run_goes_on_with_a_new_context_behind_a_kernel_that_broke_the_old_one(
    suite, monkeypatch, tmp_path
):
    broken, good = (
        next(c for c in suite.CASES if c.name.startswith(name)) for name in ("segments", "49 agents")
    )
    steps = []

    class Replaced(Exception):
        pass

    def check(case, *_):
        steps.append(f"check {case.op}")
        if case is broken:
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")
        return [{"case": case.name, "right": True}]

    def synchronize():
        if steps[-1] == f"check {broken.op}":
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    def execv(program, arguments):
        raise Replaced(*arguments)

    monkeypatch.setattr(suite, "about_device", lambda: {"device": "made up", "capability": "9.0"})
    monkeypatch.setattr(suite, "ceilings", lambda: {"bytes": 1.0})
    monkeypatch.setattr(suite, "compile_all", lambda *_: steps.append("compile") or {})
    monkeypatch.setattr(suite, "check", check)
    monkeypatch.setattr(suite, "bench", lambda case, results: steps.append(f"time {case.op}"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "execv", execv)
    file = tmp_path / "made_up.json"
    with pytest.raises(Replaced) as again:
        suite.measure([broken, good], file, tuning=False)
    assert again.value.args[-4:-1] == ("--out", str(file), "--until")
    assert steps == ["compile", *[f"check {broken.op}"] * 3 * len(broken.small)]
    steps.clear()
    assert suite.measure([broken, good], file, tuning=False, end=float(again.value.args[-1])) == 1
    assert steps == [*[f"check {good.op}"] * 3 * len(good.small), f"time {good.op}"]
    found = json.loads(file.read_text())
    assert found["checks"][0]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert {"what": f"times of {broken.name}", "why": "its operation is wrong"} in found["left_out"]


def test_what_is_timed_already_is_not_timed_again(suite, monkeypatch, tmp_path):
    results = suite.Results(tmp_path / "made_up.json", {})
    results.found["ceilings"] = dict.fromkeys(("bytes", "flops", "exps"), 1.0)
    problem = suite.Problem({}, lambda x, backend: None, flops=1, moved=1, exps=1)
    case = suite.Case("made up", "attention", lambda make, **size: problem, (), {})
    results.found["rows"] = [{"case": "made up", "step": "forward", "by": "triton", "error": "context lost"}]
    monkeypatch.setattr(suite, "free", lambda: None)
    suite.bench(case, results)
    assert [(row["step"], row["by"]) for row in results.found["rows"]] == [
        ("forward", "triton"), ("training", "triton"),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_comparison_with_float64_runs_and_finds_what_is_wrong():
    code = (
        f"import sys; sys.path.insert(0, {str(SUITE.parent)!r})\n"
        "import torch, gpu_suite\n"
        "from unittest import mock\n"
        "case = next(case for case in gpu_suite.CASES if case.name.startswith('windows'))\n"
        "device = torch.device('cpu')\n"
        "rows = gpu_suite.check(case, case.small[0], torch.float32, device)\n"
        "assert [row['of'] for row in rows] == ['out', 'dq', 'dk', 'dv', 'dbias'], rows\n"
        "assert all(row['right'] for row in rows), rows\n"
        "from zoo.kernels.tile import launch\n"
        "with mock.patch.object(launch, 'exact', lambda number: (number * 1.01, 0.0)):\n"
        "    rows = gpu_suite.check(case, case.small[0], torch.float32, device)\n"
        "assert not any(row['right'] for row in rows if row['of'] in ('out', 'dq', 'dk')), rows\n"
    )
    answer = run("-c", code, interpret="1")
    assert answer.returncode == 0, answer.stderr[-3000:]
