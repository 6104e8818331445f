"""Position-aligned and keyword-scoped attention: the definition, its cost, and Flux with conditions."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from goldens import cases, golden
from tiny_diffusion import FLUX, build_flux, masked_sdpa, noise, train_lora
from tiny_diffusion import conditioned_inputs as conditioned
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from zoo import ConfigError, diffusion
from zoo.diffusion import TokenLayout, keyword_routing, pka_attention, relation_mask, relation_pairs

LAYOUT = TokenLayout(text=5, grid=(3, 4), spatial=2, subjects=(4, 3))


def tensors(layout: TokenLayout, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(batch, layout.tokens, 2, 6, dtype=dtype).requires_grad_() for _ in range(3)]


def masks(layout: TokenLayout, batch: int = 2, share: float = 0.5) -> list[Tensor]:
    return [torch.rand(batch, layout.image) < share for _ in layout.subjects]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


# Layout ----------------------------------------------------------------------------------------------------


def test_the_layout_says_where_everything_lies():
    layout = TokenLayout(text=11, grid=(3, 8), spatial=3, subjects=(12,))
    assert (layout.image, layout.tokens) == (24, 11 + 4 * 24 + 12)
    assert (layout.text_slice, layout.image_slice) == (slice(0, 11), slice(11, 35))
    assert layout.spatial_slices == (slice(35, 59), slice(59, 83), slice(83, 107))
    assert layout.subject_slices == (slice(107, 119),)
    last = TokenLayout(text=2, grid=(3,), text_last=True)
    assert (last.text_slice, last.image_slice) == (slice(3, 5), slice(0, 3))
    x = torch.arange(5)[None]
    text, image = last.split(x)
    assert text.tolist() == [[3, 4]] and torch.equal(last.join(text, image), x)


# Definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("pka"))
def test_it_is_the_stored_definition(path):
    case, stored = golden().load_case(path)
    args = case["args"]
    stored = {name: x.transpose(1, 2) if x.ndim == 4 else x for name, x in stored.items()}
    layout = TokenLayout(
        args["text_tokens"], tuple(args["grid"]), args["num_spatial"], tuple(args["subject_tokens"])
    )
    routed = []
    for number, words in enumerate(args["keyword_token_indices"]):
        score, mask = keyword_routing(
            stored["prev_query_image"], stored["prev_key_text"], words,
            epsilon=args["epsilon"], norm=args["norm"], scale=args["scale"],
        )  # fmt: skip
        assert (score - stored[f"keyword_score_{number}"]).abs().max() <= 1e-5
        assert torch.equal(mask, stored[f"keyword_mask_{number}"].bool())
        routed.append(mask)
    shape = case["mask"]["shape"]
    packed = np.unpackbits(stored["mask_packed"].numpy())[: np.prod(shape)].reshape(shape).astype(bool)
    mask = relation_mask(layout, routed=routed, paa_radius=args["paa_radius"], batch=args["batch"])
    assert torch.equal(mask, torch.from_numpy(packed))
    for combine in ("joint", "sum"):
        out = pka_attention(
            stored["query"], stored["key"], stored["value"], layout,
            routed=routed, paa_radius=args["paa_radius"], combine=combine, scale=args["scale"],
        )  # fmt: skip
        assert (out - stored[f"out_{combine}"]).abs().max() <= 1e-5


@pytest.mark.parametrize("radius", [0, 1, 9])
@pytest.mark.parametrize("text_to_condition", [False, True])
def test_joint_is_dense_attention_under_the_mask_in_value_and_gradient(radius, text_to_condition):
    query, key, value = tensors(LAYOUT)
    routed = masks(LAYOUT)
    settings = {"routed": routed, "paa_radius": radius, "text_to_condition": text_to_condition}
    mask = relation_mask(LAYOUT, batch=2, **settings)
    found, wanted = pka_attention(query, key, value, LAYOUT, **settings), sdpa(query, key, value, mask)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.sin().sum(), (query, key, value)),
        torch.autograd.grad(wanted.sin().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_sum_adds_branches_with_a_softmax_each(share):
    layout = TokenLayout(text=5, grid=(3, 4), spatial=1, subjects=(4,))
    query, key, value = tensors(layout)
    routed = masks(layout, share=share)
    found = pka_attention(query, key, value, layout, routed=routed, combine="sum")
    base, image = slice(0, 17), layout.image_slice
    plain = sdpa(query[:, image], key[:, base], value[:, base])
    (spatial,), (subject,) = layout.spatial_slices, layout.subject_slices
    own = sdpa(query[:, image], key[:, subject], value[:, subject]) * routed[0][..., None, None]
    torch.testing.assert_close(found[:, image], plain + value[:, spatial] + own)
    joint = pka_attention(query, key, value, layout, routed=routed)
    rest = [i for i in range(layout.tokens) if not image.start <= i < image.stop]
    torch.testing.assert_close(found[:, rest], joint[:, rest])


def test_the_printed_alignment_ignores_the_query():
    layout = TokenLayout(text=2, grid=(3,), spatial=1)
    query, key, value = tensors(layout)
    with_condition = pka_attention(query, key, value, layout, routed=[], combine="sum")[:, layout.image_slice]
    base = sdpa(query[:, layout.image_slice], key[:, :5], value[:, :5])
    torch.testing.assert_close(with_condition - base, value[:, layout.spatial_slices[0]])
    (gradient,) = torch.autograd.grad((with_condition - base).sum(), query)
    assert gradient.abs().max() <= 1e-12


def test_conditions_see_themselves_and_are_seen_in_place():
    layout = TokenLayout(text=5, grid=(3, 4), spatial=1, subjects=(4,))
    query, key, value = tensors(layout)
    routed = masks(layout)
    call = lambda *x: pka_attention(*x, layout, routed=routed)  # noqa: E731
    before = call(query, key, value)
    base = slice(0, layout.text + layout.image)

    changed = [x.detach().clone() for x in (query, key, value)]
    for x in changed:
        x[:, base] += 1
    torch.testing.assert_close(call(*changed)[:, base.stop :], before[:, base.stop :])

    place = 7
    changed = [x.detach().clone() for x in (query, key, value)]
    for x in changed[1:]:
        x[:, layout.spatial_slices[0].start + place] += 1
    apart = (call(*changed) - before)[:, layout.image_slice].abs().amax(dim=(0, 2, 3))
    assert apart[place] > 1e-3 and apart.sum() == apart[place]

    swapped = TokenLayout(text=5, grid=(3, 4), spatial=2)
    x = tensors(swapped)
    first, second = swapped.spatial_slices
    order = torch.cat([torch.arange(17), torch.arange(second.start, second.stop), torch.arange(17, 29)])
    torch.testing.assert_close(
        pka_attention(*(y[:, order] for y in x), swapped, routed=[])[:, base],
        pka_attention(*x, swapped, routed=[])[:, base],
    )
    assert first.stop == second.start


def test_a_query_without_conditions_gives_the_same_rows():
    query, key, value = tensors(LAYOUT)
    routed, base = masks(LAYOUT), LAYOUT.text + LAYOUT.image
    whole = pka_attention(query, key, value, LAYOUT, routed=routed)
    torch.testing.assert_close(
        pka_attention(query[:, :base], key, value, LAYOUT, routed=routed), whole[:, :base]
    )


@pytest.mark.slow
def test_it_compiles_without_knowing_how_many_rows_are_routed():
    query, key, value = (x.detach().float() for x in tensors(LAYOUT))
    routed = masks(LAYOUT)
    call = torch.compile(pka_attention, fullgraph=True, backend="eager")
    wanted = pka_attention(query, key, value, LAYOUT, routed=routed)
    torch.testing.assert_close(call(query, key, value, LAYOUT, routed=routed), wanted)


@pytest.mark.parametrize("combine", ["joint", "sum"])
def test_half_precision_stays_near(combine):
    query, key, value = (x.detach() for x in tensors(LAYOUT))
    routed = masks(LAYOUT)
    truth = pka_attention(query, key, value, LAYOUT, routed=routed, combine=combine)
    low = [x.bfloat16() for x in (query, key, value)]
    found = pka_attention(*low, LAYOUT, routed=routed, combine=combine)
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).abs().max() <= 0.05 * truth.abs().max()


# Cost ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["pka", "omini", "easycontrol", "unicombine"])
@pytest.mark.parametrize("radius", [0, 1])
def test_pairs_are_those_of_the_mask_and_grow_linearly_with_the_conditions(relation, radius):
    counts = []
    for number in range(1, 6):
        layout = TokenLayout(text=5, grid=(3, 4), spatial=number, subjects=(4,) * number)
        routed = masks(layout, batch=1)
        mask = relation_mask(layout, relation, routed=routed, paa_radius=radius)
        rows = [int(x.sum()) for x in routed]
        assert relation_pairs(layout, relation, routed=rows, paa_radius=radius) == int(mask.sum())
        counts.append(relation_pairs(layout, relation, paa_radius=radius))
    steps = {b - a for a, b in pairwise(counts)}
    assert len(steps) == 1


def test_products_grow_linearly_with_the_conditions_too():
    flops = []
    for number in (2, 4, 6, 8):
        layout = TokenLayout(text=4, grid=(4, 4), spatial=number)
        query, key, value = (x.detach() for x in tensors(layout))
        with FlopCounterMode(display=False) as counter:
            pka_attention(query, key, value, layout, routed=[])
        flops.append(counter.get_total_flops())
    steps = [b - a for a, b in pairwise(flops)]
    assert max(steps) == min(steps)


@pytest.mark.parametrize("relation", ["omini", "easycontrol", "unicombine"])
def test_other_relations_are_dense_attention_under_their_masks(relation):
    query, key, value = tensors(LAYOUT)
    found = diffusion.group_attention(query, key, value, LAYOUT, relation=relation)
    mask = relation_mask(LAYOUT, relation, batch=2)
    torch.testing.assert_close(found, sdpa(query, key, value, mask))


# Routing, cache, sampling ----------------------------------------------------------------------------------


def test_epsilon_zero_and_equal_scores_route_everything():
    query, key = torch.randn(2, 6, 2, 4), torch.randn(2, 5, 2, 4)
    for norm in ("minmax", "softmax_max"):
        score, routed = keyword_routing(query, key, [1, 3], epsilon=0, norm=norm)
        assert routed.all() and score.min() >= 0 and score.max() == 1
        assert keyword_routing(query[:, :1].expand(-1, 6, -1, -1), key, [2], epsilon=1, norm=norm)[1].all()
    few = keyword_routing(query, key, [1], epsilon=0.8)[1].sum()
    assert 2 <= few < keyword_routing(query, key, [1], epsilon=0.2)[1].sum()
    assert not keyword_routing(query.requires_grad_(), key, [1])[0].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keyword_indices": [5]}, r"0..4, found \[5\]"),
        ({"keyword_indices": []}, "found \\[\\]"),
        ({"epsilon": 1.5}, "epsilon .* found 1.5"),
        ({"norm": "minmaks"}, "'minmaks'; did you mean minmax"),
    ],
    ids=str,
)
def test_wrong_routing_is_refused(change, message):
    arguments = {"keyword_indices": [1], **change}
    with pytest.raises(ConfigError, match=message):
        keyword_routing(torch.randn(1, 6, 2, 4), torch.randn(1, 5, 2, 4), **arguments)


def test_words_are_found_with_all_their_tokens():
    pytest.importorskip("tokenizers")

    class Words:
        is_fast = True

        def __call__(self, text: str, **kwargs: bool) -> dict:
            spans = [(0, 0)]  # begin
            for start in range(0, len(text), 4):  # tokens of four letters: sub-words
                spans.append((start, min(start + 4, len(text))))
            return {"offset_mapping": [*spans, (0, 0)]}

    prompt = "a small Bicycle by the sea"
    (found,) = diffusion.find_keywords(Words(), prompt, ["bicycle"])
    assert found == [3, 4]  # letters 8..15
    with pytest.raises(ConfigError, match="'boat'"):
        diffusion.find_keywords(Words(), prompt, ["boat"])
    with pytest.raises(ConfigError, match="fast tokenizer, found object"):
        diffusion.find_keywords(object(), prompt, ["sea"])


def test_a_cache_is_exact_where_conditions_know_no_time_and_refused_where_they_do():
    layout = TokenLayout(text=3, grid=(2, 3), spatial=1, subjects=(4,))
    base = layout.text + layout.image
    cache, made = diffusion.ConditionCache(), []

    def condition(time: float) -> tuple[Tensor, Tensor]:
        made.append(time)
        return noise(1, 10, 2, 6, seed=1) * time, noise(1, 10, 2, 6, seed=2) * time

    for step in range(4):
        query, key, value = (noise(1, base, 2, 6, seed=10 * step + i) for i in range(3))
        cached = cache.get("layer", lambda: condition(1.0), 1000 - step)
        fresh = condition(1.0)
        found, wanted = (
            pka_attention(query, torch.cat([key, k], 1), torch.cat([value, v], 1), layout, routed=[None])
            for k, v in (cached, fresh)
        )
        assert torch.equal(found, wanted)
    assert len(made) == 4 + 2  # fresh ones at every step, cached ones twice
    cache.reset()
    cache.get("layer", lambda: condition(1.0), 1.0)
    with pytest.raises(ConfigError, match="layer must not depend on time"):
        cache.get("layer", lambda: condition(0.9), 0.9)


def test_several_calls_of_a_step_prove_nothing_to_a_cache():
    cache, time = diffusion.ConditionCache(), torch.tensor([1.0])
    condition = lambda: (noise(1, 4, 2, 6) * time, noise(1, 4, 2, 6) * time)  # noqa: E731
    for _ in range(3):  # guidance, or a solver that evaluates a time twice
        found = cache.get("layer", condition, time)
        assert torch.equal(found[0], condition()[0])
    time *= 0.5  # in place
    with pytest.raises(ConfigError, match="layer must not depend on time"):
        cache.get("layer", condition, time)


def test_times_lean_to_noise():
    t = diffusion.csas_timesteps(200_000, generator=torch.Generator().manual_seed(0))
    assert t.mean() == pytest.approx(0.588, abs=0.003)
    assert (t > 0.5).float().mean() == pytest.approx(0.631, abs=0.004)
    assert (t > 0.9).float().mean() == pytest.approx(0.129, abs=0.003)
    plain = diffusion.csas_timesteps(200_000, mean=0.0, std=1.0, generator=torch.Generator().manual_seed(0))
    assert plain.mean() == pytest.approx(0.5, abs=0.003)
    assert t.min() > 0 and t.max() < 1


# Flux ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict, mask: Tensor | None = None) -> Tensor:
    with masked_sdpa(lambda *_: None if mask is None else mask[:, None]):
        return model(**inputs)[0]


KINDS = ("spatial", "subject")


def test_flux_with_everything_routed_is_the_stock_model_under_the_mask():
    model, layout = build_flux(), TokenLayout(7, (3, 4), 1, (5,))
    for relation in ("omini", "unicombine"):
        wanted = output(model, conditioned(), relation_mask(layout, relation))
        with diffusion.apply_group_mask(model, relation, conditions=KINDS) as handle:
            assert (output(model, conditioned()) - wanted).abs().max() <= 1e-5
        assert handle.stats().keep == pytest.approx(relation_pairs(layout, relation) / layout.tokens**2)
    stock = output(model, conditioned())
    wanted = output(model, conditioned(), relation_mask(layout, paa_radius=1))
    with diffusion.apply_pka(model, conditions=KINDS, keywords=[[2]], epsilon=0, paa_radius=1) as handle:
        output(model, conditioned(timestep=0.95))
        assert (output(model, conditioned()) - wanted).abs().max() <= 1e-5  # by the masks of the first step
    assert torch.equal(output(model, conditioned()), stock)
    assert handle.stats().keep == pytest.approx(relation_pairs(layout, paa_radius=1) / layout.tokens**2)


@torch.no_grad()
def routed_at(model: torch.nn.Module, layout: TokenLayout, words: list[int], timestep: float) -> Tensor:
    """Where the words are, by the queries and keys that the stock model has at a timestep."""
    seen = {}
    original = functional.scaled_dot_product_attention

    def look(*, query: Tensor, key: Tensor, **kwargs: object) -> Tensor:
        seen.update(query=query.transpose(1, 2), key=key.transpose(1, 2))
        return original(query=query, key=key, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", look)
        model(**conditioned(timestep=timestep))
    image, text = seen["query"][:, layout.image_slice], seen["key"][:, layout.text_slice]
    return keyword_routing(image, text, words, epsilon=0.5)[1]


@pytest.mark.parametrize("refresh", ["every", "once"])
def test_the_mask_of_a_step_is_that_of_the_step_before_or_the_first(refresh):
    model = build_flux(1)
    layout, words = TokenLayout(7, (3, 4), 1, (5,)), [2, 3]
    del model.single_transformer_blocks[:]  # one layer, so that its inputs depend on no mask
    times = (0.9, 0.6, 0.3, 0.95, 0.5)  # the fourth begins a new generation
    attn = model.transformer_blocks[0].attn
    with torch.no_grad():
        masks = {timestep: routed_at(model, layout, words, timestep) for timestep in times}
    before = {"every": (None, 0.9, 0.6, None, 0.95), "once": (None, 0.9, 0.9, None, 0.95)}[refresh]
    wanted = []
    for timestep, source in zip(times, before, strict=True):
        mask = relation_mask(layout, routed=[None if source is None else masks[source]], batch=2)
        wanted.append(output(model, conditioned(timestep=timestep), mask))
    stock = attn.processor
    with diffusion.apply_pka(model, conditions=KINDS, keywords=[words], epsilon=0.5, refresh=refresh):
        for timestep, result in zip(times, wanted, strict=True):
            found = output(model, conditioned(timestep=timestep))
            assert (found - result).abs().max() <= 1e-5
    assert attn.processor is stock
    assert not torch.equal(masks[0.9], masks[0.6])


def test_in_training_the_masks_are_those_of_the_same_forward():
    model, layout, words = build_flux(1), TokenLayout(7, (3, 4), 1, (5,)), [2, 3]
    del model.single_transformer_blocks[:]
    settings = {"conditions": KINDS, "keywords": [words], "epsilon": 0.5}
    with diffusion.apply_pka(model, **settings) as handle:
        found = {}
        for timestep in (0.5, 0.5, 0.9, 0.1):  # samples, in no order
            found[timestep] = output(model.train(), conditioned(timestep=timestep))
            assert handle.step == -1 and handle.stats().sparse_calls == handle.stats().calls
    for timestep, out in found.items():
        routed = routed_at(model, layout, words, timestep)
        wanted = output(
            model, conditioned(timestep=timestep), relation_mask(layout, routed=[routed], batch=2)
        )
        assert 0 < routed.sum() < routed.numel() and (out - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("share", [False, True])
def test_the_call_without_the_prompt_sees_all_or_shares_the_routing(share):
    model, layout = build_flux(1), TokenLayout(7, (3, 4), 1, (5,))
    del model.single_transformer_blocks[:]
    settings = {"conditions": KINDS, "keywords": [[2]], "epsilon": 0.9, "share_routing": share}
    other = lambda t: {**conditioned(timestep=t), "encoder_hidden_states": noise(2, 7, 16, seed=8)}  # noqa: E731
    full, bare = (output(model, x, relation_mask(layout)) for x in (conditioned(timestep=0.5), other(0.5)))
    with diffusion.apply_pka(model, **settings):
        for timestep in (0.9, 0.5):
            found, without = (output(model, x) for x in (conditioned(timestep=timestep), other(timestep)))
    assert (found - full).abs().max() > 1e-4
    assert ((without - bare).abs().max() <= 1e-5) == (not share)


def prompted(timestep: float, seed: int) -> dict:
    """Another prompt, and an image that it led to."""
    inputs = conditioned(timestep=timestep)
    inputs["hidden_states"][:, :12] = noise(2, 12, 4, seed=100 * seed + int(100 * timestep))
    return {**inputs, "encoder_hidden_states": noise(2, 7, 16, seed=seed)}


@pytest.mark.slow
@pytest.mark.parametrize("dense_steps", [0, 1])
@pytest.mark.parametrize("refresh", ["every", "once"])
@pytest.mark.parametrize("guided", [False, True], ids=["guidance 1", "guidance"])
@pytest.mark.parametrize("broken_off", [[9], [9, 4, 9, 4], [5], range(6, 12)], ids=str)
def test_masks_of_a_generation_of_one_step_are_not_those_of_the_next(
    broken_off, guided, refresh, dense_steps
):
    model = build_flux()
    settings = {"conditions": KINDS, "keywords": [[2, 3]], "epsilon": 0.5, "refresh": refresh}
    settings["dense_steps"] = dense_steps
    seeds = (5, 4) if guided else (5,)
    generate = lambda: [output(model, prompted(t, seed)) for t in (0.9, 0.6, 0.3) for seed in seeds]  # noqa: E731
    with diffusion.apply_pka(model, **settings):
        wanted = generate()
    with diffusion.apply_pka(model, **settings):
        for seed in broken_off:
            output(model, {**prompted(0.9, seed), "hidden_states": prompted(0.9, 3)["hidden_states"]})
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(generate(), wanted, strict=True))


def test_a_solver_that_evaluates_a_time_twice_gets_the_same_masks():
    model = build_flux()
    with diffusion.apply_pka(model, conditions=KINDS, keywords=[[2, 3]], epsilon=0.5):
        first, *twice = (output(model, prompted(t, 5)) for t in (0.9, 0.6, 0.6, 0.3, 0.3))
    assert torch.equal(twice[0], twice[1]) and torch.equal(twice[2], twice[3])


def test_both_evaluations_of_a_step_of_heun_have_the_masks_of_the_step_before():
    pipe = FLUX.pipe()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with diffusion.apply_pka(pipe, conditions=KINDS, keywords=[[2, 3]], epsilon=0.7) as handle:
        processor = handle._processors[0]
        pipe.scheduler.set_timesteps(4)
        routed, found = [], []
        for timestep in pipe.scheduler.timesteps:
            output(pipe.transformer, prompted(float(timestep) / 1000, 5))
            routed.append(processor.memory.routed[0])
            found.append(processor.memory.found[0])
            nothing = torch.zeros(2, 12, 4)
            pipe.scheduler.step(nothing, timestep, nothing)
    assert handle.step == 3 and all(mask.all() for mask in routed[:2])
    for first in (2, 4):  # two evaluations each
        assert torch.equal(routed[first], routed[first + 1])
        assert any(torch.equal(routed[first], before) for before in found[first - 2 : first])


def test_a_block_computed_again_for_its_gradient_has_the_masks_of_its_step():
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = build_flux()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with diffusion.apply_pka(model, conditions=KINDS, keywords=[[2, 3]], epsilon=0.7):
            sum(model(**conditioned(timestep=t))[0].square().mean() for t in (0.9, 0.6, 0.3)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-4)


def test_a_checkpoint_of_somebody_else_has_the_masks_of_its_step_or_refuses():
    settings = {"conditions": KINDS, "keywords": [[2, 3]], "epsilon": 0.7}

    def model_with_checkpoints() -> torch.nn.Module:
        model = build_flux()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return model

    def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
        with diffusion.apply_pka(model, **settings):
            for timestep in (0.9, 0.6, 0.3):
                model(**conditioned(timestep=timestep))[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    again = model_with_checkpoints()
    torch.testing.assert_close(gradients(again), gradients(build_flux()), atol=1e-6, rtol=1e-4)
    with diffusion.apply_pka(again, **settings):
        loss = sum(again(**conditioned(timestep=t))[0].square().mean() for t in (0.9, 0.6))
        with pytest.raises(ConfigError, match="call backward after each of them"):
            loss.backward()
    with diffusion.apply_pka(again, **settings):
        loss = again(**conditioned(timestep=0.9))[0].square().mean()
        output(again, conditioned(timestep=0.6))  # goes on with the masks of that
        with pytest.raises(ConfigError, match="call backward after each of them"):
            loss.backward()


def test_sizes_and_conditions_may_change_and_a_second_generation_equals_the_first():
    model = build_flux()
    with diffusion.apply_pka(model, conditions=KINDS, keywords=[[2]], epsilon=0.5):
        runs = [
            [output(model, conditioned(grid, (12, 5 + i), t)) for t in (0.9, 0.5)]
            for i, grid in enumerate([(3, 4), (4, 3), (3, 4)])
        ]
        again = [output(model, conditioned((3, 4), (12, 5), t)) for t in (0.9, 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    assert runs[2][1].shape != runs[0][1].shape


def test_lora_for_conditions_trains_and_travels_as_diffusers_saves_it(tmp_path):
    pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    from peft.utils import get_peft_model_state_dict

    settings = {"conditions": KINDS, "keywords": [[2]], "epsilon": 0.5}
    pipe, other = FLUX.pipe(), FLUX.pipe()
    steps = [conditioned(timestep=t) for t in (0.9, 0.5)]
    with diffusion.apply_pka(pipe, **settings):
        modules = ["to_q", "to_k", "to_v", "to_out.0", "x_embedder", "proj_mlp"]
        train_lora(pipe.transformer.train(), modules, lambda: pipe.transformer(**steps[0])[0])
        pipe.transformer.eval()
        wanted = [output(pipe.transformer, x) for x in steps]
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    with diffusion.apply_pka(other, **settings):
        plain = [output(other.transformer, x) for x in steps]
        other.load_lora_weights(tmp_path)
        for x, result in zip(steps, wanted, strict=True):
            torch.testing.assert_close(output(other.transformer, x), result)
        other.unload_lora_weights()
        assert all(torch.equal(output(other.transformer, x), y) for x, y in zip(steps, plain, strict=True))
    assert (wanted[1] - plain[1]).abs().max() > 1e-3


def test_a_handle_compares_with_dense_attention():
    model = build_flux()
    with diffusion.apply_pka(model, conditions=KINDS, keywords=[[2]]) as handle:
        comparison = handle.compare_dense(**conditioned())
    assert 0 < comparison.output < 2 and tuple(comparison.layers) == handle.layers
    assert "pka" in diffusion.supported(model)


@pytest.mark.parametrize("conditions", [None, 3, "spatial"])
def test_a_group_mask_wants_a_sequence_of_conditions(conditions):
    with pytest.raises(ConfigError, match=f"conditions must be a sequence, .* found {conditions!r}"):
        diffusion.apply_group_mask(build_flux(), "omini", conditions=conditions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditions": ("subject", "spatial"), "keywords": [None]}, "spatial conditions must come before"),
        ({"conditions": ("depth",)}, "spatial, subject, found"),
        ({"conditions": "spatial"}, "found 'spatial'"),
        ({"conditions": None}, "conditions must be a sequence, .* found None"),
        ({"conditions": ("subject",), "keywords": [3]}, "places of tokens .* found 3; find_keywords"),
        ({"conditions": ("subject",), "keywords": ["dog"]}, r"places of tokens .* found \('d', 'o', 'g'\)"),
        ({"conditions": ("subject",), "keywords": [[-1]]}, r"places of tokens .* found \(-1,\)"),
        ({"conditions": ("subject",), "keywords": [[]]}, r"places of tokens .* found \(\)"),
        ({"conditions": ("spatial",), "backend": "tirton"}, "'tirton'; did you mean triton"),
        ({"conditions": ("spatial",), "share_routing": "yes"}, "share_routing .* found 'yes'"),
        ({"conditions": ("subject",)}, "each of 1 subjects, found"),
        ({"conditions": ("spatial",), "cache": True}, "cache=True needs conditions .* leave it out"),
        ({"conditions": ("spatial",), "combine": "jiont"}, "'jiont'; did you mean joint"),
        ({"conditions": ("spatial",), "paa_radius": -1}, "radius .* found -1"),
        ({"conditions": ("spatial",), "refresh": "never"}, "every, once, found 'never'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_and_nothing_is_changed(settings, message):
    model = build_flux()
    before = dict(model.attn_processors)
    with pytest.raises(ConfigError, match=message):
        diffusion.apply_pka(model, **settings)
    assert all(model.attn_processors[name] is p for name, p in before.items())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((12,), r"2 conditions .* found \[0.0, 1.0\]"), ((9, 5), r"image's 12 tokens, found \[9, 5\]")],
    ids=str,
)
def test_conditions_that_are_not_there_are_missed(lengths, message):
    model = build_flux()
    with (
        diffusion.apply_pka(model, conditions=KINDS, keywords=[None]),
        pytest.raises(ConfigError, match=message),
    ):
        output(model, conditioned(lengths=lengths))
