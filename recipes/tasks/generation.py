"""Generation: a diffusion transformer learns to make images of a class or for a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from zoo.errors import ConfigError, DataError
from zoo.layers.words import WordEncoder
from zoo.recipes import pictures
from zoo.recipes.data import load_half, prompts
from zoo.recipes.data.latents import DrawLatents, LatentImages, load_vae, shrinking
from zoo.recipes.data.loader import BadImage, EpochLoader, Images
from zoo.recipes.data.transforms import ImageOnly, InputSettings, JointTransform
from zoo.recipes.files import write_atomically
from zoo.recipes.judging import Judge, distances, nearest
from zoo.recipes.noising import Noising, spread
from zoo.recipes.run_folder import Trained, choose_device
from zoo.recipes.schema import GenerationRecipe
from zoo.recipes.tasks import base

COMPARED = 20_000  # training images, at most, among which copies are looked for
DIFFUSERS = "diffusers"  # the folder of the pipeline in a run folder


@dataclass(frozen=True, kw_only=True)
class Evaluation(base.Evaluation):
    """`made` has for each guidance the shares and distances of the samples; others are of real images.

    `explained` is the share of its target's square that the network predicts of held-out images. `nearest`
    are mean distances to the closest training image, over pixels in 0..1.
    """

    explained: float
    made: dict[float, dict[str, float]] = field(default_factory=dict)
    real: dict[str, float] = field(default_factory=dict)
    samples: dict[float, np.ndarray] = field(default_factory=dict, repr=False)  # uint8 [N, y, x, C]
    asked: list[int | str] = field(default_factory=list, repr=False)

    def headline(self, of: str = "images") -> str:
        if not self.made:
            return f"{100 * self.explained:.2f} % explained of {self.images:,} {of}"
        each = [self._of(guidance, values) for guidance, values in self.made.items()]
        count = len(self.asked)
        real = f" ({self.real['nearest']:.2f} of real ones)" if "nearest" in self.real else ""
        return f"of {count:,} samples {'; '.join(each)}{real}"

    def _of(self, guidance: float, values: dict[str, float]) -> str:
        parts = []
        if "recognised" in values:
            parts.append(f"{100 * values['recognised']:.1f} % recognised")
        parts.append(f"distance to training images {values['nearest']:.2f}")
        return f"{', '.join(parts)} at guidance {guidance:g}"

    def metrics(self) -> dict[str, float]:
        found = {"val_loss": self.loss, "val_explained": self.explained}
        for guidance, values in self.made.items():
            found |= {f"{name}_guidance_{guidance:g}": value for name, value in values.items()}
        return found | {f"{name}_real": value for name, value in self.real.items()}

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "images": self.images,
            "skipped": self.skipped,
            "loss": self.loss,
            "explained": self.explained,
            "samples": len(self.asked),
            "made": {f"{guidance:g}": values for guidance, values in self.made.items()},
            "real": self.real,
        }


# ---- loss and samples


class Generation(base.Objective):
    """The squared error of what a network predicts of noisy images, and pictures of what it makes."""

    def __init__(self, recipe: GenerationRecipe, classes: Sequence[str]) -> None:
        from torchmetrics import MeanMetric

        super().__init__()
        self.recipe, self.classes = recipe, list(classes)
        self.noising = Noising(recipe.diffusion)
        self.val_loss, self.val_power = MeanMetric(), MeanMetric()

    @cached_property
    def judge(self) -> Judge | None:
        """What says which class an image shows, loaded when it is first asked."""
        return Judge(self.recipe.sampling.judge) if self.recipe.sampling.judge is not None else None

    @cached_property
    def eyes(self) -> Judge | None:
        """Whose features FID and KID compare."""
        return (
            Judge(self.recipe.sampling.features) if self.recipe.sampling.features is not None else self.judge
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Any]) -> Tensor:
        x, targets = batch
        t = self.noising.times(len(x), x.device)
        noise = torch.randn_like(x)
        conditions = self.conditions(model, targets, x.device)
        if isinstance(targets[0], str):  # a model of classes hides them by itself
            hidden = torch.rand(len(x), device=x.device) < self.recipe.diffusion.drop_condition
            conditions = tuple(each * spread(~hidden, each) for each in conditions)
        error = (self.predict(model, x, noise, t, conditions) - self.noising.target(x, noise, t)) ** 2
        return (error.flatten(1).mean(1) * self.noising.weight(t)).mean()

    def predict(self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, conditions: Any) -> Tensor:
        """What the network says of images at times [B]."""
        from zoo.diffusion.sampling import predict

        noisy = self.noising.noised(x, noise, t)
        return predict(model, noisy, self.noising.model_time(t), conditions).float()

    def conditions(self, model: nn.Module, targets: Any, device: torch.device) -> tuple[Tensor, ...]:
        """What the network is told, from class numbers or prompts."""
        if isinstance(targets[0], str):
            encoder = WordEncoder(self.classes, model.config.text_dim)
            return tuple(each.to(device) for each in encoder(targets))
        return (torch.as_tensor(targets, device=device),)

    def update(self, model: nn.Module, batch: tuple[Tensor, Any], number: int) -> None:
        x, targets = batch
        # The same times and noise in every validation, so that only the network makes a difference.
        generator = torch.Generator().manual_seed(number)
        t = self.noising.even(len(x))[torch.randperm(len(x), generator=generator)].to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        said = self.predict(model, x, noise, t, self.conditions(model, targets, x.device))
        wanted = self.noising.target(x, noise, t)
        self.val_loss.update(((said - wanted) ** 2).mean(), weight=len(x))
        self.val_power.update((wanted**2).mean(), weight=len(x))

    def compute(self) -> dict[str, float]:
        loss, power = self.val_loss.compute().item(), self.val_power.compute().item()
        self.val_loss.reset(), self.val_power.reset()
        return {"val_loss": loss, "val_explained": 1 - loss / power}

    def show(self, model: nn.Module, folder: Path, step: int, *, first: bool) -> dict[str, float]:
        sampling = self.recipe.sampling
        asked = self.ask(sampling.shown)
        images = self.make(model, asked, sampling.guidance[0])
        if first:
            target = folder / "samples"
            target.mkdir(exist_ok=True)
            pictures.tiles(images, target / f"step-{step:06d}.png", columns=self.columns(asked))
        return {} if self.judge is None else {"val_recognised": self.recognised(images, asked)}

    def columns(self, asked: Sequence[Any]) -> int:
        """How many samples in a row: those of a class below each other."""
        return len(self.classes) if asked and isinstance(asked[0], int) and len(self.classes) <= 20 else 10

    def ask(self, count: int) -> list[int | str]:
        """What to make: the classes in turn, or the prompts of held-out images."""
        if self.recipe.data.name in prompts.NAMES:
            images = prompts.DigitPairs(train=False)
            return [images.target(index % len(images)) for index in range(count)]
        return [index % len(self.classes) for index in range(count)]

    def make(self, model: nn.Module, asked: Sequence[int | str], guidance: float) -> np.ndarray:
        """Make images, uint8 [N, y, x, C], always from the same noise."""
        from zoo.diffusion.sampling import sample, to_pixels

        sampling = self.recipe.sampling
        generator = torch.Generator().manual_seed(sampling.seed)
        shape, parts = sample_shape(model, self.recipe), []
        device = next(model.parameters()).device
        for start in range(0, len(asked), sampling.batch):
            some = asked[start : start + sampling.batch]
            conditions = self.conditions(model, some, device)
            x = sample(
                model,
                scheduler_of(self.recipe),
                torch.randn(len(some), *shape, generator=generator).to(device),
                conditions,
                self.nothing(model, conditions),
                guidance=guidance,
                interval=tuple(sampling.interval),
                steps=sampling.steps,
                generator=generator,
            )
            vae = self.vae.to(device) if self.vae is not None else None
            pixels = to_pixels(x, vae).movedim(1, -1)
            parts.append((255 * pixels).round().byte().cpu().numpy())
        return np.concatenate(parts)

    @cached_property
    def vae(self) -> nn.Module | None:
        """What makes pixels of latents."""
        return vae_of(self.recipe)

    def nothing(self, model: nn.Module, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the network is told for no class and no prompt."""
        if len(conditions) == 1:
            return (torch.full_like(conditions[0], model.num_classes),)
        return tuple(torch.zeros_like(each) for each in conditions)

    def recognised(self, images: np.ndarray, asked: Sequence[int | str]) -> float:
        """The share of images in which the judge sees all that was asked for."""
        seen, wanted, owner = [], [], []
        for number, (pixels, what) in enumerate(zip(images, asked, strict=True)):
            picture = to_image(pixels)
            shown = prompts.parts(picture, what) if isinstance(what, str) else [(picture, self.classes[what])]
            for part, name in shown:
                seen.append(part), wanted.append(name), owner.append(number)
        right = np.ones(len(images), dtype=bool)
        for number, found, name in zip(owner, self.judge.see(seen), wanted, strict=True):
            right[number] &= found == name
        return float(right.mean())


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [y, x, 1 or 3] as RGB."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def scheduler_of(recipe: GenerationRecipe) -> Any:
    """Build the scheduler of a recipe."""
    from zoo.diffusion.sampling import make_scheduler

    how = recipe.diffusion
    return make_scheduler(
        recipe.sampling.sampler, how.objective,
        noise_schedule=how.noise_schedule, shift=how.shift, clip=recipe.data.vae is None,
    )  # fmt: skip


