"""AgentSD: merging tokens, attending through agents, and Stable Diffusion with both."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from goldens import cases, golden
from tiny_diffusion import FLUX, SD15, SD21, SDXL, Tiny
from torch import Tensor

from zoo import ConfigError, diffusion, ops
from zoo.diffusion.agent import AgentConfig, MergePlan, Merger, Phase, agentsd_attention, plan_merge
from zoo.diffusion.processor import Processor

EARLY = Phase(stride=4, ratio=0.4, agent_ratio=0.95)
BOTH = pytest.mark.parametrize("tiny", [SD15, SDXL], ids=repr)


@pytest.mark.parametrize("path", [p for p in cases("agent") if p.id in ("op_agentsd_attention", "absent")])
def test_attention_through_agents_is_the_published_one(path):
    case, stored = golden().load_case(path)
    attn = Attention(80, heads=2, dim_head=40, bias=False)
    attn.load_state_dict(golden().reference_state_dict(case))
    heads = lambda x: x.unflatten(-1, (2, -1))  # noqa: E731
    x, agents = stored["input"], stored["agent"]
    with torch.no_grad():
        q, k, v = (heads(part(x)) for part in (attn.to_q, attn.to_k, attn.to_v))
        out = agentsd_attention(q, k, v, heads(attn.to_q(agents)))
        out = attn.to_out[0](out.flatten(2))
    assert golden().relative_error(out, stored["output"]) <= case["tolerance"]["outputs"]


# Merging ---------------------------------------------------------------------------------------------------


def slow_merge(source: Tensor, y: Tensor, plan: MergePlan, count: int) -> tuple[list, list[int | None]]:
    """One sample, token by token: clusters of tokens, and for every token the cluster it went to."""
    unit = source / source.norm(dim=-1, keepdim=True)
    kept = plan.kept.tolist()
    best = {s: max((float(unit[s] @ unit[d]), d) for d in kept) for s in plan.free.tolist()}
    merged = sorted(best, key=lambda s: -best[s][0])[:count]
    clusters = {token: [token] for token in range(len(source)) if token not in merged}
    for s in merged:
        clusters[best[s][1]].append(s)
    means = {head: y[members].mean(dim=0) for head, members in clusters.items()}
    home = [next(head for head, members in clusters.items() if t in members) for t in range(len(source))]
    return means, home


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (4, 5)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.99])
def test_merging_is_a_mean_over_the_likest_and_parting_gives_it_back(grid, ratio):
    plan = plan_merge(grid, Phase(2, ratio, 0.9), generator=torch.Generator().manual_seed(1))
    if plan is None:
        plan = MergePlan(torch.tensor([0]), torch.arange(1, grid[0] * grid[1]), 0, 0)
    n, count = grid[0] * grid[1], plan.merged
    source, y = torch.randn(2, n, 6, dtype=torch.float64), torch.randn(2, n, 3, dtype=torch.float64)
    merger = Merger(source, plan)
    merged = merger.merge(y, count)
    assert merged.shape == (2, n - count, 3)
    back = merger.part(merged, count)
    for sample in range(2):
        means, home = slow_merge(source[sample], y[sample], plan, count)
        torch.testing.assert_close(back[sample], torch.stack([means[head] for head in home]))
        # The order of merged tokens is nobody's business, their multiset is.
        key = lambda rows: sorted(tuple(round(float(v), 9) for v in row) for row in rows)  # noqa: E731
        assert key(merged[sample]) == key(means.values())


def test_nothing_merged_is_the_identity_and_gradients_flow():
    plan = plan_merge((4, 4), Phase(2, 0.5, 0.0))
    x = torch.randn(1, 16, 3, dtype=torch.float64, requires_grad=True)
    merger = Merger(x, plan)
    assert torch.equal(merger.part(merger.merge(x, 0), 0), x)
    assert torch.autograd.gradcheck(lambda y: merger.part(merger.merge(y, 7).sin(), 7), (x,))


@pytest.mark.parametrize(
    ("grid", "phase", "tokens", "agents"),
    [
        ((64, 64), EARLY, 2458, 256),
        ((14, 18), EARLY, 152, 13),
        ((64, 64), Phase(2, 0.5, 0.8), 2048, 0),  # the published defaults never have agents
        ((64, 64), Phase(2, 0.4, 0.5), 2458, 0),
    ],
    ids=str,
)
def test_tokens_and_agents_are_as_many_as_published(grid, phase, tokens, agents):
    plan = plan_merge(grid, phase)
    assert (plan.tokens, plan.agents) == (tokens, agents)


def test_cells_are_whole_and_the_rest_may_be_merged():
    plan = plan_merge((9, 10), Phase(4, 0.4, 0.9), generator=torch.Generator().manual_seed(0))
    cells = {(int(t) // 10 // 4, int(t) % 10 // 4) for t in plan.kept}
    assert cells == {(0, 0), (0, 1), (1, 0), (1, 1)} and len(plan.kept) == 4
    assert sorted([*plan.kept.tolist(), *plan.free.tolist()]) == list(range(90))
    assert plan_merge((9, 10), EARLY).kept.tolist() == [0, 4, 40, 44]
    assert plan_merge((3, 10), EARLY) is None and plan_merge((8, 8), Phase(4, 0.0, 0.0)) is None


# Stable Diffusion ------------------------------------------------------------------------------------------


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict) -> Tensor:
    return model(**copy.deepcopy(inputs))[0]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def by_hand(tiny: Tiny, inputs: dict, config: AgentConfig, step: int) -> Tensor:
    """The same numbers by wrapping each block's attention, from the parts tested above."""
    model = tiny.build()
    finest = 2 if tiny is SDXL else 1
    for name, block in model.named_modules():
        if not name.rpartition(".")[0].endswith("transformer_blocks"):
            continue
        level = diffusion.adapters.downsampling(model, name)
        if level != finest:
            continue
        grid = tuple(-(-n // level) for n in inputs["sample"].shape[-2:])
        phase = config.early if step < config.early_steps else config.late
        generator = torch.Generator().manual_seed(config.seed + step)
        plan = plan_merge(grid, phase, generator=generator)
        seen = {}
        block.norm1.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(x=args[0]))

        def forward(y, *args, attn=block.attn1, plan=plan, seen=seen, **kwargs):
            merger = Merger(seen["x"], plan)
            tokens = merger.merge(y, plan.merged)
            q, k, v = (
                part(tokens).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)
            )
            if plan.agents:
                agents = attn.to_q(merger.merge(y, plan.merged_for_agents)).unflatten(-1, (attn.heads, -1))
                s = q.shape[-1] ** -0.5
                first = (torch.einsum("bahd,bnhd->bhan", agents, k) * s).softmax(-1)
                second = (torch.einsum("bnhd,bahd->bhna", q, agents) * s**0.3).softmax(-1)
                out = torch.einsum("bhna,bham,bmhd->bnhd", second, first, v) + 0.075 * v
            else:
                weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
                out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
            return merger.part(attn.to_out[0](out.flatten(2)), plan.merged)

        block.attn1.forward = forward
    return output(model, inputs)


