"""Bi-level routing and global attention as modules: the published functions, both forms, padding, options."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo import ops
from zoo.attention import BilevelRoutingAttention, GlobalAttention, RaggedRoutingAttention
from zoo.models.biformer import BiFormer, BiFormerConfig


def module_of(facts: dict) -> nn.Module:
    """The zoo's module for a case of the published operations."""
    given = dict(facts["constructor"]["kwargs"])
    given.pop("auto_pad", None)
    dim = given.pop("dim")
    if facts["zoo_name"] == "biformer_block":
        cfg = BiFormerConfig(
            dims=(dim,), depths=(1,), num_heads=(given["num_heads"],), n_win=given["n_win"],
            topks=(given["topk"],), mlp_ratio=given["mlp_ratio"],
        )  # fmt: skip
        return BiFormer(cfg).stages[0][0]
    if facts["zoo_name"] == "attention_lepe":
        return GlobalAttention(dim, 8, lepe_of="input", qkv_bias=False)
    ragged = facts["zoo_name"].endswith("_nchw")
    kind = RaggedRoutingAttention if ragged else BilevelRoutingAttention
    return kind(dim, given.pop("num_heads"), **given)


OPERATIONS = [case for case in cases("biformer") if "224" not in str(case.id)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", OPERATIONS)
def test_it_computes_the_published_function_and_gradient(case, backend):
    facts, stored = golden().load_case(case)
    module = module_of(facts).eval()
    module.load_state_dict(golden().reference_state_dict(facts))
    channels_first = facts["zoo_name"] in ("biformer_block", "bilevel_routing_attention_nchw")
    x = golden().seeded_normal("input", facts["input_shape"], facts["seed"]).requires_grad_()
    with ops.use_backend(backend):
        out = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_first else module(x)
        (out * golden().seeded_normal("grad", out.shape, facts["seed"])).sum().backward()
    error = golden().relative_error
    assert error(out, stored["out"]) <= facts["tolerance"]["outputs"]
    assert error(x.grad, stored["dinput"]) <= facts["tolerance"]["gradients"]


@pytest.mark.parametrize("case", [case for case in OPERATIONS if "bra" in str(case.id)])
def test_it_chooses_the_published_regions(case):
    facts, stored = golden().load_case(case)
    module = module_of(facts).eval()
    module.load_state_dict(golden().reference_state_dict(facts))
    x = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    if facts["zoo_name"] in ("biformer_block", "bilevel_routing_attention_nchw"):
        x = x.permute(0, 2, 3, 1)
    if facts["zoo_name"] == "biformer_block":
        x, module = module.norm1(x + module.pos_embed(x)), module.attn
    q, k, _, regions, counted = module._project(x)
    routes, _ = module._route(q, k, regions, counted)
    assert torch.equal(routes.flatten(0, 1).sort()[0], stored["r_idx"].long())


def test_both_forms_agree_where_the_regions_divide_the_map():
    one, other = (
        BilevelRoutingAttention(16, 2, n_win=4, topk=3),
        RaggedRoutingAttention(16, 2, n_win=4, topk=3),
    )
    other.load_state_dict(
        {
            key.replace("qkv.qkv", "qkv_linear").replace("wo.", "output_linear."): value[..., None, None]
            if key in ("qkv.qkv.weight", "wo.weight")
            else value
            for key, value in one.state_dict().items()
        }
    )
    x = torch.randn(2, 8, 12, 16)
    torch.testing.assert_close(one(x), other(x))
    ragged = torch.randn(2, 9, 11, 16)
    assert one.regions_for(9, 11) == ((4, 4), (12, 12))
    assert other.regions_for(9, 11) == ((5, 6), (10, 12))
    assert (one(ragged) - other(ragged)).norm() > 0.01 * one(ragged).norm()


@pytest.mark.parametrize("kind", [BilevelRoutingAttention, RaggedRoutingAttention, GlobalAttention])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (7, 7), (13, 20)])
def test_any_map_runs_with_defaults_alone(kind, rows, columns):
    module = kind(16, 2)
    x = torch.randn(2, rows, columns, 16, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in module.parameters())
    assert module(x[:0]).shape == (0, rows, columns, 16)


