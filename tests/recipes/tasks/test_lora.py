"""LoRA of diffusers transformers from a recipe, on tiny pipelines with random weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from stops import Killed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo.errors import ConfigError, DataError
from zoo.recipes import api, pictures
from zoo.recipes.tasks import lora
from zoo.recipes.training import Training

RECIPE = """
task: lora
model: {name: KIND, checkpoint: PIPE}
data: {root: DATA, image_size: 32, batch_size: 2, val_batch_size: 2, workers: 0, words: 6}
lora: {rank: 2, alpha: 2}
diffusion: {drop_condition: 0.2}
optim: {lr: 1.0e-2, epochs: 2, warmup_epochs: 1}
trainer: {log_every: 1, save_every: 1}
"""
VIDEO = ["data.frames=5", "attention.method=radial", "attention.args={decay_factor: 0.2, block_size: 16}"]
PKA = ["data.conditions=[spatial, subject]", "attention.method=pka", "attention.args={keywords: [[1]]}"]


def tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "square"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=6
    )


def text_model(kind: type, config: type) -> Any:
    return kind(config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def clip_model() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=77, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A Wan pipeline whose clips of 5 frames of 32 x 32 pixels are latents of 2 x 4 x 4."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[0.5] * 4,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=text_model(UMT5EncoderModel, UMT5Config), vae=vae,
        transformer=tiny.build_wan(2), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A Flux pipeline whose images of 32 x 32 pixels are latents of 16 x 16 in patches of 2."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), latent_channels=1, norm_num_groups=2, sample_size=32,
        scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        tokenizer=tokenizer(), text_encoder=clip_model(), vae=vae,
        tokenizer_2=tokenizer(), text_encoder_2=text_model(T5EncoderModel, T5Config),
        transformer=tiny.build_flux(1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hunyuan_video(tmp_path_factory) -> Path:
    """A HunyuanVideo pipeline whose clips of 5 frames of 32 x 32 pixels are latents of 2 x 4 x 4."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        tokenizer=tokenizer(), text_encoder=LlamaModel(llama).eval(), vae=vae,
        tokenizer_2=tokenizer(), text_encoder_2=clip_model(), transformer=tiny.build_hunyuan(1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hunyuan_video")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of clips of five frames and of images with two conditions; four to train, two to validate."""
    clips, images = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)

    def save(path: Path) -> None:
        Image.fromarray(noise.integers(0, 256, (34, 40, 3), dtype=np.uint8)).save(path)

    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            for root in (clips, images):
                (root / split).mkdir(exist_ok=True)
                (root / split / f"{number}.txt").write_text("a red square" if number % 2 else "a blue square")
            (clips / split / str(number)).mkdir()
            for frame in range(5):
                save(clips / split / str(number) / f"{frame}.png")
            for name in (f"{number}.png", f"{number}.1.png", f"{number}.2.png"):
                save(images / split / name)
    return clips, images


@pytest.fixture
def run(request, captioned, tmp_path, monkeypatch):
    """Train adapters: run("wan", "hunyuan_video" or "flux", "folder", "key=value", ..., resume=...)."""
    monkeypatch.setattr(pictures, "curves", lambda *_, **__: None)

    def train(kind: str, name: str, *overrides: str, **keywords: object):
        pipe, data = request.getfixturevalue(kind), captioned[kind == "flux"]
        text = RECIPE.replace("KIND", kind).replace("PIPE", str(pipe)).replace("DATA", str(data))
        file = tmp_path / "tiny.yaml"
        file.write_text(text)
        if "resume" not in keywords:
            keywords["run_dir"] = tmp_path / name
        return api.train(api.recipe(file, [*(PKA if kind == "flux" else VIDEO), *overrides]), **keywords)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", "hunyuan_video", "flux"])
