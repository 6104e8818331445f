"""Attention in one form for all mechanisms: rows are distributions, walks equal dense products."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo import analysis
from zoo.analysis.capture import mechanism_of, run_with_attention, weights_with_gradient
from zoo.analysis.maps import _walk_back, on_image
from zoo.attention import GlobalAttention, NeighborhoodAttention, WindowAttention

SMALL_TIMM = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (2, 2), "window_size": 4},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (2, 2), "window_size": 4},
}


class Body(nn.Module):
    """Two attentions of one resolution around a residual, and a classifier of the mean."""

    def __init__(self, kind: type[nn.Module], **arguments: object) -> None:
        super().__init__()
        self.first, self.second = (kind(16, 2, **arguments) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean((1, 2)))


BODIES = {
    "neighborhood": lambda: Body(NeighborhoodAttention, kernel_size=3),
    "window": lambda: Body(WindowAttention, window_size=4, shift=2),
    "window-unshifted": lambda: Body(WindowAttention, window_size=4),
    "global": lambda: Body(GlobalAttention),
    "bilevel": lambda: Body(zoo.attention.BilevelRoutingAttention, n_win=4, topk=2),
    "agent": lambda: Body(zoo.attention.AgentAttention, agent_num=4),
    "deformable": lambda: Body(zoo.attention.DeformableAttention, offset_range_factor=2.0),
}


@pytest.fixture(scope="module")
def digits():
    return zoo.create_model("nat_digits", pretrained=True).eval()


@pytest.mark.parametrize("name", sorted(SMALL_TIMM))
def test_timm_weights_are_distributions_and_the_model_is_left_as_it_was(name):
    model = timm.create_model(name, **SMALL_TIMM[name]).train()
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])[..., : SMALL_TIMM[name]["img_size"], :]
    images = images[..., : SMALL_TIMM[name]["img_size"]]
    blocks = analysis.block_attention(model, images)
    assert model.training and fused == [getattr(module, "fused_attn", None) for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for block in blocks.values():
        rows = block.rows()
        assert rows.shape == (2, block.heads, block.tokens, block.tokens)
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5, rtol=0)
    assert analysis.gradient_relevance(model, images).min() >= 0


def test_swin_windows_lie_where_the_block_puts_them():
    """What a token does not attend to cannot change its output: a brute force over all tokens."""
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=48, depths=(2,), window_size=8).eval()
    (_, shifted) = analysis.block_attention(model, torch.randn(1, 3, 48, 48)).values()
    block = model.layers[0].blocks[1]
    x = torch.randn(1, 12, 12, 96, requires_grad=True)
    for row, column in [(0, 0), (3, 4), (11, 5)]:
        (gradient,) = torch.autograd.grad(block._attn(x)[0, row, column].square().sum(), x)
        seen = shifted.rows()[0, :, row * 12 + column].sum(0) > 1e-12
        assert torch.equal(gradient[0].abs().sum(-1).flatten() > 1e-12, seen)


@pytest.mark.parametrize("name", sorted(BODIES))
def test_a_query_is_moved_by_the_tokens_that_the_matrix_names(name):
    """Values only: replacing the values by one-hot tokens must give back the matrix, head by head."""
    model = BODIES[name]().eval()
    images = torch.randn(2, 16, 8, 8)
    for block in analysis.block_attention(model, images).values():
        assert block.mechanism == name.partition("-")[0] and block.grid == (8, 8)
        rows = block.rows()
        assert (rows >= 0).all()
        if name != "deformable":  # a point beyond the map gives part of its weight to nothing
            torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5, rtol=0)
        mass = torch.rand(2, 64)
        dense = torch.einsum("bq,bqt->bt", mass, rows.mean(1))
        torch.testing.assert_close(block.pull(mass), dense, atol=1e-5, rtol=1e-5)
        for fuse, fused in (("max", rows.amax(1)), ("min", rows.amin(1))):
            dense = torch.einsum("bq,bqt->bt", mass, fused)
            torch.testing.assert_close(block.pull(mass, fuse), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bilevel", "global", "neighborhood", "window", "window-unshifted"])
def test_weight_times_gradient_is_that_of_the_weights_own_graph(name):
    """Multiplying a weight by 1 + e moves the score by e * weight * gradient: summed over a query's keys this
    is the gradient of the query's output times the output itself, whatever the mechanism."""
    model = BODIES[name]().eval()
    images = torch.randn(1, 16, 8, 8)
    products = {}

    def keep(module, arguments, name):
        products[name] = arguments[0]
        arguments[0].retain_grad()

    for each in ("first", "second"):
        module = getattr(model, each)
        last = next(getattr(module, n) for n in ("proj", "proj_out", "wo") if hasattr(module, n))
        last.register_forward_pre_hook(lambda m, a, n=each: keep(m, a, n))
    if name in ("global", "bilevel"):  # what is added beside attention, at zero
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 16:
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    sums = []
    for sign in (1, -1):
        with weights_with_gradient(model) as blocks_of:
            score = sign * model(images)[:, 2]
            if sign == 1:
                score.sum().backward(retain_graph=True)
                kept = {key: (x * x.grad).sum() / 2 for key, x in products.items()}  # of two heads, the mean
            found = blocks_of(images, score)
            sums.append({key: block.pull(torch.ones(1, 64)).sum() for key, block in found.items()})
    for key, signed in kept.items():
        torch.testing.assert_close(sums[0][key] - sums[1][key], signed, atol=1e-6, rtol=1e-3)


