"""The zoo's own diffusion transformers: published keys, any size, training, saving, generating."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

import diffusers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_diffusion import finish, masked_sdpa, noise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import zoo
from zoo import ConfigError, IntegrityError, diffusion, ops
from zoo.diffusion import DiTModel, KeywordState, VideoDiTModel
from zoo.kernels import dispatch
from zoo.layers import count_macs
from zoo.layers.radial import radial_block_mask
from zoo.models.dit import DiT, filter_checkpoint
from zoo.models.video_dit import GEOMETRIES, VideoDiT

RADIAL = {"block_size": 4, "decay_factor": 0.5, "decimation_threshold": 8}


def tiny_dit(**changes: object) -> DiTModel:
    torch.manual_seed(0)
    arguments = {"depth": 2, "hidden_size": 16, "num_heads": 2, "sample_size": 8, "num_classes": 5}
    return finish(DiTModel(**{**arguments, **changes}))


def tiny_video(**changes: object) -> VideoDiTModel:
    torch.manual_seed(0)
    arguments = {"depth": 2, "hidden_size": 24, "num_heads": 2, "in_channels": 4}
    return finish(VideoDiTModel(**{**arguments, **changes}))


# DiT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "macs"),
    [
        ("dit_s_8", 33, 0.36), ("dit_b_2", 130, 23.01), ("dit_xl_2", 675, 118.64)
    ],
)  # fmt: skip
def test_parameters_and_cost_are_the_published_ones(name, millions, macs):
    info = zoo.model_info(name)
    assert round(info.params / 1e6) == millions
    assert info.macs / 1e9 == pytest.approx(macs, abs=0.02)
    assert (info.task, info.family, info.input_size) == ("generation", "dit", (4, 32, 32))


@pytest.mark.parametrize("patch", [2, 4])
def test_the_layout_of_diffusers_loads_and_computes_the_same(patch):
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=patch, num_embeds_ada_norm=5, norm_eps=1e-6,
    )  # fmt: skip
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb = first
    finish(theirs)
    ours = tiny_dit(patch_size=patch, sample_size=16, frequency_shift=1)
    assert ours.load_state_dict(filter_checkpoint(theirs.state_dict())) == ([], [])
    x, time, label = noise(2, 4, 16, 16), torch.tensor([900, 3]), torch.tensor([1, 5])
    with torch.no_grad():
        wanted = theirs(x, time, label, return_dict=False)[0]
        torch.testing.assert_close(ours(x, time, label, return_dict=False)[0], wanted, atol=1e-5, rtol=1e-5)


def test_the_authors_layout_loads_and_other_embedders_are_noticed():
    model = tiny_dit()
    published = {**model.state_dict(), "pos_embed": torch.zeros(1, 16, 16)}
    assert model.load_state_dict(filter_checkpoint(published)) == ([], [])
    names = set(model.state_dict())
    assert {"x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight"} <= names
    assert {
        "blocks.1.attn.qkv.weight",
        "blocks.0.adaLN_modulation.1.bias",
        "final_layer.linear.weight",
    } <= names
    theirs = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8)
    with pytest.raises(IntegrityError, match="transformer_blocks.1.*another embedder"):
        filter_checkpoint(theirs.state_dict())


# Keys and shapes of the authors' file for 256 x 256 images.
XL_2 = {
    "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
    "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.0.bias": (1152,),
    "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
    "y_embedder.embedding_table.weight": (1001, 1152),
    "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,),
}  # fmt: skip
XL_2_BLOCK = {
    "attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608),
    "adaLN_modulation.1": (6912, 1152),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["authors", "diffusers"])
def test_the_published_files_of_xl_2_have_every_key_of_ours_and_no_other(layout):
    with torch.device("meta"):
        ours = zoo.create_model("dit_xl_2")
        theirs = DiTTransformer2DModel(out_channels=8)  # what is left is that of the published model
    if layout == "authors":
        shapes = dict(XL_2)
        for number in range(28):
            for name, shape in XL_2_BLOCK.items():
                shapes[f"blocks.{number}.{name}.weight"] = shape
                shapes[f"blocks.{number}.{name}.bias"] = shape[:1]
    else:
        shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    zero = torch.zeros((), dtype=torch.int8)  # expanded, so that a file of gigabytes takes no memory
    found = filter_checkpoint({name: zero.expand(shape) for name, shape in shapes.items()})
    assert {name: x.shape for name, x in found.items()} == {n: x.shape for n, x in ours.state_dict().items()}


def test_files_of_both_layouts_load_by_name(tmp_path):
    sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 5}
    model = finish(zoo.create_model("dit_s_2", **sizes))
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(1, 256, 16)}, tmp_path / "authors.pt")
    model.save_pretrained(tmp_path / "ours")
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "diffusers")
    weights = "diffusion_pytorch_model.safetensors"
    for path, wanted in (
        (tmp_path / "authors.pt", model.state_dict()),
        (tmp_path / "ours" / weights, model.state_dict()),
        (tmp_path / "diffusers" / weights, filter_checkpoint(theirs.state_dict())),
    ):
        loaded = zoo.create_model("dit_s_2", checkpoint_path=path, **sizes)
        assert all(torch.equal(x, wanted[name]) for name, x in loaded.state_dict().items())
    with pytest.raises(IntegrityError, match="does not fit DiTModel"):
        zoo.create_model("dit_s_2", checkpoint_path=tmp_path / "authors.pt", **{**sizes, "depth": 3})


def test_weights_of_global_attention_load_under_a_sparse_one(tmp_path):
    tiny_video().save_pretrained(tmp_path)
    path, sizes = tmp_path / "diffusion_pytorch_model.safetensors", {"hidden_size": 24, "num_heads": 2}
    settings = {"attention": "radial", "attention_kwargs": RADIAL, "checkpoint_path": path}
    sparse = zoo.create_model("video_dit_s", depth=2, in_channels=4, **sizes, **settings)
    x = noise(1, 4, 5, 8, 8)
    wanted = tiny_video(attention="radial", attention_kwargs=RADIAL)(x, 3).sample
    assert torch.equal(sparse(x, 3).sample, wanted)


def test_a_new_model_changes_nothing_and_predicts_zero():
    model = DiT(depth=2, hidden_size=16, num_heads=2, num_classes=5)
    out = model(noise(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 1]))
    assert out.shape == (2, 8, 8, 8) and not out.any()


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (2, 14)], ids=str)
@pytest.mark.parametrize("attention", ["global", "neighborhood", "window", "agent", "bilevel"])
def test_any_size_under_any_attention(attention, size):
    if attention == "bilevel" and size != (8, 8):
        size = (16, 8)
    model = tiny_dit(attention=attention)
    out = model(noise(2, 4, *size), 700, torch.tensor([0, 4])).sample
    assert out.shape == (2, 8, *size) and out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_labels_are_dropped_in_training_alone():
    model = tiny_dit(class_dropout=1.0)
    x, labels = noise(1, 4, 8, 8), torch.tensor([2])
    with torch.no_grad():
        shown, none = (model(x, 5, y).sample for y in (labels, torch.tensor([5])))
        assert not torch.equal(shown, none)
        assert torch.equal(model.train()(x, 5, labels).sample, none)


# Video -----------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, 500).sample.sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_radial_attention_and_its_gradients_are_those_of_the_dense_mask():
    dense, sparse = tiny_video(), tiny_video(attention="radial", attention_kwargs=RADIAL)
    x = noise(2, 4, 5, 8, 8)
    mask = radial_block_mask(5, 16, **RADIAL).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with masked_sdpa(lambda queries, keys: mask):
        wanted, value = gradients(dense, x), dense(x, 500).sample
    assert (sparse(x, 500).sample - value).abs().max() <= 1e-5
    for name, gradient in gradients(sparse, x).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    assert (sparse(x, 500).sample - dense(x, 500).sample).abs().max() > 1e-4


@pytest.mark.parametrize("grid", [(5, 4, 4), (1, 3, 5), (2, 1, 1), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("attention", ["global", "radial", "neighborhood"])
@pytest.mark.parametrize("text_dim", [None, 6])
def test_any_video_with_and_without_text(attention, grid, text_dim):
    kwargs = {"radial": RADIAL, "neighborhood": {"kernel_size": (3, 3, 2)}, "global": None}[attention]
    model = tiny_video(attention=attention, attention_kwargs=kwargs, text_dim=text_dim)
    frames, rows, columns = grid
    x = noise(2, 4, frames, 2 * rows, 2 * columns)
    text = None if text_dim is None else noise(2, 3, 6)
    out = model(x, torch.tensor([900.0, 10.0]), text).sample
    assert out.shape == x.shape and out.isfinite().all()
    with pytest.raises(ConfigError, match="text must be"):
        model(x, 1, noise(2, 3, 6) if text is None else None)


@pytest.mark.parametrize("attention", ["global", "radial", "neighborhood"])
def test_the_padding_of_a_text_is_not_read(attention):
    kwargs = {"radial": RADIAL, "neighborhood": {"kernel_size": 3}, "global": None}[attention]
    model = tiny_video(attention=attention, attention_kwargs=kwargs, text_dim=6)
    x, text, mask = noise(3, 4, 5, 4, 4), noise(3, 5, 6), torch.arange(5) < torch.tensor([[5], [2], [0]])
    with torch.no_grad():
        found = model(x, 7, text, encoder_attention_mask=mask.long()).sample
        for sample, length in enumerate((5, 2)):
            alone = model(x[sample : sample + 1], 7, text[sample : sample + 1, :length]).sample
            torch.testing.assert_close(found[sample : sample + 1], alone, atol=1e-5, rtol=1e-4)
        other = model(x, 7, torch.where(mask[..., None], text, 9.0), encoder_attention_mask=mask).sample
    torch.testing.assert_close(other, found)  # nor is it of a prompt that has nothing else
    model(x, 7, text, encoder_attention_mask=mask).sample.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for wrong in (mask[:, :4], mask.float()):
        with pytest.raises(ConfigError, match=r"text_mask must be bool, .* text \(3, 5\), found torch"):
            model(x, 7, text, encoder_attention_mask=wrong)
    with pytest.raises(ConfigError, match="text None, found"):
        tiny_video()(x, 7, encoder_attention_mask=mask)


def test_mmdit_reads_padding_as_published_and_refuses_a_mask():
    model, arguments = model_and_arguments("mmdit")
    with pytest.raises(ConfigError, match="encoder_attention_mask must be left out, found one"):
        model(*arguments, encoder_attention_mask=torch.ones(1, 5))


def test_a_window_over_the_whole_video_is_global_attention():
    x = noise(1, 4, 3, 8, 6)
    near = tiny_video(attention="neighborhood", attention_kwargs={"kernel_size": 99})
    torch.testing.assert_close(near(x, 1).sample, tiny_video()(x, 1).sample, atol=1e-5, rtol=1e-4)


def test_it_trains_saves_reloads_and_generates_through_a_scheduler(tmp_path):
    torch.manual_seed(0)
    model = VideoDiTModel(
        depth=2, hidden_size=24, num_heads=2, in_channels=2, attention="radial", attention_kwargs=RADIAL
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    videos, losses = 3 * noise(1, 2, 1, 8, 8).expand(4, -1, 5, -1, -1), []  # one still picture
    for step in range(25):
        generator = torch.Generator().manual_seed(step)
        t = diffusion.csas_timesteps(4, generator=generator)
        noisy = torch.randn(videos.shape, generator=generator)
        mixed = torch.lerp(videos, noisy, t.view(-1, 1, 1, 1, 1))  # t = 1 is noise
        loss = (model(mixed, 1000 * t).sample - (noisy - videos)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    model.eval().save_pretrained(tmp_path)
    loaded = VideoDiTModel.from_pretrained(tmp_path)
    assert loaded.config.attention == "radial" and loaded.config.attention_kwargs == RADIAL
    made = []
    for each in (model, loaded):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        latents = noise(1, 2, 5, 8, 8, seed=9)
        with torch.no_grad():
            for t in scheduler.timesteps:
                latents = scheduler.step(each(latents, t).sample, t, latents, return_dict=False)[0]
        made.append(latents)
    assert torch.equal(*made) and made[0].isfinite().all()


def test_dit_saves_reloads_and_generates_with_guidance(tmp_path):
    model = tiny_dit(learn_sigma=False)
    model.save_pretrained(tmp_path)
    loaded = DiTModel.from_pretrained(tmp_path)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(3)
    latents = noise(1, 4, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = loaded(latents.repeat(2, 1, 1, 1), t, torch.tensor([1, 5])).sample
            guided = both[1:] + 4 * (both[:1] - both[1:])
            latents = scheduler.step(guided, t, latents).prev_sample
    assert latents.isfinite().all()
    x, label = noise(1, 4, 8, 8), torch.tensor([1])
    assert torch.equal(model(x, 3, label).sample, loaded(x, 3, label).sample)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_dit_generates_in_the_pipeline_of_diffusers(learn_sigma, tmp_path):
    tiny_dit(num_classes=1000, learn_sigma=learn_sigma).save_pretrained(tmp_path)
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    pipe = DiTPipeline(DiTModel.from_pretrained(tmp_path), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3, 999], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def tiny_pipeline(**settings: object) -> diffusion.ImagePipeline:
    pipe = diffusion.ImagePipeline(
        tiny_dit(learn_sigma=False), FlowMatchEulerDiscreteScheduler(), sample_shape=[4, 8, 8], **settings
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1, found 0"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps must be a whole number from 1, found 2\.5"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be a number from 0 on; 1 is none"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a number from 0 on"),
        ({"guidance_interval": (0.8, 0.2)}, "must go from the smaller number to the larger"),
        ({"guidance_interval": (0.5,)}, "must go from the smaller number to the larger"),
    ],
)
def test_the_zoos_own_pipeline_refuses_settings_that_mean_nothing(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_pipeline()(class_labels=[1], output_type="latent", **{"num_inference_steps": 1, **settings})


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        ([], 12, "unknown class 12; it has 5 classes, 0 to 4"),
        ([*"01234"], "12", "unknown class '12'; it has 5 classes, 0 to 4"),
        ([*"01234"], "-1", "unknown class '-1'; it has 5 classes, 0 to 4"),
        ([*"abcde"], 5, "unknown class 5; it has 5 classes: a, b, c, d, e, or 0 to 4"),
        (["light", *"bcde"], "lihgt", r"unknown class 'lihgt'; did you mean light\?"),
    ],
)
def test_an_unknown_class_is_told_which_there_are(names, asked, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        tiny_pipeline(classes=names).labels([asked])


def test_of_many_classes_an_error_names_the_first():
    pipe = diffusion.ImagePipeline(
        tiny_dit(num_classes=20), FlowMatchEulerDiscreteScheduler(), classes=[f"{n} m" for n in range(20)]
    )
    with pytest.raises(ConfigError, match=r"20 classes: 0 m, 1 m, .*, 11 m, \.\.\., or 0 to 19$"):
        pipe.labels("sheep")


@pytest.mark.parametrize("attention", ["global", "radial", "neighborhood"])
def test_captured_weights_give_the_output_of_a_video(attention):
    kwargs = {"radial": RADIAL, "neighborhood": {"kernel_size": (3, 2, 3)}, "global": None}[attention]
    model = tiny_video(attention=attention, attention_kwargs=kwargs)
    block, seen = model.blocks[1], {}
    block.set_processor(lambda attn, *args: seen.setdefault("out", attn(*seen.setdefault("args", args))))
    with torch.no_grad(), zoo.capture_attention(model) as records:
        model(noise(2, 4, 5, 6, 8), 500)
        value = block.attn.project(*seen["args"][:2])[2].flatten(1, 3)
    record = records["blocks.1.attn"]
    assert record.weights.shape == (2, 5, 3, 4, 2, 60) and record.grid == (5, 3, 4)
    assert ((record.weights == 0).any()) == (attention != "global")
    mixed = torch.einsum("bthm,bmhd->bthd", record.weights.flatten(1, 3), value).unflatten(1, (5, 3, 4))
    torch.testing.assert_close(block.attn.proj(mixed.flatten(-2)), seen["out"], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["dit", "video", "mmdit"])
def test_half_precision_stays_near(kind, autocast):
    model, arguments = model_and_arguments(kind)
    wanted = model(*arguments).sample
    if not autocast:
        model.to(torch.bfloat16)
        arguments = [x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(*arguments).sample
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


def model_and_arguments(kind: str) -> tuple[nn.Module, tuple]:
    if kind == "video":
        return tiny_video(attention="radial", attention_kwargs=RADIAL), (noise(1, 4, 5, 4, 4), 3)
    if kind == "mmdit":
        sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "text_dim": 6, "pooled_dim": 5}
        model = finish(zoo.create_model("mmdit_s", **sizes))
        return model, (noise(1, 16, 4, 6), 3, noise(1, 5, 6), noise(1, 5))
    return tiny_dit(), (noise(1, 4, 8, 8), 3, torch.tensor([1]))


@pytest.mark.parametrize("kind", ["dit", "video"])
def test_checkpointing_and_lora(kind):
    peft = pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    model, arguments = model_and_arguments(kind)

    def gradient() -> Tensor:
        model.zero_grad()
        model(*arguments).sample.sum().backward()
        return model.blocks[0].attn.qkv.weight.grad.clone()

    plain = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)
    model.disable_gradient_checkpointing()

    wanted = model(*arguments).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False))
    assert (model(*arguments).sample - wanted).abs().max() > 1e-4


def test_what_is_computed_again_leaves_the_masks_of_later_steps_alone():
    model, _ = model_and_arguments("mmdit")
    keywords = KeywordState([[2, 3]], epsilon=0.6)
    subject = noise(1, 16, 4, 4, seed=9)

    def step(seed: int) -> Tensor:
        told = noise(1, 5, 6, seed=seed), noise(1, 5)
        return model(noise(1, 16, 4, 6, seed=seed), 9 - seed, *told, subjects=[subject], keywords=keywords)

    model.enable_gradient_checkpointing()
    loss = sum(step(seed).sample.sum() for seed in (1, 2, 3))
    before = {layer: [x.clone() for x in masks] for layer, masks in keywords._routed.items()}
    assert not all(mask.all() for masks in before.values() for mask in masks)
    loss.backward()
    for layer, masks in before.items():
        assert all(map(torch.equal, keywords._routed[layer], masks))


@pytest.mark.parametrize("kind", ["dit", "video", "mmdit"])
def test_what_is_computed_again_takes_the_backends_of_the_first_time(kind, monkeypatch):
    model, arguments = model_and_arguments(kind)
    model.enable_gradient_checkpointing()
    resolve, used = dispatch.resolve, []

    def spy(op: str, requested: str, call: object) -> tuple[dispatch.Backend, str]:
        used.append(resolve(op, requested, call)[0].name)
        return resolve(op, requested, call)

    monkeypatch.setattr(dispatch, "resolve", spy)
    with ops.use_backend("reference"):
        out = model(*arguments).sample.sum()
    first = len(used)
    out.backward()
    assert len(used) > first and set(used) == {"reference"}


class Doubled:
    """Twice what the attention gives."""

    calls = 0

    def __call__(self, attention: nn.Module, *args: object) -> Tensor:
        type(self).calls += 1
        return 2 * attention(*args)


@pytest.mark.parametrize("kind", ["dit", "video", "mmdit"])
def test_processors_are_exchanged_as_in_diffusers(kind):
    model, arguments = model_and_arguments(kind)
    before = model.attn_processors
    assert list(before) == ["blocks.0.processor", "blocks.1.processor"]
    with torch.no_grad():
        wanted = model(*arguments).sample
        model.set_attn_processor(Doubled())
        Doubled.calls = 0
        assert not torch.equal(model(*arguments).sample, wanted) and Doubled.calls == 2
        model.set_attn_processor(nn.Identity())  # a module, which a plain object then replaces
        model.set_attn_processor(dict(before))
        assert all(model.attn_processors[name] is processor for name, processor in before.items())
        assert torch.equal(model(*arguments).sample, wanted)
    assert not any("processor" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="number of processors 1 does not match"):
        model.set_attn_processor({"blocks.0.processor": Doubled()})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "video"])
def test_they_compile_whole_and_block_by_block_once_for_all_steps(kind):
    model, (x, _, *rest) = model_and_arguments(kind)
    times = range(8, 0, -1)
    with torch.no_grad():
        wanted = [model(x, time, *rest).sample for time in times]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, 8, *rest).sample, wanted[0])
        torch.compiler.reset()
        counter = CompileCounter()
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for time, result in zip(times, wanted, strict=True):
            torch.testing.assert_close(model(x, time, *rest).sample, result)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_lora_for_longer_videos_is_saved_and_loaded_as_diffusers_does(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    model, x = tiny_video(attention="radial", attention_kwargs=RADIAL), noise(1, 4, 7, 4, 4)
    plain = model(x, 3).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False))
    adapted = model(x, 3).sample
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    model.save_lora_adapter(tmp_path)
    other = tiny_video(attention="radial", attention_kwargs=RADIAL)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(x, 3).sample, adapted)
    assert (adapted - plain).abs().max() > 1e-4
    other.unload_lora()
    torch.testing.assert_close(other(x, 3).sample, plain)


def test_a_video_model_may_train_after_inference_mode():
    model, x = tiny_video(attention="radial", attention_kwargs=RADIAL), noise(1, 4, 5, 8, 8)
    with torch.inference_mode():
        model(x, 3)
    model.train()(x, 3).sample.sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.any()


def test_geometries_are_bounded():
    model = VideoDiT(depth=1, hidden_size=12, num_heads=2, attention="radial", attention_kwargs=RADIAL)
    for frames in range(1, GEOMETRIES + 4):
        model.lists_of((frames, 1, 1), torch.device("cpu"))
    assert len(model._lists) == GEOMETRIES and "_lists" not in model.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: zoo.create_model("dit_xl_3"), "'dit_xl_3'.*did you mean dit_xl_"),
        (lambda: zoo.create_model("dit_s_8", colour="red"), "unknown argument 'colour' of dit_s_8"),
        (lambda: zoo.create_model("mmdit_s", num_classes=5), "unknown argument 'num_classes' of mmdit_s"),
        (lambda: tiny_video(attention="raidal"), "'raidal'.*did you mean radial"),
        (lambda: tiny_dit(attention="globl"), "unknown attention 'globl'"),
        (lambda: tiny_video(hidden_size=20, num_heads=3), "3 heads an even width"),
        (
            lambda: tiny_dit()(noise(1, 4, 7, 8), 1, torch.tensor([0])),
            r"\(2, 2\) divides, found \(1, 4, 7, 8\)",
        ),
        (lambda: tiny_video()(noise(1, 4, 8, 8), 1), r"found \(1, 4, 8, 8\)"),
    ],
    ids=["name", "argument", "classes", "video attention", "image attention", "heads", "size", "axes"],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("attention", "kwargs", "message"),
    [
        ("global", {"kernel_size": 3}, "unknown 'kernel_size' in attention_kwargs of 'global'; it has none"),
        ("radial", {"blok_size": 4}, "'blok_size' .* use block_size, .*; did you mean block_size"),
        ("radial", {"num_frames": 3}, "unknown 'num_frames'"),
        ("radial", {"decay_factor": -1}, "decay_factor .* found -1"),
        ("radial", {"rule": "prnted"}, "rule .* found 'prnted'; did you mean printed"),
        ("radial", {"keep_diagonal": "no"}, "keep_diagonal .* found 'no'"),
        ("neighborhood", {"kernel_sise": 3}, "use kernel_size, dilation, stride; did you mean kernel_size"),
        ("neighborhood", {"kernel_size": 1}, "kernel_size .* >= 2 or 3 of them, found 1"),
        ("neighborhood", {"kernel_size": (3, 3)}, r"3 of them, found \(3, 3\)"),
        ("neighborhood", {"kernel_size": 3.0}, "found 3.0"),
        ("neighborhood", {"dilation": 0}, "dilation .* found 0"),
        ("neighborhood", {"kernel_size": [3, 4, 5], "stride": 4}, "stride must not exceed .* found 4"),
    ],
    ids=str,
)
def test_wrong_arguments_of_an_attention_are_named_when_the_model_is_built(attention, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        tiny_video(attention=attention, attention_kwargs=kwargs)


def test_every_name_is_listed_and_its_rows_exist():
    names = zoo.list_models(task="generation")
    assert {f"dit_{s}_{p}" for s in ("s", "b", "l", "xl") for p in (2, 4, 8)} < set(names)
    assert {"video_dit_s", "video_dit_b", "video_dit_l", "video_dit_xl"} < set(names)
    assert not set(names) & {*zoo.list_models(task="classification"), *timm.list_models()}
    assert set(names) <= set(zoo.list_models())
    with torch.device("meta"):
        for name in ("dit_s_8", "mmdit_s", "video_dit_s"):
            model = zoo.create_model(name, depth=1)
            assert isinstance(model, diffusers.ModelMixin)
            assert (model.config.depth, model.config.hidden_size) == (1, 384)


def test_what_is_known_of_them_needs_no_diffusers(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("zoo.diffusion")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    info = zoo.model_info("video_dit_s")
    assert (info.input_size, info.num_classes, info.weights) == ((16, 9, 32, 32), 0, ())
    tokens, width = 9 * 16 * 16, 384
    blocks = 12 * (12 * tokens * width**2 + 6 * width**2 + 2 * tokens**2 * width)
    ends = tokens * (64 * width + 64 * width) + (256 + width + 2 * width) * width
    assert info.macs == blocks + ends
    with pytest.raises(zoo.ResourceError, match=r"pip install 'attnzoo\[diffusion\]'"):
        zoo.create_model("video_dit_s")


@pytest.mark.parametrize(
    ("name", "attention", "kwargs"),
    [
        ("video_dit_s", "radial", RADIAL),
        ("video_dit_s", "neighborhood", {"kernel_size": (3, 3, 3)}),
        ("mmdit_s", "neighborhood", {"kernel_size": 3}),
    ],
)
def test_a_sparser_attention_counts_fewer_multiply_adds(name, attention, kwargs):
    sizes = {"depth": 1, "hidden_size": 24, "num_heads": 2}
    with torch.device("meta"):
        dense, sparse = (
            zoo.create_model(name, **sizes, attention=kind, attention_kwargs=given)
            for kind, given in (("global", None), (attention, kwargs))
        )
        latents, *others = dense.example_inputs()
    dense, sparse = (count_macs(model, latents.shape[1:], *others) for model in (dense, sparse))
    assert 0 < sparse < dense
