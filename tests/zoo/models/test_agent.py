"""Agent-DeiT, -PVT, -Swin and -CSwin: the published functions, counts and traps."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import AgentAttention, WindowAttention
from zoo.layers import count_macs

# Published parameters and multiply-adds (in millions, in billions), measured on the published code.
PUBLISHED = {
    "agent_deit_tiny": (6.016, 1.168),
    "agent_deit_small": (22.647, 4.427),
    "agent_deit_small_448": (23.070, 17.642),
    "agent_deit_base": (87.205, 17.527),
    "agent_pvt_tiny": (11.570, 1.986),
    "agent_pvt_small": (20.635, 3.955),
    "agent_pvt_medium": (35.922, 6.999),
    "agent_pvt_medium_256": (36.084, 9.142),
    "agent_pvt_large": (48.738, 10.339),
    "agent_swin_tiny": (28.903, 4.499),
    "agent_swin_small": (49.667, 8.701),
    "agent_swin_small_288": (49.708, 14.535),
    "agent_swin_base": (88.095, 15.400),
    "agent_swin_base_384": (88.305, 46.207),
    "agent_cswin_tiny": (20.459, 4.292),
    "agent_cswin_small": (32.814, 6.744),
    "agent_cswin_base": (73.250, 14.870),
    "agent_cswin_base_384": (73.328, 46.177),
}
# A body of every kind, small enough to run: their published rows with fewer blocks.
SMALL = {
    "agent_deit_tiny": {"depth": 3, "agent_depth": 2},
    "agent_pvt_tiny": {"stages": ("A",) * 4},
    "agent_swin_tiny": {"stages": ("A", "A", "AB", "BB")},
    "agent_cswin_tiny": {"stages": ("A", "A", "BB", "B")},
}


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


def small(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(name, num_classes=10, **SMALL[name], **arguments).eval()


def part(feature: torch.Tensor, stored: str) -> torch.Tensor:
    """The slice that a case names, such as "[:, ::4, :, :]"."""
    steps = [piece.strip() for piece in stored.strip("[]").split(",")]
    return feature[tuple(slice(None, None, int(step.strip(":") or 1)) for step in steps)]


@pytest.mark.parametrize("case", [c for c in cases("agent") if not (c.id or "").startswith("op_")])
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    derived = {key: torch.zeros(49, 49) for key in facts["derived"]}
    torch.save({"model": state | derived, "epoch": 299}, tmp_path / "published.pth")
    model = zoo.create_model(facts["zoo_name"], checkpoint_path=tmp_path / "published.pth").eval()
    assert set(model.state_dict()) == set(state)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]

    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
        torch.testing.assert_close(model(image), logits)
    error, tolerance = golden().relative_error, facts["tolerance"]
    assert error(logits, stored["logits"]) <= tolerance["logits"]
    outputs = {"tokens": last, **{f"feat{i}": feature for i, feature in enumerate(features)}}
    for name in stored:
        if name != "logits" and name in facts:
            assert error(part(outputs[name], facts[name]), stored[name]) <= tolerance["feats"], name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(macs, rel=0.001)