def test_relevance_equals_the_published_rule_on_dense_matrices():
    """R = I, then R + (weights * gradient)+ R for every block, with autograd's own gradients."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    images = torch.randn(1, 3, 64, 64)
    kept = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, a, out: kept.append(out))
    score = model(images)[0, 7]
    gradients = torch.autograd.grad(score, kept)
    relevance = torch.eye(17)
    for weights, gradient in zip(kept, gradients, strict=True):
        relevance = relevance + (weights * gradient).clamp(min=0).mean(1)[0] @ relevance
    expected = (relevance - torch.eye(17))[0, 1:].view(4, 4).detach()
    torch.testing.assert_close(analysis.gradient_relevance(model, images, target=7)[0], expected)


@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_rollout_equals_the_published_product(fuse):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    images = torch.randn(2, 3, 64, 64)
    product = torch.eye(17).expand(2, -1, -1)
    for block in analysis.block_attention(model, images).values():
        rows = {"mean": block.rows().mean(1), "max": block.rows().amax(1), "min": block.rows().amin(1)}[fuse]
        rows = rows / rows.sum(-1, keepdim=True)
        product = (0.5 * rows + 0.5 * torch.eye(17)) @ product
    expected = product[:, 0, 1:].view(2, 4, 4)
    expected = expected / expected.sum((1, 2), keepdim=True)
    torch.testing.assert_close(analysis.attention_rollout(model, images, fuse=fuse), expected)


def test_mass_is_kept_between_stages(digits):
    blocks = list(analysis.block_attention(digits, torch.randn(1, 3, 32, 32)).values())
    mass = torch.rand(1, blocks[-1].tokens)
    back = _walk_back(blocks, mass, lambda block, mass: mass)
    assert back.shape == (1, 64)
    torch.testing.assert_close(back.sum(), mass.sum())


def test_uniform_attention_has_the_entropy_and_distance_of_the_uniform_distribution():
    block = analysis.TokenAttention("b", "global", torch.full((1, 2, 4, 4), 0.25), (2, 2))
    found = analysis.maps.statistics_of(block, (32, 32))
    torch.testing.assert_close(found.entropy, torch.full((2,), 4.0).log())
    torch.testing.assert_close(found.distance, torch.full((2,), (16 + 16 + 16 * 2**0.5) / 4))


def test_head_statistics_follow_the_neighborhood(digits):
    for each in analysis.head_statistics(digits, torch.randn(2, 3, 32, 32)):
        assert (each.entropy <= torch.log(torch.tensor(9.0)) + 1e-4).all() and (each.distance > 0).all()


def test_views_of_a_query_show_what_the_mechanism_shows():
    images = torch.randn(1, 16, 8, 8)
    seen = {}
    for name, build in BODIES.items():
        block = next(iter(analysis.block_attention(build().eval(), images).values()))
        view = analysis.query_view(block, (0.6, 0.3))
        assert view.query == (4, 2) and view.heat.shape == (2, 8, 8)
        torch.testing.assert_close(view.heat, analysis.attention_map(block, (0.6, 0.3)))
        assert not (view.heat.sum(0)[~view.cells] > 0).any()
        seen[name] = view
    assert seen["neighborhood"].cells.sum() == 9 and seen["window"].cells.sum() == 16
    assert seen["bilevel"].cells.sum() == 8 and seen["global"].cells.all()  # two regions of 2 x 2
    assert seen["agent"].agent_weights.shape == (2, 4) and seen["agent"].agent_maps.shape == (2, 4, 8, 8)
    points, weights = seen["deformable"].points, seen["deformable"].point_weights
    assert points.shape == (2, 64, 2) and weights.shape == (2, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_channel_attention_is_shown_between_channels_and_refused_between_tokens():
    model = Body(zoo.attention.ChannelAttention).eval()
    images = torch.randn(1, 16, 8, 8)
    blocks = analysis.block_attention(model, images)
    assert analysis.query_view(blocks["first"], (0.5, 0.5)).groups.shape == (2, 8, 8)
    for function in (analysis.attention_rollout, analysis.gradient_relevance):
        with pytest.raises(zoo.ConfigError, match="no block of this model attends between tokens"):
            function(model, images)
    assert analysis.head_statistics(model, images) == []


def test_the_receptive_field_of_convolutions_is_theirs():
    model = timm.create_model("resnet18").eval()
    field = analysis.effective_receptive_field(model, torch.randn(1, 3, 64, 64), stage=0)
    assert field.shape == (64, 64) and field.max() == 1
    rows = (field.sum(1) > 0).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 7  # the stem's kernel alone


@pytest.mark.parametrize("name", ["dat_digits", "nat_digits"])
def test_relevance_of_the_shipped_model_lies_on_the_digit(name):
    """More of it lies on the strokes than their share of the area, which chance would give."""
    from zoo.recipes.data.digits import Digits
    from zoo.recipes.data.transforms import eval_transform
    from zoo.recipes.run_folder import load_trained

    trained, data = load_trained(name), Digits(train=False)
    transform = eval_transform(trained.settings)
    images = torch.stack([transform(data.load(i)) for i in range(32)])
    relevance = on_image(analysis.gradient_relevance(trained.model, images), (32, 32))
    ink = on_image(torch.stack([torch.as_tensor(data.images[i]) for i in range(32)]) > 127, (32, 32)).bool()
    inside = (relevance * ink).sum((1, 2)) / relevance.sum((1, 2))
    assert inside.mean() > 1.2 * ink.float().mean()


@pytest.mark.parametrize("of", ["zoo", "timm"])
def test_relevance_is_the_same_for_a_compiled_model_and_under_inference_mode(digits, of):
    name, images = "vit_tiny_patch16_224", torch.randn(2, 3, 64, 64)
    model = digits if of == "zoo" else timm.create_model(name, **SMALL_TIMM[name]).eval()
    expected = analysis.gradient_relevance(model, images)
    assert torch.equal(analysis.gradient_relevance(torch.compile(model), images), expected)
    with torch.inference_mode():
        assert torch.equal(analysis.gradient_relevance(model, images.clone()), expected)


def test_what_cannot_be_answered_is_refused_in_one_line(digits):
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(zoo.ConfigError, match="ResNet has no attention known here; known are the zoo's own"):
        analysis.block_attention(timm.create_model("resnet18"), torch.randn(1, 3, 64, 64))
    with pytest.raises(zoo.ConfigError, match="images must be"):
        analysis.block_attention(digits, images[0])
    with pytest.raises(zoo.ConfigError, match="did you mean levels.0.blocks.0.attn"):
        analysis.choose_block(analysis.block_attention(digits, images), "levels.0.block.0.attn")
    for number in ("--1", "²"):
        with pytest.raises(zoo.ConfigError, match=f"no attention block '{number}' in this model"):
            analysis.choose_block(analysis.block_attention(digits, images), number)
    with pytest.raises(zoo.ConfigError, match=r"needs class scores \[B, classes\], found list"):
        analysis.gradient_relevance(zoo.create_model("nat_digits", features_only=True), images)
    with pytest.raises(zoo.ConfigError, match="target must be from 0 to 9"):
        analysis.gradient_relevance(digits, images, target=10)
    for target in (1.5, True, torch.tensor([1, 2, 3]), torch.tensor([[1], [2]])):
        with pytest.raises(zoo.ConfigError, match="number of a class or one for each of the 2 images, found"):
            analysis.gradient_relevance(digits, images.repeat(2, 1, 1, 1), target=target)
    with pytest.raises(zoo.ConfigError, match="stage must be a whole number from -3 to 2, found 3"):
        analysis.effective_receptive_field(digits, images, stage=3)
    with pytest.raises(zoo.ConfigError, match=r"from -3 to 2, found 0\.5"):
        analysis.effective_receptive_field(digits, images, stage=0.5)
    with pytest.raises(zoo.ConfigError, match="fuse must be"):
        analysis.attention_rollout(digits, images, fuse="sum")
    with pytest.raises(zoo.ConfigError, match="query must be two fractions"):
        analysis.query_view(next(iter(analysis.block_attention(digits, images).values())), (16, 16))


def test_a_wrong_record_is_found_out(monkeypatch):
    """Relevance compares weights times values with the output of the operation before it trusts them."""
    model = BODIES["neighborhood"]()
    true = NeighborhoodAttention.attention_weights

    def wrong(self, x):
        from dataclasses import replace

        record = true(self, x)
        return replace(record, weights=record.weights.flip(-1))

    monkeypatch.setattr(NeighborhoodAttention, "attention_weights", wrong)
    with pytest.raises(zoo.ConfigError, match="do not give its output"):
        analysis.gradient_relevance(model, torch.randn(1, 16, 8, 8))


def test_operations_are_themselves_again_afterwards(digits):
    from zoo import ops

    before = ops.neighborhood_attention
    analysis.gradient_relevance(digits, torch.randn(1, 3, 32, 32))
    with pytest.raises(zoo.ConfigError):
        analysis.gradient_relevance(digits, torch.randn(1, 3, 32, 32), target=99)
    assert ops.neighborhood_attention is before
    output, _ = run_with_attention(digits, torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(output, digits(torch.zeros(1, 3, 32, 32)))


def test_families_name_their_subclasses_as_they_like():
    class LocalAttention(WindowAttention):
        pass

    assert mechanism_of(LocalAttention(16, 2)) == "window"


@pytest.mark.parametrize("name", zoo.list_models("*_digits", task="classification", pretrained=True))
def test_every_shipped_model_can_be_looked_at(name):
    """Maps, views and statistics of each, rollout and relevance."""
    model = zoo.create_model(name, pretrained=True).eval()
    images = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    blocks = analysis.block_attention(model, images)
    assert blocks and all(analysis.query_view(block, (0.4, 0.7)).query for block in blocks.values())
    assert analysis.head_statistics(model, images)
    for function in (analysis.attention_rollout, analysis.gradient_relevance):
        found = function(model, images)
        assert found.isfinite().all() and found.min() >= 0 and found.max() > 0


@pytest.mark.parametrize("name", zoo.list_models("*_digits", task="classification", pretrained=True))
def test_a_model_in_float64_attends_as_in_float32(name):
    model = zoo.create_model(name, pretrained=True).eval()
    images = torch.randn(1, 3, *model.default_cfg["input_size"][1:])
    for function in (analysis.attention_rollout, analysis.gradient_relevance):
        single, double = function(model.float(), images), function(model.double(), images.double())
        torch.testing.assert_close(double, single, rtol=1e-3, atol=1e-5)
