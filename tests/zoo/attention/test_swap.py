"""`attention=`: every hierarchical body under every mechanism, or one clear line why not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.attention import capture_attention
from zoo.attention.swap import MECHANISMS
from zoo.layers import count_macs

BODIES = zoo.list_models("*_digits", task="classification")


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
    macs = count_macs(model, (3, 224, 224))
    assert macs > 7e9 if attention == "global" else 2e9 < macs < 4e9


@pytest.mark.parametrize(
    ("attention", "wanted"),
    [
        ("window", ["(0, 0)", "(3, 3)", "(0, 0)", "(3, 3)", "(0, 0)"]),
        ("dual", ["Channel", "Window", "Channel", "Window", "Channel"]),
        ("bilevel", ["49 of 7", "49 of 7", "49 of 7", "49 of 7", "49 of 7"]),
        ("deformable", ["1", "1", "1", "1", "1"]),
        ("agent", ["49", "49", "49", "49", "49"]),
    ],
)
def test_a_place_gets_what_the_mechanisms_own_models_have_there(attention, wanted):
    with torch.device("meta"):
        model = zoo.create_model("nat_mini", attention=attention)
    told = {
        "window": lambda module: str(module.shift),
        "dual": lambda module: type(module).__name__.removesuffix("Attention"),
        "bilevel": lambda module: f"{module.topk} of {module.n_win}",
        "deformable": lambda module: str(module.stride),
        "agent": lambda module: str(module.agent_num),
    }[attention]
    assert [told(block.attn) for block in model.stages_[3].blocks] == wanted


@pytest.mark.parametrize(
    "name", ["agent_cswin_tiny", "agent_pvt_tiny", "davit_tiny", "biformer_stl_nchw", "dat_tiny"]
)
def test_bodies_without_a_small_row_keep_everything_but_their_attention(name):
    with torch.device("meta"):
        own, other = zoo.create_model(name), zoo.create_model(name, attention="global")
    mlp = [key for key in own.state_dict() if ".mlp" in key or ".norm1" in key or "cpe" in key]
    assert (
        mlp
        and {key: own.state_dict()[key].shape for key in mlp}.items()
        <= {key: value.shape for key, value in other.state_dict().items()}.items()
    )
    blocks = sum(hasattr(module, "attention_weights") for module in own.modules())
    assert blocks == sum(type(module).__name__ == "GlobalAttention" for module in other.modules())


@pytest.mark.parametrize(("name", "side"), [("dat_tiny", 48), ("dat_digits", 16)])
def test_sizes_that_only_the_published_attention_refuses_run_under_another(name, side):
    image = torch.randn(1, 3, side, side)
    with pytest.raises(zoo.ConfigError, match=f"found {side} x {side}"):
        build(name)(image)
    assert build(name, attention="window")(image).isfinite().all()


def test_an_image_that_ends_before_the_last_stage_is_refused():
    with pytest.raises(zoo.ConfigError, match="images must be at least 32 x 32 .* found 31 x 40"):
        build("dat_tiny", attention="window")(torch.randn(1, 3, 31, 40))


def test_timm_loads_no_weights_under_another_attention():
    with pytest.raises(zoo.ConfigError, match="do not fit another attention"):
        timm.create_model("nat_digits", attention="window", pretrained=True)


@pytest.mark.parametrize(
    ("attention", "arguments", "message"),
    [
        ("window", {"window_size": 0}, "window_size in .*window' must be a whole number above 0 .*found 0"),
        ("neighborhood", {"kernel_size": 1}, "kernel_size must be a whole number from 2, found 1"),
        (
            "neighborhood",
            {"dilation": True},
            "dilation in .* above 0 or a text, found True",
        ),
        ("bilevel", {"side_dwconv": 4}, "side_dwconv must be odd, found 4"),
        ("global", {"side_dwconv": 4}, "side_dwconv must be odd, found 4"),
        ("agent", {"class_token": True}, "unknown argument 'class_token'"),
        ("agent", {"agent_shape": (0, 3)}, "agent_shape in .* a tuple of 2 whole numbers above 0 or None"),
        ("deformable", {"stride": 0}, "stride in .* must be a whole number above 0, found 0"),
        ("agent", {"agent_shape": (1, 2, 3)}, "agent_shape in .* must be a tuple of 2 whole numbers"),
        (
            "window",
            {"window_size": [(3,)] * 3},
            "window_size in .* or a tuple of 2 whole numbers",
        ),
        ("window", {"scale": "x"}, "scale in .* must be a number above 0 or None, found 'x'"),
        ("window", {"proj_drop": 2}, "proj_drop must be from 0 to below 1, found 2.0"),
        ("window", {"qkv_bias": "no"}, "qkv_bias in .* must be true or false, found 'no'"),
        ("bilevel", {"kv_per_win": 0}, "kv_per_win in .* must be a whole number above 0, found 0"),
        ("window", "a", "attention_kwargs must be a dictionary"),
        (["window"], {}, r"unknown attention \['window'\]; use neighborhood"),
    ],
)
def test_numbers_that_no_module_takes_are_told_when_it_is_built(attention, arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.create_model("nat_digits", attention=attention, attention_kwargs=arguments)


def test_regions_too_small_to_pool_are_told():
    arguments = {"kv_downsample_mode": "avgpool", "n_win": 4}
    model = build("nat_digits", attention="bilevel", attention_kwargs=arguments)
    with pytest.raises(zoo.ConfigError, match="kv_downsample_ratio 4 leaves no token of regions of 2 x 2"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("stride", [3, 5, 6])
def test_any_stride_of_the_sampled_keys_serves_a_map_of_a_few_tokens(stride):
    model = build("nat_digits", attention="deformable", attention_kwargs={"stride": stride})
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    arguments = {"stride": 3, "kernel_size": 3}
    model = build("nat_digits", attention="deformable", attention_kwargs=arguments)
    with pytest.raises(zoo.ConfigError, match="map of 2 x 2 tokens is smaller than kernel_size=3.*give 5"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("attention", MECHANISMS)
def test_what_the_body_was_asked_for_is_asked_of_the_attention(attention):
    model = build("nat_digits", attention=attention, proj_drop_rate=0.3, qkv_bias=False)
    modules = [module for module in model.modules() if hasattr(module, "attention_weights")]
    assert modules and {module.proj_drop.p for module in modules} == {0.3}
    assert not any("qkv" in name and name.endswith("bias") for name, _ in model.named_parameters())


def test_a_mechanism_of_ones_own_need_not_say_its_types_nor_drop(monkeypatch):
    class Mean(nn.Module):
        def __init__(self, dim, num_heads, *, power=1, device=None, dtype=None):
            super().__init__()
            self.power, self.proj = power, nn.Linear(dim, dim, device=device, dtype=dtype)

        def forward(self, x):
            return self.proj(x.mean((1, 2), keepdim=True) ** self.power).expand_as(x)

        def attention_weights(self, x):
            """What tells an attention module from others."""

    monkeypatch.setitem(MECHANISMS, "mean", ((Mean,), lambda place, given: (Mean, {})))
    model = build("nat_digits", attention="mean", attention_kwargs={"power": [1, 2, 3]}, proj_drop_rate=0.1)
    assert [m.power for m in model.modules() if isinstance(m, Mean)] == [1, 2, 2, 3]
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(zoo.ConfigError, match="unknown argument 'pover' .* did you mean power"):
        build("nat_digits", attention="mean", attention_kwargs={"pover": 1})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nat_digits", {"dilations": "auto"}),
        ("biformer_digits", {"n_win": 2}),
        ("davit_digits", {"window_size": 3}),
        ("dat_digits", {"groups": (1, 1, 1)}),
        ("agent_digits", {"agent_num": (4, 4, 4)}),
    ],
)
def test_arguments_of_the_attention_that_is_not_there_are_refused(name, arguments):
    (argument,) = arguments
    build(name, **arguments)
    with pytest.raises(zoo.ConfigError, match=f"{argument} is of {name}'s own attention.* attention_kwargs"):
        build(name, attention="window", **arguments)


@pytest.mark.parametrize("name", ["nat_digits", "biformer_digits", "davit_digits", "agent_digits"])
@pytest.mark.parametrize(
    ("attention", "table"),
    [
        ("window", "relative_position_bias_table"),
        ("neighborhood", "rpb"),
        ("deformable", "rpe_table"),
        ("global", None),
    ],
)
def test_position_tables_are_not_decayed_in_any_body(name, attention, table):
    model = build(name, attention=attention)
    tables = {key for key, _ in model.named_parameters() if table and key.endswith(table)}
    assert model.no_weight_decay() == tables and bool(tables) == (table is not None)


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
