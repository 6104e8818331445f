"""timm's window models under our window attention: the same function and weights, and all of it undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.acceleration import Acceleration

SMALL = {
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
    "maxvit_pico_rw_256": {"img_size": 64},
    "twins_svt_small": {"img_size": 64, "depths": (2, 2, 1, 1)},
    "gcvit_xxtiny": {"img_size": 64},
}


def build(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SMALL[name], **settings).eval()
    for parameter in model.parameters():  # biases begin at zero, which would hide them
        if parameter.ndim <= 2:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def images(name: str, batch: int = 2) -> torch.Tensor:
    side = SMALL[name]["img_size"]
    return torch.randn(batch, 3, side, side)


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of images and parameters."""
    x = x.clone().requires_grad_()
    out = model(x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out.square().mean(), [x, *parameters], allow_unused=True)]


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_are_equal_and_afterwards_the_very_same(name):
    # In double precision: rounding cannot hide a difference, nor a deep model make one of it.
    model, x = build(name).double(), images(name).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = results(model, x)
    handle = zoo.accelerate(model)
    assert handle.changed and not handle.kept
    during = results(model, x)
    assert list(model.state_dict()) == list(state)
    handle.remove()
    after = results(model, x)
    differs = False
    for one, other, again in zip(before, during, after, strict=True):
        if one is None:
            assert other is None
            continue
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(other, one, rtol=0, atol=1e-9 * scale)
        assert torch.equal(one, again)
        differs |= not torch.equal(one, other)
    assert differs, "another path rounds in another way; this one was never taken"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(56, 112), (60, 76)])
def test_maps_that_windows_do_not_divide(size):
    name = "swin_tiny_patch4_window7_224"
    model = build(name, strict_img_size=False)
    x = torch.randn(1, 3, *size)
    before = model(x)
    with zoo.accelerate(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_copy_is_accelerated_and_goes_its_own_way():
    name = "twins_svt_small"
    model, x = build(name), images(name)
    before = model(x)
    handle = zoo.accelerate(model)
    other = copy.deepcopy(model)
    handle.remove()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_was_pickled_is_accelerated_and_can_be_given_back(name):
    model, x = build(name), images(name)
    before = model(x)
    handle = zoo.accelerate(model)
    other = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    torch.testing.assert_close(other(x), before, rtol=0, atol=1e-5)
    found = Acceleration.of(other)
    assert found.changed == handle.changed and Acceleration.of(build(name)).changed == []
    found.remove()
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    assert Acceleration.of(other).changed == [] and Acceleration.of(model).changed == handle.changed


def test_what_drops_attention_weights_keeps_its_own_way():
    name = "swin_tiny_patch4_window7_224"
    model = build(name)
    model.layers[0].blocks[0].attn.attn_drop.p = 0.1
    handle = zoo.accelerate(model)
    assert list(handle.kept) == ["layers.0.blocks.0"] and "attn_drop=0.1" in repr(handle)
    assert handle.changed == ["layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]


def test_an_exception_in_the_block_undoes_it_too():
    model = build("gcvit_xxtiny")
    with pytest.raises(KeyError), zoo.accelerate(model):
        raise KeyError
    assert not [m for m in model.modules() if "_window_attn" in m.__dict__]


def test_twice_and_nothing_to_do_are_refused():
    model = build("twins_svt_small")
    handle = zoo.accelerate(model)
    with pytest.raises(zoo.ConfigError, match="is accelerated already; call remove"):
        zoo.accelerate(model)
    handle.remove()
    handle.remove()
    with pytest.raises(zoo.ConfigError, match="nothing in Sequential can be accelerated.*Swin"):
        zoo.accelerate(nn.Sequential(nn.Linear(2, 2)))
    for attention in (m for m in model.modules() if hasattr(m, "attn_drop")):
        attention.attn_drop.p = 0.5
    with pytest.raises(zoo.ConfigError, match="nothing in Twins can be accelerated.*attn_drop=0.5"):
        zoo.accelerate(model)
