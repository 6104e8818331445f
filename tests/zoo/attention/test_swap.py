"""`attention=`: every hierarchical body under every mechanism, or one clear line why not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.attention import capture_attention
from zoo.attention.swap import MECHANISMS

BODIES = zoo.list_models("*_digits")


def build(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(name, **arguments).eval()


@pytest.mark.parametrize("attention", MECHANISMS)
@pytest.mark.parametrize("name", BODIES)
def test_every_body_runs_and_learns_under_every_mechanism(name, attention):
    model = build(name, attention=attention)
    channels = model.default_cfg["input_size"][0]
    classes = MECHANISMS[attention][0]
    with capture_attention(model) as records:
        logits = model(torch.randn(2, channels, 32, 32))
    assert all(isinstance(model.get_submodule(site), classes) for site in records)
    assert len(records) == sum(hasattr(module, "attention_weights") for module in build(name).modules())
    assert all(record.weights.isfinite().all() for record in records.values())
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model(torch.randn(1, channels, 45, 37)).isfinite().all()


@pytest.mark.parametrize("attention", MECHANISMS)
def test_timm_builds_the_same_body(attention):
    torch.manual_seed(0)
    theirs = timm.create_model("nat_digits", attention=attention)
    ours = build("nat_digits", attention=attention)
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    features = build("nat_digits", attention=attention, features_only=True, out_indices=(0, 1))
    maps = features(torch.randn(1, *ours.default_cfg["input_size"]))
    assert [x.shape[1] for x in maps] == features.feature_info.channels()


@pytest.mark.parametrize("attention", MECHANISMS)
def test_a_mechanism_counts_its_own_multiply_adds(attention):
    with torch.device("meta"):
        model = zoo.create_model("nat_mini", attention=attention)
    from zoo.layers import count_macs

    assert 1.5e9 < count_macs(model, (3, 224, 224)) < 5e9


def test_a_list_holds_one_value_for_each_stage():
    model = build("nat_digits", attention="neighborhood", attention_kwargs={"kernel_size": [3, 5, 7]})
    assert [[block.attn.kernel_size for block in stage.blocks] for stage in model.stages_] == [
        [3],
        [5, 5],
        [7],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "neighbourhood"}, "did you mean neighborhood"),
        (
            {"attention": "neighborhood", "attention_kwargs": {"kernel": 3}},
            "unknown argument 'kernel'.*did you mean kernel_size",
        ),
        (
            {"attention": "neighborhood", "attention_kwargs": {"kernel_size": [3]}},
            "each of 3 stages, found 1",
        ),
        ({"attention_kwargs": {"kernel_size": 3}}, "not given"),
        ({"attention": "neighborhood", "pretrained": True}, "do not fit another attention"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(arguments, message):
    with pytest.raises(zoo.ConfigError, match=message) as caught:
        zoo.create_model("nat_digits", **arguments)
    assert "\n" not in str(caught.value)


def test_a_body_of_one_resolution_is_refused():
    with torch.device("meta"), pytest.raises(zoo.ConfigError, match="one resolution throughout"):
        zoo.create_model("nat_isotropic_small", attention="neighborhood")
