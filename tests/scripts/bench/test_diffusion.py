"""The benchmark of the diffusion side: published geometries keep what was published, and every case runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "bench" / "diffusion.py"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    spec = spec_from_file_location("bench_diffusion", SCRIPT)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_it_starts_as_a_command():
    """Beside the other scripts: one with the name of a package that diffusers needs would be taken for it."""
    result = subprocess.run([sys.executable, str(SCRIPT), "--plan"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_published_geometries_keep_what_was_published(bench):
    rows = {case.name: bench.measure(case, None, CPU, 1, True) for case in bench.CASES}
    assert rows["Wan 2.1 161 f 768p"].keep == pytest.approx(1 - 0.736, abs=0.001)
    # Text adds to the video's 1 - 0.808: all see it, and it sees all.
    video, text = 64 * 45 * 80, 256
    kept = (0.192 * video**2 + 2 * video * text + text**2) / (video + text) ** 2
    assert rows["Hunyuan 253 f 720p"].keep == pytest.approx(kept, abs=0.002)
    assert rows["Flux 4K GNA"].keep == pytest.approx((80 / 256) ** 2, abs=0.02)
    assert all(row.dense_block is None and row.backend is None for row in rows.values())


def test_every_case_runs_at_a_small_size(bench):
    for case in bench.CASES:
        row = bench.measure(case.reduced(16), 1, CPU, 1, False)
        assert 0 < row.keep < 1 and row.backend and row.heads == 1
        assert min(row.dense_attention, row.sparse_attention, row.dense_block, row.sparse_block) > 0
