"""Published files, made up from the keys that their authors wrote: through the command line into a model."""

from __future__ import annotations

import json

import pytest
import torch
from goldens import cases, golden
from safetensors import safe_open
from safetensors.torch import load_file

import zoo
from zoo.cli import main
from zoo.weights.manifest import all_entries, entries_of

LARGE = 100_000_000  # parameters
FAMILIES = ("nat", "biformer", "davit", "dat", "agent")
WRAPPERS = ("model", "state_dict", "state_dict_ema", None)  # each is published somewhere


def of_models(family: str) -> list:
    """The cases of whole models, one for each model; what the loader gives where there are none."""
    found = []
    for each in cases(family):
        path = each.values[0]
        if path is None or json.loads(path.with_suffix(".json").read_text())["kind"] == "model":
            found += [each] if path is None or "gain" not in path.name else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for family in FAMILIES for case in of_models(family)])
def test_a_published_file_is_converted_verified_and_loaded(case, tmp_path, monkeypatch):
    facts, stored = golden().load_case(case)
    wrapper = WRAPPERS[facts["params"] % len(WRAPPERS)]
    state, name = golden().reference_state_dict(facts), facts["zoo_name"]
    torch.save({wrapper: state, "epoch": 299} if wrapper else state, tmp_path / "published.pth")
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "convert", "published.pth", name, "ours.safetensors"]) == 0
    assert main(["weights", "verify", "ours.safetensors", "--model", name]) == 0

    with safe_open("ours.safetensors", "pt") as file:
        said = file.metadata()
    assert said["model"] == name and said["source"] == "published.pth"
    assert said["license"] == (entries_of(name)[0].license or "unknown")
    one = zoo.create_model(name, checkpoint_path="ours.safetensors").eval()
    other = zoo.create_model(name, checkpoint_path="published.pth").eval()
    assert load_file("ours.safetensors").keys() == one.state_dict().keys()
    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])[:1]
    with torch.no_grad():
        logits, others = one(image), other(image)
    torch.testing.assert_close(others, logits, rtol=0, atol=0)
    assert golden().relative_error(logits, stored["logits"][:1]) < facts["tolerance"]["logits"]


def other_rows() -> list:
    """The rows with published weights that are no case, by name; those of many parameters are large."""
    published = {each.model for each in all_entries() if each.packaged is None}
    paths = [case.values[0] for family in FAMILIES for case in of_models(family)]
    known = {json.loads(path.with_suffix(".json").read_text())["zoo_name"] for path in paths if path}
    return [
        pytest.param(name, marks=[pytest.mark.large] if zoo.model_info(name).params > LARGE else [])
        for name in sorted(published - known)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", other_rows())
def test_a_file_of_any_other_row_is_converted_and_verified(name, tmp_path, monkeypatch):
    """The cases show which keys a family publishes: the row's own, and those of timm for DaViT."""
    with torch.device("meta"):
        model = zoo.create_model(name)
    state = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "published.pth")
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "convert", "published.pth", name, "ours.safetensors"]) == 0
    assert main(["weights", "verify", "ours.safetensors", "--model", name]) == 0
    with safe_open("ours.safetensors", "pt") as file:
        assert file.metadata()["model"] == name
        assert set(file.keys()) == set(state)
