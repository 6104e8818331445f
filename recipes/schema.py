"""What a recipe may say: typed dataclasses, one for each task, with the limits of every value beside it."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any

import yaml

from zoo.errors import ConfigError
from zoo.recipes.names import MODELS

PRECISIONS = (
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine",
)  # fmt: skip


TIMM = "timm/"  # in front of the name of a model of timm's own


# Constraints live beside the field they belong to, so that the check and its test find them by introspection.
def number(
    default: Any, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf, length: int = 0
) -> Any:
    """A field of finite numbers, `> above`, `>= low`, `<= high`; `length` of them where it is a list."""
    metadata = {"above": above, "low": low, "high": high, "length": length}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(
    default: Any,
    names: Sequence[str] | Callable[[], Sequence[str]],
    *,
    slow: bool = False,
    quick: Callable[[str], Sequence[str] | None] | None = None,
) -> Any:
    """A field with one of `names`, or of what `names()` returns; `slow` where that imports torch.

    `quick(value)` returns the names that a value is to be found among without imports, or None.
    """
    return field(default=default, metadata={"names": names, "slow": slow, "quick": quick})


def notation(default: Any, is_right: Callable[[str], bool], wanted: str) -> Any:
    """A field of a text that `is_right` accepts, which may import torch; `wanted` says what it is."""
    return field(default=default, metadata={"is_right": is_right, "wanted": wanted})


def _models() -> Sequence[str]:
    import timm

    from zoo import list_models

    return [*list_models(task="classification"), *(f"{TIMM}{name}" for name in timm.list_models())]


def _zoo_models(name: str, task: str = "classification") -> Sequence[str] | None:
    if name.startswith(TIMM):
        return None
    if "zoo.models" in sys.modules:  # somebody may have registered more
        from zoo import list_models

        return list_models(task=task)
    return MODELS[task]


def _optimizers() -> Sequence[str]:
    from timm.optim import list_optimizers

    return list_optimizers()


def _data_sets() -> Sequence[str]:
    from zoo.recipes.data import NAMES

    return NAMES


def _mask_sets() -> Sequence[str]:
    from zoo.recipes.data.masks import NAMES

    return NAMES


def _is_devices(devices: int | str) -> bool:
    if isinstance(devices, int):
        return devices == -1 or devices > 0
    numbers = [part.strip() for part in devices.removesuffix(",").split(",")]
    return devices in ("auto", "-1") or all(part.isdecimal() for part in numbers) and devices != "0"


def _is_auto_augment(text: str) -> bool:
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    make = next(
        (each for start, each in kinds.items() if text.startswith(f"{start}-")), auto_augment_transform
    )
    try:
        make(text, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError):
        return False
    return True


@dataclass(kw_only=True)
class Model:
    """The network and what it starts from; `name` is one of the zoo's, or timm/ and one of timm's."""

    name: str = choice("???", _models, slow=True, quick=_zoo_models)
    pretrained: bool = False  # the published or shipped weights of this name
    checkpoint: str | None = None  # or a file, or another model whose published weights are taken
    num_classes: int | None = number(None, low=1)  # None: as many as the data has; else checked against it
    drop_path_rate: float | None = number(None, low=0, high=0.99)
    freeze: list[str] = field(default_factory=list)  # what is not trained: modules or parameters, * and ?
    probe: str | None = choice(None, ("linear", "attentive"))  # train a classifier on the frozen network
    grad_checkpointing: bool = False  # recompute in backward: less memory, about a third more time
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the model


@dataclass(kw_only=True)
class AnyData:
    """Where the images of any task are and how many travel together; None leaves a value to the model."""

    local: typing.ClassVar[tuple[str, ...]] = ()  # names of which nothing can be downloaded

    name: str = "???"
    root: str | None = None  # the folder of the data set
    download: bool = False  # torchvision sets only
    batch_size: int = number(64, low=1)  # images per process and step
    val_batch_size: int | None = number(None, low=1)
    workers: int = number(2, low=0, high=512)  # reader processes for each training process
    image_size: int | None = number(None, low=1, high=16384)
    mean: list[float] | None = number(None, length=3)
    std: list[float] | None = number(None, above=0, length=3)
    bad_images: str = choice("error", ("error", "skip"))  # skip: go on without, list them in bad_files.txt
    max_bad: float = number(
        0.01, low=0, high=1
    )  # with skip: stop above this share (five files are always allowed)


@dataclass(kw_only=True)
class Data(AnyData):
    """Images of one class each; `root`: train/ and val/ of a folder or shards, or torchvision's folder."""

    local = ("folder", "digits")

    name: str = choice("???", _data_sets)
    crop_pct: float | None = number(None, above=0, high=1)  # share of the side that validation keeps
    balance: float = number(0.0, low=0, high=1)  # 0: each image once an epoch; 1: each class equally often
    interpolation: str | None = choice(None, ("bicubic", "bilinear", "nearest", "lanczos"))


