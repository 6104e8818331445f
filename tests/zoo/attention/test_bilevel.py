"""Bi-level routing and global attention as modules: the published functions in both forms, padding, options."""

from __future__ import annotations

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo import ops
from zoo.attention import BilevelRoutingAttention, GlobalAttention, RaggedRoutingAttention
from zoo.models.biformer import BiFormer, BiFormerConfig

# How the published constructors' arguments are called here, and those that always have one value.
RENAMED = {"kv_per_win": "kv_per_win", "topk": "topk", "n_win": "n_win", "qk_dim": "qk_dim"}


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
