"""NAT, DiNAT, DiNAT_s and the isotropic models: the published functions, counts and traps."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import NeighborhoodAttention
from zoo.layers import count_macs

# Published parameters and multiply-adds (in millions, in billions), measured on the published code.
PUBLISHED = {
    "nat_mini": (19.984, 2.695),
    "nat_tiny": (27.902, 4.295),
    "nat_small": (50.743, 7.772),
    "nat_base": (89.770, 13.677),
    "dinat_mini": (19.984, 2.695),
    "dinat_tiny": (27.902, 4.295),
    "dinat_small": (50.720, 7.772),
    "dinat_base": (89.770, 13.677),
    "dinat_large": (200.944, 30.458),
    "dinat_large_384": (200.944, 89.505),
    "dinat_large_384_11x11": (201.144, 92.085),
    "dinat_s_tiny": (28.288, 4.491),
    "dinat_s_small": (49.606, 8.741),
    "dinat_s_base": (87.768, 15.431),
    "dinat_s_large": (196.532, 34.476),
    "dinat_s_large_384": (196.532, 101.314),
    "nat_isotropic_small": (22.000, 4.308),
    "nat_isotropic_base": (86.466, 16.941),
    "dinat_isotropic_small": (22.000, 4.308),
    "dinat_isotropic_base": (86.466, 16.941),
    "vitrpb_small": (22.080, 4.574),
    "vitrpb_base": (86.627, 17.472),
}


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


@pytest.mark.parametrize("case", cases("nat"))
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    torch.save(
        state | {key: torch.zeros(shape) for key, shape in facts["derived"]}, tmp_path / "published.pth"
    )
    model = zoo.create_model(facts["zoo_name"], checkpoint_path=tmp_path / "published.pth").eval()
    assert set(model.state_dict()) == set(state)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]

    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
        torch.testing.assert_close(model(image), logits)
    error = golden().relative_error
    assert error(logits, stored["logits"]) <= facts["tolerance"]["logits"]
    wanted = [name for name in stored if name.startswith("feat")]
    for name, feature in zip(wanted, features[-len(wanted) :], strict=True):
        steps = facts["features"]["stored"][name].strip("[]").split(",")[1:]
        part = feature[(slice(None), *(slice(None, None, int(step.strip(" :"))) for step in steps))]
        assert error(part, stored[name]) <= facts["tolerance"]["feats"], name


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("name", zoo.list_models(family="nat"))
def test_every_norm_has_the_published_epsilon(name):
    """The outputs cannot show it: 1e-6 instead changes them by less than rounding."""
    norms = [m for m in on_meta(name).modules() if isinstance(m, nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("name", zoo.list_models(family="nat"))
def test_only_three_rows_have_layer_scale(name):
    scaled = any(key.endswith("gamma1") for key, _ in on_meta(name).named_parameters())
    assert scaled == (name in {"nat_small", "nat_base", "dinat_base"})


DILATIONS_224 = [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
DILATIONS_384 = [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("dinat_tiny", DILATIONS_224),
        ("dinat_large_384", DILATIONS_384),
        ("dinat_large_384_11x11", DILATIONS_224),
        ("dinat_large_21k", DILATIONS_224),
        ("dinat_s_small", [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
    ],
)
def test_dilations_are_the_published_ones(name, dilations):
    model = on_meta(name)
    assert [[block.attn.dilation for block in stage.blocks] for stage in model.stages_] == dilations


@pytest.mark.parametrize(("side", "dilations"), [(224, DILATIONS_224), (384, DILATIONS_384)])
def test_automatic_dilations_are_the_published_ones_at_both_sizes(side, dilations):
    model = on_meta("dinat_tiny", dilations="auto")
    found = []
    for i, stage in enumerate(model.stages_):
        rows = side // 4 // 2**i
        found.append([block.attn.dilation_for(rows, rows) for block in stage.blocks])
    assert found == dilations


def test_dilations_can_be_given_and_share_the_weights():
    downstream = [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
    model = on_meta("dinat_mini", dilations=downstream)
    assert model.stages_[2].blocks[5].attn.dilation == 4
    assert set(model.state_dict()) == set(on_meta("dinat_mini").state_dict())
    with pytest.raises(zoo.ConfigError, match=r"found \[3, 4, 5, 5\]"):
        on_meta("dinat_mini", dilations=[[1] * 3, [1] * 4, [1] * 5, [1] * 5])
    with pytest.raises(zoo.ConfigError, match="'auto', None or lists"):
        on_meta("dinat_mini", dilations="automatic")


def test_the_global_isotropic_model_says_which_size_it_takes():
    model = zoo.create_model("vitrpb_small").eval()
    with pytest.raises(zoo.ConfigError, match="must be 224 x 224, found a map of 16 x 14"):
        model(torch.zeros(1, 3, 256, 224))


def test_hugging_face_names_become_the_published_ones(tmp_path):
    from zoo.weights.convert.nat import from_huggingface

    model = zoo.create_model("nat_digits", layer_scale=1e-5)
    state = model.state_dict()
    theirs = {}
    for key, value in state.items():
        stage = key.replace("levels.", "nat.encoder.levels.").replace(".blocks.", ".layers.")
        if key.startswith("patch_embed.proj."):
            theirs[key.replace("patch_embed.proj.", "nat.embeddings.patch_embeddings.projection.")] = value
        elif key.startswith("patch_embed.norm."):
            theirs[key.replace("patch_embed.norm.", "nat.embeddings.norm.")] = value
        elif key.startswith("norm."):
            theirs[f"nat.layernorm.{key[5:]}"] = value
        elif key.startswith("head."):
            theirs[f"classifier.{key[5:]}"] = value
        elif ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[stage.replace(".attn.qkv.", f".attention.self.{name}.")] = part
        elif key.endswith(".gamma1"):
            both = torch.stack([value, state[key.replace("gamma1", "gamma2")]])
            theirs[stage.replace(".gamma1", ".layer_scale_parameters")] = both
        elif not key.endswith(".gamma2"):
            for new, old in (
                (".norm1.", ".layernorm_before."),
                (".norm2.", ".layernorm_after."),
                (".attn.rpb", ".attention.self.rpb"),
                (".attn.proj.", ".attention.output.dense."),
                (".mlp.fc1.", ".intermediate.dense."),
                (".mlp.fc2.", ".output.dense."),
            ):
                stage = stage.replace(new, old)
            theirs[stage] = value
    back = from_huggingface(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    del theirs["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    torch.save(theirs, tmp_path / "cut.bin")
    with pytest.raises(zoo.IntegrityError, match="1 missing: levels.0.blocks.0.attn.qkv.weight"):
        zoo.load_checkpoint(model, tmp_path / "cut.bin")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dims": (32, 64, 96)}, r"dims=\(32, 64, 96\) must double .* such as \(32, 64, 128\)"),
        ({"dims": (32, 64)}, "one value a stage"),
        ({"num_heads": (2, 4, 5)}, "5 does not divide the dim 96"),
    ],
)
def test_stages_that_do_not_fit_are_named(wrong, words):
    with pytest.raises(zoo.ConfigError, match=words):
        zoo.create_model("nat_digits", **wrong)


def test_captured_weights_are_finite_where_half_precision_products_are_not():
    attention = NeighborhoodAttention(32, 1, kernel_size=3).half()
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.eye(32).repeat(3, 1) * 60)
        attention.qkv.bias.zero_()
        x = torch.randn(1, 6, 6, 32).sign().half()
        assert attention.attention_weights(x).weights.isfinite().all()