@pytest.mark.parametrize(
    ("tiny", "grid"), [(SD15, (16, 12)), (SD15, (10, 18)), (SD21, (16, 12)), (SDXL, (10, 18))], ids=str
)
def test_both_phases_are_what_they_are_made_of(tiny, grid):
    model, config = tiny.build(), AgentConfig(early_steps=1)
    with diffusion.apply_agent(model, early_steps=1) as handle:
        for step, timestep in enumerate((900.0, 500.0)):
            inputs = tiny.inputs(grid, timestep=timestep)
            found, wanted = output(model, inputs), by_hand(tiny, inputs, config, step)
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
            backend = handle.stats().backend
            assert backend == "sdpa" if step else backend in {row.backend for row in ops.backends()}
    assert (found - output(model, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize(("tiny", "guidance"), [(SD15, 1.0), (SD15, 3.0), (SDXL, 3.0)], ids=str)
def test_a_pipeline_is_changed_at_its_finest_maps_and_given_back(tiny, guidance):
    pipe, settings = tiny.pipe(), {"steps": 3, "guidance_scale": guidance}
    before, count = list(pipe.unet.attn_processors.values()), hooks(pipe.unet)
    stock = tiny.generate(pipe, **settings)
    with diffusion.apply_agent(pipe, dense_steps=3):
        assert torch.equal(tiny.generate(pipe, **settings), stock)
    with diffusion.apply_agent(pipe, early_steps=2) as handle:
        level = 1 if tiny is SD15 else 2
        assert {diffusion.adapters.downsampling(pipe.unet, name) for name in handle.layers} == {level}
        assert all(name.endswith("attn1") for name in handle.layers)
        first = tiny.generate(pipe, **settings)
        tiny.generate(pipe, tiny.large, steps=1)
        assert torch.equal(tiny.generate(pipe, **settings), first)
        assert handle.step == 2 and 0 < handle.stats().keep < 1
    assert not torch.equal(first, stock)
    assert all(a is b for a, b in zip(before, pipe.unet.attn_processors.values(), strict=True))
    assert hooks(pipe.unet) == count and torch.equal(tiny.generate(pipe, **settings), stock)


@BOTH
def test_an_exception_in_mid_run_and_handles_left_in_the_wrong_order_restore_all(tiny):
    pipe = tiny.pipe()
    before, count = list(pipe.unet.attn_processors.values()), hooks(pipe.unet)
    stock = tiny.generate(pipe, steps=2)
    interrupt = mock.patch.object(pipe.scheduler, "step", side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), interrupt, diffusion.apply_agent(pipe) as handle:
        tiny.generate(pipe, steps=2)
    first = diffusion.apply_agent(pipe, dense_layers=handle.layers[1:])
    second = diffusion.apply_agent(pipe, dense_layers=handle.layers[:1])
    assert not torch.equal(tiny.generate(pipe, steps=2), stock)
    first.remove()
    second.remove()
    assert all(a is b for a, b in zip(before, pipe.unet.attn_processors.values(), strict=True))
    assert hooks(pipe.unet) == count and torch.equal(tiny.generate(pipe, steps=2), stock)


def test_nothing_to_merge_is_the_stock_pipeline_bit_for_bit():
    pipe = SD15.pipe()
    stock = SD15.generate(pipe, steps=2)
    with diffusion.apply_agent(
        pipe, ratio=0.0, agent_ratio=0.0, late_ratio=0.0, late_agent_ratio=0.0
    ) as handle:
        assert torch.equal(SD15.generate(pipe, steps=2), stock)
    assert handle.stats().sparse_calls == 0 < handle.stats().calls


def test_a_ratio_of_zero_still_has_agents():
    model, inputs = SD15.build(), SD15.inputs()
    with diffusion.apply_agent(model, ratio=0.0) as handle:
        assert output(model, inputs).isfinite().all()
    assert handle.stats().sparse_calls == len(handle.layers)
    n, agents = 16 * 12, 16 * 12 - int(0.95 * 16 * 12)
    assert handle.stats().keep == pytest.approx(2 * max(agents, 12) / n)


def test_coarser_maps_are_changed_when_asked():
    model = SD15.build()
    with diffusion.apply_agent(model, max_downsample=2) as handle:
        names = handle.layers
        assert output(model, SD15.inputs((16, 16))).isfinite().all()
    with diffusion.apply_agent(model) as handle:
        assert set(handle.layers) < set(names)
    with pytest.raises(ConfigError, match=r"at \[2, 4\], found 1"):
        diffusion.apply_agent(SDXL.build(), max_downsample=1)


def test_seed_none_keeps_the_first_of_each_cell():
    model, inputs = SD15.build(), SD15.inputs()
    with diffusion.apply_agent(model, seed=None):
        fixed = output(model, inputs)
    with diffusion.apply_agent(model, seed=3):
        drawn = output(model, inputs)
    assert not torch.equal(fixed, drawn)


def test_fused_projections_lora_and_comparison():
    peft = pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    model, inputs = SD15.build(), SD15.inputs()
    with diffusion.apply_agent(model) as handle:
        plain = output(model, inputs)
        comparison = handle.compare_dense(**inputs)
        assert tuple(comparison.layers) == handle.layers and 0 < comparison.output < 2
        assert handle.step == 0 and torch.equal(output(model, inputs), plain)
    model.fuse_qkv_projections()
    with diffusion.apply_agent(model):
        torch.testing.assert_close(output(model, inputs), plain, atol=1e-5, rtol=1e-4)
    model = SD15.build()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    with diffusion.apply_agent(model):
        assert (output(model, inputs) - plain).abs().max() > 1e-4


def test_projections_fused_before_and_unfused_after_remove_are_the_stock_ones():
    model, inputs = SD15.build(), SD15.inputs()
    stock = output(model, inputs)
    handle = diffusion.apply_agent(model)
    assert not torch.equal(output(model, inputs), stock)
    model.fuse_qkv_projections()
    handle.remove()
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), stock)
    with diffusion.apply_agent(model):
        assert not torch.equal(output(model, inputs), stock)
    assert torch.equal(output(model, inputs), stock)


