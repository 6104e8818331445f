"""What every backbone of the zoo promises, over all registered names or the smallest of each family."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.models._features import FeatureHookNet
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import zoo
from zoo import ops
from zoo.attention import AgentAttention
from zoo.layers.mlp import Mlp

SMALL = zoo.list_models("*_digits", task="classification")
TRACED = [
    name if name == "nat_digits" else pytest.param(name, marks=pytest.mark.slow)
    for name in [*SMALL, "nat_mini"]
]
FIXED_SIZE = {"vitrpb_small", "vitrpb_base"}


def build(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(name, **arguments).eval()


def image(model: nn.Module, batch: int = 2, *, height: int | None = None, width: int | None = None):
    channels, rows, columns = model.default_cfg["input_size"]
    return torch.randn(batch, channels, height or rows, width or columns)


@pytest.mark.parametrize("name", zoo.list_models(task="classification"))
def test_timm_knows_it_with_a_complete_configuration(name):
    with torch.device("meta"):
        model = timm.create_model(name if timm.is_model(name) else f"zoo_{name}")
    cfg = model.default_cfg
    parameters = dict(model.named_parameters())
    assert (f"{cfg['classifier']}.weight" in parameters) == (model.num_classes > 0)
    assert f"{cfg['first_conv']}.weight" in parameters
    assert cfg["num_classes"] == model.num_classes
    assert len(cfg["mean"]) == len(cfg["std"]) == 3


@pytest.mark.parametrize("name", zoo.list_models(task="classification"))
def test_layer_decay_sees_as_many_layers_as_there_are(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    blocks = sum(hasattr(m, "attention_weights") for m in model.modules())
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) == blocks + 2, "the stem, every block, and the end"


@pytest.mark.parametrize(
    ("name", "step", "block"),
    [
        ("nat_tiny", "levels.2.downsample.reduction", "levels.2.blocks.17.mlp.fc2"),
        ("agent_swin_tiny", "layers.2.downsample.reduction", "layers.2.blocks.5.mlp.fc2"),
        ("agent_cswin_tiny", "merge3.conv", "stage3.17.mlp.fc2"),
        ("dat_plus_tiny", "down_projs.2.0", "stages.2.mlps.17.linear2.0"),
        ("davit_tiny", "stages.2.downsample.conv", "stages.2.blocks.0.0.mlp.fc2"),
    ],
)
def test_a_step_between_stages_learns_as_fast_as_the_block_beside_it(name, step, block):
    with torch.device("meta"):
        model = zoo.create_model(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[f"{step}.weight"] == scales[f"{block}.weight"]


@pytest.mark.parametrize("name", SMALL)
def test_pools_that_are_not_its_own_are_refused(name):
    with pytest.raises(zoo.ConfigError, match="global_pool must be .*avg.* found 'catavgmax'"):
        zoo.create_model(name, global_pool="catavgmax")
    with pytest.raises(zoo.ConfigError, match="global_pool must be .* found 'bogus'"):
        build(name).reset_classifier(5, "bogus")
    model = build(name)
    with pytest.raises(zoo.ConfigError, match="num_classes must be a whole number from 0, found -1"):
        model.reset_classifier(-1)
    assert model.num_classes == 10


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56), (45, 37), (17, 33), (4, 4)])
def test_any_image_size_runs_forward_and_backward(name, height, width):
    model = build(name).train()
    _, *least = model.default_cfg.get("min_input_size") or (0, 1, 1)
    height, width = max(height, least[0]), max(width, least[1])
    logits = model(image(model, height=height, width=width))
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini", "dinat_s_tiny", "nat_isotropic_small"])
@pytest.mark.parametrize(("height", "width"), [(256, 320), (97, 131)])
def test_published_models_run_on_rectangles_and_odd_sizes(name, height, width):
    model = build(name)
    with torch.no_grad():
        assert model(image(model, 1, height=height, width=width)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_images_one_by_one(name):
    model = build(name)
    images = image(model, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), torch.cat([model(x[None]) for x in images]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", SMALL)
def test_features_at_every_stage_are_what_the_model_says(name):
    model = build(name)
    extractor = build(name, features_only=True)
    extractor.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    images = image(model)
    with torch.no_grad():
        features = extractor(images)
        _, expected = model.forward_intermediates(images)
    for feature, same, info in zip(features, expected, model.feature_info, strict=True):
        torch.testing.assert_close(feature, same)
        side = 32 // info["reduction"]
        assert feature.shape == (2, info["num_chs"], side, side)
    one = build(name, features_only=True, out_indices=(1,))(images)
    assert [f.shape for f in one] == [features[1].shape]


@pytest.mark.parametrize("name", SMALL)
def test_classifiers_come_and_go(name):
    model = build(name)
    images = image(model)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        assert build(name, num_classes=0)(images).shape == pooled.shape
        model.reset_classifier(3)
        assert model(images).shape == (2, 3) and model.get_classifier().out_features == 3
        model.reset_classifier(0, "")
        assert model(images).ndim == 4
    assert build(name, in_chans=1)(torch.randn(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_gives_the_same_gradients(name):
    plain, saving = build(name), build(name)
    saving.set_grad_checkpointing()
    images = image(plain)
    for model in (plain, saving):
        model(images).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


BODIES = [*SMALL, "agent_pvt_tiny", "agent_cswin_tiny", "biformer_stl", "dat_tiny", "dinat_s_tiny"]


@pytest.mark.parametrize("name", BODIES)
def test_hooks_on_the_modules_of_feature_info_see_the_features(name):
    model = build(name)
    assert FeatureHookNet(model, out_indices=(0, 1))(image(model, 1))[1].ndim == 4
    images = image(model, 1)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
        seen, hooks = [], []
        for info in model.feature_info:
            module = model.get_submodule(info["module"])
            hooks.append(module.register_forward_hook(lambda module, inputs, output: seen.append(output)))
        model(images)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen, expected)


@pytest.fixture
def alone(tmp_path):
    """A group of one process, and the mesh of it."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_stages_can_be_sharded(name, stages, alone):
    """By FSDP2, which gathers the weights of a module when its forward begins and lets them go at the end."""
    model, sharded = build(name), build(name)
    paths = [info["module"] for info in model.feature_info]
    for module in sharded.stages_ if stages else map(sharded.get_submodule, paths):
        fully_shard(module, mesh=alone)
    fully_shard(sharded, mesh=alone)
    images = image(model)
    torch.testing.assert_close(sharded(images), model(images))
    for each in (model, sharded):
        each(images).square().sum().backward()
    for one, other in zip(model.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), one.grad)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # which nobody writes to here
