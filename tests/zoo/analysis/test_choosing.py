"""Choosing: what is measured decides, what is published ranks, and nothing is made up."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo.analysis import choosing
from zoo.analysis.choosing import choose
from zoo.cli import main

# Milliseconds of a pass, by model: no clock in a test.
SPEEDS = {"nat_mini": 50.0, "nat_tiny": 90.0, "nat_small": 150.0, "nat_base": 400.0, "nat_digits": 1.0}


@pytest.fixture
def staged(monkeypatch):
    """Time and memory as written above, and a list of what was run."""
    ran = []

    def build(task, candidate, batch):
        if candidate.name == "nat_tiny" and candidate.size % 2:
            raise ValueError("an odd side")
        ran.append(candidate.name)
        model = torch.nn.Identity()
        model.milliseconds = SPEEDS[candidate.name]
        return model, [torch.zeros(batch)]

    monkeypatch.setattr(choosing, "_build", build)
    monkeypatch.setattr(choosing, "one_pass", lambda model, *rest: lambda: model.milliseconds)
    monkeypatch.setattr(choosing, "clock_of", lambda device, wall: lambda run: run())
    monkeypatch.setattr(choosing, "peak_memory", lambda run, device: 2**20)
    return ran


def test_the_best_published_that_fit_come_first_and_the_rest_says_why(staged):
    made = choose(latency=160, among="nat_*[a-z]", most=2, seconds=0)
    assert [each.name for each in made.ranked] == ["nat_small", "nat_tiny"]
    best = made.ranked[0]
    assert best.published == zoo.model_info("nat_small").top1 == 83.7
    assert "SHI-Labs" in best.source and "ImageNet-1k at 224" in best.source
    assert best.milliseconds["p50"] == 150.0 and best.memory == 4 * best.parameters + 2**20
    assert best.parameters == zoo.model_info("nat_small").params
    left = {each.name: each.reason for each in made.missed + made.unmeasured}
    assert "not needed" in left["nat_mini"] and "not needed" in left["nat_digits"]
    assert left["nat_base"] == "400.0 ms of 160"
    assert staged.count("nat_base") == 1 and len(left) == len(zoo.list_models("nat_*[a-z]")) - 2


def test_a_model_without_a_published_figure_comes_last_and_has_none(staged):
    made = choose(among="nat_[md]i[ng]i*", seconds=0)
    assert [(each.name, each.published) for each in made.ranked] == [("nat_mini", 81.8), ("nat_digits", None)]
    assert made.ranked[1].source is None


def test_what_its_family_rules_out_is_not_run(staged):
    made = choose(latency=60, among="nat_[mb][ai]*", seconds=0)
    assert [each.name for each in made.ranked] == ["nat_mini"]
    (base,) = made.unmeasured
    assert base.name == "nat_base" and "by its family's speed" in base.reason and base.milliseconds is None
    assert "nat_base" not in staged


def test_weights_beyond_the_memory_are_not_run(staged):
    made = choose(memory=100, among="nat_[mb][ai]*", seconds=0)
    assert [each.name for each in made.ranked] == ["nat_mini"] and "nat_base" not in staged
    assert "its weights alone are 342 MB" in made.unmeasured[0].reason
    made = choose(memory=77, among="nat_mini", seconds=0)
    assert made.missed[0].reason == "77 MB of 77", "76.2 MB of weights and 1 of the pass"


def test_a_size_that_a_model_does_not_take_is_its_reason(staged):
    (tiny,) = choose(size=33, among="nat_tiny", seconds=0).unmeasured
    assert tiny.reason == "does not run at 33 pixels: an odd side"


def test_patience_ends(staged):
    (mini,) = choose(among="nat_mini", patience=0).unmeasured
    assert mini.reason == "not reached within 0 s"


def test_what_would_outlast_patience_is_not_begun(staged):
    """nat_mini's milliseconds for each parameter say what nat_base would take."""
    made = choose(among="nat_[mb][ai]*", seconds=0, patience=1.3)
    assert [each.name for each in made.ranked] == ["nat_mini"]
    assert "to measure" in made.unmeasured[0].reason and "nat_base" not in staged


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", {"among": "nat_digits"}),
        ("segmentation", {"among": "agent_digits", "size": 64}),
    ],
)
def test_a_real_model_is_measured(task, options):
    made = choose(task, seconds=0, latency=1e6, **options)
    (found,) = made.ranked
    assert found.size == options.get("size", 32) and found.milliseconds["least"] > 0
    assert made.plain()["limits"]["task"] == task


def test_latents_of_a_generator_have_the_size_asked_for():
    with torch.device("meta"):
        _, (latents, *_) = zoo.registry.generator("dit_s_8", 16)
        model, (video, *_) = zoo.registry.generator("video_dit_s", 16)
    assert latents.shape == (1, 4, 16, 16) and video.shape[-2:] == (16, 16)
    assert model(video.expand(2, -1, -1, -1, -1), torch.zeros(2, device="meta")).shape[0] == 2
    with pytest.raises(zoo.ConfigError, match="nat_mini is no generator"):
        zoo.registry.generator("nat_mini")


def test_the_command_shows_figures_sources_and_what_was_left_out(staged, tmp_path, capsys):
    file = tmp_path / "choice.json"
    line = f"choose --latency 160 --among nat_*[a-z] --most 1 --seconds 0 --json {file}"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "nat_small" in out and "83.7" in out and "150.0" in out
    assert "measured, too much: nat_base: 400.0 ms of 160" in out
    assert "published for nat_small: in1k, ImageNet-1k at 224" in out and "licence not stated" in out
    assert "not measured: nat_tiny" in out
    assert json.loads(file.read_text())["ranked"][0]["name"] == "nat_small"


def test_the_figures_stay_whole_on_a_narrow_terminal(staged, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["choose", "--latency", "160", "--among", "nat_*[a-z]", "--most", "1", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("nat_small"))
    assert row.split()[1:5] == ["83.7", "224", "150.0", "150.0"] and "\u2026" not in out


def test_mistakes_say_what_is_right(capsys):
    with pytest.raises(zoo.ConfigError, match="unknown task 'segmentaton'.*did you mean segmentation"):
        choose("segmentaton")
    with pytest.raises(zoo.ConfigError, match="no model for generation matches 'nat"):
        choose("generation", among="nat*")
    for nothing in (0, float("nan")):
        with pytest.raises(zoo.ConfigError, match="latency must be above 0"):
            choose(latency=nothing, among="nat_digits", seconds=0)
    assert main(["choose", "--among", "nothing"]) == 2
    assert "no model for classification matches" in capsys.readouterr().err
