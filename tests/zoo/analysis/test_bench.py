"""What measuring promises: turns, percentiles, memory, multiply-adds and exponents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.analysis import bench
from zoo.analysis.report import draw_costs, report_page, table_of

CPU = torch.device("cpu")


def row(name: str, side: int, milliseconds: float, memory: int | None = 2**20) -> bench.Measurement:
    times = {"least": milliseconds, "p10": milliseconds, "p50": milliseconds, "p90": milliseconds}
    return bench.Measurement(name, side, 1, "forward", times, 3, memory, tokens=side * side, macs=side**4)


@pytest.fixture(scope="module")
def report():
    rows = [row("global", side, side**4 / 1e6) for side in (14, 28)]
    rows += [row("window & <b>", side, side**2 / 1e3, None) for side in (14, 28)]
    exponents = {"global": {"time": 2.0, "memory": 0.0, "macs": 2.0}, "window & <b>": {"time": 1.0}}
    return bench.Report("over resolution", bench.machine(), rows, exponents)


def test_everything_runs_in_turns_and_at_least_three_times():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.time_in_turns(runs, 0.0, CPU)
    assert order == list("ab" * 4)  # once before the clock starts
    assert [len(found) for found in times.values()] == [3, 3]


def test_percentiles_lie_between_the_nearest_times():
    found = bench.percentiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == pytest.approx({"least": 1.0, "p10": 1.4, "p50": 3.0, "p90": 4.6})


TWO_TENSORS_THEN_A_THIRD = """
import sys
import torch
from zoo.analysis import bench

def run():
    a = torch.ones(int(sys.argv[1]) * 2**18)
    b = a + 1
    del a
    b = b + 1

