"""Channel attention as a module: both published forms, their scales, and what capture records."""

from __future__ import annotations

import pytest
import torch
from goldens import golden, golden_dir
from timm.models import davit as timm_davit

import zoo
from zoo.attention import ChannelAttention


@pytest.mark.parametrize(("version", "case"), [(1, "op_channel_attention"), (2, "op_channel_attention_v2")])
def test_it_is_the_published_attention(version, case):
    path = golden_dir() / "davit" / case
    if not path.with_suffix(".json").exists():
        pytest.skip("no golden cases; set ZOO_GOLDENS")
    facts, stored = golden().load_case(path)
    module = ChannelAttention(96, 3, version=version)
    module.load_state_dict(golden().reference_state_dict(facts))
    x = stored["input"].requires_grad_()
    out = module(x.unflatten(1, (14, 14))).flatten(1, 2)
    (out * golden().seeded_normal("grad", out.shape, facts["seed"])).sum().backward()
    assert golden().relative_error(out, stored["output"]) <= facts["tolerance"]["outputs"]
    assert golden().relative_error(x.grad, stored["dinput"]) <= facts["tolerance"]["gradients"]


@pytest.mark.parametrize(
    ("version", "theirs"),
    [(1, timm_davit.ChannelAttention), (2, timm_davit.ChannelAttentionV2)],
)
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_it_is_timms_at_any_size(version, theirs, size):
    theirs = theirs(24, num_heads=3, qkv_bias=True)
    ours = ChannelAttention(24, 3, version=version)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *size, 24)
    torch.testing.assert_close(ours(x).flatten(1, 2), theirs(x.flatten(1, 2)))


def test_the_versions_differ_with_the_same_weights():
    first, second = ChannelAttention(24, 3), ChannelAttention(24, 3, version=2)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 4, 4, 24)
    assert not torch.allclose(first(x), second(x), atol=1e-3)


@pytest.mark.parametrize(("version", "summed"), [(1, 0), (2, 2)])
def test_recorded_weights_rebuild_the_output(version, summed):
    module = ChannelAttention(24, 3, version=version)
    x = torch.randn(2, 4, 5, 24)
    with torch.no_grad():
        record = module.attention_weights(x)
        assert record.weights.shape == (2, 3, 8, 8)
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(2, 3, 8))
        values = module.qkv(x).unflatten(-1, (3, 3, 8))[..., summed, :, :]
        out = torch.einsum("bhde,byxhe->byxhd", record.weights, values)
        torch.testing.assert_close(module.proj(out.flatten(-2)), module(x))


def test_macs_and_wrong_arguments():
    assert ChannelAttention(24, 3).attention_macs((2, 4, 5, 24)) == 2 * 2 * 20 * 24 * 8
    with pytest.raises(zoo.ConfigError, match="dim 24 must be a multiple of num_heads 5"):
        ChannelAttention(24, 5)
    with pytest.raises(zoo.ConfigError, match=r"version must be 1 \(DaViT\) or 2 \(Florence-2\), found 3"):
        ChannelAttention(24, 3, version=3)