@pytest.mark.parametrize("name", SMALL)
def test_stages_of_a_backbone_for_features_can_be_sharded(name, alone):
    model, sharded = build(name, features_only=True), build(name, features_only=True)
    for stage in sharded.model.stages_:
        fully_shard(stage, mesh=alone)
    if torch.__version__ >= (2, 12):  # which takes a container that runs
        fully_shard(sharded, mesh=alone)
    images = image(model.model)
    torch.testing.assert_close(sharded(images), model(images))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_trace_serves_any_batch_with_gradients_and_without(name, grad):
    model = build(name)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, image(model))
    for batch in (1, 4):
        images = image(model, batch)
        with torch.no_grad():
            torch.testing.assert_close(traced(images), model(images), rtol=1e-5, atol=1e-5)
    if grad:
        traced(images).square().sum().backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(images).square().sum().backward()
        torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_recomputation_uses_the_backend_of_the_first_computation(name, monkeypatch):
    from zoo.kernels import dispatch

    used = []
    resolve = dispatch.resolve

    def spy(op, requested, call):
        chosen, reason = resolve(op, requested, call)
        used.append(chosen.name)
        return chosen, reason

    monkeypatch.setattr(dispatch, "resolve", spy)
    model = build(name)
    model.set_grad_checkpointing()
    with ops.use_backend("reference"):
        loss = model(image(model)).sum()
    first = len(used)
    loss.backward()
    assert len(used) == 2 * first and set(used) == {"reference"}


@pytest.mark.parametrize("name", SMALL)
def test_every_backend_gives_the_same(name):
    model = build(name)
    images = image(model)
    with torch.no_grad():
        with ops.use_backend("reference"):
            expected = model(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_low_precision_and_channels_last(name):
    model = build(name)
    images = image(model)
    with torch.no_grad():
        exact = model(images)
        torch.testing.assert_close(
            model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)),
            exact, rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(images)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", TRACED)
def test_it_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model = build(name)
    images = image(model, 1)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", TRACED)
