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


def test_the_shipped_digits_model_is_as_good_as_its_manifest_says():
    from zoo.recipes import api
    from zoo.weights.manifest import entries_of

    (entry,) = entries_of("biformer_digits")
    result = api.evaluate("biformer_digits")
    assert 100 * result.top1 == pytest.approx(entry.measured["top1"], abs=0.01)
    assert result.images == 599 and result.top1 >= 0.985
    assert entry.packaged.stat().st_size == entry.size < 800_000


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_every_norm_has_the_published_epsilon(name):
    """The outputs cannot show it: 1e-5 instead changes them by less than rounding."""
    modules = list(on_meta(name).modules())
    assert {m.eps for m in modules if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {(m.eps, m.momentum) for m in modules if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_stage_attends_globally_with_eight_heads_and_no_bias(name):
    model = on_meta(name)
    *routed, last = [[block.attn for block in stage.blocks] for stage in model.stages]
    assert all((attn.num_heads, attn.qkv.bias) == (8, None) for attn in last)
    assert {attn.lepe_of for attn in last} == {"value" if name.endswith("nchw") else "input"}
    for attns, topk in zip(routed, (1, 4, 16), strict=True):
        assert all((attn.topk, attn.dim // attn.num_heads) == (topk, 32) for attn in attns)
        assert all(attn.scale == attn.dim**-0.5 for attn in attns), "the width of all heads, not of one"


def test_stl_rows_have_nothing_before_the_attention():
    assert all(block.pos_embed is not None for stage in on_meta("biformer_tiny").stages for block in stage)
    stl = on_meta("biformer_stl")
    assert all(block.pos_embed is None for stage in stl.stages for block in stage.blocks)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl_nchw"])
def test_the_number_of_regions_changes_no_parameter(name):
    model, dense = on_meta(name), on_meta(name, n_win=16)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in dense.state_dict().items()
    ]
    assert {m.n_win for m in dense.modules() if hasattr(m, "n_win")} == {16}
    assert count_macs(dense, (3, 512, 512)) < 7 * count_macs(model, (3, 224, 224))


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize(("height", "width"), [(97, 131), (225, 250)])
def test_any_image_size_runs(name, height, width):
    model = zoo.create_model(name, depths=(1, 1, 1, 1), n_win=8).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, width)).isfinite().all()


def test_stl_rows_say_which_images_are_too_small():
    with pytest.raises(zoo.ConfigError, match="at least 32 x 32, found 31 x 64"):
        zoo.create_model("biformer_stl", depths=(1, 1, 1, 1))(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize("topks", [(1, 4, 16), (1, 4, 16, -2), (0, 4, 16, None)])
def test_topks_are_numbers_of_regions_or_none(topks):
    with pytest.raises(zoo.ConfigError, match="topks"):
        on_meta("biformer_tiny", topks=topks)


def test_synchronised_batch_norms_compute_the_same():
    model = zoo.create_model("biformer_digits").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model)(images), expected)


def test_fewer_stages_take_fewer_steps_down():
    model = zoo.create_model("biformer_digits")
    model.prune_intermediate_layers([0])
    assert len(model.downsample_layers) == len(model.stages) == 1
