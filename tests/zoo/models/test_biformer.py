"""BiFormer: the published functions, counts and traps."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.layers import count_macs

# Published parameters and multiply-adds (in millions, in billions), measured on the published code.
PUBLISHED = {
    "biformer_tiny": (13.143, 2.216),
    "biformer_small": (25.536, 4.464),
    "biformer_base": (56.805, 9.759),
    "biformer_stl": (28.373, 4.574),
    "biformer_stl_nchw": (28.373, 4.574),
}
MODELS = [case for case in cases("biformer") if "224" in str(case.id) or case.id == "absent"]


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


@pytest.mark.parametrize("case", MODELS)
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    torch.save({"model": state}, tmp_path / "published.pth")
    model = zoo.create_model(facts["zoo_name"], checkpoint_path=tmp_path / "published.pth").eval()
    assert set(model.state_dict()) == set(state)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]

    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
    error = golden().relative_error
    assert error(logits, stored["logits"]) <= facts["tolerance"]["logits"]
    for i, feature in enumerate(features):
        steps = facts["features"]["stored"][f"feat{i}"].strip("[]").split(",")[1:]
        part = feature[(slice(None), *(slice(None, None, int(step.strip(" :"))) for step in steps))]
        assert error(part, stored[f"feat{i}"]) <= facts["tolerance"]["feats"], i


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, rel=0.01)
