"""LoRA: adapters for a diffusers transformer, trained under the attention it will run with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.utils import natural_key
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean
from zoo.recipes.data.captions import Captioned, Encode, key_of
from zoo.recipes.data.loader import BadImage, EpochLoader, Images
from zoo.recipes.data.transforms import InputSettings, JointTransform
from zoo.recipes.noising import Noising, spread
from zoo.recipes.run_folder import Trained, choose_device
from zoo.recipes.schema import LoraRecipe
from zoo.recipes.tasks import base

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluation(base.Evaluation):
    """`explained` is the share of its target's square that the network predicts of held-out items."""

    explained: float

    def headline(self, of: str = "images") -> str:
        return f"{100 * self.explained:.2f} % explained of {self.images:,} {of}"

    def metrics(self) -> dict[str, float]:
        return {"val_loss": self.loss, "val_explained": self.explained}

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source, "images": self.images, "skipped": self.skipped, "loss": self.loss,
            "explained": self.explained,
        }  # fmt: skip


# ---- the models: what each is called with, and what its encoders are


@dataclass(frozen=True)
class Kind:
    """How diffusers calls a transformer and its pipeline, how it predicts and how its inputs are encoded.

    `patch` returns the height and width in pixels of a patch, from the settings of VAE and transformer.
    """

    transformer: str
    pipeline: str
    predict: Callable[..., Tensor]
    encode: Callable[..., dict[str, Tensor]]
    patch: Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]


def predict_wan(model: nn.Module, x: Tensor, t: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
    """Velocity [B, C, T, y, x] of Wan."""
    return model(x, 1000 * t, told["text"], return_dict=False)[0]


def predict_hunyuan(
    model: nn.Module, x: Tensor, t: Tensor, told: dict[str, Tensor], guidance: float
) -> Tensor:
    """Velocity [B, C, T, y, x] of HunyuanVideo."""
    scale = torch.full_like(t, 1000 * guidance) if model.config.guidance_embeds else None
    return model(
        x, 1000 * t, told["text"], told["mask"], told["pooled"], guidance=scale, return_dict=False
    )[0]  # fmt: skip


def predict_flux(model: nn.Module, x: Tensor, t: Tensor, told: dict[str, Tensor], guidance: float) -> Tensor:
    """Velocity [B, C, y, x] of Flux; conditions are further tokens, numbered by the first column of ids."""
    conditions = sorted((name for name in told if name.startswith("condition")), key=natural_key)
    parts = [x, *(told[name] for name in conditions)]
    ids = []
    for number, each in enumerate(parts):
        rows, columns = each.shape[-2] // 2, each.shape[-1] // 2
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
        ids.append(torch.cat([torch.full((len(place), 1), number), place], dim=1))
    scale = torch.full_like(t, guidance) if model.config.guidance_embeds else None
    out = model(
        torch.cat([_pack(each) for each in parts], dim=1),
        encoder_hidden_states=told["text"],
        pooled_projections=told["pooled"],
        timestep=t,
        img_ids=torch.cat(ids).to(x),
        txt_ids=torch.zeros(told["text"].shape[1], 3).to(x),
        guidance=scale,
        return_dict=False,
    )[0]
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    out = out[:, : rows * columns].unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))
    return out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _pack(x: Tensor) -> Tensor:
    """[B, C, y, x] to tokens [B, y / 2 x / 2, 4 C], as Flux does: channels first, then the four places."""
    x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def encode_wan(
    pipe: Any, pixels: Tensor, caption: str, conditions: list[Tensor], words: int
) -> dict[str, Tensor]:
    """Latents by the VAE's own mean and deviation, and the text encoder's states."""
    vae = pipe.vae
    latents = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(each).to(latents)[:, None, None, None]
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    text, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=words)
    return {"latents": (latents - mean) / std, "text": text[0]}


def encode_hunyuan(
    pipe: Any, pixels: Tensor, caption: str, conditions: list[Tensor], words: int
) -> dict[str, Tensor]:
    """Scaled latents, and the states, mask and pooled state of both text encoders."""
    vae = pipe.vae
    latents = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    text, pooled, mask = pipe.encode_prompt(caption, max_sequence_length=words)
    return {
        "latents": latents * vae.config.scaling_factor, "text": text[0], "pooled": pooled[0], "mask": mask[0],
    }  # fmt: skip


