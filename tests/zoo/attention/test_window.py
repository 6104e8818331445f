"""Window attention as a module: Swin's attention, its padding rule, its table, and what capture records."""

from __future__ import annotations

import pytest
import torch
from goldens import golden, golden_dir
from timm.models.swin_transformer import SwinTransformerBlock

import zoo
from zoo.attention import WindowAttention
from zoo.attention.window import resize_relative_position_bias


@pytest.mark.parametrize(("shift", "side"), [(0, 14), (3, 14), (3, 7)])
def test_it_is_swins_attention(shift, side):
    block = SwinTransformerBlock(48, (side, side), 3, window_size=7, shift_size=shift).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    ours = WindowAttention(48, 3, window_size=7, shift=shift, clamp_window=True)
    state = block.attn.state_dict()
    ours.load_state_dict({key: value for key, value in state.items() if not key.endswith("index")})
    x = torch.randn(2, side, side, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), block._attn(x))


def test_it_is_the_published_attention_of_davit():
    path = golden_dir() / "davit" / "op_window_attention"
    if not path.with_suffix(".json").exists():
        pytest.skip("no golden cases; set ZOO_GOLDENS")
    facts, stored = golden().load_case(path)
    module = WindowAttention(96, 3, rel_pos_bias=False)
    module.load_state_dict(golden().reference_state_dict(facts))
    x = stored["input"].requires_grad_()
    out = module(x.unflatten(1, (7, 7))).flatten(1, 2)
    (out * golden().seeded_normal("grad", out.shape, facts["seed"])).sum().backward()
    assert golden().relative_error(out, stored["output"]) <= facts["tolerance"]["outputs"]
    assert golden().relative_error(x.grad, stored["dinput"]) <= facts["tolerance"]["gradients"]


def test_padded_tokens_carry_the_bias_and_are_attended():
    module = WindowAttention(8, 2, window_size=3, rel_pos_bias=False)
    torch.nn.init.normal_(module.qkv.bias)
    x = torch.randn(1, 2, 4, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(padded)[:, :2, :4])
        alone = WindowAttention(8, 2, window_size=3, rel_pos_bias=False, clamp_window=True)
        alone.load_state_dict(module.state_dict())
        assert not torch.allclose(module(x), alone(x), atol=1e-3), "clamping leaves the padding out"


def test_clamping_follows_each_axis_and_drops_its_shift():
    module = WindowAttention(8, 2, window_size=(7, 5), shift=(3, 2), clamp_window=True)
    assert module.window_for(14, 10) == ((7, 5), (3, 2))
    assert module.window_for(7, 6) == ((7, 5), (0, 2))
    assert module.window_for(4, 5) == ((4, 5), (0, 0))
    fixed = WindowAttention(8, 2, window_size=7, shift=3)
    assert fixed.window_for(4, 4) == ((7, 7), (3, 3))


def test_a_clamped_window_reads_the_displacements_that_it_has():
    module = WindowAttention(8, 2, window_size=(4, 3))
    whole = module.relative_position_bias().unflatten(2, (4, 3)).unflatten(1, (4, 3))
    part = module.relative_position_bias((2, 3)).unflatten(2, (2, 3)).unflatten(1, (2, 3))
    torch.testing.assert_close(part, whole[:, :2, :, :2, :])
    table = module.relative_position_bias_table.unflatten(0, (7, 5))
    torch.testing.assert_close(whole[:, 3, 0, 1, 2], table[3 - 1 + 3, 0 - 2 + 2])  # query minus key


@pytest.mark.parametrize("shift", [0, 2, (1, 0)])
@pytest.mark.parametrize("size", [(8, 12), (5, 9)])
def test_recorded_weights_rebuild_the_output(shift, size):
    module = WindowAttention(12, 3, window_size=4, shift=shift)
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, *size, 12)
    with torch.no_grad():
        record = module.attention_weights(x)
        assert record.image == size and record.grid == (8, 12)
        rows, columns = (whole - part for whole, part in zip(record.grid, size, strict=True))
        padded = torch.nn.functional.pad(x, (0, 0, 0, columns, 0, rows))
        v = module.qkv(padded).unflatten(-1, (3, 3, 4))[..., 2, :, :].flatten(1, 2)
        weights = record.weights.flatten(1, 2)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights.transpose(2, 3)[:, record.keys < 0].any()
        out = torch.einsum("bnhk,bnkhd->bnhd", weights, v[:, record.keys.clamp_min(0)])
        out = module.proj(out.flatten(-2)).unflatten(1, record.grid)[:, : size[0], : size[1]]
        torch.testing.assert_close(out, module(x))


def test_macs_count_the_padding():
    module = WindowAttention(8, 2, window_size=4)
    assert module.attention_macs((3, 8, 8, 8)) == 2 * 3 * 64 * 8 * 16
    assert module.attention_macs((3, 5, 8, 8)) == module.attention_macs((3, 8, 8, 8))


def test_tables_are_resized_as_pictures():
    table = torch.randn(13 * 13, 3)
    assert resize_relative_position_bias(table, 7) is table
    larger = resize_relative_position_bias(table, (12, 7))
    expected = torch.nn.functional.interpolate(
        table.T.reshape(1, 3, 13, 13), size=(23, 13), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(larger, expected.flatten(2)[0].T)
    assert resize_relative_position_bias(larger.half(), 7, old=(12, 7)).dtype == torch.float16
    with pytest.raises(zoo.ConfigError, match="a table of 170 displacements"):
        resize_relative_position_bias(torch.zeros(170, 3), 12)


def test_wrong_arguments_are_named():
    with pytest.raises(zoo.ConfigError, match="dim 8 must be a multiple of num_heads 3"):
        WindowAttention(8, 3)
    with pytest.raises(zoo.ConfigError, match="shift must be from 0 to less than window_size 7, found 7"):
        WindowAttention(8, 2, shift=7)