def sample_shape(model: nn.Module, recipe: GenerationRecipe) -> tuple[int, int, int]:
    """[C, y, x] of what the network sees. Raises ConfigError where nothing says how large that is."""
    channels, vae = model.x_embedder.proj.in_channels, vae_of(recipe)
    side = recipe.data.image_size
    if vae is not None:
        latents, times = vae.config.latent_channels, shrinking(vae) * model.patch_size
        if latents != channels:
            raise ConfigError(
                f"data.vae={recipe.data.vae} has latents of {latents} channels and {recipe.model.name} wants "
                f"{channels}; set model.args.in_channels={latents}"
            )
        if side % times:
            raise ConfigError(f"data.image_size={side} must be a multiple of {times}: latents in patches")
        return channels, side // shrinking(vae), side // shrinking(vae)
    if side is None:
        if not hasattr(model, "sample_shape"):
            raise ConfigError(f"{recipe.model.name} is for images of any size; give data.image_size=PIXELS")
        side = model.sample_shape[-1]
    patch = model.patch_size
    if side % patch:
        raise ConfigError(f"data.image_size={side} must be a multiple of the model's patches of {patch}")
    return channels, side, side


def vae_of(recipe: GenerationRecipe) -> nn.Module | None:
    """Return the VAE of a recipe, None where the network sees pixels."""
    return load_vae(recipe.data.vae) if recipe.data.vae is not None else None


