"""How images become noise in training, and what a network learns of it: rectified flow and DDPM.

One direction everywhere: t = 1 is noise and t = 0 the image. Networks count it from 0 to 1000, as the
schedulers of diffusers do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.recipes.schema import Diffusion

STEPS = 1000


class Noising:
    """The process of a recipe: times, noisy images, what is to be predicted, and how much each counts."""

    def __init__(self, settings: Diffusion) -> None:
        self.settings = settings
        self.is_flow = settings.objective == "rectified_flow"
        if not self.is_flow:
            from diffusers import DDPMScheduler

            from zoo.diffusion.sampling import BETAS

            # Asked for, so that training and sampling cannot differ.
            self.kept = DDPMScheduler(beta_schedule=BETAS[settings.noise_schedule]).alphas_cumprod

    def times(self, count: int, device: torch.device | None = None) -> Tensor:
        """Draw training times [count], strictly between 0 and 1.

        logit_normal: Esser et al. 2024 (arXiv:2403.03206) Eq. 19, t = sigmoid(mean + std z); mode: Eq. 20
        and what follows, with t = 1 as noise like there; csas: arXiv:2602.06850, a logit-normal that
        prefers noise.
        """
        how, mean, std = self.settings.times, self.settings.times_mean, self.settings.times_std
        if how == "csas":
            from zoo.layers.pka import csas_timesteps

            given = {"mean": mean, "std": std}
            t = csas_timesteps(
                count, device=device, **{k: value for k, value in given.items() if value is not None}
            )
        elif how == "logit_normal":
            z = torch.randn(count, device=device)
            t = torch.sigmoid((0.0 if mean is None else mean) + (1.0 if std is None else std) * z)
        else:
            t = torch.rand(count, device=device)
            if how == "mode":
                t = 1 - t - self.settings.mode_scale * ((math.pi / 2 * t).cos() ** 2 - 1 + t)
        return self.shifted(t).clamp(1e-5, 1 - 1e-5)

    def even(self, count: int) -> Tensor:
        """Return times [count] spread evenly, for validation."""
        return (torch.arange(count) + 0.5) / count

    def shifted(self, t: Tensor) -> Tensor:
        """Move times towards noise, as large images need; `shift` 1 leaves them where they are."""
        shift = self.settings.shift
        return shift * t / (1 + (shift - 1) * t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of image and noise at times [B]."""
        if self.is_flow:
            return 1 - t, t
        kept = self.kept.to(t.device)[self.steps(t)]
        return kept.sqrt(), (1 - kept).sqrt()

    def steps(self, t: Tensor) -> Tensor:
        """Return DDPM's whole steps, 0 to 999."""
        return (t * STEPS).long().clamp(max=STEPS - 1)

    def model_time(self, t: Tensor) -> Tensor:
        """Return times as networks count them."""
        return t * STEPS if self.is_flow else self.steps(t).to(t.dtype)

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return images at times [B]."""
        image, noisy = (spread(level, x) for level in self.levels(t))
        return image * x + noisy * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should say: the way from image to noise, the noise, or DDPM's v."""
        if self.is_flow:
            return noise - x
        if self.settings.objective == "ddpm_epsilon":
            return noise
        image, noisy = (spread(level, x) for level in self.levels(t))
        return image * noise - noisy * x

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight [B] of the squared error: 1, or min(SNR, gamma) on the image it stands for.

        Source: Hang et al. 2023 (arXiv:2303.09556) Sec. 3.4. An error of the prediction moves the image by
        t (flow), noise / image (epsilon) or noise (v) times it.
        """
        gamma = self.settings.min_snr
        if gamma is None:
            return torch.ones_like(t)
        image, noisy = self.levels(t)
        snr = (image / noisy) ** 2
        if self.is_flow:
            moved = noisy
        else:
            moved = noisy / image if self.settings.objective == "ddpm_epsilon" else noisy
        return snr.clamp(max=gamma) * moved**2


def spread(values: Tensor, x: Tensor) -> Tensor:
    """[B] to [B, 1, ..] of as many axes as `x`."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))