def encode_flux(
    pipe: Any, pixels: Tensor, caption: str, conditions: list[Tensor], words: int
) -> dict[str, Tensor]:
    """Shifted and scaled latents of the image and its conditions, T5's states and CLIP's pooled state."""
    vae = pipe.vae

    def encode(x: Tensor) -> Tensor:
        latents = vae.encode(x[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    text, pooled, _ = pipe.encode_prompt(caption, None, max_sequence_length=words)
    found = {"latents": encode(pixels[:, 0]), "text": text[0], "pooled": pooled[0]}
    return found | {f"condition{number}": encode(x) for number, x in enumerate(conditions)}


# Settings that the files of older pipelines leave out are those of diffusers.
def patch_wan(vae: dict[str, Any], transformer: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of a patch of Wan."""
    times = vae.get("scale_factor_spatial", 8)
    _, height, width = transformer.get("patch_size", (1, 2, 2))
    return times * height, times * width


def patch_hunyuan(vae: dict[str, Any], transformer: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of a patch of HunyuanVideo."""
    side = vae.get("spatial_compression_ratio", 8) * transformer.get("patch_size", 2)
    return side, side


def patch_flux(vae: dict[str, Any], transformer: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of what Flux packs into a token."""
    side = 2 ** len(vae.get("block_out_channels", (64,)))
    return side, side


KINDS = {
    "wan": Kind("WanTransformer3DModel", "WanPipeline", predict_wan, encode_wan, patch_wan),
    "hunyuan_video": Kind(
        "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline", predict_hunyuan, encode_hunyuan,
        patch_hunyuan,
    ),
    "flux": Kind("FluxTransformer2DModel", "FluxPipeline", predict_flux, encode_flux, patch_flux),
}  # fmt: skip


# ---- loss


class Lora(base.Objective):
    """The squared error of the velocity that a transformer predicts of noisy latents."""

    def __init__(self, recipe: LoraRecipe) -> None:
        from torchmetrics import MeanMetric

        super().__init__()
        self.recipe, self.noising = recipe, Noising(recipe.diffusion)
        self.predict = KINDS[recipe.model.name].predict
        self.val_loss, self.val_power = MeanMetric(), MeanMetric()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        told = dict(batch[0])
        x = told.pop("latents")
        t = self.noising.times(len(x), x.device)
        hidden = torch.rand(len(x), device=x.device) < self.recipe.diffusion.drop_condition
        for name in {"text", "pooled"} & told.keys():  # the pooled state tells the prompt, too
            told[name] = told[name] * spread(~hidden, told[name])
        error = self._error(model, x, torch.randn_like(x), t, told)
        return (error * self.noising.weight(t)).mean()

    def _error(
        self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, told: dict[str, Tensor]
    ) -> Tensor:
        """The mean squared error of each item, [B]."""
        noisy = self.noising.noised(x, noise, t).to(x.dtype)
        said = self.predict(model, noisy, t, told, self.recipe.lora.guidance).float()
        return (said - self.noising.target(x, noise, t)).square().flatten(1).mean(1)

    def update(self, model: nn.Module, batch: Batch, number: int) -> None:
        told = dict(batch[0])
        x = told.pop("latents")
        # The same times and noise in every validation, so that only the network makes a difference.
        generator = torch.Generator().manual_seed(number)
        t = self.noising.even(len(x)).to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x)
        # Dropout is off, yet these times are no steps of a generation, which PKA would remember.
        mode, model.training = model.training, True
        try:
            error = self._error(model, x, noise, t, told)
        finally:
            model.training = mode
        self.val_loss.update(error.mean(), weight=len(x))
        self.val_power.update(self.noising.target(x, noise, t).square().mean(), weight=len(x))

    def compute(self) -> dict[str, float]:
        loss, power = self.val_loss.compute().item(), self.val_power.compute().item()
        self.val_loss.reset(), self.val_power.reset()
        return {"val_loss": loss, "val_explained": 1 - loss / power}


# ---- the task


class LoraTask(base.Task):
    """Adapters of a diffusers transformer."""

    metrics = ("val_loss", "val_explained")
    monitor = "val_explained"
    label = "explained"
    keeps_base = True

    def load_half(self, recipe: LoraRecipe, *, train: bool) -> Images:
        data, kind = recipe.data, KINDS[recipe.model.name]
        if data.root is None:
            raise ConfigError("data.root=FOLDER is wanted, with train/ and val/ inside")
        if recipe.model.checkpoint is None:
            raise ConfigError("model.checkpoint=FOLDER is wanted: a diffusers pipeline on this machine")
        folder = Path(recipe.model.checkpoint)
        _refuse_other_pipeline(recipe)
        size = _size(recipe)
        if train:
            _try_changes(recipe)
        return Captioned(
            data.root,
            "train" if train else "val",
            key=f"{key_of(folder, ENCODERS)} {data.words}",
            encoder=partial(_encoder, kind, folder, data.words),
            cache=Path(data.cache) if data.cache is not None else Path(data.root) / ".latents",
            size=size,
            frames=data.frames,
            conditions=len(data.conditions),
        )

    def build_model(self, recipe: LoraRecipe, num_classes: int) -> nn.Module:
        import diffusers

        folder = Path(recipe.model.checkpoint)
        _refuse_other_pipeline(recipe)
        kind = getattr(diffusers, KINDS[recipe.model.name].transformer)
        inside = {"subfolder": "transformer"} if (folder / "transformer").is_dir() else {}
        try:
            model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **inside)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"model.checkpoint={folder} holds no {kind.__name__} ({reason})") from None
        _change(model, recipe)
        # Checkpoints hold what is trained: the base is large, and where it was.
        model.register_state_dict_post_hook(_keep_adapters)
        model.register_load_state_dict_post_hook(_miss_no_base)
        return model.train()  # diffusers reads models for use, not for training

    def settings(self, recipe: LoraRecipe, model: nn.Module) -> InputSettings:
        data = recipe.data
        size = (3, data.image_size, data.width if data.width is not None else data.image_size)
        half = (0.5,) * 3
        return InputSettings(size=size, mean=half, std=half, interpolation="bicubic", crop_pct=1.0)

    def transforms(
        self, recipe: LoraRecipe, settings: InputSettings
    ) -> tuple[JointTransform, JointTransform]:
        return _as_it_is, _as_it_is

    def objective(self, recipe: LoraRecipe, classes: Sequence[str]) -> Lora:
        return Lora(recipe)

    def other_images(self, trained: Trained, recipe: LoraRecipe, data: str | Path) -> Images:
        recipe.data.root = str(data)
        return self.load_half(recipe, train=False)

    @torch.inference_mode()
    def measure(
        self,
        trained: Trained,
        images: Images,
        recipe: LoraRecipe,
        *,
        device: str | torch.device | None = None,
        on_bad: Any = None,
    ) -> Evaluation:
        where = choose_device(device)
        model, objective = trained.model.to(where).eval(), Lora(recipe).to(where)
        skipped: set[int] = set()

        def skip(source: Images, bad: BadImage) -> None:
            skipped.add(bad.index)
            on_bad(source, bad)

        data = recipe.data
        loader = EpochLoader(
            images,
            _as_it_is,
            batch_size=data.val_batch_size if data.val_batch_size is not None else data.batch_size,
            workers=data.workers,
            on_bad=skip if on_bad is not None else None,
        )
        try:
            for number, (tensors, target) in enumerate(loader):
                if tensors is None:  # nothing of it could be read
                    continue
                there = {name: x.to(where) for name, x in tensors.items()}
                objective.update(model, (there, target), number)
        finally:
            loader.close()
        found = objective.compute()
        return Evaluation(
            source=str(trained.source),
            images=len(images) - len(skipped),
            loss=found["val_loss"],
            classes=trained.classes,
            skipped=len(skipped),
            explained=found["val_explained"],
        )

    def predict(
        self, trained: Trained, files: Sequence[str], images: Sequence[Image.Image], *, top_k: int
    ) -> list[base.Prediction]:
        raise ConfigError(f"{trained.source} holds adapters; load them into their pipeline")

    def unreadable(self, file: str, error: str) -> base.Prediction:
        raise ConfigError("adapters read no images; load them into their pipeline")

    def pictures(self, folder: Path, trained: Trained, result: Evaluation, images: Images) -> None:
        """Leave the adapters as `pipe.load_lora_weights` reads them."""
        import diffusers
        from peft import get_peft_model_state_dict

        pipeline = getattr(diffusers, KINDS[trained.recipe.model.name].pipeline)
        adapters = get_peft_model_state_dict(trained.model, adapter_name="default")
        # Without its configuration an adapter would be read as one whose alpha is its rank.
        told = trained.model.peft_config["default"].to_dict()
        told = {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}
        pipeline.save_lora_weights(
            folder, transformer_lora_layers=adapters, transformer_lora_adapter_metadata=told
        )


def _as_it_is(tensors: dict[str, Tensor], target: int) -> tuple[dict[str, Tensor], int]:
    return tensors, target


def _said(file: Path) -> dict[str, Any]:
    """What a file of settings says; nothing where diffusers, too, could not read it and will say so."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _refuse_other_pipeline(recipe: LoraRecipe) -> None:
    """Raise ConfigError where model.checkpoint is a pipeline of another transformer."""
    folder, kind = Path(recipe.model.checkpoint), KINDS[recipe.model.name]
    index = _said(folder / "model_index.json")
    found = index.get("_class_name", kind.pipeline)
    # Other pipelines of the same transformer, such as Flux Kontext, are taken.
    if found != kind.pipeline and kind.transformer not in (index.get("transformer") or ()):
        raise ConfigError(
            f"model.checkpoint={folder} is a {found}; model.name={recipe.model.name} wants a {kind.pipeline}"
        )


def _size(recipe: LoraRecipe) -> tuple[int, int]:
    """Height and width of the pixels. Raises ConfigError where their latents are no whole patches."""
    data, folder = recipe.data, Path(recipe.model.checkpoint)
    vae, transformer = (_said(folder / part / "config.json") for part in ("vae", "transformer"))
    wanted = KINDS[recipe.model.name].patch(vae, transformer)
    across = "width" if data.width is not None else "image_size"
    size = data.image_size, getattr(data, across)
    for name, side, times in zip(("image_size", across), size, wanted, strict=True):
        if side % times:
            raise ConfigError(f"data.{name}={side} must be a multiple of {times}: latents in patches")
    return size


def _encoder(kind: Kind, folder: Path, words: int) -> Encode:
    """Load the encoders of a pipeline, without its transformer, and return what encodes an item with them."""
    import diffusers

    try:
        pipe = getattr(diffusers, kind.pipeline).from_pretrained(
            folder, transformer=None, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"model.checkpoint={folder} holds no {kind.pipeline} ({reason})") from None
    pipe.to(choose_device(None))

    @torch.inference_mode()
    def encode(pixels: Tensor, caption: str, conditions: list[Tensor]) -> dict[str, Tensor]:
        return kind.encode(pipe, pixels, caption, conditions, words)

    return encode


def _try_changes(recipe: LoraRecipe) -> None:
    """Make the changes of a recipe to a model without weights, and tell what is wrong before encoding."""
    import diffusers

    folder = Path(recipe.model.checkpoint)
    config = _said(folder / "transformer" / "config.json") or _said(folder / "config.json")
    kind = KINDS[recipe.model.name].transformer
    if config.get("_class_name") == kind:
        with torch.device("meta"):
            _change(getattr(diffusers, kind).from_config(config), recipe)


def _change(model: nn.Module, recipe: LoraRecipe) -> None:
    """Give a model its adapters, the only part that learns, and the attention of a recipe."""
    from peft import LoraConfig

    part = recipe.lora
    model.requires_grad_(False)
    settings = LoraConfig(
        r=part.rank, lora_alpha=part.alpha, lora_dropout=part.dropout, target_modules=part.targets,
        init_lora_weights="gaussian",
    )  # fmt: skip
    try:
        model.add_adapter(settings)
    except ValueError as error:
        raise ConfigError(f"lora.targets={part.targets}: {' '.join(str(error).split())[:160]}") from None
    if recipe.model.grad_checkpointing:
        model.enable_gradient_checkpointing()
    _apply(model, recipe)


def _apply(model: nn.Module, recipe: LoraRecipe) -> None:
    """Put the attention of a recipe under a model, for good."""
    from zoo import diffusion

    how = recipe.attention
    if how.method == "none":
        return
    apply = {
        "radial": diffusion.apply_radial_attention,
        "neighborhood": diffusion.apply_neighborhood,
        "pka": diffusion.apply_pka,
    }[how.method]
    known = [name for name in list(inspect.signature(apply).parameters)[1:] if name != "conditions"]
    for name in how.args:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"attention.args: {how.method} has no {name}; use {', '.join(known)}{near}")
    arguments = dict(how.args)
    if how.method == "pka":
        arguments["conditions"] = tuple(recipe.data.conditions)
    try:
        apply(model, **arguments)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"attention.args do not fit {how.method}: {error}") from None


def _keep_adapters(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and ".lora_" not in key]:
        del state[key]


def _miss_no_base(module: nn.Module, found: Any) -> None:
    found.missing_keys[:] = [key for key in found.missing_keys if ".lora_" in key]


TASK = LoraTask()
