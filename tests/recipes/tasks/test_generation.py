"""Generation: what is predicted and sampled is what the formulas say; a run stops and goes on exactly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from stops import Killed, assert_same, kill, terminate
from torchvision import transforms

import zoo
from zoo.attention.swap import MECHANISMS
from zoo.cli import main
from zoo.diffusion.sampling import ImagePipeline
from zoo.errors import ConfigError, DataError, ZooError
from zoo.layers.words import WordEncoder
from zoo.recipes import api, pictures
from zoo.recipes.config import recipe as read
from zoo.recipes.data import digits, prompts
from zoo.recipes.judging import Judge, distances
from zoo.recipes.noising import Noising
from zoo.recipes.tasks import generation
from zoo.recipes.tasks.generation import Generation

PAGE = Path(__file__).resolve().parents[3] / "recipes" / "README.md"
RECIPE = """
task: generation
model: {name: dit_digits, args: {depth: 1, hidden_size: 32, num_heads: 2, in_channels: 3}}
data: {name: folder, root: ROOT, batch_size: 8, val_batch_size: 4, workers: 0}
augment: {hflip: 0.5}
sampling: {steps: 2, count: 4, shown: 4, guidance: [2.0, 1.0], features: nat_digits}
optim: {epochs: 2, warmup_epochs: 1, ema: 0.9, clip_grad: 1.0}
trainer: {log_every: 1, save_every: 2}
"""


@pytest.fixture(scope="session")
def recipe_file(image_folder, tmp_path_factory) -> Path:
    """A recipe of three steps an epoch and two epochs on a small folder of images."""
    file = tmp_path_factory.mktemp("recipe") / "patches.yaml"
    file.write_text(RECIPE.replace("ROOT", str(image_folder)))
    return file


@pytest.fixture(scope="session")
def made(recipe_file, tmp_path_factory) -> Path:
    """The folder of a finished run, for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    api.train(api.recipe(recipe_file), run_dir=folder)
    return folder


@pytest.fixture
def run(recipe_file, tmp_path, monkeypatch):
    """Train the small recipe without measuring its samples: run("folder", "key=value", ..., resume=...)."""
    monkeypatch.setattr(pictures, "curves", lambda *_, **__: None)

    def train(name: str, *overrides: str, **keywords: object):
        recipe = api.recipe(recipe_file, ["sampling.count=0", *overrides])
        if "resume" not in keywords:
            keywords["run_dir"] = tmp_path / name
        return api.train(recipe, **keywords)

    return train


