"""Deformable attention as a module: the published function in both versions, and what tells them apart."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import DeformableAttention


def still(**arguments) -> DeformableAttention:
    """A module of 8 channels whose network predicts no shift at all."""
    module = DeformableAttention(8, 2, **arguments)
    nn.init.zeros_(module.conv_offset[3].weight)
    return module


def positions_of(module: DeformableAttention, rows: int, columns: int) -> torch.Tensor:
    with torch.no_grad():
        return module.attention_weights(torch.randn(1, rows, columns, module.dim)).positions


def published(facts: dict) -> DeformableAttention:
    """The module of a stored case, from what its published constructor was called with."""
    call = facts["constructor"]
    version = 1 if "v1" in facts["case"] else 2
    kinds = {"dwc_pe=True": "dwc", "fixed_pe=True": "fixed", "log_cpb=True": "log_cpb"}
    return DeformableAttention(
        64,
        4,
        version=version,
        groups=2,
        stride=1 if version == 1 else 2,
        kernel_size=5,
        offset_range_factor=2.0 if "offset_range_factor=2" in call else -1.0,
        position_bias=next((kind for text, kind in kinds.items() if text in call), "table"),
        map_size=(14, 14),
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [c for c in cases("dat") if c.id == "absent" or "op_deform" in c.id])
def test_stored_outputs_positions_and_gradients(case, backend):
    facts, stored = golden().load_case(case)
    module = published(facts)
    module.load_state_dict(golden().reference_state_dict(facts))
    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"]).requires_grad_()
    with zoo.ops.use_backend(backend):
        out = module(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        (out * golden().seeded_normal("grad", out.shape, facts["seed"])).sum().backward()
    error, tolerance = golden().relative_error, facts["tolerance"]
    assert error(out, stored["output"]) <= tolerance["outputs"]
    assert error(image.grad, stored["dinput"]) <= tolerance["gradients"]
    positions = module.attention_weights(image.permute(0, 2, 3, 1)).positions
    assert error(positions, stored["pos"].flatten(2, 3)) <= tolerance["outputs"]


def test_reference_points_are_the_published_ones():
    """Neither version samples at the centres of its cells; trained weights rely on it."""
    first = still(version=1, stride=1, offset_range_factor=2.0)
    rows = (positions_of(first, 14, 14)[0, 0, ::14, 0] + 1) / 2 * 13
    torch.testing.assert_close(rows[:2], torch.tensor([0.4643, 1.3929]), rtol=0, atol=1e-4)
    assert rows[-1].item() == pytest.approx(12.5357, abs=1e-4)
    second = still(version=2, stride=8, kernel_size=9)
    rows = (positions_of(second, 56, 56)[0, 0, ::7, 0] + 1) / 2 * 55
    wanted = [4.58, 13.75, 22.92, 32.08, 41.25, 50.42, 55.0]
    torch.testing.assert_close(rows, torch.tensor(wanted), rtol=0, atol=5e-3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("factor", [-1.0, 0.0, 2.0])
def test_shifts_are_scaled_and_bounded_as_published(version, factor):
    module = DeformableAttention(8, 2, version=version, offset_range_factor=factor, kernel_size=3)
    with torch.no_grad():
        module.conv_offset[3].weight.mul_(100)  # shifts far beyond the map
    x = torch.randn(1, 5, 5, 8)
    shift = module.conv_offset(module.proj_q(x))
    cells = 5 if version == 1 else 4
    point = (2 * torch.arange(5) + 1) / cells - 1
    point = torch.stack(torch.meshgrid(point, point, indexing="ij"), -1)
    if factor < 0:
        wanted = (point + shift).tanh() if version == 1 else (point + shift).clamp(-1, 1)
    elif factor == 0 and version == 1:
        wanted = point + shift
    else:
        wanted = point + shift.tanh() * factor / cells
    torch.testing.assert_close(module.attention_weights(x).positions[0, 0], wanted.flatten(1, 2)[0])


def test_the_two_versions_share_every_name_and_differ_in_the_result():
    """This is the trap: a file of one fits the other."""
    torch.manual_seed(0)
    first, second = (DeformableAttention(16, 4, version=version).eval() for version in (1, 2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 7, 7, 16)
    with torch.no_grad():
        assert (first(x) - second(x)).norm() > 1e-3 * first(x).norm()


def test_no_gradient_comes_through_a_clamped_position_nor_to_the_points():
    module = still(version=2, kernel_size=3, position_bias=None)
    with torch.no_grad():
        module.conv_offset[3].weight.fill_(50.0)
        module.conv_offset[1].norm.bias.fill_(5.0)  # every shift is far to the bottom right
    x = torch.randn(1, 6, 6, 8)
    assert (module.attention_weights(x).positions == 1).all()
    module(x).sum().backward()
    assert module.conv_offset[3].weight.grad.abs().max() == 0


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_positions_stay_in_float32(how):
    """A position in bfloat16 is wrong by a third of a token on a map of 56."""
    module = DeformableAttention(16, 4, stride=4, kernel_size=5).eval()
    x = torch.randn(1, 56, 56, 16)
    with torch.no_grad():
        exact = module.attention_weights(x).positions
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = module.attention_weights(x).positions
        else:
            low = module.bfloat16().attention_weights(x.bfloat16()).positions
            assert module(x.bfloat16()).dtype == torch.bfloat16
    assert low.dtype == torch.float32
    # What is left is the network's own rounding: positions between those of bfloat16 do occur.
    assert (low != low.bfloat16()).float().mean() > 0.5
    torch.testing.assert_close(low, exact, rtol=0, atol=0.02)


def test_without_offsets_keys_are_averages():
    module = DeformableAttention(8, 2, stride=2, offsets=False, position_bias=None).eval()
    x = torch.randn(2, 6, 9, 8)
    pooled = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    q, k, v = (
        y.unflatten(-1, (2, 4)).transpose(1, 2)
        for y in (module.proj_q(x).flatten(1, 2), module.proj_k(pooled), module.proj_v(pooled))
    )
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(module(x), module.proj_out(out).unflatten(1, (6, 9)))
    assert module.key_count(6, 9) == pooled.shape[1] == 12
    assert not any(name.startswith(("conv_offset", "rpe_table")) for name, _ in module.named_parameters())


@pytest.mark.parametrize("arguments", [{"position_bias": "dwc"}, {"offsets": False, "position_bias": "dwc"}])
def test_a_depthwise_bias_is_added_to_the_output(arguments):
    module = DeformableAttention(8, 2, **arguments).eval()
    plain = DeformableAttention(8, 2, **arguments | {"position_bias": None}).eval()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("rpe_table")})
    x = torch.randn(1, 5, 6, 8)
    q = plain.proj_q(x).permute(0, 3, 1, 2)
    weight, bias = module.rpe_table.weight, module.rpe_table.bias
    more = nn.functional.conv2d(q, weight, bias, padding=1, groups=8).permute(0, 2, 3, 1)
    more = nn.functional.linear(more, module.proj_out.weight.flatten(1))
    torch.testing.assert_close(module(x), plain(x) + more)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("position_bias", ["table", "log_cpb", "dwc", None])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (7, 3), (8, 8)])
def test_any_map_gives_finite_outputs_and_gradients(size, position_bias, version):
    module = DeformableAttention(12, 3, version=version, stride=2, kernel_size=3, position_bias=position_bias)
    x = torch.randn(2, *size, 12, requires_grad=True)
    out = module(x)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert all(each.grad.isfinite().all() for each in (x, *module.parameters()))


@pytest.mark.parametrize("position_bias", ["table", "log_cpb", None])
def test_the_weights_rebuild_the_output(position_bias):
    module = DeformableAttention(16, 4, stride=2, position_bias=position_bias).eval()
    x = torch.randn(2, 6, 7, 16)
    with torch.no_grad():
        record = module.attention_weights(x)
        tokens = zoo.ops.deformable_sample(x, record.positions)
        v = module.proj_v(tokens).unflatten(-1, (4, 4))
        out = torch.einsum("byxhk,bkhd->byxhd", record.weights, v).flatten(-2)
        torch.testing.assert_close(module.proj_out(out), module(x))
    assert record.weights.shape == (2, 6, 7, 4, module.key_count(6, 7))
    assert record.axes == ("batch", "row", "column", "head", "key") and record.grid == (6, 7)


@pytest.mark.parametrize("arguments", [{}, {"stride": 2, "kernel_size": 2}, {"stride": 3, "offsets": False}])
def test_it_counts_the_keys_that_it_samples(arguments):
    arguments |= {"position_bias": None}
    for version in (1, 2):
        module = DeformableAttention(8, 2, version=version, **arguments)
        x = torch.randn(1, 8, 7, 8)
        assert module.attention_weights(x).weights.shape[-1] == module.key_count(8, 7)
        assert module.attention_macs(x.shape) == 2 * 56 * 8 * module.key_count(8, 7)


def test_it_is_initialised_as_published():
    """The convolutions as in torch, the shifts not at zero; the table with 0.01."""
    module = DeformableAttention(64, 2, groups=1, map_size=(56, 56), stride=8, kernel_size=9)
    assert module.rpe_table.shape == (2, 111, 111)
    assert module.rpe_table.std().item() == pytest.approx(0.01, rel=0.05)
    assert module.conv_offset[3].weight.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.2)
    assert module.conv_offset[3].bias is None
    assert module.conv_offset[1].norm.eps == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10}, "dim 10 must be a multiple of num_heads 4"),
        ({"groups": 3}, "groups must divide the 4 heads, found 3"),
        ({"version": "plus"}, "version must be 1 .DAT. or 2 .*found .plus."),
        ({"position_bias": "rpe"}, "position_bias must be one of .*found 'rpe'"),
        ({"position_bias": "fixed"}, "'fixed' needs the map_size"),
        ({"offsets": False}, "without offsets there is no displacement for position_bias 'table'"),
    ],
)
def test_what_cannot_be_built_is_told(arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        DeformableAttention(**{"dim": 8, "num_heads": 4} | arguments)


def test_a_fixed_bias_knows_one_map():
    module = DeformableAttention(8, 2, position_bias="fixed", map_size=(4, 5), stride=2)
    assert module(torch.randn(1, 4, 5, 8)).shape == (1, 4, 5, 8)
    with pytest.raises(zoo.ConfigError, match=r"made for a map of \(4, 5\), found \(5, 4\)"):
        module(torch.randn(1, 5, 4, 8))