def test_it_exports_with_any_batch(name):
    model = build(name)
    images = image(model)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:1]), model(images[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_captured_weights_sum_to_one_and_rebuild_the_attention(name):
    model = build(name)
    images = image(model)
    seen = {}
    attention = [(n, m) for n, m in model.named_modules() if hasattr(m, "attention_weights")]
    hooks = [m.register_forward_hook(lambda m, x, y, n=n: seen.update({n: (x[0], y)})) for n, m in attention]
    with torch.no_grad(), zoo.capture_attention(model) as records:
        model(images)
    for hook in hooks:
        hook.remove()
    assert list(records) == [n for n, _ in attention]
    for record in records.values():
        assert len(record.axes) == record.weights.ndim
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
    before = model(images)
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model(images), before)


def test_threads_capture_their_own_passes():
    model = build("nat_digits")
    images = [image(model) for _ in range(4)]
    turns = threading.Barrier(len(images))

    def captured(x: torch.Tensor) -> list[torch.Tensor]:
        with zoo.capture_attention(model) as records:
            turns.wait()
            with torch.no_grad():
                model(x)
            turns.wait()
        return [record.weights for record in records.values()]

    with ThreadPoolExecutor(len(images)) as pool:
        together = list(pool.map(captured, images))
    turns = threading.Barrier(1)
    torch.testing.assert_close(together, [captured(x) for x in images], rtol=0, atol=0)


class Keywords(nn.Module):
    """Attention that is called with names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = AgentAttention(32, 2, agent_num=9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attn(x=tokens, grid=(8, 8))


def test_attention_called_with_names_is_captured():
    model, tokens = Keywords(), torch.randn(1, 64, 32)
    with torch.no_grad(), zoo.capture_attention(model) as records:
        out = model(tokens)
    assert records["attn"].weights.shape == (1, 64, 2, 9)
    torch.testing.assert_close(out, model(tokens))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), "Linear has no attention module of the zoo's"),
        (None, "model must be a torch.nn.Module, found NoneType"),
        ("nat_digits", "model must be a torch.nn.Module, found str"),
    ],
)
def test_what_cannot_be_captured_is_refused(model, words):
    with pytest.raises(zoo.ConfigError, match=words), zoo.capture_attention(model):
        raise AssertionError


def test_compiled_models_are_compiled_again_after_captures_that_overlap():
    runs, model = [], build("nat_digits")

    def note(graph, example):
        runs.append(graph)
        return graph.forward

    one, other = zoo.capture_attention(model), zoo.capture_attention(model)
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    torch._dynamo.reset()
    compiled = torch.compile(nn.Linear(2, 2), backend=note)
    compiled(torch.ones(2))
    assert not runs, "the other one still records"
    other.__exit__(None, None, None)
    compiled(torch.ones(2))
    assert len(runs) == 1


@pytest.mark.parametrize("of", ["the model", "the compiled one"])
def test_a_model_that_is_compiled_already_is_captured(of):
    model = build("nat_digits")
    compiled, images = torch.compile(model, backend="eager"), image(model)
    before = compiled(images)
    with zoo.capture_attention(model if of == "the model" else compiled) as records:
        torch.testing.assert_close(compiled(images), before)
    assert list(records) == [n for n, m in model.named_modules() if hasattr(m, "attention_weights")]


def test_hooks_on_layers_of_an_mlp_see_all_tokens_at_once():
    mlp, seen = Mlp(4, 1 << 20), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        mlp(torch.randn(1, 2, 3, 4))
    assert seen == [(1, 2, 3, 1 << 20)]


def test_captured_neighborhoods_rebuild_the_output_of_their_module():
    model = build("nat_digits")
    module = model.levels[1].blocks[1].attn
    x = torch.randn(2, 8, 8, 48)
    with torch.no_grad():
        record = module.attention_weights(x)
        v = module.qkv(x).unflatten(-1, (3, 4, 12))[..., 2, :, :].flatten(1, 2)  # [B, N, H, D]
        out = torch.einsum("byxhk,byxkhd->byxhd", record.weights, v[:, record.keys].unflatten(1, (8, 8)))
        torch.testing.assert_close(module.proj(out.flatten(-2)), module(x))


@pytest.mark.parametrize("name", SMALL)
def test_no_weight_decay_names_the_position_tables(name):
    model = build(name)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}
    if name.startswith("nat"):
        assert {n for n, _ in model.named_parameters() if n.endswith("rpb")} == model.no_weight_decay()