def test_gradients_are_finite_and_an_exception_restores_all():
    model, inputs = SD15.build(), SD15.inputs()
    before, count = list(model.attn_processors.values()), hooks(model)
    with pytest.raises(KeyboardInterrupt), diffusion.apply_agent(model):
        model(**inputs)[0].square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(before, model.attn_processors.values(), strict=True))
    assert hooks(model) == count and not any(isinstance(p, Processor) for p in before)


def test_a_model_may_train_after_inference_mode():
    model, inputs = SD15.build(), SD15.inputs()
    with diffusion.apply_agent(model):
        with torch.inference_mode():
            model(**inputs)
        model.train()(**inputs)[0].square().mean().backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("place", ["attn1", "attn2"])  # diffusers puts it on the second
def test_an_image_prompt_adapter_is_refused(place):
    model = SD15.build()
    layer = getattr(model.down_blocks[0].attentions[0].transformer_blocks[0], place)
    foreign = IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=16)
    layer.set_processor(foreign)
    with pytest.raises(ConfigError, match=f"found a IPAdapterAttnProcessor2_0 at .*{place}; call unload_ip"):
        diffusion.apply_agent(model)
    assert layer.processor is foreign and "IP-Adapter" in diffusion.supported(model)["agent"].reason


def test_supported_tells_unets_from_transformers():
    assert diffusion.supported(SD15.pipe())["agent"] and not diffusion.supported(FLUX.pipe())["agent"]
    assert not diffusion.supported(SDXL.pipe())["radial"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 1}, "stride .* found 1"),
        ({"ratio": 1.0}, "ratio .* found 1.0"),
        ({"late_agent_ratio": -0.1}, "agent_ratio .* found -0.1"),
        ({"early_steps": 1.5}, "early_steps .* found 1.5"),
        ({"backend": "tirton"}, "'tirton'"),
        ({"seed": "x"}, "seed .* found 'x'"),
        ({"seed": 2**64}, "seed .* found 18446744073709551616"),
        ({"max_downsample": "2"}, "max_downsample .* found '2'"),
        ({"scale_power": None}, "scale_power .* found None"),
        ({"shortcut": float("nan")}, "shortcut .* found nan"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_and_nothing_is_changed(settings, message):
    model = SD15.build()
    before = list(model.attn_processors.values())
    with pytest.raises(ConfigError, match=message):
        diffusion.apply_agent(model, **settings)
    assert all(a is b for a, b in zip(before, model.attn_processors.values(), strict=True))