@pytest.mark.parametrize("kind", [BilevelRoutingAttention, RaggedRoutingAttention])
def test_captured_weights_rebuild_the_output(kind):
    module = kind(16, 2, n_win=3, topk=4, side_dwconv=0).double()
    x = torch.randn(2, 7, 8, 16, dtype=torch.float64)
    record = module.attention_weights(x)
    q, k, v, regions, counted = module._project(x)
    rebuilt = torch.stack(
        [
            torch.einsum("nhk,nkhd->nhd", weights.flatten(0, 1).double(), values.flatten(0, 1)[keys])
            for weights, values, keys in zip(record.weights, v, record.keys, strict=True)
        ]
    )
    out = rebuilt.view(v.shape).flatten(-2)[:, :7, :8]
    torch.testing.assert_close(module._projections[1](out), module(x), rtol=1e-5, atol=1e-6)
    assert record.image == (7, 8) and record.grid == module.regions_for(7, 8)[1]


def test_captured_global_weights_rebuild_the_output():
    module = GlobalAttention(16, 2, lepe_of=None)
    x = torch.randn(2, 5, 6, 16)
    record = module.attention_weights(x)
    v = module._project(x)[2]
    out = torch.einsum("byxhk,bkhd->byxhd", record.weights, v).flatten(-2)
    torch.testing.assert_close(module.proj(out), module(x))


@pytest.mark.parametrize("mode", ["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"])
def test_keys_are_pooled_inside_their_regions(mode):
    module = BilevelRoutingAttention(8, 2, n_win=2, topk=2, kv_downsample_mode=mode, kv_per_win=2,
                                     kv_downsample_ratio=2)  # fmt: skip
    x = torch.randn(1, 8, 8, 8)
    pooled = module._pool(x.unflatten(-1, (2, 4)), (2, 2)).flatten(3)
    pool = torch.nn.functional.avg_pool2d if "avg" in mode else torch.nn.functional.max_pool2d
    torch.testing.assert_close(pooled, pool(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    record = module.attention_weights(x)
    assert record.keys is None and record.weights.shape[-1] == 2 * 4
    assert module.attention_macs(x.shape) == 4 * 4 * 8 + 64 * 8 * 16


def test_routing_learns_only_where_it_is_asked_to():
    x = torch.randn(2, 8, 8, 8)
    learned = BilevelRoutingAttention(8, 2, n_win=2, topk=2, soft_routing=True, param_routing=True)
    learned(x).square().sum().backward()
    assert learned.router["emb"].weight.grad.abs().sum() > 0
    hard, soft, free = (
        BilevelRoutingAttention(8, 2, n_win=2, topk=2, soft_routing=s, diff_routing=d)
        for s, d in ((False, False), (True, False), (True, True))
    )
    grads = []
    for module in (soft, free):
        module.load_state_dict(hard.state_dict())
        module(x).square().sum().backward()
        grads.append(module.qkv["qkv"].weight.grad)
    assert not torch.allclose(*grads), "without diff_routing the means are detached"
    assert not torch.allclose(hard(x), soft(x))


def test_queries_and_keys_may_have_a_width_of_their_own():
    module = BilevelRoutingAttention(16, 2, qk_dim=8, n_win=2, topk=1)
    assert module.scale == 8**-0.5 and module.qkv["qkv"].out_features == 32
    x = torch.randn(1, 6, 6, 16)
    with ops.use_backend("reference"):
        expected = module(x)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "dim 16 and qk_dim 16 must be multiples of num_heads 3"),
        ({"topk": 0}, "topk must be a whole number from 1, found 0"),
        ({"param_routing": True}, "need soft_routing"),
        ({"kv_downsample_mode": "fracpool"}, "one of identity, .* found 'fracpool'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        BilevelRoutingAttention(**{"dim": 16, "num_heads": 2} | arguments)
    with pytest.raises(zoo.ConfigError, match="lepe_of must be"):
        GlobalAttention(16, 2, lepe_of="x")


def test_low_precision_agrees_under_the_same_routes(monkeypatch):
    module = BilevelRoutingAttention(32, 2, n_win=4, topk=4)
    x = torch.randn(2, 16, 16, 32)
    q, k, _, regions, counted = module._project(x)
    routes = module._route(q, k, regions, counted)
    monkeypatch.setattr(module, "_route", lambda *arguments: routes)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    assert (low.float() - exact).norm() < 0.02 * exact.norm()
