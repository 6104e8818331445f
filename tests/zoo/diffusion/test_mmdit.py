"""MMDiT: text, image and conditions in two streams; cached and recomputed conditions are the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from tiny_diffusion import finish, masked_sdpa, noise, train_lora
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import ConfigError, ops
from zoo.diffusion import ConditionCache, KeywordState, MMDiTModel, TokenLayout, keyword_routing
from zoo.models.mmdit import MMDiT


def tiny(**changes: object) -> MMDiTModel:
    torch.manual_seed(0)
    arguments = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "in_channels": 4, "text_dim": 6, "pooled_dim": 5
    }  # fmt: skip
    return finish(MMDiTModel(**{**arguments, **changes}))


def inputs(grid: tuple[int, int] = (3, 4), *, batch: int = 2, time: float = 900.0) -> tuple[Tensor, ...]:
    rows, columns = grid
    latents = noise(batch, 4, 2 * rows, 2 * columns, seed=int(time))
    return latents, torch.full((batch,), time), noise(batch, 5, 6), noise(batch, 5, seed=1)


def conditions(spatial: int = 1, subjects: int = 1, batch: int = 2) -> dict[str, list[Tensor]]:
    return {
        "spatial": [noise(batch, 4, 6, 8, seed=2 + i) for i in range(spatial)],
        "subjects": [noise(batch, 4, 4, 6, seed=50 + i) for i in range(subjects)],
    }


@torch.no_grad()
def run(model: torch.nn.Module, *args: Tensor, **kwargs: object) -> Tensor:
    return model(*args, **kwargs).sample


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (1, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("attention", ["global", "neighborhood"])
def test_any_size_and_gradients_reach_all_that_is_used(attention, grid):
    model = tiny(attention=attention)
    out = model(*inputs(grid)).sample
    assert out.shape == inputs(grid)[0].shape and out.isfinite().all()
    out.square().mean().backward()
    # The text of the last block is read by nobody.
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith("blocks.1.text.") for name in unused)


def test_neighborhoods_are_dense_attention_under_their_mask():
    mask = torch.ones(5 + 30, 5 + 30, dtype=torch.bool)
    mask[5:, 5:] = False
    for query, keys in enumerate(ops.neighborhood_indices((5, 6), 3)):
        mask[5 + query, 5 + keys] = True
    with masked_sdpa(lambda queries, keys: mask):
        wanted = run(tiny(), *inputs((5, 6)))
    found = run(tiny(attention="neighborhood", attention_kwargs={"kernel_size": 3}), *inputs((5, 6)))
    assert (found - wanted).abs().max() <= 1e-5


def test_a_new_model_predicts_zero():
    model = MMDiT(depth=1, hidden_size=16, num_heads=2, in_channels=4, text_dim=6, pooled_dim=5)
    assert not model(*inputs()).any()


@pytest.mark.parametrize("combine", ["joint", "sum"])
def test_cached_conditions_are_recomputed_ones_and_cost_nothing_more(combine):
    model, given = tiny(), {**conditions(2, 2), "combine": combine, "paa_radius": 1}
    cache, costs = ConditionCache(), []
    for time in (900.0, 700.0, 300.0):
        fresh = run(model, *inputs(time=time), **given)
        with FlopCounterMode(display=False) as counter:
            cached = run(model, *inputs(time=time), **given, cache=cache)
        assert torch.equal(cached, fresh)
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] > costs[2]
    # Other conditions in the same generation would be a mistake that the first two steps notice.
    cache.reset()
    run(model, *inputs(), **given, cache=cache)
    given["subjects"] = [x + 1 for x in given["subjects"]]
    with pytest.raises(ConfigError, match="must not depend on time"):
        run(model, *inputs(), **given, cache=cache)


def test_conditions_are_seen_and_their_order_does_not_matter():
    model, given = tiny(), conditions(2, 0)
    out = run(model, *inputs(), **given)
    assert (out - run(model, *inputs())).abs().max() > 1e-4
    swapped = run(model, *inputs(), spatial=given["spatial"][::-1])
    torch.testing.assert_close(swapped, out, atol=1e-5, rtol=1e-4)


def test_keywords_route_from_the_step_before():
    model, given = tiny(depth=1), conditions(0, 1)
    state = KeywordState([[2]], epsilon=0.6)
    first = run(model, *inputs(time=900.0), **given, keywords=state)
    assert torch.equal(first, run(model, *inputs(time=900.0), **given))  # the whole image sees the subject
    (mask,) = state.routed(0)
    assert mask.shape == (2, 12) and 0 < mask.sum() < 24
    second = run(model, *inputs(time=500.0), **given, keywords=state)
    assert (second - run(model, *inputs(time=500.0), **given)).abs().max() > 1e-6
    state.reset()
    assert state.routed(0) == [None]
    everything = KeywordState([[2]], epsilon=0)
    for time in (900.0, 500.0):
        out = run(model, *inputs(time=time), **given, keywords=everything)
    torch.testing.assert_close(out, run(model, *inputs(time=500.0), **given))
    assert keyword_routing(torch.randn(1, 3, 2, 4), torch.randn(1, 4, 2, 4), [0])[1].shape == (1, 3)


def test_in_training_keywords_route_by_the_same_forward():
    model, given, state = tiny(depth=1), conditions(0, 1), KeywordState([[2]], epsilon=0.6)
    for _ in range(2):  # the second time by the masks of the first, at the same time
        wanted = run(model, *inputs(time=500.0), **given, keywords=state)
    fresh = KeywordState([[2]], epsilon=0.6)
    model.train().enable_gradient_checkpointing()
    for time in (100.0, 900.0, 500.0):
        found = model(*inputs(time=time), **given, keywords=fresh).sample
        found.sum().backward()
    torch.testing.assert_close(found.detach(), wanted)
    assert fresh.routed(0) == [None]


def test_the_cost_grows_linearly_with_the_conditions():
    model, costs = tiny(), []
    for number in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            run(model, *inputs(), **conditions(number, number))
        costs.append(counter.get_total_flops())
    steps = {b - a for a, b in pairwise(costs)}
    assert len(steps) == 1


def test_it_saves_reloads_and_checkpoints(tmp_path):
    model, given = tiny(), conditions()
    model.save_pretrained(tmp_path)
    loaded = MMDiTModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, *inputs(), **given), run(model, *inputs(), **given))

    def gradient() -> Tensor:
        model.zero_grad()
        state = KeywordState([[2]], epsilon=0.6)
        for time in (900.0, 500.0):
            model(*inputs(time=time), **given, keywords=state).sample.sum().backward()
        return model.blocks[0].image.qkv.weight.grad.clone()

    plain = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


def test_lora_for_conditions_trains_and_is_cached_as_recomputed(tmp_path):
    pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    model, other, given = tiny(), tiny(), conditions()
    plain = run(other, *inputs(), **given)
    train_lora(model, ["qkv", "proj"], lambda: model(*inputs(), **given).sample)
    wanted, cache = run(model, *inputs(), **given), ConditionCache()
    assert (wanted - plain).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    for time in (900.0, 700.0, 300.0):
        cached = run(other, *inputs(time=time), **given, cache=cache)
        torch.testing.assert_close(cached, run(model, *inputs(time=time), **given))
    other.unload_lora()
    torch.testing.assert_close(run(other, *inputs(), **given), plain)


@pytest.mark.parametrize("kind", ["global", "neighborhood", "conditions"])
def test_captured_weights_give_the_output_of_the_image(kind):
    given = {**conditions(), "paa_radius": 1} if kind == "conditions" else {}
    window = {"attention": "neighborhood", "attention_kwargs": {"kernel_size": 2}}
    model, seen = tiny(**(window if kind == "neighborhood" else {})), {}
    model.blocks[1].set_processor(
        lambda attn, *args: seen.setdefault("out", attn(*seen.setdefault("args", args)))
    )
    with zoo.capture_attention(model) as records:
        run(model, *inputs(), **given)
    record, value = records["blocks.1.attn"], seen["args"][2]
    assert record.weights.shape == (2, 3, 4, 2, value.shape[1])
    assert ((record.weights == 0).any()) == (kind != "global")
    assert record.keys[0, :18].tolist() == [-1] * 5 + list(range(12)) + [-1] * (len(record.keys[0]) > 17)
    out = torch.einsum("bnhm,bmhd->bnhd", record.weights.flatten(1, 2), value)
    torch.testing.assert_close(out, seen["out"][:, 5:], atol=1e-5, rtol=1e-4)
    if kind == "conditions":
        with pytest.raises(ConfigError, match='combine="sum" has no common weights'):
            with zoo.capture_attention(model):
                run(model, *inputs(), **given, combine="sum")


@pytest.mark.slow
def test_it_compiles():
    model = tiny()
    wanted = run(model, *inputs())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, *inputs()), wanted)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny(attention="neighbourhood"), "did you mean neighborhood"),
        (lambda: tiny(attention="neighborhood", attention_kwargs={"kernel_sise": 3}), "mean kernel_size"),
        (lambda: tiny(attention="neighborhood", attention_kwargs={"kernel_size": [3] * 3}), "or 2 of them"),
        (lambda: tiny(attention_kwargs={"kernel_size": 3}), "'kernel_size' in attention_kwargs of 'global'"),
        (lambda: tiny(hidden_size=20), "2 heads a width that 4 divides, found 20"),
        (lambda: run(tiny(), *inputs(), spatial=[noise(2, 4, 4, 6)]), r"\(3, 4\), found \(2, 3\)"),
    ],
    ids=["attention", "argument", "axes", "global", "width", "grid"],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_layout_counts_conditions():
    layout = tiny().layout_of(TokenLayout(5, (3, 4)), **conditions(2, 1))
    assert layout == TokenLayout(5, (3, 4), 2, (6,))
