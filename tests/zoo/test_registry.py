"""Names become models; wrong names, arguments and files say what would be right."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import timm
import torch
from torch.optim.swa_utils import AveragedModel

import zoo
from zoo.registry import IMAGENET, register_family


def test_unknown_names_suggest_near_ones():
    with pytest.raises(zoo.ConfigError, match="unknown model 'nat_tny'; did you mean nat_tiny"):
        zoo.create_model("nat_tny")
    with pytest.raises(zoo.ConfigError, match="zoo.list_models"):
        zoo.create_model("completely-else")
    for wrong in (None, ["nat_tiny"]):
        with pytest.raises(zoo.ConfigError, match="unknown model"):
            zoo.create_model(wrong)
    with pytest.raises(zoo.ConfigError, match="unknown family 'nad'; use .*nat.*did you mean nat"):
        zoo.list_models(family="nad")
    with pytest.raises(zoo.ConfigError, match="unknown task 'clasification'.*did you mean classification"):
        zoo.list_models(task="clasification")
    for value in (3, ["nat"]):
        with pytest.raises(zoo.ConfigError, match="unknown family .*use .*nat"):
            zoo.list_models(family=value)


def test_unknown_arguments_suggest_near_ones():
    with pytest.raises(zoo.ConfigError, match="unknown argument 'drop_path' of nat_digits.*drop_path_rate"):
        zoo.create_model("nat_digits", drop_path=0.1)
    with pytest.raises(zoo.ConfigError, match="num_classes must be 0 .* or more, found -1"):
        zoo.create_model("nat_digits", num_classes=-1)
    with pytest.raises(zoo.ConfigError, match="not both"):
        zoo.create_model("nat_digits", pretrained=True, checkpoint_path="x.pth")


def test_a_name_with_the_tag_of_its_weights_is_read_as_timm_lists_it():
    assert "nat_digits.digits" in timm.list_pretrained("nat_digits*")
    plain, tagged = (zoo.create_model(name, pretrained=True) for name in ("nat_digits", "nat_digits.digits"))
    for one, other in zip(plain.parameters(), tagged.parameters(), strict=True):
        assert torch.equal(one, other)
    assert zoo.create_model("nat_digits.digits").pretrained_cfg["tag"] == "digits"
    for wrong, words in (
        (("nat_digits.digit",), "unknown weights tag 'digit' of nat_digits.*did you mean digits"),
        (("nat_digits.digits", "in1k"), "nat_digits.digits and pretrained='in1k' name two files"),
        (("nat_digit.digits",), "unknown model 'nat_digit.digits'; did you mean nat_digits"),
    ):
        with pytest.raises(zoo.ConfigError, match=words):
            zoo.create_model(*wrong)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("agent_digits", "sr_ratios", (4, 2, 1)),
        ("agent_cswin_tiny", "clamp_window", False),
        ("agent_pvt_tiny", "window_size", 14),
        ("dat_tiny", "kernel_size", 9),
        ("dat_digits", "window_size", 5),
    ],
)
def test_arguments_of_another_body_of_the_family_are_unknown(name, argument, value):
    with pytest.raises(zoo.ConfigError, match=f"unknown argument '{argument}' of {name}"):
        zoo.create_model(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nat_digits", {"out_indices": (0, 1)}, "out_indices .* features_only=True, which is not given"),
        (
            "nat_digits",
            {"out_indices": (0, 5), "features_only": True},
            r"out_indices=\(0, 5\): .*out of range",
        ),
        ("nat_digits", {"out_indices": (), "features_only": True}, r"must be stages, .* found \(\)"),
        ("nat_digits", {"out_indices": "1", "features_only": True}, "must be stages, .* found '1'"),
        ("nat_digits", {"out_indices": (0, 1.5), "features_only": True}, r"stages.* found \(0, 1.5\)"),
        ("nat_digits", {"pretrained_cfg": "nope"}, "pretrained_cfg 'nope' is no tag of nat_digits; use"),
        ("nat_digits", {"mlp_ratio": 0.001}, "mlp_ratio must leave an MLP a channel, found 0.001 of 24"),
        ("agent_digits", {"mlp_ratios": (1, 0.01, 1)}, "mlp_ratios must leave .* found 0.01 of 48"),
        ("agent_digits", {"dims": (24, 52, 96)}, r"dims=\(24, 52, 96\) must double from stage to stage"),
        ("agent_cswin_tiny", {"stages": ("B",) * 4, "num_heads": (1, 2, 4, 8)}, "both must be even"),
        (
            "dat_tiny",
            {"input_size": 20},
            "input_size must be at least 32 for a token in every stage, found 20",
        ),
        ("vitrpb_small", {"input_size": 16}, "input_size must be above patch_size=16 .* found 16"),
    ],
)
def test_models_that_cannot_be_are_refused_when_they_are_built(name, arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.create_model(name, **arguments)


def test_a_size_that_is_no_multiple_of_the_patches_is_padded():
    model = zoo.create_model("vitrpb_small", input_size=230, depth=1, num_classes=3).eval()
    assert model(torch.randn(1, 3, 230, 230)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 40) for name in ("nat_digits", "biformer_digits", "dat_digits", "davit_digits", "agent_digits")]
    + [("nat_isotropic_small", 232), ("agent_cswin_tiny", 225), ("dat_p", 250), ("biformer_stl", 250)],
)
def test_the_pool_size_is_that_of_the_last_map(name, size):
    smaller = {"depth": 1} if "isotropic" in name else {}
    model = zoo.create_model(name, input_size=size, **smaller).eval()
    with torch.no_grad():
        last = model.forward_features(torch.zeros(1, *model.default_cfg["input_size"]))
    assert tuple(last.shape[1:3]) == tuple(model.default_cfg["pool_size"])


def test_lists_take_globs_and_are_sorted():
    names = zoo.list_models("dinat_s_*")
    assert names == sorted(names) and "dinat_s_tiny" in names
    assert all(name.startswith("dinat_s_") for name in names)
    assert zoo.list_models("no-such*") == []
    with pytest.raises(zoo.ConfigError, match="pattern must be a text such as 'dinat.*found 3"):
        zoo.list_models(3)
    assert set(zoo.list_models(pretrained=True)) <= set(zoo.list_models())


def test_rows_can_be_overridden():
    model = zoo.create_model("nat_digits", kernel_size=5, depths=(1, 1, 1), mlp_ratio=1.0, num_classes=3)
    assert model.levels[0].blocks[0].attn.rpb.shape == (2, 9, 9)
    assert len(model.levels[0].blocks) == 1
    assert model.head.out_features == 3


def test_info_holds_what_is_known():
    info = zoo.model_info("nat_mini")
    assert (info.family, info.attention, info.top1) == ("nat", "neighborhood", 81.8)
    assert info.input_size == (3, 224, 224)
    assert info.weights[0]["url"].endswith("nat_mini.pth")


def test_a_name_that_timm_has_is_registered_beside_it(monkeypatch):
    from zoo import registry
    from zoo.models.nat import NAT, NAT_ROWS

    theirs = timm.models.model_entrypoint("resnet18")
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name, known in vars(timm.models._registry).items():
        if name.startswith(("_model", "_module")):
            monkeypatch.setattr(timm.models._registry, name, copy.deepcopy(known))
    register_family(NAT, {"resnet18": NAT_ROWS["nat_digits"]}, paper="", attention="", cfg=IMAGENET)
    assert timm.models.model_entrypoint("resnet18") is theirs
    assert isinstance(zoo.create_model("resnet18"), NAT)
    assert isinstance(timm.create_model("zoo_resnet18"), NAT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": True}, "num_classes must be 0 .* found True"),
        ({"in_chans": True}, "in_chans must be a whole number from 1, found True"),
        ({"pretrained": 3}, "pretrained must be True, False or the tag of a file, found 3"),
        (
            {"pretrained": True, "pretrained_cfg_overlay": {"file": "own.pth"}},
            r"pretrained_cfg_overlay names weights \(file\).*give checkpoint_path",
        ),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls must be 'getter', found 'hook'"),
    ],
)
def test_what_timm_would_take_and_not_obey_is_refused(arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.create_model("nat_digits", **arguments)


def test_counts_may_come_from_numpy():
    assert zoo.create_model("nat_digits", num_classes=np.int64(3)).num_classes == 3


def test_timms_img_size_is_the_rows_input_size():
    with torch.device("meta"):
        assert timm.create_model("dat_tiny", img_size=256).default_cfg["input_size"] == (3, 256, 256)
        assert timm.create_model("dat_tiny").default_cfg["input_size"] == (3, 224, 224)
        with pytest.raises(zoo.ConfigError, match=r"img_size must be that of squares, found \(256, 320\)"):
            timm.create_model("dat_tiny", img_size=(256, 320))
        with pytest.raises(zoo.ConfigError, match="not both"):
            timm.create_model("dat_tiny", img_size=256, input_size=224)


def test_timms_configuration_says_how_many_classes_there_are(tmp_path):
    overlaid = timm.create_model("nat_digits", pretrained_cfg_overlay={"num_classes": 4})
    assert overlaid.num_classes == overlaid.get_classifier().out_features == 4
    timm.models.save_for_hf(overlaid, str(tmp_path))
    file = tmp_path / "config.json"
    told = {key: value for key, value in json.loads(file.read_text()).items() if key != "model_args"}
    file.write_text(json.dumps(told))  # as files of the hub are that say the classes and no arguments
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(again.get_classifier().weight, overlaid.get_classifier().weight)


def test_the_tag_of_the_weights_says_how_their_images_are_cropped(monkeypatch):
    from zoo.weights import loader

    state = zoo.create_model("davit_tiny").state_dict()
    monkeypatch.setattr(loader, "read_pretrained", lambda name, tag: (state, "a file"))
    assert zoo.create_model("davit_tiny.in1k").pretrained_cfg["crop_pct"] == 0.9
    assert zoo.create_model("davit_tiny", pretrained="in1k").pretrained_cfg["crop_pct"] == 0.9
    assert zoo.create_model("davit_tiny", pretrained=True).pretrained_cfg["crop_pct"] == 0.95


# Weights files ---------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return zoo.create_model("nat_digits")


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"state_dict_ema": s, "state_dict": {k: v * 0 for k, v in s.items()}},
        lambda s: {"model": {k: v * 0 for k, v in s.items()}, "ema": s, "opt": {"state": {}}},
        lambda s: {"params": {k: v * 0 for k, v in s.items()}, "params_ema": s},
        lambda s: {"module": s, "epoch": 3},
        lambda s: {"state_dict_ema": {}, "ema": {"decay": 0.99}, "state_dict": s},
        lambda s: {"module." + k: v for k, v in s.items()},
        lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}},
        lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
        lambda s: {"state_dict": {"model." + k: v for k, v in s.items()}},
        lambda s: {"n_averaged": torch.tensor(3)} | {"module." + k: v for k, v in s.items()},
        lambda s: {"model_state_dict": s},
        lambda s: {**s, "levels.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)},
    ],
    ids=[
        *("bare", "model", "state_dict", "ema first", "ema and model", "params", "module", "empty ema"),
        *("DataParallel", "both", "compiled DataParallel"),
        *("Lightning", "AveragedModel", "model_state_dict", "derived buffer"),
    ],
)
def test_files_load_whatever_their_wrapper(model, wrap, tmp_path):
    target = zoo.create_model("nat_digits")
    zoo.load_checkpoint(target, saved(tmp_path / "w.pth", wrap(model.state_dict())))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dat_digits", "stages.2.attns.0.rpe_table"),
        ("agent_digits", "layers.2.blocks.0.attn.wa_bias"),
        ("nat_digits", "nat.encoder.levels.0.layers.0.attention.self.{}.weight"),
    ],
)
def test_shapes_that_no_layout_has_are_told_of_their_file(name, key, tmp_path):
    target = zoo.create_model(name)
    own = target.state_dict()
    empty = own[key][:0] if key in own else torch.tensor(1.0)
    state = own | {key.format(part): empty for part in ("query", "key", "value")}
    message = f"w.pth has the names of {type(target).__name__} but not its shapes"
    with pytest.raises(zoo.IntegrityError, match=message):
        zoo.load_checkpoint(target, saved(tmp_path / "w.pth", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "rpb" not in k}, "4 missing: levels.0.blocks.0.attn.rpb"),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, "1 unexpected: extra.weight"),
        (lambda s: {**s, "norm.weight": torch.ones(3)}, r"1 misshapen: norm.weight \[3\] instead of \[96\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(model, change, message, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = saved(tmp_path / "w.pth", change(zoo.create_model("nat_digits").state_dict()))
    with pytest.raises(zoo.IntegrityError, match=message):
        zoo.load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert zoo.load_checkpoint(model, path, strict=False)


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel, AveragedModel]
)
def test_a_model_that_is_wrapped_takes_its_file(model, wrap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    other = zoo.create_model("nat_digits")
    assert zoo.load_checkpoint(wrap(other), path) == []
    wrapped = wrap(zoo.create_model("nat_digits"))
    zoo.load_checkpoint(wrapped, path)
    for ours, theirs in zip(wrapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_model_without_numbers_takes_no_weights(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(zoo.ConfigError, match="NAT is on the meta device, which holds no numbers"):
        zoo.create_model("nat_digits", device="meta", checkpoint_path=tmp_path / "weights.pth")


def test_another_models_file_is_refused_with_the_first_five_keys(model, tmp_path):
    other = saved(tmp_path / "other.pth", timm.create_model("resnet18").state_dict())
    with pytest.raises(
        zoo.IntegrityError, match="other.pth does not fit NAT .*missing: .*unexpected: conv1.weight"
    ):
        zoo.load_checkpoint(model, other)
    with pytest.raises(zoo.IntegrityError, match="no entry that fits"):
        zoo.load_checkpoint(model, other, strict=False)


def test_a_classifier_for_other_classes_stays_as_initialised(model, tmp_path):
    path = saved(tmp_path / "w.pth", model.state_dict())
    other = zoo.create_model("nat_digits", num_classes=3, checkpoint_path=path)
    assert other.head.weight.shape == (3, 96)
    assert torch.equal(other.norm.weight, model.norm.weight)
    headless = zoo.create_model("nat_digits", num_classes=0, checkpoint_path=path)
    assert torch.equal(headless.levels[1].blocks[1].mlp.fc2.weight, model.levels[1].blocks[1].mlp.fc2.weight)


def test_a_feature_extractor_takes_the_whole_models_file(model, tmp_path):
    path = saved(tmp_path / "w.pth", model.state_dict())
    extractor = zoo.create_model("nat_digits", features_only=True, checkpoint_path=path)
    images = torch.randn(1, 3, 32, 32)
    model.eval(), extractor.eval()
    torch.testing.assert_close(
        extractor(images), model.forward_intermediates(images, intermediates_only=True)
    )


def test_one_channel_models_take_colour_weights(model, tmp_path):
    path = saved(tmp_path / "w.pth", model.state_dict())
    grey = zoo.create_model("nat_digits", in_chans=1, checkpoint_path=path)
    image = torch.randn(1, 1, 32, 32)
    model.eval(), grey.eval()
    torch.testing.assert_close(grey(image), model(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_weights_with_nan_in_them_are_refused_by_name(tmp_path):
    model = zoo.create_model("nat_digits")
    state = model.state_dict()
    state["levels.1.blocks.0.mlp.fc1.weight"][3, 4] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    before = {key: value.clone() for key, value in model.state_dict().items() if "levels.1" not in key}
    with pytest.raises(zoo.IntegrityError, match="nan.pth: levels.1.blocks.0.mlp.fc1.weight holds infinite"):
        zoo.load_checkpoint(model, tmp_path / "nan.pth")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
