"""DAT++ and DAT: the published functions, counts, and two versions that nothing but the row tells apart."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import DeformableAttention, NeighborhoodAttention, WindowAttention
from zoo.layers import count_macs

# Parameters in millions and multiply-adds in billions, measured on the published code.
PUBLISHED = {
    "dat_plus_tiny": (23.963, 4.259),
    "dat_plus_small": (53.127, 9.382),
    "dat_plus_base": (93.691, 16.502),
    "dat_plus_base_384": (93.691, 49.502),
    "dat_p": (22.773, 4.025),
    "dat_tiny": (28.319, 4.563),
    "dat_small": (49.700, 8.959),
    "dat_base": (87.882, 15.721),
    "dat_base_384": (88.178, 49.450),
}
PLUS = [name for name in PUBLISHED if "_p" in name]
FIRST = [name for name in PUBLISHED if "_p" not in name]


@cache
def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


def state_of(name: str, **arguments) -> dict[str, torch.Tensor]:
    """The weights of a row as a file would hold them, without numbers."""
    return {key: torch.empty(value.shape) for key, value in on_meta(name, **arguments).state_dict().items()}


@pytest.mark.parametrize("case", [c for c in cases("dat") if c.id == "absent" or c.id.startswith("dat_")])
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    torch.save({"model": state, "max_accuracy": 83.9, "epoch": 300}, tmp_path / "published.pth")
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
        part = feature[(slice(None), *(slice(None, None, int(step.strip(" :") or 1)) for step in steps))]
        assert error(part, stored[f"feat{i}"]) <= facts["tolerance"]["feats"], i


@pytest.mark.parametrize("case", [c for c in cases("dat") if c.id in ("absent", "op_neighborhood_attn")])
def test_its_neighborhoods_are_the_zoos(case):
    facts, stored = golden().load_case(case)
    module = NeighborhoodAttention(32, 2, kernel_size=7)
    module.load_state_dict(golden().reference_state_dict(facts))
    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    out = module(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert golden().relative_error(out, stored["output"]) <= facts["tolerance"]["outputs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = on_meta(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("name", zoo.list_models(family="dat"))
def test_every_norm_has_the_published_epsilon(name):
    norms = [m for m in on_meta(name).modules() if isinstance(m, nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("name", zoo.list_models(family="dat"))
def test_every_row_fixes_its_version(name):
    """Nothing in a file tells it, so nothing can be said against it either."""
    model = on_meta(name)
    first = name in FIRST
    deformable = [m for m in model.modules() if isinstance(m, DeformableAttention)]
    assert {m.version for m in deformable} == {1 if first else 2}
    assert {m.offset_range_factor for m in deformable} == {2.0 if first else -1.0}
    with pytest.raises(zoo.ConfigError, match="unknown argument 'version'"):
        on_meta(name, version=2 if first else 1)


def test_the_blocks_of_every_stage_are_the_published_ones():
    letters = {DeformableAttention: "D", NeighborhoodAttention: "N"}

    def spec(model):
        return [
            "".join(letters.get(type(m)) or ("S" if max(m.shift) else "L") for m in stage.attns)
            for stage in model.stages
        ]

    for name in PLUS:
        assert spec(on_meta(name)) == ["ND", "NDND", "ND" * 9, "DD"]
    assert spec(on_meta("dat_tiny")) == ["LS", "LS", "LD" * 3, "LD"]
    assert spec(on_meta("dat_small")) == ["LS", "LS", "LD" * 9, "LD"]
    settings = [
        {
            (m.groups, m.stride, m.kernel_size, m.map_size)
            for m in stage.attns
            if type(m) is DeformableAttention
        }
        for stage in on_meta("dat_plus_small").stages
    ]
    assert settings == [
        {(1, 8, 9, (56, 56))}, {(2, 4, 7, (28, 28))}, {(3, 2, 5, (14, 14))}, {(6, 1, 3, (7, 7))}
    ]  # fmt: skip
    settings = {(m.groups, m.stride, m.kernel_size) for m in on_meta("dat_base").stages[2].attns[1::2]}
    assert settings == {(4, 1, 5)}


def test_shifted_windows_move_by_half_a_window_rounded_up():
    """Four of seven, where Swin takes three."""
    first, shifted = on_meta("dat_tiny").stages[0].attns
    assert (first.shift, shifted.shift, shifted.window_size) == ((0, 0), (4, 4), (7, 7))
    assert on_meta("dat_base_384").stages[0].attns[1].shift == (6, 6)


def test_windows_are_what_a_rolled_and_masked_map_gives():
    from zoo.models.dat import LocalAttention

    module = LocalAttention(8, 2, window_size=7, shift=4).eval()
    nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, 14, 14, 8)
    qkv = module.proj_qkv(x).roll((-4, -4), (1, 2)).unflatten(-1, (3, 2, 4))
    region = torch.zeros(14)
    region[7:10], region[10:] = 1, 2  # what of a rolled map was together before
    region = (3 * region[:, None] + region).unflatten(1, (2, 7)).unflatten(0, (2, 7)).transpose(1, 2)
    region = region.flatten(2).flatten(0, 1)  # [windows, 49]
    cut = qkv.unflatten(2, (2, 7)).unflatten(1, (2, 7)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    q, k, v = cut.transpose(2, 4).unbind(3)  # [B, windows, H, 49, D]
    token = torch.arange(49)
    down, right = (a[:, None] - a + 6 for a in (token // 7, token % 7))  # query minus key
    logits = q @ k.transpose(-1, -2) / 2 + module.relative_position_bias_table[13 * down + right].permute(
        2, 0, 1
    )
    logits = logits - 100.0 * (region[:, :, None] != region[:, None])[:, None]
    out = (logits.softmax(-1) @ v).transpose(2, 3).flatten(-2)
    out = out.unflatten(2, (7, 7)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close(module(x), module.proj_out(out.roll((4, 4), (1, 2))), rtol=1e-5, atol=1e-5)


# Which file fits which row --------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", PUBLISHED)
@pytest.mark.parametrize("ours", ["dat_plus_tiny", "dat_plus_base", "dat_p", "dat_tiny", "dat_base"])
def test_a_file_of_another_row_is_refused_by_name(ours, theirs):
    same = {"dat_plus_base": "dat_plus_base_384", "dat_base": "dat_base_384"}
    model, state = on_meta(ours), state_of(theirs)
    if theirs in (ours, same.get(ours)):
        assert type(model).filter_checkpoint(state, model).keys() == model.state_dict().keys()
        return
    with pytest.raises(zoo.IntegrityError) as caught:
        type(model).filter_checkpoint(state, model)
    message = str(caught.value)
    row = {large: small for small, large in same.items()}.get(theirs, theirs)
    assert f"zoo.create_model('{row}')" in message and "\n" not in message
    assert ("different functions" in message) == ((ours in FIRST) != (theirs in FIRST))


def test_a_first_file_never_loads_into_the_second_version(tmp_path):
    """Upstream it does, without a missing key, and every logit is wrong."""
    torch.save({"model": state_of("dat_tiny")}, tmp_path / "dat_tiny_in1k_224.pth")
    for strict in (True, False):
        with pytest.raises(zoo.IntegrityError, match=r"these weights are of dat_tiny .*different functions"):
            zoo.load_checkpoint(zoo.create_model("dat_p"), tmp_path / "dat_tiny_in1k_224.pth", strict=strict)
    # Nor can a body be built that would take it.
    for name, letters in (("dat_p", ("LS", "LS", "LDLDLD", "LD")), ("dat_tiny", ("ND", "LS", "LD", "LD"))):
        with pytest.raises(zoo.ConfigError, match="made of the letters"):
            on_meta(name, stages=letters)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"stages": ("N", "DN", "D")}, r"stages \('N', 'DN', 'D'\) instead of \('N', 'ND', 'D'\)"),
        ({"convolutional": False}, "convolutional False instead of True"),
        ({"offset_kernel_sizes": (5, 5, 3)}, "offset_kernel_sizes .* instead of"),
        ({"dims": (16, 48, 96)}, "width 16 instead of 24"),
    ],
)
def test_a_file_of_no_row_is_refused_with_the_difference(change, difference):
    model = on_meta("dat_digits")
    with pytest.raises(zoo.IntegrityError, match=f"another model .*{difference}.*made with"):
        type(model).filter_checkpoint(state_of("dat_digits", **change), model)


def test_a_feature_extractor_refuses_them_too(tmp_path):
    torch.save(state_of("dat_tiny"), tmp_path / "dat.pth")
    with pytest.raises(zoo.IntegrityError, match="these weights are of dat_tiny"):
        zoo.create_model(
            "dat_p", features_only=True, out_indices=(0, 1), checkpoint_path=tmp_path / "dat.pth"
        )


@pytest.mark.parametrize("attention", ["neighborhood", "window", "dual"])
def test_a_body_under_another_attention_takes_its_own_files_and_what_fits_of_others(attention, tmp_path):
    model = zoo.create_model("dat_digits", attention=attention)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert zoo.load_checkpoint(model, tmp_path / "own.pth") == []
    torch.save(zoo.create_model("dat_digits").state_dict(), tmp_path / "row.pth")
    left_out = zoo.load_checkpoint(model, tmp_path / "row.pth", strict=False)
    assert left_out and all(".attns." in key for key in left_out)


def test_derived_buffers_of_published_files_are_dropped(tmp_path):
    state = {k: torch.randn_like(v) for k, v in state_of("dat_tiny").items()}
    for key in [key for key in state if key.endswith(".relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    state["stages.0.attns.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": state}, tmp_path / "dat.pth")
    model = zoo.create_model("dat_tiny", checkpoint_path=tmp_path / "dat.pth")
    table = "stages.3.attns.1.rpe_table"
    assert torch.equal(model.state_dict()[table], state[table])
    assert not any(key.endswith(("index", "attn_mask")) for key in model.state_dict())


def test_tables_are_resized_to_another_image_and_window_as_published(tmp_path):
    state = {k: torch.randn_like(v) for k, v in state_of("dat_base").items()}
    model = on_meta("dat_base_384")
    loaded = type(model).filter_checkpoint(state, model)
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert loaded["stages.2.attns.1.rpe_table"].shape == (16, 47, 47)
    assert loaded["stages.3.attns.1.rpe_table"].shape == (32, 23, 23)
    key = "stages.0.attns.0.relative_position_bias_table"
    square = state[key].T.reshape(1, 4, 13, 13)
    wanted = nn.functional.interpolate(square, (23, 23), mode="bicubic").reshape(4, -1).T
    torch.testing.assert_close(loaded[key], wanted)


# Sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(97, 131), (256, 320), (33, 64)])
def test_the_second_version_runs_at_any_size(height, width):
    model = zoo.create_model("dat_plus_tiny", num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, width)).isfinite().all()


@pytest.mark.parametrize(("name", "least"), [("dat_plus_tiny", 33), ("dat_p", 64), ("dat_digits", 17)])
def test_an_image_too_small_is_refused_and_gives_no_nan(name, least):
    model = zoo.create_model(name).eval()
    assert model.default_cfg["min_input_size"] == (3, least, least)
    with torch.no_grad():
        assert model(torch.randn(1, 3, least, least)).isfinite().all()
        for size in ((least - 1, 224), (224, least - 1)):
            with pytest.raises(
                zoo.ConfigError, match=rf"at least {least} x {least}, found {size[0]} x {size[1]}"
            ):
                model(torch.randn(1, 3, *size))


def test_tables_of_the_second_version_do_not_follow_the_image():
    assert on_meta("dat_plus_base_384").stages[0].attns[1].rpe_table.shape == (4, 111, 111)
    large = on_meta("dat_plus_tiny", input_size=512)
    assert large.stages[0].attns[1].rpe_table.shape == (2, 111, 111)
    assert large.default_cfg["input_size"] == (3, 512, 512)


def test_the_first_version_takes_the_size_it_is_built_for():
    model = zoo.create_model("dat_tiny", num_classes=3).eval()
    with pytest.raises(zoo.ConfigError, match=r"images of 224 x 224, found 256 x 224.*input_size=") as caught:
        model(torch.zeros(1, 3, 256, 224))
    assert "\n" not in str(caught.value)
    other = zoo.create_model("dat_tiny", num_classes=3, input_size=160).eval()
    assert other.default_cfg["input_size"] == (3, 160, 160) and other.default_cfg["fixed_input_size"]
    assert other.stages[2].attns[1].rpe_table.shape == (12, 19, 19)
    with torch.no_grad():
        assert other(torch.randn(1, 3, 160, 160)).isfinite().all()


# The rest -------------------------------------------------------------------------------------------------


def test_published_evaluation_does_not_keep_proportions():
    assert {on_meta(name).default_cfg["crop_mode"] for name in PUBLISHED} == {"squash"}
    assert {name: on_meta(name).default_cfg["crop_pct"] for name in ("dat_tiny", "dat_base_384")} == {
        "dat_tiny": 0.875,
        "dat_base_384": 1.0,
    }


def test_layers_start_as_published():
    """As in torch, nothing at zero; tables with 0.01, but 0.02 for the neighborhoods."""
    model = zoo.create_model("dat_digits")
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if not n.endswith("norm.bias"))
    tables = {"rpb": [], "rpe_table": []}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in tables:
            tables[name.rpartition(".")[2]].append(parameter.flatten())
    assert torch.cat(tables["rpb"]).std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.cat(tables["rpe_table"]).std().item() == pytest.approx(0.01, rel=0.15)
    window = next(m for m in zoo.create_model("dat_tiny").modules() if isinstance(m, WindowAttention))
    assert window.relative_position_bias_table.std().item() == pytest.approx(0.01, rel=0.15)


def test_position_tables_are_not_decayed_but_those_of_neighborhoods():
    for name in ("dat_plus_tiny", "dat_tiny"):
        model = on_meta(name)
        tables = {n for n, _ in model.named_parameters() if n.endswith(("rpe_table", "bias_table"))}
        assert model.no_weight_decay() == tables and tables
    assert not any(name.endswith("rpb") for name in on_meta("dat_plus_tiny").no_weight_decay())


def test_the_shipped_digits_are_the_manifests():
    model = zoo.create_model("dat_digits", pretrained=True)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    (entry,) = zoo.model_info("dat_digits").weights
    result = zoo.evaluate("dat_digits")
    assert 100 * result.top1 == pytest.approx(entry["measured"]["top1"], abs=0.01)
    assert result.images == 599 and result.top1 >= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_plus_tiny", "dat_tiny"])
def test_published_rows_compile_export_and_train(name):
    torch._dynamo.reset()
    model = zoo.create_model(name, num_classes=3).eval()
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        exact = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), exact, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(image[:1]), exact[:1], rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(image).float() - exact).norm() < 0.05 * exact.norm()
    model.train().set_grad_checkpointing()
    model(image).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
