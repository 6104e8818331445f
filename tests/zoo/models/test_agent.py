"""Agent-DeiT, -PVT, -Swin and -CSwin: the published functions, counts and traps."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from goldens import cases, golden
from torch import nn

import zoo
from zoo.attention import AgentAttention, WindowAttention
from zoo.layers import count_macs

# Published parameters and multiply-adds (in millions, in billions), measured on the published code.
PUBLISHED = {
    "agent_deit_tiny": (6.016, 1.168),
    "agent_deit_small": (22.647, 4.427),
    "agent_deit_small_448": (23.070, 17.642),
    "agent_deit_base": (87.205, 17.527),
    "agent_pvt_tiny": (11.570, 1.986),
    "agent_pvt_small": (20.635, 3.955),
    "agent_pvt_medium": (35.922, 6.999),
    "agent_pvt_medium_256": (36.084, 9.142),
    "agent_pvt_large": (48.738, 10.339),
    "agent_swin_tiny": (28.903, 4.499),
    "agent_swin_small": (49.667, 8.701),
    "agent_swin_small_288": (49.708, 14.535),
    "agent_swin_base": (88.095, 15.400),
    "agent_swin_base_384": (88.305, 46.207),
    "agent_cswin_tiny": (20.459, 4.292),
    "agent_cswin_small": (32.814, 6.744),
    "agent_cswin_base": (73.250, 14.870),
    "agent_cswin_base_384": (73.328, 46.177),
}
# A body of every kind, small enough to run: their published rows with fewer blocks.
SMALL = {
    "agent_deit_tiny": {"depth": 3, "agent_depth": 2},
    "agent_pvt_tiny": {"stages": ("A",) * 4},
    "agent_swin_tiny": {"stages": ("A", "A", "AB", "BB")},
    "agent_cswin_tiny": {"stages": ("A", "A", "BB", "B")},
}
# The same in a few blocks of two stages, for what takes long in every block.
_TWO = {"num_heads": (2, 4), "agent_num": (9, 9), "mlp_ratios": (2.0, 2.0)}
MINI = {
    "agent_deit_tiny": {"depth": 2, "agent_depth": 1},
    "agent_pvt_tiny": {"dims": (32, 64), "stages": ("A", "A"), "sr_ratios": (1, 2), **_TWO},
    "agent_swin_tiny": {"dims": (32, 64), "stages": ("A", "BB"), **_TWO},
    "agent_cswin_tiny": {"dims": (32, 64), "stages": ("B", "A"), **_TWO},
}


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name, **arguments)


@cache
def published(name: str) -> nn.Module:
    """A published model on the meta device, to look at."""
    return on_meta(name)


def small(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(name, num_classes=10, **SMALL[name], **arguments).eval()


def part(feature: torch.Tensor, stored: str) -> torch.Tensor:
    """The slice that a case names, such as "[:, ::4, :, :]"."""
    steps = [piece.strip() for piece in stored.strip("[]").split(",")]
    return feature[tuple(slice(None, None, int(step.strip(":") or 1)) for step in steps)]


@pytest.mark.parametrize("case", [c for c in cases("agent") if not c.id.startswith("op_")])
def test_it_loads_the_published_keys_and_computes_the_published_function(case, tmp_path):
    facts, stored = golden().load_case(case)
    state = golden().reference_state_dict(facts)
    derived = {key: torch.zeros(49, 49) for key in facts["derived"]}
    torch.save({"model": state | derived, "epoch": 299}, tmp_path / "published.pth")
    model = zoo.create_model(facts["zoo_name"], checkpoint_path=tmp_path / "published.pth").eval()
    assert set(model.state_dict()) == set(state)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]

    image = golden().seeded_normal("input", facts["input_shape"], facts["seed"])
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        logits = model.forward_head(last)
        torch.testing.assert_close(model(image), logits)
    error, tolerance = golden().relative_error, facts["tolerance"]
    assert error(logits, stored["logits"]) <= tolerance["logits"]
    outputs = {"tokens": last, **{f"feat{i}": feature for i, feature in enumerate(features)}}
    inside = [name for name in stored if name in outputs]
    assert inside
    for name in inside:
        assert error(part(outputs[name], facts[name]), stored[name]) <= tolerance["feats"], name


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    params, macs = PUBLISHED[name]
    model = published(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == params
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(macs, rel=0.001)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_norm_has_the_published_epsilon(name):
    """The outputs cannot show it: PVT has 1e-6 in its blocks and 1e-5 in its patches."""
    norms = {n: m.eps for n, m in published(name).named_modules() if isinstance(m, nn.LayerNorm)}
    body = name.split("_")[1]
    for path, eps in norms.items():
        strict = body == "deit" or (body == "pvt" and not path.startswith("patch_embed"))
        assert eps == (1e-6 if strict else 1e-5), path
    assert (body == "pvt") == (not any(path == "norm" for path in norms)), "only PVT has no last norm"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("agent_swin_tiny", ["AA", "AA", "AAAAAA", "BB"]),
        ("agent_swin_small", ["AA", "AA", "B" * 18, "BB"]),
        ("agent_swin_base", ["AA", "AA", "AA" + "B" * 16, "BB"]),
        ("agent_swin_base_384", ["AA", "AA", "AA" + "B" * 16, "BB"]),
    ],
)
def test_swin_has_agents_and_windows_where_published(name, kinds):
    model = published(name)
    found = [
        "".join("A" if isinstance(block.attn, AgentAttention) else "B" for block in stage.blocks)
        for stage in model.stages_
    ]
    assert found == kinds
    window = {224: 7, 288: 9, 384: 12}[model.default_cfg["input_size"][-1]]
    for stage in model.stages_:
        for j, block in enumerate(stage.blocks):
            if isinstance(block.attn, WindowAttention):
                shift = window // 2 if j % 2 else 0  # by the block's place in its stage, whatever came before
                assert (block.attn.window_size, block.attn.shift) == ((window,) * 2, (shift,) * 2)


def test_agents_are_as_many_as_published():
    for name in PUBLISHED:
        model = published(name)
        if "deit" in name:
            counts = [b.attn.agent_num for b in model.blocks if isinstance(b.attn, AgentAttention)]
            assert counts == ([81] * 4 if name == "agent_deit_base" else [49] * 12)
            continue
        first = [getattr(s.blocks[0], "attn", None) or s.blocks[0].attns[0] for s in model.stages_]
        for attn, count in zip(first, (9, 16, 49, 49), strict=True):
            assert getattr(attn, "agent_num", count) == count


def test_cswin_has_one_branch_of_agents_then_two_of_stripes_then_one():
    for name, width in (("agent_cswin_tiny", 7), ("agent_cswin_base_384", 12)):
        branches = [stage.blocks[0].attns for stage in published(name).stages_]
        assert [len(b) for b in branches] == [1, 1, 2, 1]
        assert [hasattr(b[0], "an_bias") for b in branches] == [True, True, False, False]
        assert [(b.direction, b.width) for b in branches[2]] == [("down", width), ("across", width)]
        assert branches[3][0].direction is None
        assert branches[2][0].num_heads * 2 == branches[2][0].dim * 2 // 32 or "base" in name


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(256, 320), (97, 131)])
def test_any_image_size_runs_and_learns(name, size):
    model = small(name).train()
    logits = model(torch.randn(1, 3, *size))
    logits.square().sum().backward()
    assert logits.shape == (1, 10)
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not unused


@pytest.mark.parametrize("name", SMALL)
def test_checkpoints_of_another_size_are_interpolated(name, tmp_path):
    """224 into 448 and back; what follows from the geometry is dropped."""
    model = small(name)
    path = tmp_path / "at224.pth"
    derived = {"layers.3.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    derived["layers.3.blocks.1.attn.attn_mask"] = torch.zeros(1, 49, 49)
    torch.save({"state_dict_ema": model.state_dict() | derived}, path)
    larger = zoo.create_model(name, num_classes=10, **SMALL[name], input_size=448, checkpoint_path=path)
    for key, value in larger.state_dict().items():
        own = model.state_dict()[key]
        if own.shape == value.shape:
            assert torch.equal(own, value), key
            continue
        assert key.rpartition(".")[2].rstrip("1234") in {
            "ah_bias",
            "aw_bias",
            "ha_bias",
            "wa_bias",
            "pos_embed",
        }
        assert value.numel() > own.numel()
        torch.testing.assert_close(value.mean(), own.mean(), atol=2e-3, rtol=0)
    # The tables at run time are the tables at load time, but for position embeddings of PVT (bilinear).
    image = torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        one, other = model(image), larger.eval()(image)
    if name != "agent_pvt_tiny":
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_window_tables_of_another_size_are_interpolated(tmp_path):
    stages = ("A", "A", "A", "BB")
    model = zoo.create_model("agent_swin_tiny", stages=stages, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "at224.pth")
    arguments = {"stages": stages, "num_classes": 10, "input_size": 384, "window_size": 12}
    larger = zoo.create_model("agent_swin_tiny", checkpoint_path=tmp_path / "at224.pth", **arguments)
    key = "layers.3.blocks.0.attn.relative_position_bias_table"
    old, new = (m.state_dict()[key] for m in (model, larger))
    assert (old.shape, new.shape) == ((169, 24), (529, 24))
    maps = torch.nn.functional.interpolate(old.T.view(1, 24, 13, 13), size=(23, 23), mode="bicubic")
    torch.testing.assert_close(new, maps.view(24, 529).T)


@pytest.mark.parametrize("change", ["another", "damaged"])
def test_a_file_of_another_row_is_refused(change, tmp_path):
    model = small("agent_deit_tiny")
    state = model.state_dict()
    if change == "another":
        state = zoo.create_model("agent_deit_tiny", num_classes=10, **SMALL["agent_deit_tiny"], agent_num=9)
        state = state.state_dict()
    else:
        state["pos_embed"] = state["pos_embed"][:, :100]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(zoo.IntegrityError, match="an_bias" if change == "another" else "pos_embed"):
        zoo.load_checkpoint(model, tmp_path / "other.pth")


def test_other_agents_share_the_weights():
    """Dense prediction pools more agents with the weights of classification."""
    model = small("agent_swin_tiny")
    shapes = ((9, 9), (12, 12), (14, 14), (7, 7))
    dense = small("agent_swin_tiny", agent_shapes=shapes)
    dense.load_state_dict(model.state_dict())
    assert [dense.stages_[i].blocks[0].attn.agents for i in range(3)] == [81, 144, 196]
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad(), zoo.capture_attention(dense) as records:
        assert dense(image).isfinite().all()
    assert records["layers.0.blocks.0.attn"].weights.shape == (1, 24, 32, 3, 81)
    deit = small("agent_deit_tiny", agent_shape=(5, 9))
    with torch.no_grad(), zoo.capture_attention(deit) as records:
        deit(image)
    assert records["blocks.0.attn"].weights.shape == (1, 1 + 6 * 8, 3, 45)
    assert records["blocks.2.attn"].weights.shape == (1, 49, 3, 49), "a plain block, tokens to tokens"


def test_captured_stripes_say_which_tokens_every_head_sees():
    model = small("agent_cswin_tiny")
    with torch.no_grad(), zoo.capture_attention(model) as records:
        model(torch.randn(2, 3, 160, 224))
    record = records["stage3.0"]
    assert record.grid == (10, 14) and record.weights.shape[:4] == (2, 10, 14, 8)
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(2, 10, 14, 8))
    down, across = 10 * 7, 7 * 14
    assert record.keys.shape == (140, down + across)
    assert (record.weights[..., :4, down:] == 0).all() and (record.weights[..., 4:, :down] == 0).all()
    assert (record.weights.flatten(1, 2)[:, :, 0][:, record.keys < 0] == 0).all()
    assert records["stage1.0"].axes[-1] == "agent" and records["stage4.0"].weights.shape[-1] == 5 * 7


def test_deit_speaks_as_other_vision_transformers():
    model = small("agent_deit_tiny")
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(image)
        assert tokens.shape == (2, 197, 192)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
        model.reset_classifier(10, "avg")
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
        pairs = model.forward_intermediates(
            image, [0, 2], return_prefix_tokens=True, norm=True, intermediates_only=True
        )
        flat = model.forward_intermediates(image, 1, output_fmt="NLC", norm=True, intermediates_only=True)
    assert [(f.shape, c.shape) for f, c in pairs] == [((2, 192, 14, 14), (2, 1, 192))] * 2
    torch.testing.assert_close(pairs[1][0].flatten(2).transpose(1, 2), flat[0])
    torch.testing.assert_close(torch.cat([pairs[1][1], flat[0]], 1), tokens)
    assert model.num_prefix_tokens == 1 and model.no_weight_decay() == {"cls_token", "pos_embed"}
    with pytest.raises(ValueError, match="NCHW or NLC"):
        model.forward_intermediates(image, output_fmt="NHWC")
    with pytest.raises(zoo.ConfigError, match="global_pool must be token"):
        model.reset_classifier(10, "catavgmax")


@pytest.mark.parametrize("name", SMALL)
def test_pruned_bodies_keep_what_the_chosen_stages_need(name):
    model = small(name)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, whole = model.forward_intermediates(image)
        assert model.prune_intermediate_layers([1]) == [1]
        (feature,) = model.forward_intermediates(image, [1], intermediates_only=True)
    torch.testing.assert_close(feature, whole[1])
    assert len(model.stages_) == 2
    left = {key.partition(".")[0] for key in model.state_dict()}
    assert not left & {"block3", "pos_embed3", "patch_embed3", "stage3", "merge2", "head", "norm"}


@pytest.mark.parametrize("name", SMALL)
def test_low_precision_layouts_and_recomputation(name):
    model = small(name)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(image)
        last = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    assert (low.float() - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(last, exact, rtol=1e-4, atol=1e-4)
    grads = []
    for saving in (False, True):
        model.set_grad_checkpointing(saving)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "agent_deit_tiny",
        "agent_cswin_tiny",
        pytest.param("agent_pvt_tiny", marks=pytest.mark.slow),
        pytest.param("agent_swin_tiny", marks=pytest.mark.slow),  # agent_digits is one
    ],
)
def test_it_compiles_to_one_graph_and_exports(name):
    torch._dynamo.reset()
    model = zoo.create_model(name, num_classes=10, **MINI[name]).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), expected)
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model, (image,), dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(image[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(zoo.ConfigError, match="has 4 stages and agent_num="):
        on_meta("agent_swin_tiny", agent_num=(9, 9, 9))
    with pytest.raises(zoo.ConfigError, match="words of A and B"):
        on_meta("agent_swin_tiny", stages=("AA", "AA", "AC", "BB"))
    with pytest.raises(zoo.ConfigError, match="Agent-PVT has agents in every block"):
        on_meta("agent_pvt_tiny", stages=("AA", "AA", "AA", "BB"))
