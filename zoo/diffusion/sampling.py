"""From noise to images with a diffusion transformer of the zoo: samplers by name, guidance, a pipeline.

One direction everywhere: time 1 is noise and 0 the image; models and schedulers count it from 1000 to 0.
"""

import inspect
from collections.abc import Sequence
from operator import index
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from zoo.errors import ConfigError, at_least, did_you_mean
from zoo.layers.words import WordEncoder

STEPS = 1000  # of the time that models and schedulers count
OBJECTIVES = ("rectified_flow", "ddpm_epsilon", "ddpm_v")

# name: diffusers' class for rectified flow and for DDPM, None where it has none
SAMPLERS: dict[str, tuple[str | None, str | None]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    "heun": ("FlowMatchHeunDiscreteScheduler", None),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "ddim": (None, "DDIMScheduler"),
    "ddpm": (None, "DDPMScheduler"),
}
NAMED = 12  # classes that an error lists
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def make_scheduler(
    sampler: str, objective: str, *, noise_schedule: str = "linear", shift: float = 1.0, clip: bool = False
) -> Any:
    """Build diffusers' scheduler of that name for what a model was trained to predict.

    `noise_schedule` is DDPM's ("linear", "cosine"), `shift` that of rectified flow; `clip` keeps DDIM's and
    DDPM's guess of the image in -1..1, which is right for pixels and wrong for latents. Raises ConfigError.
    """
    if sampler not in SAMPLERS or objective not in OBJECTIVES:
        value, known = (sampler, SAMPLERS) if sampler not in SAMPLERS else (objective, OBJECTIVES)
        what = "sampler" if known is SAMPLERS else "objective"
        raise ConfigError(f"unknown {what} {value!r}{did_you_mean(value, known)}; use {', '.join(known)}")
    is_flow = objective == "rectified_flow"
    names = {key: flow if is_flow else other for key, (flow, other) in SAMPLERS.items()}
    name = names[sampler]
    if name is None:
        fitting = ", ".join(key for key, each in names.items() if each)
        raise ConfigError(f"the sampler {sampler} is not for {objective}; use {fitting}")
    kind = getattr(diffusers, name)
    settings: dict[str, Any] = {"num_train_timesteps": STEPS}
    if name.startswith("FlowMatch"):
        settings["shift"] = shift
    elif is_flow:
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    else:
        settings["beta_schedule"] = BETAS[noise_schedule]
        settings["prediction_type"] = "epsilon" if objective == "ddpm_epsilon" else "v_prediction"
        if "clip_sample" in inspect.signature(kind.__init__).parameters:
            settings["clip_sample"] = clip
    return kind(**settings)


