"""Every method on every pipeline that it supports, built offline at tiny size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

import accelerate
import diffusers
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_layer_skip
from diffusers.models import attention_dispatch
from tiny_diffusion import (
    COGVIDEOX,
    FLUX,
    HUNYUAN,
    IMAGES,
    LTX,
    MOCHI,
    PIXART,
    QWEN,
    SD3,
    SD15,
    SD35,
    VIDEOS,
    WAN,
    WAN22,
    Tiny,
    conditioned_inputs,
    masked_sdpa,
)
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

from zoo import ConfigError, diffusion, ops

pytestmark = [
    # Mochi's own remark on its autocast to float32, which a CPU does not have.
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # two schedulers' numpy
]

RADIAL = {"block_size": 4, "decay_factor": 0.5, "decimation_threshold": 8}
WINDOW = 3
SINK = {"wan": True, "wan22": True}

CASES = [
    *(pytest.param("radial", tiny, id=f"radial-{tiny}") for tiny in VIDEOS),
    *(pytest.param("neighborhood", tiny, id=f"neighborhood-{tiny}") for tiny in (*IMAGES, *VIDEOS)),
]
TWICE = {f"neighborhood-{tiny}" for tiny in VIDEOS}
every = pytest.mark.parametrize(("method", "tiny"), CASES)
# What does not depend on the method is tested with one for each pipeline.
once = pytest.mark.parametrize(("method", "tiny"), [case for case in CASES if case.id not in TWICE])


def apply(method: str, target: Any, **kwargs: Any) -> diffusion.Handle:
    if method == "radial":
        return diffusion.apply_radial_attention(target, **{**RADIAL, **kwargs})
    return diffusion.apply_neighborhood(target, **{"kernel_size": WINDOW, **kwargs})


def apply_all_true(method: str, target: Any) -> diffusion.Handle:
    settings = {"block_size": 4096} if method == "radial" else {"kernel_size": 99}
    return apply(method, target, **settings)


def image_mask(method: str, tiny: Tiny, grid: tuple[int, ...], text: int) -> Tensor:
    """Who sees whom, bool [N, N] in the order [image, text]."""
    image = torch.Size(grid).numel()
    if method == "radial":
        blocks = diffusion.radial_block_mask(
            grid[0], image // grid[0], text_tokens=text, sink=SINK.get(tiny.name, False), **RADIAL
        )
        size = RADIAL["block_size"]
        mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
        return mask[: image + text, : image + text].clone()
    mask = torch.ones(image + text, image + text, dtype=torch.bool)
    mask[:image, :image] = False
    sizes = [min(WINDOW, n) for n in grid]
    axes = [i for i, n in enumerate(grid) if n > 1]
    indices = ops.neighborhood_indices([grid[i] for i in axes], [sizes[i] for i in axes])
    for query, keys in enumerate(indices):
        mask[query, keys] = True
    return mask


def stock_under_mask(method: str, tiny: Tiny, grid: tuple[int, ...]) -> Any:
    """The stock processors, with the expanded dense mask under their own."""
    image = torch.Size(grid).numel()
    full = image_mask(method, tiny, grid, tiny.text)

    def mask_of(queries: int, keys: int) -> Tensor | None:
        if queries != keys or queries < image:
            return None  # cross-attention, or the refiner of the text
        if queries == image:
            return image_mask(method, tiny, grid, 0)
        mask = full[:queries, :queries]  # fewer where a model drops padding, which comes last
        return mask if tiny.text_last else mask.roll((tiny.text, tiny.text), (0, 1))

    return masked_sdpa(mask_of)


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**copy.deepcopy(inputs))[0]


def transformers(pipe: Any) -> list[torch.nn.Module]:
    return [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]


def processors(pipe: Any) -> list[object]:
    return [m.processor for t in transformers(pipe) for m in t.modules() if hasattr(m, "processor")]


def is_as_before(pipe: Any, before: list[object]) -> bool:
    """The very same processors, and no hook."""
    now = processors(pipe)
    is_same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
    return is_same and not any(m._forward_pre_hooks for t in transformers(pipe) for m in t.modules())


# Numbers ---------------------------------------------------------------------------------------------------


@every
def test_an_all_true_mask_is_bit_identical_and_remove_restores_the_very_same_objects(method, tiny):
    pipe = tiny.pipe()
    before, stock = processors(pipe), tiny.generate(pipe, steps=2)
    handle = apply_all_true(method, pipe)
    assert torch.equal(tiny.generate(pipe, steps=2), stock)
    assert handle.stats().sparse_calls == 0 and handle.stats().calls > 0
    handle.remove()
    handle = apply(method, pipe)
    assert not torch.equal(tiny.generate(pipe, steps=2), stock)
    assert handle.stats().sparse_calls == handle.stats().calls
    handle.remove()
    assert is_as_before(pipe, before)
    assert torch.equal(tiny.generate(pipe, steps=2), stock)


@every
@pytest.mark.parametrize("guided", [False, True], ids=["guidance 1", "guidance"])
def test_a_sparse_generation_is_the_stock_one_under_the_expanded_mask(method, tiny, guided):
    pipe, guidance = tiny.pipe(), tiny.guidance if guided else dict.fromkeys(tiny.guidance, 1.0)
    grid = tiny.small
    with stock_under_mask(method, tiny, grid):
        wanted = tiny.generate(pipe, grid, steps=2, **guidance)
    with apply(method, pipe) as handle:
        found = tiny.generate(pipe, grid, steps=2, **guidance)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
    assert handle.step == 1


@every
@pytest.mark.parametrize("grid", ["small", "odd", "single"])
def test_a_sparse_forward_is_the_stock_one_under_the_expanded_mask(method, tiny, grid):
    grid = getattr(tiny, grid)
    model, inputs = tiny.build(), tiny.inputs(grid)  # a batch of 2, padded differently where there is a mask
    with stock_under_mask(method, tiny, grid):
        wanted = output(model, inputs)
    with apply(method, model) as handle:
        found = output(model, inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
    full = image_mask(method, tiny, grid, tiny.text)
    assert (handle.stats().keep < 1) == (not bool(full.all()))


@once
def test_bfloat16_is_bit_identical_when_dense_and_finite_when_sparse(method, tiny):
    exact = ("timestep", "guidance", "img_ids", "txt_ids")
    model, inputs = tiny.build().bfloat16(), tiny.inputs(tiny.small)
    for name, x in inputs.items():
        if torch.is_tensor(x) and x.is_floating_point() and name not in exact:
            inputs[name] = x.bfloat16()
    stock = output(model, inputs)
    with apply_all_true(method, model):
        assert torch.equal(output(model, inputs), stock)
    with apply(method, model):
        found = output(model, inputs)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and not torch.equal(found, stock)


@every
def test_gradients_are_those_of_the_mask(method, tiny):
    model, inputs = tiny.build(1), tiny.inputs(tiny.small)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**copy.deepcopy(inputs))[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with stock_under_mask(method, tiny, tiny.small):
        wanted = gradients()
    with apply(method, model):
        found = gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@once
def test_a_model_may_train_after_inference_mode(method, tiny):
    model, inputs = tiny.build(1), tiny.inputs(tiny.small)
    with apply(method, model):
        with torch.inference_mode():
            model(**copy.deepcopy(inputs))
        model.train()(**copy.deepcopy(inputs))[0].square().mean().backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tiny", [WAN, HUNYUAN, LTX, SD3, FLUX], ids=repr)
@pytest.mark.parametrize("kind", ["two geometries", "validation between", "another step"])
def test_blocks_computed_again_for_their_gradient_are_those_of_their_forward(tiny, kind):
    method = "radial" if tiny in VIDEOS else "neighborhood"
    grid, turned = ((5, 4, 4), (4, 5, 4)) if tiny in VIDEOS else ((5, 6), (6, 5))
    inputs, turned, later = tiny.inputs(grid), tiny.inputs(turned), tiny.inputs(grid, timestep=0.1)

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = tiny.build(1)
        with apply(method, model, dense_steps=1) as handle:
            if checkpointing:
                model.enable_gradient_checkpointing()
            run = lambda x: model(**copy.deepcopy(x))[0].square().mean()  # noqa: E731
            model.train(kind != "another step")
            loss = run(inputs)
            if kind == "two geometries":
                loss = loss + run(turned)
            elif kind == "validation between":
                output(model.eval(), turned)
                model.train()
            else:
                loss = loss + run(later)
                assert handle.step == 1
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-3)


def test_a_backward_after_remove_is_refused_where_it_would_compute_again():
    model, inputs = WAN.build(1), WAN.inputs(WAN.small)
    model.enable_gradient_checkpointing()
    with apply("radial", model):
        loss = model.train()(**inputs)[0].square().mean()
    with pytest.raises(ConfigError, match="apply_radial_attention removed; call backward before remove"):
        loss.backward()
    model(**inputs)[0].square().mean().backward()  # of the stock model


def test_two_handles_leave_the_checkpointing_of_a_model_as_it_was():
    model, inputs = WAN.build(2), WAN.inputs(WAN.small)
    model.train().enable_gradient_checkpointing()
    before = model._gradient_checkpointing_func
    with apply("radial", model) as handle:
        layers = handle.layers
    first = apply("radial", model, dense_layers=layers[1:])
    second = apply("radial", model, dense_layers=layers[:1])
    for _ in range(3):
        model(**inputs)[0].square().mean().backward()
    assert len(diffusion.handle.handles_of(model._gradient_checkpointing_func)) == 2
    first.remove()
    model(**inputs)[0].square().mean().backward()
    second.remove()
    assert model._gradient_checkpointing_func is before


def with_checkpoints(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """Blocks that somebody else computes again for their gradient, not the model."""
    if kind == "FSDP":
        is_block = lambda module: type(module).__name__ in model._repeated_blocks  # noqa: E731
        apply_activation_checkpointing(model, check_fn=is_block)
        return model
    for module in model.modules():
        if type(module).__name__ in model._repeated_blocks:
            module.forward = partial(checkpoint, module.forward, use_reentrant=kind == "reentrant")
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # while validating
@pytest.mark.parametrize(
    ("tiny", "kind"),
    # The reentrant one takes no keywords, as Flux gives them to its blocks.
    [(WAN, "by hand"), (WAN, "reentrant"), (WAN, "FSDP"), (FLUX, "by hand"), (FLUX, "FSDP")],
    ids=str,
)
def test_checkpoints_of_somebody_else_compute_the_block_of_their_forward_or_refuse(tiny, kind):
    method = "radial" if tiny is WAN else "neighborhood"
    grid, turned = ((5, 4, 4), (4, 5, 4)) if tiny is WAN else ((5, 6), (6, 5))
    inputs, others = (tiny.inputs(size) for size in (grid, turned))

    def gradients(build: Callable[[], torch.nn.Module]) -> dict[str, Tensor]:
        model = build().train()
        with apply(method, model):
            for x in (inputs, others):  # one after the other
                model(**x)[0].square().mean().backward()
            loss = model(**inputs)[0].square().mean()
            output(model.eval(), others)  # validation between
            loss.backward()
        return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}

    again = lambda: with_checkpoints(tiny.build(1), kind)  # noqa: E731
    torch.testing.assert_close(gradients(again), gradients(lambda: tiny.build(1)), atol=1e-6, rtol=1e-3)
    model = again().train()
    with apply(method, model) as handle:
        loss = sum(model(**x)[0].square().mean() for x in (inputs, others))
        with pytest.raises(ConfigError, match=r"found forwards of several .* enable_gradient_checkpointing"):
            loss.backward()
        handle.reset()
        model(**others)[0].square().mean().backward()


@pytest.mark.parametrize("tiny", [HUNYUAN, MOCHI, QWEN], ids=repr)
@pytest.mark.parametrize("kept", [(0, 0), (7, 0), (3, 3), (7, 7), (1, 6)], ids=str)
def test_any_padding_of_the_prompts_is_left_out(tiny, kept):
    method = "neighborhood" if tiny is QWEN else "radial"
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    name = next(name for name in inputs if name.endswith("_mask"))
    inputs[name] = torch.arange(tiny.text) < torch.tensor(kept)[:, None]
    if tiny is not QWEN and 0 in kept:
        kept = tuple(max(n, 1) for n in kept)  # the models pool the prompt and divide by its length
        inputs[name] = torch.arange(tiny.text) < torch.tensor(kept)[:, None]
    with stock_under_mask(method, tiny, tiny.small):
        wanted = output(model, inputs)
    with apply(method, model):
        found = output(model, inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)


def test_padding_inside_a_prompt_of_qwen_is_left_out_as_well():
    model, inputs = QWEN.build(), QWEN.inputs(QWEN.small)
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    with stock_under_mask("neighborhood", QWEN, QWEN.small):
        wanted = output(model, inputs)
    with apply("neighborhood", model):
        assert (output(model, inputs) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("tiny", [SD3, COGVIDEOX, WAN], ids=repr)
def test_a_backend_chosen_for_the_whole_process_reaches_those_that_heed_it_alone(tiny, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", attention_dispatch.AttentionBackendName._NATIVE_MATH)
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    stock = output(model, inputs)
    with apply_all_true("neighborhood", model):
        assert torch.equal(output(model, inputs), stock)


# Steps, sizes, handles -------------------------------------------------------------------------------------


@once
def test_dense_steps_count_over_all_calls_and_transformers(method, tiny):
    pipe = tiny.pipe()
    stock = tiny.generate(pipe, steps=3, **tiny.guidance)
    with apply(method, pipe, dense_steps=2) as handle:
        first = tiny.generate(pipe, steps=3, **tiny.guidance)
        stats = handle.stats()
        assert handle.step == 2 and 0 < stats.sparse_calls <= stats.calls / 2
        assert torch.equal(tiny.generate(pipe, steps=3, **tiny.guidance), first)
    with apply(method, pipe, dense_steps=3 if tiny in VIDEOS else 99):
        assert torch.equal(tiny.generate(pipe, steps=3, **tiny.guidance), stock)
    assert not torch.equal(first, stock)


@pytest.mark.parametrize(
    ("tiny", "scheduler", "guided", "steps"),
    [(SD3, "FlowMatchHeunDiscreteScheduler", True, 4), (SD15, "HeunDiscreteScheduler", False, 4),
     (SD15, "KDPM2DiscreteScheduler", True, 4),
     # Of 10 steps some of its timesteps rise within the generation.
     (SD15, "KDPM2AncestralDiscreteScheduler", False, 10)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_a_scheduler_that_evaluates_twice_in_a_step_has_its_own_count(tiny, scheduler, guided, steps, copied):
    pipe = tiny.pipe()
    config = pipe.scheduler.config if "KDPM2Ancestral" in scheduler else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    guidance = tiny.guidance if guided else dict.fromkeys(tiny.guidance, 1.0)
    change = diffusion.apply_agent if tiny is SD15 else partial(apply, "neighborhood")
    with change(pipe, dense_steps=2) as handle:
        if copied:
            pipe = copy.deepcopy(pipe)
            (handle,) = diffusion.handles(pipe)
        for _ in range(2):
            before = handle.stats()
            tiny.generate(pipe, steps=steps, **guidance)
            assert handle.step == steps - 1
            # The last step has one evaluation, the others two; the 4 of the first two steps are dense.
            calls, layers = 2 * steps - 1, len(handle.layers)
            assert handle.stats().calls - before.calls == calls * layers
            assert handle.stats().sparse_calls - before.sparse_calls == (calls - 4) * layers


@pytest.mark.parametrize(
    ("tiny", "shift", "guided"), [(HUNYUAN, 7.0, False), (HUNYUAN, 7.0, True), (FLUX, 8.0, False)], ids=str
)
def test_steps_whose_timesteps_are_equal_in_bfloat16_are_told_apart(tiny, shift, guided):
    pipe = tiny.pipe()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe.to(torch.bfloat16)
    prompt = {n: x.bfloat16() if x.is_floating_point() else x for n, x in tiny.prompt().items()}
    guidance = tiny.guidance if guided else dict.fromkeys(tiny.guidance, 1.0)
    method = "radial" if tiny is HUNYUAN else "neighborhood"
    timesteps, evaluations = [], 1 + guided
    with apply(method, pipe, dense_steps=12) as handle:
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: timesteps.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
        for _ in range(2):
            before = handle.stats()
            tiny.generate(pipe, steps=50, **prompt, **guidance)
            calls = handle.stats().sparse_calls - before.sparse_calls
            assert (handle.step, calls) == (49, 38 * evaluations * len(handle.layers))
    assert len(set(timesteps)) < 50


def test_a_generation_that_starts_less_noisy_than_the_last_one_ended_begins_anew():
    pipe = SD15.pipe()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with diffusion.apply_agent(pipe, dense_steps=1) as handle:
        steps = []
        pipe.unet.register_forward_pre_hook(lambda *_: steps.append(handle.step))
        for begin, end in ((0, 2), (3, 5)):  # broken off after two steps; image to image
            pipe.scheduler.set_timesteps(5)
            pipe.scheduler.set_begin_index(begin)
            x = torch.zeros(SD15.inputs()["sample"].shape)
            for timestep in pipe.scheduler.timesteps[begin:end]:
                x = pipe.scheduler.scale_model_input(x, timestep)
                noise = output(pipe.unet, {**SD15.inputs(), "sample": x, "timestep": timestep})
                x = pipe.scheduler.step(noise, timestep, x).prev_sample
    assert steps == [0, 1, 0, 1]


def test_a_scheduler_that_stands_still_does_not_hold_the_count():
    pipe = SD15.pipe()
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    SD15.generate(pipe, steps=2)
    with diffusion.apply_agent(pipe) as handle:
        steps = []
        for timestep in (900.0, 900.0, 600.0, 600.0, 300.0, 900.0):  # the user's own loop around the model
            output(pipe.unet, SD15.inputs(timestep=timestep))
            steps.append(handle.step)
    assert steps == [0, 0, 1, 1, 2, 0]


def test_a_copy_of_the_model_does_not_take_the_pipeline_along():
    pipe = WAN.pipe()
    with apply("radial", pipe) as handle:
        assert copy.deepcopy(handle)._target is None and handle._target is pipe


def test_frames_that_are_given_do_not_stop_the_count_of_steps():
    # Wan 2.2 from an image and a text: a timestep for every token, 0 where the frame is known.
    model, inputs = WAN.build(), WAN.inputs(WAN.small)
    tokens = torch.Size(WAN.small).numel()
    with apply("radial", model, dense_steps=1) as handle:
        steps = []
        for time in (900.0, 900.0, 500.0, 100.0):
            inputs["timestep"] = torch.where(torch.arange(tokens) < 16, 0.0, time).expand(2, -1)
            output(model, inputs)
            steps.append(handle.step)
    assert steps == [0, 0, 1, 2]


@every
def test_two_sizes_in_a_row_are_as_each_alone(method, tiny):
    pipe, steps = tiny.pipe(), 1 + (tiny is MOCHI)  # whose schedule cannot be one step long
    alone = []
    for grid in (tiny.small, tiny.large):
        with apply(method, pipe):
            alone.append(tiny.generate(pipe, grid, steps=steps))
    with apply(method, pipe):
        for number in (0, 1, 0):
            grid = (tiny.small, tiny.large)[number]
            assert torch.equal(tiny.generate(pipe, grid, steps=steps), alone[number])


@pytest.mark.parametrize("tiny", [WAN, FLUX], ids=repr)
def test_two_pipelines_keep_their_own_settings(tiny):
    method = "radial" if tiny is WAN else "neighborhood"
    settings = (
        [{"block_size": 4}, {"block_size": 8}] if tiny is WAN else [{"kernel_size": 2}, {"kernel_size": 3}]
    )
    pipes, alone = [tiny.pipe(), tiny.pipe()], []
    for pipe, setting in zip(pipes, settings, strict=True):
        with apply(method, pipe, **setting):
            alone.append(tiny.generate(pipe, steps=2))
    with apply(method, pipes[0], **settings[0]), apply(method, pipes[1], **settings[1]):
        for _ in range(2):
            for pipe, wanted in zip(pipes, alone, strict=True):
                assert torch.equal(tiny.generate(pipe, steps=2), wanted)


@once
def test_an_exception_in_mid_run_and_handles_left_in_the_wrong_order_restore_all(method, tiny):
    pipe = tiny.pipe()
    before, stock = processors(pipe), tiny.generate(pipe, steps=2)
    interrupt = mock.patch.object(pipe.scheduler, "step", side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), interrupt, apply(method, pipe):
        tiny.generate(pipe, steps=2)
    assert is_as_before(pipe, before)

    # Two handles share a model where each leaves the other's layers alone; the first goes first.
    with apply(method, pipe.transformer) as handle:
        layers = handle.layers
    first = apply(method, pipe.transformer, dense_layers=layers[1:])
    second = apply(method, pipe.transformer, dense_layers=layers[:1])
    both = tiny.generate(pipe, steps=2)
    first.remove()
    second.remove()
    assert is_as_before(pipe, before)
    assert torch.equal(tiny.generate(pipe, steps=2), stock) and not torch.equal(both, stock)


# Wan, HunyuanVideo and Qwen-Image call the model twice per step, the others once with both prompts.
@pytest.mark.parametrize("tiny", [WAN, HUNYUAN, QWEN, MOCHI, COGVIDEOX, SD3], ids=repr)
def test_several_at_once_with_guidance_are_as_under_the_mask(tiny):
    method, pipe = "radial" if tiny in VIDEOS else "neighborhood", tiny.pipe()
    prompts = {  # a second one, of another length where there is a mask
        name: torch.cat([x, torch.ones_like(x) if x.dtype == torch.bool else x.flip(-1)])
        for name, x in tiny.prompt().items()
    }
    more = {**prompts, **tiny.guidance}
    with stock_under_mask(method, tiny, tiny.small):
        wanted = tiny.generate(pipe, steps=2, **more)
    with apply(method, pipe):
        found = tiny.generate(pipe, steps=2, **more)
    assert len(found) == 2
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)


def test_both_transformers_of_wan_22_are_changed_or_none():
    pipe = WAN22.pipe()
    before = processors(pipe)
    pipe.transformer_2.blocks[1].attn1.processor = object()
    with pytest.raises(ConfigError, match="blocks.1.attn1 must have a WanAttnProcessor, found a object"):
        apply("radial", pipe)
    pipe.transformer_2.blocks[1].attn1.processor = before[0]
    assert not any(isinstance(p, diffusion.processor.Processor) for p in processors(pipe))
    with apply("radial", pipe) as handle:
        assert len(handle.layers) == 5


def test_cross_attention_and_the_token_refiner_keep_their_processors():
    for tiny, kept in ((WAN, "attn2"), (LTX, "attn2"), (PIXART, "attn2"), (HUNYUAN, "refiner")):
        pipe = tiny.pipe()
        before = pipe.transformer.attn_processors
        with apply("radial" if tiny in VIDEOS else "neighborhood", pipe):
            for name, processor in pipe.transformer.attn_processors.items():
                assert (processor is before[name]) == (kept in name), name


# Beside the rest of diffusers ------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [WAN, LTX, COGVIDEOX, SD3, PIXART], ids=repr)
def test_fused_projections_give_the_same_numbers(tiny):
    method = "radial" if tiny in VIDEOS else "neighborhood"
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    with apply(method, model):
        wanted = output(model, inputs)
    model.fuse_qkv_projections()
    stock = output(model, inputs)
    with apply_all_true(method, model):
        assert torch.equal(output(model, inputs), stock)
    with apply(method, model):
        torch.testing.assert_close(output(model, inputs), wanted, atol=2e-5, rtol=1e-4)


@once
def test_processors_that_come_back_after_remove_are_the_stock_ones(method, tiny):
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    stock = output(model, inputs)
    handle = apply(method, model)
    assert not torch.equal(output(model, inputs), stock)
    ours = [(module, module.processor) for module in model.modules() if hasattr(module, "processor")]
    handle.remove()
    for module, processor in ours:  # as unfuse_qkv_projections of several models does
        module.processor = processor
    larger = tiny.inputs(tiny.large)
    found = [output(model, x) for x in (inputs, larger)]
    assert torch.equal(found[0], stock) and torch.equal(found[1], output(tiny.build(), larger))
    with apply(method, model):
        assert not torch.equal(output(model, inputs), stock)
    assert not any(isinstance(m.processor, diffusion.processor.Processor) for m, _ in ours)


@pytest.mark.parametrize("tiny", [SD3, COGVIDEOX, PIXART], ids=repr)
def test_projections_fused_before_and_unfused_after_remove_are_the_stock_ones(tiny):
    method = "radial" if tiny in VIDEOS else "neighborhood"
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    stock = output(model, inputs)
    handle = apply(method, model)
    output(model, inputs)
    model.fuse_qkv_projections()
    handle.remove()
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), stock)


@pytest.mark.parametrize("adapter_first", [True, False], ids=["LoRA first", "handle first"])
@pytest.mark.parametrize("tiny", [WAN, HUNYUAN, MOCHI, SD35, QWEN], ids=repr)
def test_lora_before_and_after_is_heeded(tiny, adapter_first):
    peft = pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    method = "radial" if tiny in VIDEOS else "neighborhood"
    lora = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_k", "to_v", "add_q_proj"], init_lora_weights=False
    )
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    with apply(method, model):
        plain = output(model, inputs)
    if adapter_first:
        model.add_adapter(lora)
    with apply(method, model):
        if not adapter_first:
            model.add_adapter(lora)
        found = output(model, inputs)
    with stock_under_mask(method, tiny, tiny.small):
        wanted = output(model, inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("tiny", [WAN, HUNYUAN, FLUX], ids=repr)
def test_weights_may_be_offloaded_and_stored_in_eight_bits(tiny):
    method = "radial" if tiny in VIDEOS else "neighborhood"
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    with apply(method, model):
        wanted = output(model, inputs)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with apply(method, model):
        assert torch.equal(output(model, inputs), wanted)

    model = tiny.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stock = output(model, inputs)
    with apply_all_true(method, model):
        assert torch.equal(output(model, inputs), stock)
    with apply(method, model):
        assert (output(model, inputs) - stock).abs().max() > 1e-4


@pytest.mark.parametrize("tiny", [WAN, FLUX, HUNYUAN], ids=repr)
def test_the_first_block_cache_of_diffusers_works_beside_it(tiny):
    method, pipe = "radial" if tiny in VIDEOS else "neighborhood", tiny.pipe()
    with apply(method, pipe):
        wanted = tiny.generate(pipe, steps=3)
    for threshold, is_exact in ((0.0, True), (10.0, False)):  # never and always reuse what the rest computed
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        with apply(method, pipe):
            assert torch.equal(tiny.generate(pipe, steps=3), wanted) == is_exact
        pipe.transformer.disable_cache()


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # of FasterCache
def test_a_cache_that_leaves_out_prompts_is_heeded_or_refused_where_they_are_padded():
    def generate(pipe: Any, **kwargs: Any) -> Tensor:
        spans = dict.fromkeys(
            ("spatial_attention_timestep_skip_range", "unconditional_batch_timestep_skip_range"), (-1, 1)
        )
        more = {"current_timestep_callback": lambda: 0, "attention_weight_callback": lambda module: 0.5}
        pipe.transformer.enable_cache(diffusers.FasterCacheConfig(**spans, **more))
        return MOCHI.generate(pipe, steps=4, **MOCHI.guidance, **kwargs)

    whole = {name: torch.ones_like(x) for name, x in MOCHI.prompt().items() if name.endswith("_mask")}
    with stock_under_mask("radial", MOCHI, MOCHI.small):
        wanted = generate(MOCHI.pipe(), **whole)
    pipe = MOCHI.pipe()
    with apply("radial", pipe):
        assert (generate(pipe, **whole) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        pipe.transformer.disable_cache()
        with pytest.raises(ConfigError, match="got 1 samples, found 2 prompts with padding .* disable_cache"):
            generate(pipe)


@pytest.mark.parametrize("tiny", [WAN, FLUX], ids=repr)
def test_a_shallow_copy_of_the_model_is_changed_with_it(tiny):
    # accelerate's compile_regions makes one, with compiled blocks.
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    stock = output(model, inputs)
    with apply("radial" if tiny in VIDEOS else "neighborhood", model):
        wanted, twin = output(model, inputs), copy.copy(model)
        assert torch.equal(output(twin, inputs), wanted)
    assert torch.equal(output(twin, inputs), stock)


@pytest.mark.parametrize("tiny", [PIXART, QWEN], ids=repr)
def test_scores_of_attention_that_diffusers_leaves_out_are_refused_unless_the_layer_stays_dense(tiny):
    # As perturbed attention guidance does: what the layer attends to is its own value.
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    skip = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    before = list(model.attn_processors.values())
    apply_layer_skip(model, diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks", **skip))
    skipped = output(model, inputs)
    with pytest.raises(ConfigError, match=r"skip_attention_scores=True at transformer_blocks.0.attn.*; rem"):
        apply("neighborhood", model)
    assert all(a is b for a, b in zip(model.attn_processors.values(), before, strict=True))
    with diffusion.apply_neighborhood(model, 99, dense_layers=1):
        assert torch.equal(output(model, inputs), skipped)


@once
def test_a_changed_model_survives_pickling(method, tiny):
    model, inputs = tiny.build(1), tiny.inputs(tiny.small)
    with apply(method, model):
        wanted = output(model, inputs)
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert torch.equal(output(twin, inputs), wanted)


# Reports ---------------------------------------------------------------------------------------------------


@every
def test_stats_count_the_pairs_of_the_mask(method, tiny):
    pipe = tiny.pipe()
    model = pipe.transformer
    inputs = tiny.inputs(tiny.small, **({"padded": False} if tiny in (HUNYUAN, MOCHI, QWEN) else {}))
    with apply(method, model) as handle:
        output(model, inputs)
    image = torch.Size(tiny.small).numel()
    kept = dense = 0
    for name in handle.layers:
        text = 0 if name.endswith("attn2") else tiny.text
        kept += int(image_mask(method, tiny, tiny.small, text).sum())
        dense += (image + text) ** 2
    assert handle.stats().keep == pytest.approx(kept / dense)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert handle.stats().flops_saved == 4 * width * 2 * (dense - kept)
    assert handle.stats().backend in {row.backend for row in ops.backends()}


@once
def test_compare_dense_measures_every_layer_and_the_output(method, tiny):
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    stock = output(model, inputs)
    with apply(method, model, dense_steps=1) as handle:
        first = output(model, inputs)
        stats, step = handle.stats(), handle.step
        comparison = handle.compare_dense(**inputs)
        assert (handle.stats(), handle.step) == (stats, step)
        assert torch.equal(output(model, inputs), first)  # still the dense step
    with apply(method, model):
        sparse = output(model, inputs)
    assert comparison.output == pytest.approx(float((sparse - stock).norm() / stock.norm()), rel=1e-4)
    assert tuple(comparison.layers) == handle.layers
    assert all(0 < error < 2 for error in comparison.layers.values())
    assert 0 < comparison.keep < 1


@pytest.mark.parametrize("tiny", [WAN, COGVIDEOX, FLUX], ids=repr)
def test_compare_dense_refuses_a_cache_that_would_give_the_dense_output_again(tiny):
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    with apply("radial" if tiny in VIDEOS else "neighborhood", model) as handle:
        wanted = handle.compare_dense(**inputs)
        now = {"current_timestep_callback": lambda: 500}
        model.enable_cache(
            diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **now)
        )
        with pytest.raises(ConfigError, match=r"found a cache enabled on .*; call disable_cache\(\) first"):
            handle.compare_dense(**inputs)
        model.disable_cache()
        assert handle.compare_dense(**inputs) == wanted


def test_supported_names_every_method_for_every_pipeline():
    for tiny in (*IMAGES, *VIDEOS):
        report = diffusion.supported(tiny.pipe())
        assert bool(report["neighborhood"]) and bool(report["radial"]) == (tiny in VIDEOS), tiny
    assert "found FluxTransformer2DModel" in diffusion.supported(FLUX.pipe())["radial"].reason


def refusal(inputs: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    inputs = dict(inputs)
    change(inputs)
    return inputs


@pytest.mark.parametrize(
    ("tiny", "change", "message"),
    [
        (QWEN, lambda x: x.update(img_shapes=[[(1, 5, 6), (1, 2, 2)]] * 2), "img_shapes .* one image"),
        (LTX, lambda x: x.update(num_frames=None), "num_frames, height and width .* 80 tokens"),
        (LTX, lambda x: x.update(height=5), r"found \(5, 5, 4\)"),
    ],
    ids=["reference image", "no frames", "other height"],
)
def test_a_geometry_that_cannot_be_read_is_refused(tiny, change, message):
    model = tiny.build()
    with apply("neighborhood", model), pytest.raises(ConfigError, match=message):
        output(model, refusal(tiny.inputs(tiny.small), change))


@pytest.mark.parametrize(
    ("method", "tiny"),
    [("neighborhood", QWEN), ("radial", HUNYUAN), ("radial", MOCHI), ("pka", FLUX), ("agent", SD15)],
    ids=str,
)
def test_the_default_device_of_torch_may_be_another_one_than_the_model_s(method, tiny):
    model, inputs = tiny.build(), conditioned_inputs() if method == "pka" else tiny.inputs(tiny.small)
    change = {
        "pka": partial(diffusion.apply_pka, conditions=("spatial", "subject"), keywords=[[2, 3]]),
        "agent": diffusion.apply_agent,
    }.get(method, partial(apply, method))
    with change(model):
        wanted = output(model, inputs)
    with change(model), torch.device("meta"):  # nothing can be read there
        assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize(("method", "tiny"), [("neighborhood", QWEN), ("radial", HUNYUAN)], ids=str)
def test_padded_prompts_work_on_a_model_that_is_offloaded(method, tiny):
    model, inputs = tiny.build(), tiny.inputs(tiny.small)
    with apply(method, model):
        accelerate.cpu_offload_with_hook(model, "meta")  # the inputs are moved after the geometry was read
        assert output(model, inputs).device.type == "meta"