print(bench.peak_memory(run, torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from Linux")
@pytest.mark.parametrize("megabytes", [32, 64])
def test_memory_is_the_peak_of_what_a_call_adds(megabytes):
    """Two tensors at once, then a third beside one of them: the peak is two.

    In a process of its own: a heap that other tests have used may have a hole that only one tensor fits in.
    """
    asked = [sys.executable, "-c", TWO_TENSORS_THEN_A_THIRD, str(megabytes)]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert int(answer.stdout) == pytest.approx(2 * megabytes * 2**20, rel=0.15)


def test_a_failure_while_memory_is_measured_gives_no_number():
    calls = []

    def run() -> None:
        calls.append(1)
        raise MemoryError

    assert bench.peak_memory(run, CPU) is None
    assert not calls  # it ran in a process of its own


def test_threads_are_as_many_as_before():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), bench.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_exponents_of_powers_are_those_powers():
    sizes = [100.0, 400.0, 1600.0]
    assert bench.fit_exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    with pytest.raises(zoo.ConfigError, match="two sizes"):
        bench.fit_exponent([7.0, 7.0], [1.0, 2.0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(bench.OPERATIONS))
def test_every_operation_can_be_measured(name, training):
    made = bench.subject(name, size=14, training=training)
    made.run()
    assert made.tokens == 196 and made.macs > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", bench.MECHANISMS)
def test_every_mechanism_can_be_measured(name, training):
    small, large = (bench.module_subject(name, side, training=training) for side in (14, 28))
    small.run()
    exponent = bench.fit_exponent([small.tokens, large.tokens], [small.macs, large.macs])
    assert exponent < 1.1 or name == "global"
    assert exponent > 1.5 or name != "global"


def test_a_model_its_peer_and_a_backend(monkeypatch):
    specs = ["nat_digits", "neighborhood_attention@reference", "neighborhood_attention"]
    subjects = [bench.subject(spec, size=32) for spec in specs]
    found = bench.measure(subjects, seconds=0.0, memory=False)
    assert [each.name for each in found] == specs
    assert found[0].parameters == zoo.model_info("nat_digits").params
    assert found[0].macs == zoo.model_info("nat_digits").macs and found[0].memory is None
    seen = []
    monkeypatch.setattr(
        bench.ops, "neighborhood_attention", lambda q, *a, **k: seen.append(zoo.ops.current_backend()) or q
    )
    for each in subjects[1:]:
        each.run()
    assert seen == ["reference", "auto"]


def test_a_model_of_timm_is_counted_by_the_operations_it_runs():
    made = bench.subject("resnet18", size=64)
    expected = 0.149e9  # 1.82 G multiply-adds at 224, by (64 / 224) squared
    assert made.macs == pytest.approx(expected, rel=0.02) and made.parameters == 11689512


def test_a_comparison_has_every_mechanism_at_every_size():
    made = bench.compare(["window", "global"], (7, 14), seconds=0.0, dim=16, memory=False)
    assert [(each.name, each.side) for each in made.rows] == [
        ("window", 7),
        ("global", 7),
        ("window", 14),
        ("global", 14),
    ]
    assert set(made.exponents["global"]) == {"time", "macs"}
    assert bench.Report.from_plain(json.loads(json.dumps(made.plain()))) == made


def test_the_measured_exponents_are_as_promised_and_as_written():
    """Of the last measurement that is stored: linear mechanisms at most 1.15 in tokens, global about 2."""
    root = Path(__file__).resolve().parents[3]
    stored = json.loads((root / "scripts" / "bench" / "results" / "attention_cpu.json").read_text())
    found = bench.Report.from_plain(stored).exponents
    for name in ("neighborhood", "agent", "channel", "bilevel"):
        assert found[name]["time"] <= 1.15, name
    assert 1.7 <= found["global"]["time"] <= 2.2
    text = (root / "zoo" / "analysis" / "README.md").read_text()
    for name, fitted in found.items():
        assert f"| {name} | {fitted['time']:.2f} | {fitted['memory']:.2f} |" in text


def test_mistakes_say_what_is_right():
    with pytest.raises(zoo.ConfigError, match="did you mean neighborhood_attention"):
        bench.subject("neighborhod_attention")
    with pytest.raises(zoo.ConfigError, match=r"did you mean (?!.*nat_digits or nat_digits).*nat_digits"):
        bench.subject("nat_digit")
    with pytest.raises(zoo.ConfigError, match="dit_digits makes images; bench runs classifiers"):
        bench.subject("dit_digits")
    with pytest.raises(zoo.ConfigError, match="did you mean window"):
        bench.module_subject("windw", 14)
    with pytest.raises(zoo.ConfigError, match="device must be cpu or cuda"):
        bench.subject("sdpa", device="meta")
    with pytest.raises(zoo.ConfigError, match="different names"):
        bench.measure([bench.subject("sdpa", size=7)] * 2)
    with pytest.raises(zoo.ConfigError, match="no benchmark of zoo bench"):
        bench.Report.from_plain({"rows": []})
    if not torch.cuda.is_available():
        with pytest.raises(zoo.ResourceError, match="no GPU"):
            bench.subject("sdpa", device="cuda")


def test_ratios_are_over_the_first_row_of_a_size(report):
    heads, rows = table_of(report)
    ratio = heads.index("ratio")
    assert [cells[ratio] for cells in rows] == ["1.00", "1.00", f"{14**2 / 1e3:.2f}", f"{28**2 / 1e3:.2f}"]
    assert rows[2][heads.index("memory (MB)")] == "-"


def test_the_page_is_one_file_with_escaped_names(report):
    page = report_page([report])
    assert "window &amp; &lt;b&gt;" in page and "<b>" not in page
    assert "data:image/png;base64," in page and not any(
        word in page for word in ("http:", "https:", "<script")
    )
    with pytest.raises(zoo.ConfigError, match="at least one benchmark"):
        report_page([])


def test_the_chart_is_logarithmic_and_names_exponents(report):
    figure = draw_costs(report)
    axis = figure.axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_xlabel() == "tokens of the map" and axis.get_ylabel() == "median time (ms)"
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["global: tokens^2.00", "window & <b>: tokens^1.00"]