def predict(model: nn.Module, x: Tensor, time: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """Call a diffusers model of the zoo, leaving out a variance that it may predict beside."""
    return model(x, time, *conditions, return_dict=False)[0][:, : x.shape[1]]


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Sequence[Tensor],
    nothing: Sequence[Tensor],
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    steps: int = 25,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Turn noise [B, C, ..] into samples under conditions [B, ..]; `nothing` are those of no condition.

    Classifier-free guidance: nothing + guidance (condition - nothing), at times inside `interval` only.
    Source: Ho and Salimans 2022 (arXiv:2207.12598); the interval: Kynkaanniemi et al. 2024
    (arXiv:2404.07724).
    """
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    takes = inspect.signature(scheduler.step).parameters
    random = {"generator": generator} if "generator" in takes else {}
    both = [torch.cat(pair) for pair in zip(conditions, nothing, strict=True)]
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        if guidance != 1 and interval[0] <= time.item() / STEPS <= interval[1]:
            times = time.to(x.dtype).expand(2 * len(x))
            guided, free = predict(model, torch.cat([scaled, scaled]), times, both).chunk(2)
            out = free + guidance * (guided - free)
        else:
            out = predict(model, scaled, time.to(x.dtype).expand(len(x)), conditions)
        x = scheduler.step(out, time, x, **random).prev_sample
    return x


class ImagePipeline(DiffusionPipeline):
    """Images from a class number or a prompt with a transformer of the zoo, in pixels or a VAE's latents.

    `classes` are the names of the class numbers; `words` the vocabulary of a model for prompts that was
    trained with the zoo's own word vectors. Saves and loads as every diffusers pipeline does.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: Any,
        vae: nn.Module | None = None,
        classes: list[str] = (),
        words: list[str] = (),
        sample_shape: list[int] = (),
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            classes=list(classes), words=list(words), sample_shape=[int(n) for n in sample_shape]
        )

    def labels(self, classes: int | str | Sequence[int | str]) -> Tensor:
        """Class numbers from numbers or names. Raises ConfigError."""
        classes = [classes] if isinstance(classes, int | str) else list(classes)
        if not classes:
            raise ConfigError("class_labels must name at least one class, found none")
        known = {str(name): number for number, name in enumerate(self.config.classes)}
        count = self.transformer.num_classes
        found = []
        for each in classes:
            number = index(each) if hasattr(each, "__index__") else known.get(each, -1)
            if number < 0 and str(each).isdecimal():
                number = int(each)
            if not 0 <= number < count:
                # Nobody means another number by a number, however alike the two are written.
                is_number = str(each).lstrip("-").isdecimal()
                near = "" if is_number else did_you_mean(str(each), known)
                raise ConfigError(f"unknown class {each!r}{near or self._allowed(list(known), count)}")
            found.append(number)
        return torch.tensor(found)

    @staticmethod
    def _allowed(names: list[str], count: int) -> str:
        numbers = f"0 to {count - 1}"
        if names in ([], [str(number) for number in range(count)]):
            return f"; it has {count} classes, {numbers}"
        more = ", ..." if len(names) > NAMED else ""
        return f"; it has {count} classes: {', '.join(names[:NAMED])}{more}, or {numbers}"

    def conditions(
        self, class_labels: int | str | Sequence[int | str] | None, prompt: str | Sequence[str] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the transformer is told for each image, and what it is told for none. Raises ConfigError."""
        is_of_classes = hasattr(self.transformer, "y_embedder")
        if (class_labels is None) == (prompt is None) or is_of_classes != (prompt is None):
            wanted = "class_labels" if is_of_classes else "prompt"
            raise ConfigError(f"this model is told what to show by {wanted}; give that alone")
        if is_of_classes:
            labels = self.labels(class_labels)
            found = [labels], [torch.full_like(labels, self.transformer.num_classes)]
        else:
            encoder = WordEncoder(self.config.words, self.transformer.config.text_dim)
            found = encoder([prompt] if isinstance(prompt, str) else prompt)
            found = list(found), [torch.zeros_like(each) for each in found]
        return tuple([each.to(self._execution_device) for each in part] for part in found)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate an image for each class or prompt; the same generator seed gives the same images.

        `generator`: one, or one for each image; on the CPU, so that a seed means the same on every machine.
        `output_type`: "pil", "np" [B, height, width, C] in 0..1, or "latent" for the model's own space.
        Raises ConfigError.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ConfigError(f"output_type={output_type!r} must be 'pil', 'np' or 'latent'")
        at_least(1, num_inference_steps=num_inference_steps)
        if not 0 <= guidance_scale < float("inf"):
            raise ConfigError(f"guidance_scale={guidance_scale} must be a number from 0 on; 1 is none")
        if len(guidance_interval) != 2 or not guidance_interval[0] <= guidance_interval[1]:
            raise ConfigError(
                f"guidance_interval={guidance_interval} must go from the smaller number to the larger"
            )
        conditions, nothing = self.conditions(class_labels, prompt)
        shape = (len(conditions[0]), *self.config.sample_shape)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ConfigError(
                f"generator must be one or {shape[0]}, one for each image, found {len(generator)}"
            )
        device = torch.device("cpu") if generator is None else self._execution_device
        noise = randn_tensor(shape, generator, device).to(self._execution_device, self.transformer.dtype)
        was_training = self.transformer.training
        try:
            x = sample(
                self.transformer.eval(), self.scheduler, noise, conditions, nothing,
                guidance=guidance_scale, interval=guidance_interval, steps=num_inference_steps,
                generator=generator,
            )  # fmt: skip
            pixels = x if output_type == "latent" else to_pixels(x, self.vae)
        finally:
            self.transformer.train(was_training)
            self.maybe_free_model_hooks()
        if output_type == "latent":
            return ImagePipelineOutput(images=pixels) if return_dict else (pixels,)
        images: Any = pixels.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def to_pixels(x: Tensor, vae: nn.Module | None) -> Tensor:
    """Pixels in 0..1 from what a model makes: itself, or a VAE's latents."""
    if vae is not None:
        x = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        x = vae.decode(x.to(vae.dtype)).sample
    return (x / 2 + 0.5).clamp(0, 1)
