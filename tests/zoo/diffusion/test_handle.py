"""What every method shares: apply and restore, steps and layers, and life beside the rest of diffusers."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch._dynamo.testing import CompileCounter

from zoo import ConfigError, ResourceError, diffusion

LAYERS = (
    "transformer_blocks.0.attn",
    "transformer_blocks.1.attn",
    "single_transformer_blocks.0.attn",
    "single_transformer_blocks.1.attn",
)


@torch.no_grad()
def outputs(model: torch.nn.Module, x: dict) -> torch.Tensor:
    return model(**x)[0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def snapshot(model: torch.nn.Module) -> list[object]:
    return [*model.attn_processors.values(), *model._forward_pre_hooks, *model._forward_pre_hooks_with_kwargs]


def is_unchanged(model: torch.nn.Module, before: list[object]) -> bool:
    now = snapshot(model)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


# Apply and restore ---------------------------------------------------------------------------------------


def test_remove_restores_the_very_same_objects_and_numbers(flux, inputs):
    flux.register_forward_pre_hook(lambda module, args: None)
    before, stock = snapshot(flux), outputs(flux, inputs())
    handle = diffusion.apply_neighborhood(flux, 3)
    assert not same(outputs(flux, inputs()), stock)
    handle.remove()
    assert is_unchanged(flux, before) and same(outputs(flux, inputs()), stock)
    handle.remove()
    assert is_unchanged(flux, before)
    with pytest.raises(ConfigError, match="removed already"), handle:
        pass


def test_an_exception_inside_the_block_restores_as_well(flux):
    before = snapshot(flux)
    with pytest.raises(KeyboardInterrupt), diffusion.apply_neighborhood(flux, 3):
        raise KeyboardInterrupt
    assert is_unchanged(flux, before)


def test_an_exception_while_applying_leaves_nothing_half_done(flux, monkeypatch):
    before = snapshot(flux)
    monkeypatch.setattr(flux, "register_forward_pre_hook", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffusion.apply_neighborhood(flux, 3)
    assert is_unchanged(flux, before)


def test_the_state_dict_and_saved_files_do_not_notice(flux, inputs, tmp_path):
    keys = list(flux.state_dict())
    with diffusion.apply_neighborhood(flux, 3):
        assert list(flux.state_dict()) == keys
        flux.save_pretrained(tmp_path)
    loaded = type(flux).from_pretrained(tmp_path)
    assert {type(processor) for processor in loaded.attn_processors.values()} == {FluxAttnProcessor}
    assert same(outputs(loaded, inputs()), outputs(flux, inputs()))


def test_a_deep_copy_goes_its_own_way(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3):
        twin = copy.deepcopy(flux)
        wanted = outputs(flux, inputs((5, 5)))
        outputs(flux, inputs((4, 4)))
    assert same(outputs(twin, inputs((5, 5))), wanted)


def test_two_models_keep_their_own_settings(make_flux, inputs):
    first, second = make_flux(), make_flux()
    alone = []
    for kernel_size in (3, 5):
        with diffusion.apply_neighborhood(first, kernel_size):
            alone.append(outputs(first, inputs()))
    with diffusion.apply_neighborhood(first, 3), diffusion.apply_neighborhood(second, 5, dense_layers=0):
        assert same(outputs(first, inputs()), alone[0])
        assert same(outputs(second, inputs((5, 6))), outputs(second, inputs((5, 6))))
        assert same(outputs(second, inputs()), alone[1])
        assert same(outputs(first, inputs()), alone[0])


# Layers and steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense_layers", "changed"),
    [
        (0, LAYERS),
        (1, LAYERS[1:]),
        (3, LAYERS[3:]),
        ([0, 2], (LAYERS[1], LAYERS[3])),
        ("single_*", LAYERS[:2]),
        (["transformer_blocks"], LAYERS[2:]),
        (["transformer_blocks.1", "single_transformer_blocks.0.attn.processor"], (LAYERS[0], LAYERS[3])),
    ],
    ids=str,
)
def test_dense_layers_keep_their_stock_processor(flux, dense_layers, changed):
    before = dict(flux.attn_processors)
    with diffusion.apply_neighborhood(flux, 3, dense_layers=dense_layers) as handle:
        assert handle.layers == changed
        for name, processor in flux.attn_processors.items():
            assert (processor is before[name]) == (name.removesuffix(".processor") not in changed)


def test_dense_steps_are_bit_identical_to_the_stock_processor(flux, inputs):
    stock = outputs(flux, inputs())
    with diffusion.apply_neighborhood(flux, 3, dense_steps=1):
        assert same(outputs(flux, inputs(timestep=1.0)), stock)
        assert not same(outputs(flux, inputs(timestep=0.9)), stock)


def test_steps_are_counted_by_changes_of_the_timestep(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3) as handle:
        assert handle.step == -1
        steps = []
        for timestep in (1.0, 1.0, 0.8, 0.8, 0.5, 1.0, 0.5):  # a rise begins a new generation
            outputs(flux, inputs(timestep=timestep))
            steps.append(handle.step)
        assert steps == [0, 0, 1, 1, 2, 0, 1]
        handle.reset()
        outputs(flux, inputs(timestep=0.4))
        assert handle.step == 0


def test_timesteps_of_training_are_no_steps(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3, dense_steps=2) as handle:
        flux.train()
        for timestep in (0.3, 0.9, 0.9, 0.1):
            outputs(flux, inputs(timestep=timestep))
        assert handle.step == -1 and handle.stats().sparse_calls == handle.stats().calls == 16
        flux.eval()
        outputs(flux, inputs(timestep=1.0))
        assert handle.step == 0 and handle.stats().sparse_calls == 16


def test_training_after_a_generation_forgets_its_steps(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3, dense_steps=1) as handle:
        for timestep in (1.0, 0.5):
            outputs(flux, inputs(timestep=timestep))
        assert handle.step == 1
        outputs(flux.train(), inputs(timestep=0.2))
        assert handle.step == -1
        handle.compare_dense(**inputs())
        outputs(flux.eval(), inputs(timestep=0.4))  # later than where that generation ended, but another one
        assert handle.step == 0 and handle.stats().sparse_calls == 2 * 4


@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["no guidance", "two calls per step"])
def test_a_pipeline_runs_its_first_steps_dense_at_every_generation(make_pipe, run, guidance):
    pipe = make_pipe()
    stock = run(pipe, true_cfg_scale=guidance)
    calls = 4 * (1 + (guidance > 1))
    with diffusion.apply_neighborhood(pipe, 3, dense_steps=3) as handle:
        first = run(pipe, true_cfg_scale=guidance)
        assert handle.step == 3
        assert (handle.stats().calls, handle.stats().sparse_calls) == (4 * calls, calls)
        run(pipe, height=20, width=20)
        assert same(run(pipe, true_cfg_scale=guidance), first)
    with diffusion.apply_neighborhood(pipe, 3, dense_steps=4):
        assert same(run(pipe, true_cfg_scale=guidance), stock)
    assert not same(first, stock)
    assert same(run(pipe, true_cfg_scale=guidance), stock)


# Refusals ------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_named_with_what_is(flux):
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    for target in (unet, SimpleNamespace(transformer=unet)):
        with pytest.raises(ConfigError, match="needs a FluxTransformer2DModel, .* found UNet2DCond"):
            diffusion.apply_neighborhood(target, 3)
    with pytest.raises(ConfigError, match="found str"):
        diffusion.apply_neighborhood("black-forest-labs/FLUX.1-dev", 3)


def test_a_second_call_is_refused_and_leaves_the_first_in_place(flux):
    with diffusion.apply_neighborhood(flux, 3):
        before = snapshot(flux)
        with pytest.raises(ConfigError, match="has a NeighborhoodProcessor already; call remove"):
            diffusion.apply_neighborhood(flux, 5)
        assert is_unchanged(flux, before)


def test_a_handle_that_nobody_holds_is_found(make_pipe):
    pipe = make_pipe()
    assert diffusion.handles(pipe) == []
    before = snapshot(pipe.transformer)
    diffusion.apply_neighborhood(torch.compile(pipe.transformer), 3, dense_layers=LAYERS[:1])
    diffusion.apply_neighborhood(pipe, 5, dense_layers=LAYERS[1:])
    with pytest.raises(ConfigError, match=r"call remove\(\) of its handle \(diffusion.handles"):
        diffusion.apply_neighborhood(pipe, 3)
    assert diffusion.handles(copy.deepcopy(pipe.transformer.transformer_blocks[0])) == []  # it has no model
    found, twins = diffusion.handles(pipe), diffusion.handles(copy.deepcopy(pipe))
    assert [handle.layers for handle in found] == [LAYERS[:1], LAYERS[1:]]
    assert [handle.layers for handle in twins] == [LAYERS[:1]]  # the other one watches the compiled wrapper
    assert not {id(handle) for handle in found} & {id(handle) for handle in twins}
    for handle in found:
        handle.remove()
    assert diffusion.handles(pipe) == [] and is_unchanged(pipe.transformer, before)


def test_a_foreign_processor_is_refused_unless_its_layer_stays_dense(flux):
    foreign = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
    flux.transformer_blocks[1].attn.set_processor(foreign)
    before = snapshot(flux)
    with pytest.raises(ConfigError, match="transformer_blocks.1.attn .* found a FluxIPAdapterAttnProcessor"):
        diffusion.apply_neighborhood(flux, 3)
    assert is_unchanged(flux, before)
    with diffusion.apply_neighborhood(flux, 3, dense_layers=["transformer_blocks.1"]):
        assert flux.transformer_blocks[1].attn.processor is foreign
    assert is_unchanged(flux, before)


def test_a_processor_that_is_replaced_later_is_noticed_and_kept(flux, inputs):
    later = FluxAttnProcessor()
    with diffusion.apply_neighborhood(flux, 3):
        flux.transformer_blocks[0].attn.set_processor(later)
        with pytest.raises(ConfigError, match="transformer_blocks.0.attn has a FluxAttnProcessor, set after"):
            outputs(flux, inputs())
    assert flux.transformer_blocks[0].attn.processor is later
    assert {type(processor) for processor in flux.attn_processors.values()} == {FluxAttnProcessor}


def test_context_parallelism_is_refused_before_and_after(flux, inputs):
    parallel = SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)
    flux._parallel_config = parallel
    with pytest.raises(ConfigError, match="context parallelism"):
        diffusion.apply_neighborhood(flux, 3)
    flux._parallel_config = None
    with diffusion.apply_neighborhood(flux, 3):
        flux._parallel_config = parallel
        with pytest.raises(ConfigError, match="context parallelism"):
            outputs(flux, inputs())


@pytest.mark.parametrize("how", ["forward", "block", "without its compiled wrapper"])
@pytest.mark.parametrize("before", ["nothing", "a call", "a backward"])
def test_a_call_that_passes_by_the_hook_is_refused(flux, inputs, how, before):
    # Even where the geometry of a call before would fit: step, padding and mode would be of that call.
    target = torch.compile(flux, backend="eager") if how == "without its compiled wrapper" else flux
    x = inputs()
    with diffusion.apply_neighborhood(target, 3):
        if before == "a backward":
            target(**x)[0].square().mean().backward()
        elif before == "a call":
            outputs(target, x)
        attend = flux.transformer_blocks[0].attn
        parts = torch.zeros(1, 42, 32), torch.zeros(1, 5, 32)
        call = {"forward": flux.forward, "block": lambda **_: attend(*parts)}.get(how, flux)
        with pytest.raises(ConfigError, match="call the transformer itself"):
            call(**x)
        outputs(target, x)


@pytest.mark.parametrize("kind", ["reference image", "shuffled", "all equal", "column-major"])
def test_image_ids_that_are_no_grid_are_refused(flux, inputs, kind):
    x = inputs((6, 6))
    ids = x["img_ids"]
    if kind == "reference image":
        x["img_ids"] = torch.cat([ids, ids + torch.tensor([1, 0, 0])])
        x["hidden_states"] = x["hidden_states"].repeat(1, 2, 1)
    else:
        changed = {"shuffled": ids.roll(1, 0), "all equal": ids * 0, "column-major": ids[:, [0, 2, 1]]}
        x["img_ids"] = changed[kind]
    with diffusion.apply_neighborhood(flux, 3), pytest.raises(ConfigError, match=r"img_ids .* found \d+ ids"):
        outputs(flux, x)


def test_supported_says_what_can_be_applied_and_why_not(flux):
    report = diffusion.supported(flux)
    assert report["neighborhood"] and report["neighborhood"].reason == "4 layers of FluxTransformer2DModel"
    before = snapshot(flux)
    with diffusion.apply_neighborhood(flux, 3):
        assert not diffusion.supported(flux)["neighborhood"]
    assert is_unchanged(flux, before)
    assert "found Linear" in diffusion.supported(torch.nn.Linear(2, 2))["neighborhood"].reason


def test_without_diffusers_the_import_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("zoo.diffusion")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ResourceError, match=r"pip install 'attnzoo\[diffusion\]'"):
        import zoo.diffusion  # noqa: F401


# Beside the rest of diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_first", [True, False], ids=["LoRA first", "handle first"])
def test_lora_can_be_added_fused_and_unloaded(flux, inputs, adapter_first):
    peft = pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    modules = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    lora = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    x = inputs()
    stock = outputs(flux, x)
    if adapter_first:
        flux.add_adapter(lora)
    # A window over the whole grid must give the stock numbers in every state.
    handle = diffusion.apply_neighborhood(flux, 99)
    if not adapter_first:
        flux.add_adapter(lora)
    found = [outputs(flux, x)]
    flux.fuse_lora()
    found.append(outputs(flux, x))
    flux.unfuse_lora()
    found.append(outputs(flux, x))
    handle.remove()
    adapted = outputs(flux, x)
    assert (adapted - stock).abs().max() > 1e-3
    assert all((y - adapted).abs().max() <= 1e-5 for y in found)
    with diffusion.apply_neighborhood(flux, 99):
        flux.unload_lora()
        assert (outputs(flux, x) - stock).abs().max() <= 1e-5


def test_projections_may_be_fused_and_unfused_while_applied(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3):
        wanted = outputs(flux, inputs())
        flux.fuse_qkv_projections()
        torch.testing.assert_close(outputs(flux, inputs()), wanted)
        flux.unfuse_qkv_projections()
        assert same(outputs(flux, inputs()), wanted)


def test_nothing_of_a_handle_comes_back_when_projections_are_unfused_after_it(flux):
    stock = {name: type(processor) for name, processor in flux.attn_processors.items()}
    with diffusion.apply_neighborhood(flux, 3):
        flux.fuse_qkv_projections()
    flux.unfuse_qkv_projections()
    assert {name: type(processor) for name, processor in flux.attn_processors.items()} == stock


def test_diffusers_is_told_why_it_cannot_make_processors_anew(flux):
    with diffusion.apply_neighborhood(flux, 3):
        processor = next(iter(flux.attn_processors.values()))
        with pytest.raises(ConfigError, match="NeighborhoodProcessor; remove the handle before that"):
            type(processor)()  # as an IP-Adapter does


def test_positional_arguments_are_understood(flux, inputs):
    x = inputs()
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with diffusion.apply_neighborhood(flux, 3), torch.no_grad():
        assert same(flux(*(x[name] for name in names)).sample, outputs(flux, x))


def test_the_attention_backend_of_diffusers_is_carried_over(flux, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # it is set for the process
    flux.set_attention_backend("_native_math")
    with diffusion.apply_neighborhood(flux, 3):
        backends = {str(p._attention_backend.value) for p in flux.attn_processors.values()}
        assert backends == {"_native_math"}


@pytest.mark.parametrize("chosen", ["before and while", "while", "reset while"])
def test_an_attention_backend_chosen_while_applied_stays_after_remove(flux, monkeypatch, chosen):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    if chosen != "while":
        flux.set_attention_backend("_native_math")
    before = snapshot(flux)
    with diffusion.apply_neighborhood(flux, 3, dense_layers=1):
        flux.reset_attention_backend() if chosen == "reset while" else flux.set_attention_backend("native")
    assert is_unchanged(flux, before)
    (backend,) = {p._attention_backend for p in flux.attn_processors.values()}
    assert backend == (None if chosen == "reset while" else attention_dispatch.AttentionBackendName.NATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "wrapped later", "in place"])
def test_a_compiled_transformer_has_one_graph_for_dense_and_one_for_sparse_steps(make_flux, inputs, how):
    torch.compiler.reset()
    flux = make_flux(layers=1, single_layers=0)
    steps = [inputs((4, 4), timestep=1 - n / 10) for n in range(6)]
    with diffusion.apply_neighborhood(flux, 3, dense_steps=2):
        wanted = [outputs(flux, x) for x in steps]
    counter = CompileCounter()
    if how == "wrapped":
        flux = torch.compile(flux, backend=counter, fullgraph=True)
    with diffusion.apply_neighborhood(flux, 3, dense_steps=2) as handle:
        if how == "wrapped later":
            flux = torch.compile(flux, backend=counter)
        elif how == "in place":
            flux.compile(backend=counter)
        found = [outputs(flux, x) for x in steps]
    assert counter.frame_count == 2
    assert (handle.stats().calls, handle.stats().sparse_calls) == (6, 4)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, wanted, strict=True))