@dataclass(kw_only=True)
class Augment:
    """Changes to training images; every random number follows from seed, epoch and image."""

    crop_scale: list[float] | None = number(
        [0.08, 1.0], above=0, high=1, length=2
    )  # None: resize, do not crop
    crop_ratio: list[float] = number([0.75, 4 / 3], above=0, length=2)
    interpolation: str = choice("random", ("random", "bicubic", "bilinear", "nearest", "lanczos"))
    hflip: float = number(0.5, low=0, high=1)
    vflip: float = number(0.0, low=0, high=1)
    rotate: float = number(0.0, low=0, high=180)  # degrees to either side
    shift: float = number(0.0, low=0, high=1)  # share of the side
    zoom: float = number(0.0, low=0, high=0.99)  # 0.1: between 0.9 and 1.1
    shear: float = number(0.0, low=0, high=89)  # degrees to either side
    color_jitter: float = number(0.0, low=0)  # replaced by auto_augment where that is given, as in timm
    auto_augment: str | None = notation(
        None,
        _is_auto_augment,
        "timm's notation, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original",
    )
    random_erasing: float = number(0.0, low=0, high=1)
    mixup: float = number(0.0, low=0)
    cutmix: float = number(0.0, low=0)
    mix_prob: float = number(1.0, low=0, high=1)
    mix_switch: float = number(0.5, low=0, high=1)  # how often cutmix where both are on
    label_smoothing: float = number(0.0, low=0, high=0.999)


@dataclass(kw_only=True)
class Optim:
    """Optimiser and schedule; the learning rate is a function of the step alone."""

    name: str = choice("adamw", _optimizers, slow=True)
    lr: float = number(1e-3, above=0)
    find_lr: bool = False  # look for lr by a short test of rising rates, which then replaces it
    lr_base_batch: int | None = number(
        None, low=1
    )  # lr belongs to this many images a step; scaled to the actual
    weight_decay: float = number(0.05, low=0)
    layer_decay: float | None = number(None, above=0, high=1)
    betas: list[float] | None = number(None, low=0, high=0.99999, length=2)
    momentum: float = number(0.9, low=0, high=0.99999)
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the optimiser
    schedule: str = choice("cosine", ("cosine", "linear", "poly", "constant"))  # poly: a power of 0.9
    epochs: int = number(100, low=1)  # of the schedule
    cooldown_epochs: int = number(0, low=0)  # after it, at min_lr
    warmup_epochs: float = number(5.0, low=0)  # replaces the beginning of the schedule, as in timm
    warmup_lr: float = number(1e-6, low=0)
    min_lr: float = number(1e-6, low=0)
    clip_grad: float | None = number(None, above=0)  # norm of all gradients together
    accumulate: int = number(1, low=1)  # batches for each step
    ema: float | None = number(
        None, low=0, high=0.999999
    )  # decay of the averaged weights, which are then the result
    ema_warmup: bool = False  # a smaller decay at first, so that a short run forgets where it began


@dataclass(kw_only=True)
class Trainer:
    """Lightning's own names where Lightning has one, and what the run folder keeps."""

    accelerator: str = choice("auto", ("auto", "cpu", "gpu", "cuda", "mps", "tpu"))
    devices: int | str = notation("auto", _is_devices, "a number of devices, -1 or auto for all, or 0,1")
    num_nodes: int = number(1, low=1)
    strategy: str = "auto"
    sync_batchnorm: bool = False  # batch norm over the images of all processes
    precision: str = choice("32-true", PRECISIONS)
    deterministic: bool = False  # refuse operations that differ from run to run (GPU)
    compile: bool = False
    channels_last: bool = False
    val_every: int = number(1, low=1)  # epochs
    patience: int | None = number(None, low=1)  # stop after so many validations without a better one
    log_every: int = number(10, low=1)  # steps
    save_every: int = number(1000, low=1)  # steps between saves of last.ckpt inside an epoch
    keep_best: int = number(1, low=1)  # checkpoints kept by the validation metric of the task