# ---- the task


class GenerationTask(base.Task):
    """Images of a class, or for a prompt."""

    metrics = ("val_loss", "val_explained", "val_recognised")
    monitor = "val_explained"
    label = "explained"

    def load_half(self, recipe: GenerationRecipe, *, train: bool) -> Images:
        if recipe.data.name == "digit_pairs":
            images = prompts.DigitPairs(train=train)
        else:
            images = load_half(recipe, train=train)
        vae = vae_of(recipe)
        if vae is None:
            return images
        folder = Path(recipe.data.cache) if recipe.data.cache is not None else None
        lenient = recipe.data.bad_images == "skip"
        return LatentImages(images, vae, pixel_transform(pixels_of_a_vae(recipe)), folder, lenient=lenient)

    def build_model(self, recipe: GenerationRecipe, num_classes: int) -> nn.Module:
        from zoo import create_model

        part = recipe.model
        arguments = dict(part.args)
        if part.name.startswith("dit"):
            arguments |= {"num_classes": num_classes, "class_dropout": recipe.diffusion.drop_condition}
        elif recipe.data.name not in prompts.NAMES:
            raise ConfigError(
                f"{part.name} is told what to make by prompts, of which data.name={recipe.data.name} has "
                f"none; use a dit, or data.name={prompts.NAMES[0]}"
            )
        if part.name.startswith("dit") and recipe.data.name in prompts.NAMES:
            raise ConfigError(f"{part.name} is told classes, not prompts; use an mmdit")
        model = create_model(
            part.name, pretrained=part.pretrained, checkpoint_path=part.checkpoint, **arguments
        )
        if part.grad_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def settings(self, recipe: GenerationRecipe, model: nn.Module) -> InputSettings:
        shape = sample_shape(model, recipe)
        return pixels_of_a_vae(recipe) if recipe.data.vae is not None else pixel_settings(shape)

    def transforms(
        self, recipe: GenerationRecipe, settings: InputSettings
    ) -> tuple[JointTransform, JointTransform]:
        vae = vae_of(recipe)
        if vae is not None:
            return DrawLatents.of(vae, hflip=recipe.augment.hflip, noisy=True), DrawLatents.of(vae)
        flip = [transforms.RandomHorizontalFlip(recipe.augment.hflip)] if recipe.augment.hflip else []
        return ImageOnly(pixel_transform(settings, flip)), ImageOnly(pixel_transform(settings))

    def objective(self, recipe: GenerationRecipe, classes: Sequence[str]) -> Generation:
        made = Generation(recipe, classes)
        wanted = set() if made.judge is None or recipe.data.name in prompts.NAMES else set(classes)
        unknown = sorted(wanted - set(made.judge.trained.classes)) if wanted else []
        if unknown:
            raise ConfigError(
                f"sampling.judge={recipe.sampling.judge} does not know {', '.join(unknown[:5])}, which the "
                "data has; train one with a recipe of classification, or leave it out"
            )
        _ = made.eyes  # now, not after an epoch
        return made

    def other_images(self, trained: Trained, recipe: GenerationRecipe, data: str | Path) -> Images:
        raise ConfigError("a model that generates is measured on the data of its recipe; leave --data out")

    @torch.inference_mode()
    def measure(
        self,
        trained: Trained,
        images: Images,
        recipe: GenerationRecipe,
        *,
        device: str | torch.device | None = None,
        on_bad: Any = None,
    ) -> Evaluation:
        where = choose_device(device)
        model = trained.model.to(where)
        objective = Generation(recipe, trained.classes).to(where)
        skipped: set[int] = set()

        def skip(source: Images, bad: BadImage) -> None:
            skipped.add(bad.index)
            on_bad(source, bad)

        loader = EpochLoader(
            images,
            self.transforms(recipe, trained.settings)[1],
            batch_size=_val_batch(recipe),
            workers=recipe.data.workers,
            on_bad=skip if on_bad is not None else None,
        )
        try:
            for number, (x, targets) in enumerate(loader):
                if x is None:  # nothing of it could be read
                    continue
                objective.update(model, (x.to(where), targets), number)
        finally:
            loader.close()
        found = objective.compute()
        kept = [index for index in range(len(images)) if index not in skipped]
        made, real, samples, asked = self._samples(objective, trained, images, kept)
        return Evaluation(
            source=str(trained.source),
            images=len(images) - len(skipped),
            loss=found["val_loss"],
            classes=trained.classes,
            skipped=len(skipped),
            explained=found["val_explained"],
            made=made,
            real=real,
            samples=samples,
            asked=asked,
        )

    def _samples(
        self, objective: Generation, trained: Trained, images: Images, kept: Sequence[int]
    ) -> tuple[dict[float, dict[str, float]], dict[str, float], dict[float, np.ndarray], list[int | str]]:
        """What the samples at each guidance are worth, and the `kept` held-out images beside them."""
        recipe, settings = objective.recipe, trained.settings
        sampling = recipe.sampling
        if not sampling.count:
            return {}, {}, {}, []
        asked = objective.ask(sampling.count)
        training = self._training(recipe, settings)
        held_out = as_pixels(images, settings, kept[:COMPARED])
        real = {"nearest": float(nearest(held_out, training)[0].mean())}
        eyes = objective.eyes
        if eyes is not None:
            features = eyes.features([to_image(each) for each in held_out])
            others = eyes.features([to_image(each) for each in training])
            real |= distances(features, others)
        made, samples = {}, {}
        for guidance in sampling.guidance:
            pixels = samples[guidance] = objective.make(trained.model, asked, guidance)
            made[guidance] = {"nearest": float(nearest(pixels, training)[0].mean())}
            if objective.judge is not None:
                made[guidance]["recognised"] = objective.recognised(pixels, asked)
            if eyes is not None:
                made[guidance] |= distances(features, eyes.features([to_image(each) for each in pixels]))
        return made, real, samples, asked

    def predict(
        self, trained: Trained, files: Sequence[str], images: Sequence[Image.Image], *, top_k: int
    ) -> list[base.Prediction]:
        raise ConfigError(f"{trained.source} makes images; use `zoo generate {trained.source}`")

    def unreadable(self, file: str, error: str) -> base.Prediction:
        raise ConfigError("a model that makes images reads none; use `zoo generate`")

    def pictures(self, folder: Path, trained: Trained, result: Evaluation, images: Images) -> None:
        recipe = trained.recipe
        objective = Generation(recipe, trained.classes)
        content = json.dumps(result.facts(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "metrics.json", lambda file: file.write(content.encode()))
        pipeline_of(trained).save_pretrained(folder / DIFFUSERS)
        for guidance, pixels in result.samples.items():
            name = "samples.png" if guidance == recipe.sampling.guidance[0] else f"samples_{guidance:g}.png"
            asked = result.asked[: recipe.sampling.shown]
            pictures.tiles(pixels[: len(asked)], folder / name, columns=objective.columns(asked))
        if result.samples:
            self._nearest(folder, trained, next(iter(result.samples.values()))[:20])

    def _training(self, recipe: GenerationRecipe, settings: InputSettings) -> np.ndarray:
        """The training images among which copies are looked for."""
        known = self.load_half(recipe, train=True)
        which = range(min(len(known), COMPARED))
        return as_pixels(known, settings, which, skip=recipe.data.bad_images == "skip")

    def _nearest(self, folder: Path, trained: Trained, samples: np.ndarray) -> None:
        """Draw samples above the training images that are most like them."""
        training = self._training(trained.recipe, trained.settings)
        closest = training[nearest(samples, training)[1]]
        pictures.tiles(np.concatenate([samples, closest]), folder / "nearest.png", columns=len(samples))


def _val_batch(recipe: GenerationRecipe) -> int:
    data = recipe.data
    return data.val_batch_size if data.val_batch_size is not None else data.batch_size


def pixel_settings(shape: tuple[int, int, int]) -> InputSettings:
    """Pixels in -1..1 of that shape."""
    half = [0.5] * 3
    return InputSettings(size=shape, mean=half, std=half, interpolation="bicubic", crop_pct=1.0)


def pixels_of_a_vae(recipe: GenerationRecipe) -> InputSettings:
    """What the VAE of a recipe sees."""
    side = recipe.data.image_size
    return pixel_settings((vae_of(recipe).config.in_channels, side, side))


def pixel_transform(settings: InputSettings, changes: Sequence[Any] = ()) -> transforms.Compose:
    """Resize, cut out the centre, and scale to -1..1, grey where the network sees one channel."""
    channels, *size = settings.size
    return transforms.Compose(
        [
            *([transforms.Grayscale()] if channels == 1 else []),
            transforms.Resize(min(size), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            *changes,
            Scaled(tuple(settings.mean[:channels]), tuple(settings.std[:channels])),
        ]
    )


@dataclass(frozen=True)
class Scaled:
    """Pixels as float32 [C, height, width], shifted and scaled.

    What ToTensor and Normalize return, to the bit, in a fifth of their time on small images. Its text names
    the numbers, because cached latents are found by the text of their transform.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        pixels = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (self.mean, self.std))
        return torch.from_numpy(np.ascontiguousarray((pixels - mean) / std))


def as_pixels(
    images: Images, settings: InputSettings, which: Sequence[int], *, skip: bool = False
) -> np.ndarray:
    """Some images as the network sees them, uint8 [N, y, x, C]; `skip` leaves out what cannot be read."""
    transform = pixel_transform(settings)
    images = images.images if isinstance(images, LatentImages) else images
    parts = []
    for index in which:
        with suppress(*((DataError,) if skip else ())):
            parts.append(transform(images.load(index)))
    seen = torch.stack(parts)
    return (255 * (seen / 2 + 0.5)).round().byte().movedim(1, -1).numpy()


def pipeline_of(trained: Trained) -> Any:
    """Return a trained model as a diffusers pipeline. Raises ConfigError for a model that makes no images."""
    from zoo.diffusion.sampling import ImagePipeline

    recipe = trained.recipe
    if recipe is not None and recipe.task == "lora":
        raise ConfigError(f"{trained.source} holds adapters; load them into their pipeline to make images")
    if recipe is None or recipe.task != "generation":
        raise ConfigError(f"{trained.source} makes no images; train one with `zoo train generation/digits`")
    prompted = recipe.data.name in prompts.NAMES
    return ImagePipeline(
        transformer=trained.model,
        scheduler=scheduler_of(recipe),
        vae=vae_of(recipe),
        classes=() if prompted else trained.classes,
        words=trained.classes if prompted else (),
        sample_shape=sample_shape(trained.model, recipe),
    )


TASK = GenerationTask()
