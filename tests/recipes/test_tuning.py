"""Fine-tuning: what is frozen stays, probes, class balance, the search for a rate, stopping early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.errors import ConfigError
from zoo.recipes import api
from zoo.recipes.config import recipe
from zoo.recipes.data.loader import EpochBatches, balanced
from zoo.recipes.run_folder import build_backbone
from zoo.recipes.tasks.classification import Classification
from zoo.recipes.tuning import freeze, still_modules

ONE = ("optim.epochs=1", "optim.warmup_epochs=1")
TIMM = "model.name=timm/test_efficientnet"  # a few thousand parameters, with batch norms


SLOW = pytest.mark.slow


def small() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2))


def test_a_pattern_names_modules_or_parameters():
    model = small()
    freeze(model, ["0.1", "1.b*"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.0.weight",
        "0.0.bias",
        "1.weight",
    ]
    assert still_modules(model) == [model[0][1]]
    freeze(model, ["0"])
    assert still_modules(model) == [model[0]]


@pytest.mark.parametrize(
    ("pattern", "words"), [("2", "names no part of Sequential"), ("*", "nothing to train")]
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern, words):
    with pytest.raises(ConfigError, match=words):
        freeze(small(), [pattern])


def test_what_is_frozen_ends_as_it_began_statistics_too(run, recipe_file):
    frozen = "model.freeze=[conv_stem, bn1, blocks]"
    before = build_backbone(recipe(recipe_file, [TIMM]), 2).state_dict()
    torch.manual_seed(0)
    first = build_backbone(recipe(recipe_file, [TIMM]), 2)
    start = str(recipe_file.parent / "start.safetensors")
    save_file({name: value.contiguous() for name, value in first.state_dict().items()}, start)
    folder = run("frozen", *ONE, TIMM, frozen, f"model.checkpoint={start}", "optim.ema=null").folder
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in first.state_dict().items():
        held = name.startswith(("conv_stem", "bn1", "blocks"))
        assert torch.equal(value, after[name]) == held or name.endswith("num_batches_tracked"), name


@pytest.mark.parametrize(
    ("model", "kind", "trained"),
    [
        ("nat_digits", "linear", {"head.weight", "head.bias"}),
        ("timm/test_efficientnet", "attentive", {"queries", "value.weight", "head.weight", "head.bias"}),
        pytest.param(
            "nat_digits", "attentive", {"queries", "value.weight", "head.weight", "head.bias"}, marks=SLOW
        ),
    ],
)
def test_a_probe_trains_its_classifier_only_and_its_file_works(run, image_folder, model, kind, trained):
    result = run("probe", *ONE, f"model.name={model}", f"model.probe={kind}", "optim.layer_decay=0.9")
    found = api.load_trained(result.folder).model
    assert {name for name, p in found.named_parameters() if p.requires_grad} == trained
    again = api.evaluate(result.folder)
    assert again.loss == pytest.approx(result.metrics["val_loss"], abs=1e-6)
    with pytest.raises(ConfigError, match="model.probe"):
        run("probe", f"model.name={model}", resume=result.folder)


def test_an_attentive_probe_is_its_definition():
    from zoo import create_model
    from zoo.heads.probe import AttentiveProbe

    torch.manual_seed(0)
    model = AttentiveProbe(create_model("nat_digits", num_classes=0), 3)
    images = torch.randn(2, 3, 32, 32)
    assert not model.train().backbone.training
    tokens = model.backbone.forward_features(images).flatten(1, 2)
    width = 96 // len(model.queries)
    parts = []
    for number, query in enumerate(model.queries):
        weights = (tokens @ query / 96**0.5).softmax(1)
        values = model.value(tokens)[..., number * width : (number + 1) * width]
        parts.append((weights[..., None] * values).sum(1))
    torch.testing.assert_close(model(images), model.head(torch.cat(parts, 1)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.probe=quadratic"], "one of linear, attentive"),
        (["model.probe=linear", "model.freeze=[head]"], "leave model.freeze out"),
        (["model.freeze=head"], "model.freeze=head is not a list of texts"),
        (["model.name=timm/resnet_18"], "did you mean timm/resnet"),
        (["data.balance=2"], "data.balance=2.0 must be at most 1"),
        (["trainer.patience=0"], "trainer.patience=0 must be at least 1"),
    ],
)
def test_a_wrong_choice_is_one_line(recipe_file, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        recipe(recipe_file, overrides)
    assert "\n" not in str(refused.value)


def test_what_timm_refuses_is_one_line(recipe_file):
    with pytest.raises(ConfigError, match="timm refuses timm/test_vit") as refused:
        build_backbone(recipe(recipe_file, ["model.name=timm/test_vit", "model.args={deepness: 3}"]), 2)
    assert "\n" not in str(refused.value)


def test_balance_draws_every_class_equally_often_the_same_in_every_run():
    labels = [0] * 90 + [1] * 9 + [2]
    weights = np.array(balanced(labels, 1.0))
    assert [weights[np.array(labels) == each].sum() for each in range(3)] == pytest.approx([1, 1, 1])
    assert set(balanced(labels, 0.0)) == {1.0}
    batches = EpochBatches(100, 10, 3, shuffle=True, weights=balanced(labels, 1.0))
    order = batches.order(5)
    assert len(order) == 100 and torch.equal(order, batches.order(5))
    assert not torch.equal(order, batches.order(6))
    counts = torch.bincount(torch.tensor(labels)[torch.cat([batches.order(i) for i in range(30)])])
    assert counts.min() > 900, counts


@pytest.mark.slow
def test_balance_reaches_the_batches(run, monkeypatch):
    seen = []
    original = Classification.loss

    def loss(self, model, batch):
        seen.append(batch[1])
        return original(self, model, batch)

    monkeypatch.setattr(Classification, "loss", loss)
    run("balanced", *ONE, "data.balance=1")
    assert [len(each) for each in seen] == [8, 8, 8]


def test_the_rate_is_searched_once_written_down_and_kept(run, recipe_file, tmp_path, at_search):
    options = ["optim.find_lr=true", "optim.epochs=2"]
    first = run("search", *options)
    saved = recipe(first.folder / "config.yaml")
    assert not saved.optim.find_lr and 1e-7 < saved.optim.lr < 1 and saved.optim.lr != 1e-3
    assert len(at_search) == 1
    run("search", *options, resume=first.folder)
    assert len(at_search) == 1 and recipe(first.folder / "config.yaml").optim.lr == saved.optim.lr
    with pytest.raises(ConfigError, match="one process"):
        run("search-2", *options, "trainer.devices=2")


@pytest.fixture
def at_search(monkeypatch) -> list[int]:
    """Count the searches, and test ten rates only."""
    from zoo.recipes import tuning

    searches = []
    original = tuning.Tuner.lr_find

    def lr_find(self, *arguments, **keywords):
        searches.append(1)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(tuning.Tuner, "lr_find", lr_find)
    monkeypatch.setattr(tuning, "RATES", 15)
    return searches


def test_patience_ends_a_run_and_resuming_does_not_go_on(run, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.9, 0.9])

    def judge(self) -> dict[str, float]:
        self.top1.reset(), self.val_loss.reset()
        return {"val_top1": next(scores), "val_loss": 0.5}

    monkeypatch.setattr(Classification, "compute", judge)
    options = ["optim.epochs=6", "trainer.patience=2"]
    result = run("patient", *options)
    assert result.best_epoch == 2
    last = result.folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["position"] == [4, 0]
    run("patient", *options, resume=result.folder)
    assert torch.load(last, weights_only=True)["position"] == [4, 0]