def test_adapters_train_under_a_sparse_attention_and_resume_exactly(run, kind, tmp_path, monkeypatch):
    whole = run(kind, "whole")
    assert np.isfinite(whole.metrics["val_loss"])
    weights = load_file(whole.folder / "model.safetensors")
    assert weights and all(".lora_" in name for name in weights), "the base is not copied"
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if ".lora_B." in name)
    original = Training.training_step

    def killed(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Training, "training_step", killed)
    with pytest.raises(Killed):
        run(kind, "parts")
    monkeypatch.setattr(Training, "training_step", original)
    # What was encoded is not encoded again.
    monkeypatch.setattr(lora, "_encoder", lambda *_: pytest.fail("encoded again"))
    run(kind, "parts", resume=tmp_path / "parts")
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (whole.folder / "metrics.csv").read_text()
    again = load_file(tmp_path / "parts" / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.slow
def test_adapters_load_into_their_pipeline(run, wan, tmp_path):
    folder = run("wan", "adapted", "optim.epochs=1", "lora.rank=2", "lora.alpha=8").folder
    with pytest.raises(ConfigError, match="holds adapters; load them into their pipeline"):
        api.generate(folder)
    model = diffusers.WanTransformer3DModel.from_pretrained(wan, subfolder="transformer")
    pipe = diffusers.WanPipeline.from_pretrained(wan, transformer=model)
    inputs = tiny.wan_inputs(batch=1)
    before = model(**inputs)[0]
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    trained = api.load_trained(folder).model
    after = model.eval()(**inputs)[0]
    assert not torch.equal(before, after)
    saved, loaded = trained.state_dict(), model.state_dict()
    assert {name.replace("default", "default_0"): x.shape for name, x in saved.items()} == {
        name: x.shape for name, x in loaded.items() if ".lora_" in name
    }
    assert all(torch.equal(x, loaded[name.replace("default", "default_0")]) for name, x in saved.items())
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    assert layers and all(set(layer.scaling.values()) == {8 / 2} for layer in layers), "alpha over rank"
    pipe.unload_lora_weights()


def test_hunyuan_is_called_as_its_pipeline_calls_it():
    model, inputs = tiny.build_hunyuan(), tiny.hunyuan_inputs(timestep=500.0)
    told = {
        "text": inputs["encoder_hidden_states"], "mask": inputs["encoder_attention_mask"],
        "pooled": inputs["pooled_projections"],
    }  # fmt: skip
    found = lora.predict_hunyuan(model, inputs["hidden_states"], torch.full((2,), 0.5), told, 6.0)
    torch.testing.assert_close(found, model(**inputs)[0])


def test_flux_is_called_as_its_pipeline_calls_it():
    model, inputs = tiny.build_flux(), tiny.flux_inputs((5, 6))
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    x = tiny.noise(2, 1, 10, 12)
    tokens = pack(x, 2, 1, 10, 12)
    torch.testing.assert_close(lora._pack(x), tokens)
    told = {"text": inputs["encoder_hidden_states"], "pooled": inputs["pooled_projections"]}
    found = lora.predict_flux(model, x, inputs["timestep"], told, 1.0)
    expected = unpack(model(**{**inputs, "hidden_states": tokens})[0], 80, 96, 8 * 2 // 2)
    torch.testing.assert_close(found, expected.reshape(found.shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention.method=pka"], "is for model.name=flux"),
        (["optim.ema=0.9"], "would copy the whole model"),
        (["model.checkpoint=nowhere"], "nowhere holds none of vae"),
        (["diffusion.objective=ddpm_v"], "is a rectified flow"),
    ],
)
def test_what_does_not_fit_is_one_line(run, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        run("wan", "x", *overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("wan", "data.frames=8", "data.frames=8 must be 4k . 1 for wan, such as 5 or 9"),
        ("wan", "data.frames=4", "such as 1 or 5"),
        ("flux", "model.args.foo=1", "model.args do not reach the transformer"),
        ("flux", "model.drop_path_rate=0.1", "model.drop_path_rate is for backbones"),
        ("flux", "data.std=[1,1,1]", "data.std has no effect"),
    ],
)
def test_what_would_be_ignored_is_refused_in_one_line(tmp_path, kind, override, words):
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("KIND", kind))
    more = PKA if kind == "flux" else []
    with pytest.raises(ConfigError, match=words) as refused:
        api.recipe(file, [*more, override])
    assert "\n" not in str(refused.value)
    api.recipe(file, [*more, "data.frames=9"])
    api.recipe(file, ["model.name=hunyuan_video", "data.frames=8"])


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("wan", ["data.image_size=40"], "data.image_size=40 must be a multiple of 16: latents in patches"),
        ("wan", ["data.width=33"], "data.width=33 must be a multiple of 16"),
        ("hunyuan_video", ["data.width=40"], "data.width=40 must be a multiple of 16"),
        ("flux", ["data.image_size=30"], "data.image_size=30 must be a multiple of 4: latents"),
        ("flux", ["model.name=wan"], "is a FluxPipeline; model.name=wan wants a WanPipeline"),
        ("wan", ["lora.targets=[nonesuch]"], "lora.targets=.'nonesuch'."),
        (
            "wan",
            [*VIDEO, "attention.args={decay_facter: 0.2}"],
            "radial has no decay_facter; use decay_factor, .* did you mean decay_factor",
        ),
        (
            "wan",
            [*VIDEO, "attention.args={dense_layers: 9}"],
            "attention.args do not fit radial: dense_layers must lie",
        ),
        (
            "flux",
            [*PKA, "attention.args={keywords: []}"],
            "attention.args do not fit pka: keywords must have",
        ),
    ],
)
def test_pixels_and_pipelines_that_do_not_fit_are_one_line_before_anything_is_encoded(
    request, captioned, tmp_path, monkeypatch, kind, overrides, words
):
    monkeypatch.setattr(lora, "_encoder", lambda *_: pytest.fail("encoded"))
    text = RECIPE.replace("KIND", kind).replace("PIPE", str(request.getfixturevalue(kind)))
    file = tmp_path / "tiny.yaml"
    file.write_text(text.replace("DATA", str(captioned[kind == "flux"])))
    made = api.recipe(file, overrides)
    with pytest.raises(ConfigError, match=words) as refused:
        lora.TASK.load_half(made, train=True)
    assert "\n" not in str(refused.value)
    if "pipeline" in words.lower():
        with pytest.raises(ConfigError, match=words):
            lora.TASK.build_model(made, 1)


