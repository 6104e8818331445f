"""DaViT and Florence-2's towers: the published functions, timm's keys, counts and traps."""

from __future__ import annotations

import pytest
import timm
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import ChannelAttention, WindowAttention
from zoo.layers import count_macs
from zoo.weights.convert.davit import to_timm

# Parameters in millions and multiply-adds in billions: measured on the published code, those of the three
# largest and of the towers (with what norms need, 0.2 % more) on timm's.
PUBLISHED = {
    "davit_tiny": (28.360, 4.522),
    "davit_small": (49.746, 8.773),
    "davit_base": (87.954, 15.474),
    "davit_large": (196.812, 34.6),
    "davit_large_window12_384": (196.812, 102.97),
    "davit_huge": (348.923, 61.2),
    "davit_giant": (1406.470, 192.9),
    "davit_base_fl": (90.370, 190.3),
    "davit_huge_fl": (360.636, 744.8),
}
NARROW = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


@pytest.mark.parametrize("case", [case for case in cases("davit") if not str(case.id).startswith("op_")])
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    torch.save({"epoch": 300, "arch": "DaViT_tiny", "state_dict": state}, tmp_path / "published.pth")
    model = zoo.create_model(facts["zoo_name"], checkpoint_path=tmp_path / "published.pth").eval()
    assert sum(p.numel() for p in model.parameters()) == facts["params"]

    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
    error = golden().relative_error
    assert error(logits, stored["logits"]) <= facts["tolerance"]["logits"]
    for i, feature in enumerate(features):
        steps = facts["features"]["stored"][f"feat{i}"].strip("[]").split(",")
        part = feature[tuple(slice(None, None, int(step.strip(" :") or 1)) for step in steps)]
        assert error(part, stored[f"feat{i}"]) <= facts["tolerance"]["feats"], i


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_macs_and_keys_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(macs, rel=0.01)
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 131)])
def test_it_is_timms_model_at_any_size(name, height, width):
    names = {"dims": "embed_dims"}
    theirs = timm.create_model(name, **{names.get(k, k): v for k, v in NARROW.items()}).eval()
    ours = zoo.create_model(name, **NARROW).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        for one, other in zip(
            ours.forward_intermediates(images, intermediates_only=True),
            theirs.forward_intermediates(images, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_timms_own_model_keeps_its_name():
    assert type(timm.create_model("davit_tiny", **{"depths": (1, 1, 1, 1)})).__module__ == "timm.models.davit"
    assert timm.is_model("zoo_davit_tiny") and timm.is_model("davit_digits")


@pytest.mark.parametrize("name", zoo.list_models(family="davit"))
def test_norms_windows_and_groups_are_the_published_ones(name):
    model = on_meta(name)
    tower, digits = name.endswith("_fl"), name == "davit_digits"
    wide = tower or "window12" in name
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}
    windows = [m for m in model.modules() if isinstance(m, WindowAttention)]
    channels = [m for m in model.modules() if isinstance(m, ChannelAttention)]
    assert len(windows) == len(channels) == sum(len(stage.blocks) for stage in model.stages)
    assert {m.window_size for m in windows} == {(4, 4) if digits else (12, 12) if wide else (7, 7)}
    assert {m.version for m in channels} == {2 if tower else 1}
    assert all(m.relative_position_bias_table is None and m.shift == (0, 0) for m in windows)
    if not digits:
        assert {m.dim // m.num_heads for m in (*windows, *channels)} == {32}
        assert {stage.downsample.conv.kernel_size for stage in model.stages[1:]} == {
            (3, 3) if tower else (2, 2)
        }


def test_the_norm_comes_after_the_pool():
    model = zoo.create_model("davit_digits").eval()
    nn.init.normal_(model.head.norm.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(images)
        pooled = model.head.norm(tokens.mean(dim=(1, 2)))
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
        torch.testing.assert_close(model(images), model.head.fc(pooled))
        unnormed, _ = model.forward_intermediates(images, norm=True)
        torch.testing.assert_close(unnormed, tokens)


def test_down_sampling_pads_behind_the_norm():
    step = zoo.create_model("davit_digits").stages[1].downsample
    nn.init.normal_(step.norm.bias)
    x = torch.randn(1, 3, 4, 20)
    padded = nn.functional.pad(step.norm(x), (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(step(x), step.conv(padded))


def test_drop_path_grows_over_attention_layers():
    model = on_meta("davit_tiny", drop_path_rate=0.11)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in model.stages
        for dual in stage.blocks
        for block in dual
    ]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def towers(names: str) -> dict[str, torch.Tensor]:
    """The state of a narrow tower under Microsoft's names or those of transformers."""
    state = zoo.create_model("davit_base_fl", **NARROW).state_dict()
    old = {}
    for key, value in state.items():
        if key.startswith("head."):
            continue
        stage = key.split(".")[1]
        kind = "window" if "spatial" in key else "channel"
        key = key.replace("stem.", "convs.0.").replace(f"stages.{stage}.downsample.", f"convs.{stage}.")
        key = key.replace(f"stages.{stage}.blocks.", f"blocks.{stage}.")
        if names == "microsoft":
            key = key.replace(".conv.", ".proj.")
            key = key.replace(".cpe1.proj.", ".conv1.fn.dw.").replace(".cpe2.proj.", ".conv2.fn.dw.")
            key = key.replace(".attn.", f".{kind}_attn.fn.").replace(".mlp.", ".ffn.fn.net.")
            key = key.replace(".norm1.", f".{kind}_attn.norm.").replace(".norm2.", ".ffn.norm.")
            old[f"vision_tower.{key}"] = value
        else:
            key = key.replace(".cpe1.proj.", ".conv1.").replace(".cpe2.proj.", ".conv2.")
            key = key.replace(".attn.", f".{kind}_attn.").replace(".mlp.", ".ffn.")
            old[f"model.vision_tower.{key}"] = value
    return old


@pytest.mark.parametrize("names", ["microsoft", "transformers"])
def test_florences_towers_load_out_of_the_whole_file(names, tmp_path):
    state = towers(names) | {"language_model.lm_head.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = zoo.create_model("davit_base_fl", **NARROW)
    assert zoo.load_checkpoint(model, tmp_path / "pytorch_model.bin") == []
    stem = next(value for key, value in state.items() if key.endswith("convs.0.norm.weight"))
    torch.testing.assert_close(model.stem.norm.weight, stem)
    assert (model.head.norm.weight == 1).all() and not model.head.norm.bias.any()


@pytest.mark.slow  # transformers takes its time to import
def test_the_tower_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.florence2.modeling_florence2")
    config = modeling.Florence2VisionConfig(
        embed_dim=list(NARROW["dims"]),
        depths=list(NARROW["depths"]),
        num_heads=list(NARROW["num_heads"]),
        num_groups=list(NARROW["num_heads"]),
    )
    theirs = modeling.Florence2VisionBackbone(config).eval()
    ours = zoo.create_model("davit_base_fl", **NARROW).eval()
    state = {f"vision_tower.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(to_timm(state))
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        out = ours.forward_features(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_timms_keys_come_back_as_they_are():
    state = zoo.create_model("davit_digits").state_dict()
    assert to_timm(state) is state


def test_pruned_models_keep_the_step_to_their_last_stage():
    model = zoo.create_model("davit_digits").eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)[1]
        model.prune_intermediate_layers([1])
        torch.testing.assert_close(model(images).permute(0, 3, 1, 2), expected)