def slow(*values: object):
    """A case for the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- a run


def test_a_run_leaves_samples_metrics_and_a_pipeline(made):
    assert {path.name for path in made.iterdir()} >= {
        "config.yaml", "metrics.csv", "metrics.json", "model.safetensors", "curves.png", "samples.png",
        "samples_1.png", "nearest.png", "samples", "diffusers",
    }  # fmt: skip
    assert [file.name for file in sorted((made / "samples").iterdir())] == [
        "step-000003.png", "step-000006.png",
    ]  # fmt: skip
    facts = json.loads((made / "metrics.json").read_text())
    assert facts["samples"] == 4 and set(facts["made"]) == {"2", "1"}
    assert set(facts["made"]["2"]) == {"nearest", "fid", "kid"}
    assert all(np.isfinite(value) for value in facts["made"]["2"].values())
    assert 0 <= facts["real"]["nearest"] <= np.sqrt(3 * 16 * 16)


def test_after_a_kill_all_goes_on_exactly(run, made, at_step, tmp_path):
    """At the end of an epoch; test_exact_resume has other points."""
    at_step(3, kill)
    with pytest.raises(Killed):
        run("killed")
    run("killed", resume=tmp_path / "killed")
    assert_same(made, tmp_path / "killed")


@pytest.mark.slow
def test_workers_change_nothing_not_even_after_a_stop(run, made, at_step, tmp_path):
    at_step(5, kill)
    with pytest.raises(Killed):
        run("workers", "data.workers=2")
    run("workers", "data.workers=1", resume=tmp_path / "workers")
    assert_same(made, tmp_path / "workers")


@pytest.mark.parametrize(("where", "validating"), [(2, False), slow(3, False), slow(1, True)])
def test_sigterm_saves_the_step_it_came_in(run, made, at_step, tmp_path, where, validating):
    at_step(where, terminate, validating=validating)
    with pytest.raises(SystemExit) as stopped:
        run("stopped")
    assert stopped.value.code == 143
    run("stopped", resume=tmp_path / "stopped")
    assert_same(made, tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_validate_as_one_and_the_first_measures_alone(run, recipe_file, tmp_path):
    still = ["optim.lr=1e-9", "optim.epochs=1", "optim.warmup_epochs=0"]  # nothing but the shares may differ
    one = run("one", *still)
    pair = ["data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "zoo", "train", str(recipe_file), *still, *pair]
    result = subprocess.run([*command, "--run-dir", str(tmp_path / "two")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two" / "samples.png").exists()
    validated = [
        float(line.split(",")[4])
        for folder in (one.folder, tmp_path / "two")
        for line in (folder / "metrics.csv").read_text().splitlines()[-1:]
    ]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    assert one.metrics["val_loss"] == pytest.approx(validated[0], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_within_its_step(run, monkeypatch, tmp_path):
    monkeypatch.setattr(Noising, "weight", lambda self, t: torch.full_like(t, float("nan")))
    with pytest.raises(ZooError, match=r"the loss became nan at step 1 "):
        run("broken")
    assert not list((tmp_path / "broken" / "checkpoints").glob("*.ckpt"))


def test_another_objective_is_another_run(run, made):
    with pytest.raises(ConfigError, match=r"diffusion.times logit_normal -> uniform"):
        run("x", "diffusion.times=uniform", resume=made)


@pytest.mark.parametrize(
    "overrides",
    [
        slow("diffusion.objective=ddpm_v diffusion.min_snr=5 sampling.sampler=ddim diffusion.times=uniform"),
        slow("diffusion.objective=ddpm_epsilon diffusion.noise_schedule=cosine sampling.sampler=ddpm"),
        slow("diffusion.times=mode diffusion.shift=3 sampling.sampler=heun sampling.interval=[0.2,0.8]"),
        slow(
            "diffusion.times=csas trainer.precision=bf16-mixed model.grad_checkpointing=true optim.ema=null"
        ),
    ],
)
def test_every_choice_trains(run, overrides):
    result = run("choice", "optim.epochs=1", *overrides.split())
    assert np.isfinite(result.metrics["val_loss"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=dit_digit", "did you mean dit_digits"),
        ("model.name=nat_digits", "unknown model.name"),
        ("diffusion.objective=flow", "rectified_flow"),
        ("diffusion.timess=uniform", "did you mean diffusion.times"),
        ("sampling.sampler=ddim", "not for diffusion.objective=rectified_flow"),
        ("diffusion.objective=ddpm_v diffusion.shift=2", "is for diffusion.objective=rectified_flow"),
        ("sampling.interval=[1,0]", "smaller number to the larger"),
        ("diffusion.drop_condition=0", "guidance needs a model"),
        ("sampling.guidance=[]", "is empty"),
        ("augment.mixup=0.8", "unknown key 'augment.mixup'"),
        ("optim.layer_decay=0.5", "for backbones"),
        ("model.name=video_dit_s", "video_dit_s makes videos; generation trains dit_.* and mmdit_"),
        ("data.mean=[0,0,0]", "data.mean has no effect, pixels are scaled to -1..1"),
        ("data.std=[1,1,1]", "data.std has no effect"),
    ],
)
def test_a_wrong_recipe_is_one_line(recipe_file, override, words):
    with pytest.raises(ConfigError, match=words) as refused:
        api.recipe(recipe_file, override.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.name=mmdit_digits", "model.args={}", "data.image_size=16"],
            "is told what to make by prompts",
        ),
        (["data.name=digit_pairs"], "is told classes, not prompts"),
        (["data.image_size=15"], "multiple of the model's patches of 4"),
        (["sampling.features=dit_digits"], "neither a run folder nor a model|must classify"),
        (["sampling.judge=nat_digit"], "'nat_digit' is neither a run folder .*did you mean nat_digits"),
        (["sampling.judge=nat_digits"], "does not know dark, light"),
    ],
)
def test_what_does_not_fit_together_is_one_line(run, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        run("x", "sampling.count=2", "optim.epochs=1", *overrides)
    assert "\n" not in str(refused.value)


# ---- samples


def test_a_saved_pipeline_makes_what_the_run_makes(made):
    pipe = ImagePipeline.from_pretrained(made / "diffusers")
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    ours = api.generate(made, classes=["light", 0], steps=3, seed=5)
    theirs = pipe(
        class_labels=["light", 0], num_inference_steps=3, generator=torch.Generator().manual_seed(5)
    ).images
    assert [title for title, _ in ours] == ["light", "dark"]
    assert all(np.array_equal(image, other) for (_, image), other in zip(ours, theirs, strict=True))
    again = api.generate(made / "diffusers", classes=["light", 0], steps=3, seed=5)
    assert all(np.array_equal(image, other) for (_, image), (_, other) in zip(ours, again, strict=True))
    pixels = pipe(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert pixels.shape == (1, 16, 16, 3) and pixels.min() >= 0 and pixels.max() <= 1
    model = diffusers.AutoModel.from_pretrained(str(made / "diffusers"), subfolder="transformer")
    assert isinstance(model, zoo.diffusion.DiTModel)


def test_diffusers_loads_a_run_in_a_fresh_interpreter_as_the_page_of_recipes_says(made, tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    parts = [
        part for part in block.split("\n\n") if part.startswith(("import", "from")) or "runs/dit" in part
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dit").symlink_to(made)
    command = [sys.executable, "-c", "\n".join(parts)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "ImagePipeline" in parts[-1] and result.returncode == 0, result.stderr[-2000:]


def test_a_pipeline_leaves_the_mode_of_its_model_and_follows_offloading(made, monkeypatch):
    pipe = ImagePipeline.from_pretrained(made / "diffusers")
    few = {"num_inference_steps": 2, "output_type": "latent"}
    pipe.transformer.train()
    assert len(pipe(class_labels="light", **few).images) == 1
    assert pipe.transformer.training
    devices = []

    def look(model, scheduler, noise, conditions, nothing, **settings):
        devices.extend(x.device.type for x in (noise, *conditions, *nothing))
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.diffusion.sampling.sample", look)
    monkeypatch.setattr(ImagePipeline, "_execution_device", torch.device("meta"))  # where offloading computes
    with pytest.raises(KeyboardInterrupt):
        pipe(class_labels=["light"], **few)
    assert set(devices) == {"meta"} and pipe.transformer.training
    with pytest.raises(ConfigError, match="class_labels must name at least one class"):
        pipe(class_labels=[])


def test_a_generator_for_each_image_is_what_makes_it(made):
    pipe = ImagePipeline.from_pretrained(made / "diffusers")
    pipe.set_progress_bar_config(disable=True)

    def images(labels: list[int], seeds: list[int]) -> torch.Tensor:
        each = [torch.Generator().manual_seed(seed) for seed in seeds]
        how = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe(labels, generator=each, **how).images

    together = images([0, 1], [3, 4])
    torch.testing.assert_close(
        together, torch.cat([images([0], [3]), images([1], [4])]), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ConfigError, match="generator must be one or 2, one for each image, found 3"):
        images([0, 1], [3, 4, 5])


def test_a_seed_is_a_whole_number(made):
    with pytest.raises(ConfigError, match="seed must be a whole number from 0, found 'a'"):
        api.generate(made, classes=[0], seed="a")


def test_another_sampler_is_for_one_call(made):
    trained = api.load_trained(made)
    before = trained.recipe.sampling.sampler
    with pytest.raises(ConfigError, match="unknown sampler 'bogus'"):
        api.generate(trained, classes=[0], steps=1, sampler="bogus")
    assert trained.recipe.sampling.sampler == before


def test_generate_writes_a_grid_and_single_images(made, tmp_path, capsys):
    output = tmp_path / "out"
    status = main(
        [
            "generate",
            str(made),
            "--classes",
            "light,0",
            "--count",
            "2",
            "--steps",
            "2",
            "--output",
            str(output),
        ]
    )
    assert status == 0, capsys.readouterr().err
    assert sorted(file.name for file in output.iterdir()) == [
        "0000_light.png", "0001_light.png", "0002_0.png", "0003_0.png", "grid.png",
    ]  # fmt: skip
    with Image.open(output / "0000_light.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "lihgt"], "unknown class 'lihgt'; did you mean light"),
        (["--classes", ","], "no class is given"),
        (["--prompt", "a seven"], "told what to show by class_labels"),
        (["--sampler", "ddim"], "not for rectified_flow"),
        (["--guidance", "-1"], "guidance=-1.0 must be"),
        (["--sampler", "unipc", "--steps", "2000"], "steps=2000 must be from 1 to 1000"),
    ],
)
def test_generate_says_in_one_line_what_is_wrong(made, tmp_path, capsys, arguments, words):
    assert main(["generate", str(made), *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_commands_send_a_generator_to_generate(made):
    with pytest.raises(ConfigError, match="use `zoo generate"):
        api.predict(made, Image.new("RGB", (16, 16)))
    with pytest.raises(ConfigError, match="makes no images"):
        api.generate("nat_digits")


# ---- what samples are worth


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge("nat_digits")


def enlarged(images: np.ndarray, side: int = 16) -> np.ndarray:
    """uint8 [N, side, side, 1]."""
    small = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image)[..., None] for image in small])


def test_real_digits_are_recognised_and_others_are_not(recipe_file, judge):
    images, labels = (each[:60] for each in digits.held_out())
    objective = Generation(read(recipe_file), digits.CLASSES)
    objective.judge = judge
    pixels = enlarged(images)
    assert objective.recognised(pixels, labels.tolist()) > 0.95
    assert objective.recognised(pixels, ((labels + 1) % 10).tolist()) < 0.05


def test_one_image_has_no_distance_and_ends_no_run(made):
    real, one = torch.randn(5, 4), torch.randn(1, 4)
    assert distances(real, one) == distances(one, real) == {}
    found = api.evaluate(made, overrides=["sampling.count=1", "sampling.guidance=[1.0]"])
    assert found.made[1.0].keys() == {"nearest"} and "fid" in found.real


def test_real_images_are_compared_as_the_network_sees_them():
    settings = generation.pixel_settings((1, 16, 16))
    found = generation.as_pixels(digits.Digits(train=False), settings, [0, 5])
    assert np.abs(found.astype(int) - enlarged(digits.held_out()[0][[0, 5]])).max() <= 1


def test_training_images_that_cannot_be_read_are_compared_with_nothing(
    recipe_file, image_folder, tmp_path, monkeypatch
):
    """Neither the measures of the samples nor the picture of what is nearest to them."""
    monkeypatch.setattr(pictures, "curves", lambda *_, **__: None)
    folder = shutil.copytree(image_folder, tmp_path / "bad")
    (folder / "train" / "dark" / "03.png").write_bytes(b"")
    overrides = [f"data.root={folder}", "data.bad_images=skip", "optim.epochs=1"]
    result = api.train(api.recipe(recipe_file, overrides), run_dir=tmp_path / "lenient")
    assert np.isfinite(result.evaluation.real["nearest"])
    assert (result.folder / "nearest.png").exists()


# ---- prompts


def test_words_have_an_order_and_a_vocabulary():
    encoder = WordEncoder(prompts.WORDS, 32)
    text, pooled = encoder(["a seven left of a three", "a three left of a seven"])
    assert text.shape == (2, 16, 32) and pooled.shape == (2, 32)
    assert (text[0] - text[1]).abs().max() > 0.1
    assert torch.equal(
        text, WordEncoder(prompts.WORDS, 32)(["A seven left of a three.", "a three left of a seven"])[0]
    )
    with pytest.raises(ConfigError, match="does not know the word 'sevn'; did you mean seven"):
        encoder.encode("a sevn")
    with pytest.raises(ConfigError, match="1 to 16 words, found 17"):
        encoder.encode("a " * 17)


def test_pairs_show_what_their_prompts_say(recipe_file, judge):
    pairs = prompts.DigitPairs(train=False)
    objective = Generation(read(recipe_file), prompts.WORDS)
    objective.judge = judge
    pixels = np.stack([np.asarray(pairs.load(index)) for index in range(60)])
    asked = [pairs.target(index) for index in range(60)]
    assert {" ".join(text.split()[2:-2]) for text in asked} == set(prompts.PLACES)
    assert objective.recognised(pixels, asked) > 0.9
    assert objective.recognised(pixels, [asked[-1], *asked[:-1]]) < 0.2


def test_a_model_of_prompts_trains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "TRAINING_PAIRS", 8)
    monkeypatch.setattr(prompts, "HELD_OUT_PAIRS", 4)
    small = ["model.args={depth: 1, hidden_size: 32, num_heads: 2}", "optim.epochs=1", "data.batch_size=4"]
    quick = ["sampling.steps=2", "sampling.count=2", "sampling.shown=2", "trainer.val_every=1"]
    made = api.recipe("generation/digit_pairs", [*small, *quick])
    result = api.train(made, run_dir=tmp_path / "run")
    assert 0 <= result.metrics["recognised_guidance_2"] <= 1
    output = tmp_path / "out"
    told = ["--prompt", "a seven left of a three", "--prompt", "a one above a two", "--count", "1"]
    assert main(["generate", str(tmp_path / "run"), *told, "--output", str(output)]) == 0, capsys.readouterr()
    assert (output / "0000_a-seven-left-of-a-three.png").exists()
    saved = api.generate(tmp_path / "run" / "diffusers", prompt="a one above a two", steps=2)
    assert saved[0][1].size == (32, 32)
    with pytest.raises(ConfigError, match="makes what a prompt says"):
        api.generate(tmp_path / "run")
    with pytest.raises(ConfigError, match="does not know the word 'sevn'"):
        api.generate(tmp_path / "run", prompt="a sevn left of a three")


# ---- attentions


@pytest.mark.parametrize("attention", MECHANISMS)
def test_every_attention_trains_a_step_in_a_dit(recipe_file, attention):
    args = f"model.args={{depth: 2, hidden_size: 32, num_heads: 2, in_channels: 3, attention: {attention}}}"
    recipe = read(recipe_file, [args])
    torch.manual_seed(0)
    model = generation.TASK.build_model(recipe, 2).train()
    objective = generation.TASK.objective(recipe, ["dark", "light"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 0, 1])
    for _ in range(3):  # gates and output begin at zero, so the attention learns from the third step on
        loss = objective.loss(model, (images, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    moved = {
        name
        for (name, parameter), old in zip(model.named_parameters(), before, strict=True)
        if not torch.equal(parameter, old)
    }
    assert any(".attn." in name for name in moved), "no weight of the attention was trained"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ---- latents


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A VAE with random weights that makes 4 channels of 8 x 8 latents of 16 x 16 pixels."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
        scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def latent_overrides(vae_folder: Path, cache: Path) -> list[str]:
    return [
        "model.args={depth: 1, hidden_size: 32, num_heads: 2, in_channels: 4}",
        f"data.vae={vae_folder}", f"data.cache={cache}", "data.image_size=16",
    ]  # fmt: skip


@pytest.mark.slow
def test_latents_are_computed_once_and_trained_on(run, vae_folder, tmp_path, monkeypatch):
    options = [*latent_overrides(vae_folder, tmp_path / "cache"), "optim.epochs=1", "sampling.count=2"]
    run("first", *options)
    files = (tmp_path / "cache").glob("*.npy")
    assert sorted(np.load(file).shape for file in files) == [(10, 2, 8, 8, 8), (26, 2, 8, 8, 8)]
    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", lambda *_: pytest.fail("encoded again"))
    run("second", *options)
    assert_same(tmp_path / "first", tmp_path / "second")
    pipe = ImagePipeline.from_pretrained(tmp_path / "first" / "diffusers")
    assert isinstance(pipe.vae, diffusers.AutoencoderKL)
    assert pipe(class_labels=[0], num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGB", 1)])
def test_pixels_are_scaled_as_torchvision_scales_them(mode, channels):
    values = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    settings = generation.pixel_settings((channels, 16, 16))
    ours = generation.pixel_transform(settings)
    mean, std = settings.mean[:channels], settings.std[:channels]
    theirs = transforms.Compose(
        [*ours.transforms[:-1], transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    assert repr(ours) == repr(generation.pixel_transform(settings)), "cached latents are found by it"
    found = ours(image)
    assert found.is_contiguous() and torch.equal(found, theirs(image))


def test_latents_are_those_of_the_vae(image_folder, vae_folder, tmp_path):
    from zoo.diffusion.sampling import to_pixels
    from zoo.recipes.data.images import split_of
    from zoo.recipes.data.latents import DrawLatents, LatentImages, load_vae

    vae, images = load_vae(str(vae_folder)), split_of(image_folder, "val")
    transform = generation.pixel_transform(generation.pixel_settings((3, 16, 16)))
    latents = LatentImages(images, vae, transform, tmp_path)
    with torch.inference_mode():
        x = transform(images.load(3))[None]
        expected = [vae.encode(each).latent_dist for each in (x, x.flip(-1))]
        for hflip, truth in zip((0.0, 1.0), expected, strict=True):
            found, _ = DrawLatents.of(vae, hflip=hflip)(latents.load(3), 0)
            torch.testing.assert_close(found, (truth.mean[0] - 0.1) * 0.5, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(
                to_pixels(found[None], vae), (vae.decode(truth.mean).sample / 2 + 0.5).clamp(0, 1),
                atol=5e-3, rtol=0,
            )  # fmt: skip
    draws = torch.stack([DrawLatents.of(vae, noisy=True)(latents.load(3), 0)[0] for _ in range(400)])
    torch.testing.assert_close(draws.std(0), 0.5 * expected[0].std[0], atol=0.1, rtol=0.2)


@pytest.mark.slow
def test_an_image_without_latents_is_left_out_where_that_is_asked_for(
    run, vae_folder, tmp_path, image_folder
):
    folder = tmp_path / "photos"
    shutil.copytree(image_folder, folder)
    broken = sorted((folder / "train").rglob("*.*"))[3]
    broken.write_bytes(b"no image")
    options = [
        *latent_overrides(vae_folder, tmp_path / "cache"), f"data.root={folder}", "optim.epochs=1",
        "sampling.count=0",
    ]  # fmt: skip
    with pytest.raises(DataError, match=re.escape(str(broken))):
        run("x", *options)
    run("first", *options, "data.bad_images=skip")
    (file,) = (file for file in (tmp_path / "cache").glob("*.npy") if len(np.load(file)) == 26)
    assert np.isnan(np.load(file)).any(axis=(1, 2, 3, 4)).sum() == 1
    listed = (tmp_path / "first" / "bad_files.txt").read_text()
    assert f"{broken.relative_to(folder)} could not be read when its latents were computed" in listed
    with pytest.raises(DataError, match="could not be read when"):
        run("y", *options)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.image_size=null"], "data.vae needs data.image_size"),
        (["data.image_size=18"], "data.image_size=18 must be a multiple of 8"),
        (["data.vae=nowhere"], "data.vae=nowhere is no folder of a diffusers AutoencoderKL"),
        (["model.args={in_channels: 3}"], "latents of 4 channels and dit_digits wants 3"),
    ],
)
def test_latents_that_do_not_fit_are_one_line(run, vae_folder, tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words) as refused:
        run("x", *latent_overrides(vae_folder, tmp_path / "cache"), *overrides)
    assert "\n" not in str(refused.value)


def test_an_evaluation_sees_the_images_as_it_is_told(made):
    own = api.evaluate(made, overrides=["sampling.count=0"])
    smaller = api.evaluate(made, overrides=["sampling.count=0", "data.image_size=8"])
    assert own.loss != smaller.loss
    with pytest.raises(ConfigError, match=r"data.mean has no effect"):
        api.evaluate(made, overrides=["data.mean=[0, 0, 0]"])


# ---- the shipped model


def test_the_shipped_model_makes_the_digits_that_are_asked_for(judge):
    from zoo.weights.manifest import entries_of

    (entry,) = entries_of("dit_digits")
    assert entry.packaged.stat().st_size == entry.size < 1_500_000
    made = api.generate("dit_digits", classes=["3", 8], count=6, steps=12, seed=1)
    seen = judge.see([image for _, image in made])
    assert sum(found == title for found, (title, _) in zip(seen, made, strict=True)) >= 11


@pytest.mark.slow
def test_the_shipped_model_is_measured_and_copies_nothing():
    found = api.evaluate("dit_digits", overrides=["sampling.count=100", "sampling.guidance=[2.0]"])
    assert found.made[2.0]["recognised"] >= 0.97
    assert found.made[2.0]["nearest"] > 0.8 * found.real["nearest"]
    assert found.made[2.0]["fid"] < 2