@pytest.mark.slow
def test_too_few_frames_and_a_missing_caption_are_one_line(run, captioned, tmp_path):
    with pytest.raises(DataError, match=r"has 5 of data.frames=9 frames"):
        run("wan", "x", "data.frames=9")
    folder = tmp_path / "own"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / split / "one.png").write_bytes((captioned[1] / "val" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"one.png needs one.txt beside it"):
        run("flux", "x", f"data.root={folder}")


def test_a_hidden_prompt_is_hidden_from_both_of_its_states():
    told = {}

    def predict(model, x, t, said, guidance):
        told.update(said)
        return x

    made = api.recipe("lora/flux_pka", ["diffusion.drop_condition=0.999999"], allow_missing=True)
    objective = lora.Lora(made)
    objective.predict = predict
    batch = {"latents": torch.randn(2, 4, 6, 6), "text": torch.ones(2, 3, 5), "pooled": torch.ones(2, 7)}
    objective.loss(None, (batch,))
    assert told["text"].sum() == 0 and told["pooled"].sum() == 0


def test_conditions_are_in_the_order_of_their_numbers():
    told = {f"condition{i}": torch.full((1, 4, 2, 2), float(i)) for i in (10, 2, 0, 11, 1, *range(3, 10))}
    told |= {"text": torch.zeros(1, 3, 8), "pooled": torch.zeros(1, 8)}
    seen = []

    class Model:
        config = SimpleNamespace(guidance_embeds=False)

        def __call__(self, hidden_states, **kwargs):
            seen.extend(hidden_states[0, :, 0].tolist())
            return (hidden_states,)

    lora.predict_flux(Model(), torch.full((1, 4, 2, 2), -1.0), torch.zeros(1), told, 1.0)
    assert seen == list(range(-1, 12))