@dataclass(kw_only=True)
class Recipe:
    """All of a training run that is not code; `zoo.recipe` makes one from a file.

    This is the recipe of classification; those of other tasks replace sections and add their own.
    """

    task: str = choice("classification", lambda: tuple(RECIPES))
    name: str = ""  # of the run folder; the recipe's file name unless given
    seed: int = number(0, low=0, high=2**31 - 1)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    trainer: Trainer = field(default_factory=Trainer)

    # What each interpolated key, or one to be given later, said and became: `plain` puts the former back, so
    # that no secret is saved.
    _interpolated: typing.ClassVar[dict[str, tuple[str, Any]]] = {}

    def refuse(self) -> None:
        """Raise ConfigError for values of the task that do not fit together."""
        augment = self.augment
        for key in ("crop_scale", "crop_ratio"):
            refuse_disorder(f"augment.{key}", getattr(augment, key))
        if (augment.mixup or augment.cutmix) and self.data.batch_size % 2:
            raise ConfigError(
                f"data.batch_size={self.data.batch_size} must be even with augment.mixup or augment.cutmix"
            )

    def plain(self) -> dict[str, Any]:
        """Return plain containers for a file, with `${...}` as it was written, not what it stood for."""
        container = _plain(dataclasses.asdict(self))
        for key, (written, meant) in self._interpolated.items():
            if pick(container, key) == meant:
                put(container, key, written)
        return container

    def shown(self, key: str) -> Any:
        """Return the value of a dotted key as a message may show it: as written, never a resolved secret."""
        return pick(self.plain(), key)

    def conceal(self, text: str) -> str:
        """Return a text with what interpolations stood for replaced by how they were written."""
        for written, meant in self._interpolated.values():
            if isinstance(meant, str) and len(meant) > 2:
                text = text.replace(meant, written)
        return text

    def yaml(self) -> str:
        """Return the recipe as a YAML file that `zoo train` accepts."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


# ---- segmentation


@dataclass(kw_only=True)
class SegmentationData(AnyData):
    """Images with a mask each; `image_size` is the shorter side before augmentation and in validation."""

    local = ("digit_scenes", "folder", "ade20k", "cityscapes")

    name: str = choice("???", _mask_sets)
    val_batch_size: int | None = number(1, low=1)  # more only where all images have one size
    max_side: int | None = number(None, low=1)  # a longer side is resized to this, whatever the shorter one
    classes: str | None = None  # folder: a file of class names, one a line, if not classes.txt in root
    ignore_index: int = number(255, low=0, high=65535)  # folder: what masks hold where there is no class
    reduce_zero_label: bool = False  # folder: classes are counted from 1 in the masks, and 0 is none


@dataclass(kw_only=True)
class SegmentationAugment:
    """Changes to training images and their masks; every random number follows from seed, epoch and image."""

    scale: list[float] = number([0.5, 2.0], above=0, high=100, length=2)  # times image_size
    crop_size: int | None = number(None, low=1, high=16384)  # None: image_size
    max_class_share: float = number(0.75, above=0, high=1)  # of a crop; ten tries to keep below it
    rotate: float = number(0.0, low=0, high=180)  # degrees to either side
    hflip: float = number(0.5, low=0, high=1)
    photometric: float = number(0.5, low=0, high=1)  # brightness, contrast, saturation, hue: each so often


@dataclass(kw_only=True)
class Head:
    """The decoder behind the backbone."""

    name: str = choice("upernet", ("upernet", "semantic_fpn"))
    channels: int | None = number(None, low=1)  # None: as published, 512 or 128
    stages: list[int] | None = number(None, low=0)  # of the backbone; None: all
    norm: bool = True  # a LayerNorm on each stage, as published for dense prediction
    dropout: float = number(0.1, low=0, high=0.99)
    auxiliary: int = number(0, low=0)  # channels of a second head for training, published 256; 0: none


@dataclass(kw_only=True)
class SegmentationLoss:
    """What is minimised: a weighted sum over the pixels that have a class."""

    cross_entropy: float = number(1.0, low=0)
    dice: float = number(0.0, low=0)
    auxiliary: float = number(0.4, low=0)  # of the second head's cross-entropy
    class_weights: list[float] | None = number(None, low=0)  # of the cross-entropy, one for each class


@dataclass(kw_only=True)
class Inference:
    """How validation and prediction look at an image."""

    window: int | None = number(None, low=1)  # pixels seen at a time; None: all, or what the model takes
    stride: int | None = number(None, low=1)  # between windows; None: two thirds of one
    scales: list[float] = number([1.0], above=0, high=100)  # times image_size; several are averaged
    flip: bool = False  # average with the mirrored image


@dataclass(kw_only=True)
class SegmentationRecipe(Recipe):
    """A training run that learns the class of every pixel."""

    task: str = choice("segmentation", lambda: tuple(RECIPES))
    data: SegmentationData = field(default_factory=SegmentationData)
    augment: SegmentationAugment = field(default_factory=SegmentationAugment)
    head: Head = field(default_factory=Head)
    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    inference: Inference = field(default_factory=Inference)

    def refuse(self) -> None:
        refuse_disorder("augment.scale", self.augment.scale)
        if not self.loss.cross_entropy and not self.loss.dice:
            raise ConfigError("loss.cross_entropy and loss.dice are both 0; there is nothing to minimise")
        if self.loss.class_weights is not None and not any(self.loss.class_weights):
            raise ConfigError("loss.class_weights are all 0; there is nothing to minimise")
        if not self.inference.scales:
            raise ConfigError("inference.scales is empty; [1.0] looks once")
        if self.inference.stride is not None and self.inference.window is None:
            raise ConfigError(
                f"inference.stride={self.inference.stride} is for windows; give inference.window"
            )
        if self.inference.window is not None and (self.inference.stride or 0) > self.inference.window:
            raise ConfigError(
                f"inference.stride={self.inference.stride} leaves gaps between windows of "
                f"{self.inference.window}; make it smaller"
            )
        if self.head.name == "upernet" and self.data.batch_size == 1 and not self.trainer.sync_batchnorm:
            raise ConfigError(
                "data.batch_size=1 is too few for the batch norm of head.name=upernet; use 2, "
                "trainer.sync_batchnorm=true with several devices, or head.name=semantic_fpn"
            )


# ---- generation


def _generators() -> Sequence[str]:
    from zoo import list_models

    return list_models(task="generation")


def _zoo_generators(name: str) -> Sequence[str] | None:
    return _zoo_models(name, "generation")


def _generation_sets() -> Sequence[str]:
    from zoo.recipes.data import NAMES
    from zoo.recipes.data.prompts import NAMES as PROMPTED

    return (*NAMES, *PROMPTED)


@dataclass(kw_only=True)
class GenerationModel(Model):
    """The network; `num_classes` follows from the data."""

    name: str = choice("???", _generators, slow=True, quick=_zoo_generators)


@dataclass(kw_only=True)
class GenerationData(AnyData):
    """Images of one class each, or with a prompt each; `image_size` None follows from the model."""

    local = ("digits", "digit_pairs", "folder", "prompts")

    name: str = choice("???", _generation_sets)
    vae: str | None = None  # a folder of a diffusers AutoencoderKL; None: the model sees pixels
    cache: str | None = None  # folder of the latents; None: latents/ beside the run folders


@dataclass(kw_only=True)
class GenerationAugment:
    """Changes to training images, few: what is learned is what they look like."""

    hflip: float = number(0.0, low=0, high=1)


@dataclass(kw_only=True)
class Diffusion:
    """What is predicted and at which times; t = 1 is noise and t = 0 the image."""

    objective: str = choice("rectified_flow", ("rectified_flow", "ddpm_epsilon", "ddpm_v"))
    noise_schedule: str = choice("linear", ("linear", "cosine"))  # of DDPM
    times: str = choice("logit_normal", ("uniform", "logit_normal", "mode", "csas"))
    times_mean: float | None = number(None)  # of logit_normal (0) and csas (0.5); above 0 prefers noise
    times_std: float | None = number(None, above=0)  # of logit_normal (1) and csas (1.5)
    mode_scale: float = number(1.29, low=-1, high=1.75)  # of mode; outside, times would run backwards
    shift: float = number(1.0, above=0, high=100)  # above 1 moves times of flow to noise, for large images
    min_snr: float | None = number(None, above=0)  # published 5
    drop_condition: float = number(0.1, low=0, high=1)  # how often training hides the class or prompt


@dataclass(kw_only=True)
class Sampling:
    """How images are made for pictures during training, and what is measured of them at its end."""

    sampler: str = choice("euler", ("euler", "heun", "dpm", "unipc", "ddim", "ddpm"))
    steps: int = number(25, low=1, high=1000)
    guidance: list[float] = number([2.0], low=0)  # each is measured; pictures have the first
    interval: list[float] = number([0.0, 1.0], low=0, high=1, length=2)  # times at which there is guidance
    shown: int = number(80, low=1, high=400)  # images in a picture
    count: int = number(500, low=0)  # images measured for each guidance; 0: none; FID and KID need 2
    batch: int = number(100, low=1)
    seed: int = number(0, low=0, high=2**31 - 1)
    judge: str | None = None  # a classifier, as `zoo eval` takes it, that says which class an image shows
    features: str | None = None  # whose features FID and KID compare, timm/NAME too; None: the judge


@dataclass(kw_only=True)
class GenerationRecipe(Recipe):
    """A training run of a diffusion transformer."""

    task: str = choice("generation", lambda: tuple(RECIPES))
    model: GenerationModel = field(default_factory=GenerationModel)
    data: GenerationData = field(default_factory=GenerationData)
    augment: GenerationAugment = field(default_factory=GenerationAugment)
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampling: Sampling = field(default_factory=Sampling)

    def refuse(self) -> None:
        if self.model.name.startswith("video_dit"):
            raise ConfigError(f"{self.model.name} makes videos; generation trains dit_* and mmdit_*")
        refuse_scaling(self.data)
        refuse_disorder("sampling.interval", self.sampling.interval)
        flow = self.diffusion.objective == "rectified_flow"
        wrong = ("ddim", "ddpm") if flow else ("heun",)
        if self.sampling.sampler in wrong:
            raise ConfigError(
                f"sampling.sampler={self.sampling.sampler} is not for diffusion.objective="
                f"{self.diffusion.objective}; use euler, dpm or unipc"
            )
        if not flow and self.diffusion.shift != 1:
            raise ConfigError(
                f"diffusion.shift={self.diffusion.shift} is for diffusion.objective=rectified_flow"
            )
        if not self.sampling.guidance:
            raise ConfigError("sampling.guidance is empty; [1.0] is none")
        if not self.diffusion.drop_condition and any(each != 1 for each in self.sampling.guidance):
            raise ConfigError(
                "guidance needs a model that knows images of no class: set diffusion.drop_condition=0.1, or "
                "sampling.guidance=[1.0]"
            )
        if self.data.vae is not None and self.data.image_size is None:
            raise ConfigError("data.vae needs data.image_size=PIXELS, the side of what it encodes")
        if self.data.vae is None and self.data.cache is not None:
            raise ConfigError("data.cache is where the latents of data.vae lie; give that too")
        if self.optim.layer_decay is not None:
            raise ConfigError("optim.layer_decay is for backbones; leave it out")
        if self.model.drop_path_rate is not None:
            raise ConfigError("model.drop_path_rate is for backbones; leave it out")


# ---- LoRA


@dataclass(kw_only=True)
class LoraModel(Model):
    """`checkpoint` is the folder of a diffusers pipeline, whose transformer gets the adapters."""

    name: str = choice("???", ("wan", "hunyuan_video", "flux"))


@dataclass(kw_only=True)
class LoraData(AnyData):
    """Images or clips with captions; `image_size` is the height, and the width too unless that is given."""

    local = ("captions",)

    name: str = choice("captions", ("captions",))
    image_size: int | None = number(512, low=1, high=16384)
    width: int | None = number(None, low=1, high=16384)
    frames: int = number(1, low=1)  # of each clip, the first ones
    words: int = number(256, low=1)  # tokens of a caption
    conditions: list[str] = field(default_factory=list)  # of a Flux image: "spatial" or "subject" for each
    cache: str | None = None  # folder of latents and text embeddings; None: .latents in root


@dataclass(kw_only=True)
class Lora:
    """The adapters: low-rank additions to the layers whose names end in one of `targets`."""

    rank: int = number(16, low=1)
    alpha: float = number(16.0, above=0)
    dropout: float = number(0.0, low=0, high=0.99)
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    guidance: float = number(1.0, low=0)  # told to models that were distilled with guidance


@dataclass(kw_only=True)
class SparseAttention:
    """The attention under which the adapters are trained; `args` are those of zoo.diffusion.apply_..."""

    method: str = choice("none", ("none", "radial", "neighborhood", "pka"))
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class LoraRecipe(Recipe):
    """A training run of adapters for a diffusers transformer."""

    task: str = choice("lora", lambda: tuple(RECIPES))
    model: LoraModel = field(default_factory=LoraModel)
    data: LoraData = field(default_factory=LoraData)
    augment: GenerationAugment = field(default_factory=GenerationAugment)
    diffusion: Diffusion = field(default_factory=lambda: Diffusion(drop_condition=0.0))
    lora: Lora = field(default_factory=Lora)
    attention: SparseAttention = field(default_factory=SparseAttention)

    def refuse(self) -> None:
        if self.data.image_size is None:
            raise ConfigError("data.image_size=PIXELS is wanted")
        # Wan's VAE makes a latent of the first frame and one of each four after it, and drops the rest.
        if self.model.name == "wan" and (self.data.frames - 1) % 4:
            fits = self.data.frames - (self.data.frames - 1) % 4
            raise ConfigError(
                f"data.frames={self.data.frames} must be 4k + 1 for wan, such as {fits} or {fits + 4}"
            )
        refuse_scaling(self.data)
        if self.model.args:
            raise ConfigError("model.args do not reach the transformer of model.checkpoint; leave them out")
        if self.model.drop_path_rate is not None:
            raise ConfigError("model.drop_path_rate is for backbones; leave it out")
        if self.diffusion.objective != "rectified_flow":
            raise ConfigError(f"{self.model.name} is a rectified flow; leave diffusion.objective out")
        if self.optim.ema is not None:
            raise ConfigError("optim.ema would copy the whole model for its adapters; leave it out")
        if self.augment.hflip:
            raise ConfigError("augment.hflip does not reach latents from the cache; leave it out")
        if self.attention.method == "pka" and self.model.name != "flux":
            raise ConfigError("attention.method=pka is for model.name=flux, whose images take conditions")
        if self.data.conditions and self.model.name != "flux":
            raise ConfigError("data.conditions are for model.name=flux")
        unknown = [each for each in self.data.conditions if each not in ("spatial", "subject")]
        if unknown:
            raise ConfigError(f"data.conditions has {unknown[0]!r}; each is spatial or subject")
        if (self.attention.method == "pka") != bool(self.data.conditions):
            raise ConfigError("attention.method=pka and data.conditions, such as [spatial], belong together")


# The task comes first in a file, so that it is known which of these the file fills.
RECIPES: dict[str, type[Recipe]] = {
    "classification": Recipe, "segmentation": SegmentationRecipe, "generation": GenerationRecipe,
    "lora": LoraRecipe,
}  # fmt: skip


def refuse_disorder(key: str, pair: list[float] | None) -> None:
    """Raise ConfigError where the first of two numbers is the larger one."""
    if pair is not None and pair[0] > pair[1]:
        raise ConfigError(f"{key}={pair} must go from the smaller number to the larger")


def refuse_scaling(data: AnyData) -> None:
    """Raise ConfigError where a mean or deviation is given for pixels that are always scaled to -1..1."""
    for name in ("mean", "std"):
        if getattr(data, name) is not None:
            raise ConfigError(f"data.{name} has no effect, pixels are scaled to -1..1; leave it out")


# ---- plain containers


def pick(container: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in key.split("."):
        container = container.get(part) if isinstance(container, dict) else None
    return container


def put(container: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested dictionaries, making those on the way."""
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(container.get(part), dict):
            container[part] = {}
        container = container[part]
    container[leaf] = value


def _plain(value: Any) -> Any:
    """Return a value as YAML and the safe reader of checkpoints know it, from paths and array scalars too."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins" or value is None:
        return value
    if hasattr(value, "item"):
        return value.item()
    raise ConfigError(f"{value!r} in a recipe is neither a number nor a text; recipes hold plain values only")
