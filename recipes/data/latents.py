"""Images as the latents of a VAE, computed once and kept on disk: training then never runs the VAE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.loader import Images
from zoo.recipes.data.shards import ImageShards
from zoo.recipes.files import write_atomically

CACHE = Path("latents")
BATCH = 16


@cache
def load_vae(folder: str) -> nn.Module:
    """Read a VAE that diffusers saved, from a folder of its own or the `vae` of a pipeline's.

    Nothing is downloaded and only safetensors are read. Raises ConfigError.
    """
    from diffusers import AutoencoderKL

    path = Path(folder)
    inside = {"subfolder": "vae"} if (path / "vae" / "config.json").exists() else {}
    try:
        if not (path / "vae" / "config.json").exists() and not (path / "config.json").exists():
            raise OSError("no config.json in it")
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True, use_safetensors=True, **inside)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"data.vae={folder} is no folder of a diffusers AutoencoderKL ({reason})") from None
    return vae.eval().requires_grad_(False)


def shrinking(vae: nn.Module) -> int:
    """How many pixels a latent stands for along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class LatentImages:
    """Means and log-variances float16 [2, 2 C, y, x] of images and of their mirror images.

    `transform` makes of an RGB image what the VAE sees. Computed at the first use into a file in `folder`
    whose name follows from the VAE, the images and their size; a file that is there is read instead. An
    image that cannot be read raises DataError then, with `lenient` only when it is asked for.
    """

    def __init__(
        self,
        images: Images,
        vae: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        folder: Path | None = None,
        *,
        lenient: bool = False,
    ) -> None:
        self.images, self.classes, self.notes = images, images.classes, images.notes
        self.file = (folder if folder is not None else CACHE) / f"{_key(images, vae, transform)}.npy"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if not self.file.exists():
                self._encode(vae, transform, lenient)
        self._opened: np.ndarray | None = None

    def _encode(self, vae: nn.Module, transform: Callable[[Image.Image], Tensor], lenient: bool) -> None:
        def pixels(index: int) -> Tensor:
            try:
                return transform(self.images.load(index))
            except DataError:
                if not lenient:
                    raise
                return torch.full_like(transform(Image.new("RGB", (1, 1))), torch.nan)  # and so its latents

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae.to(device)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(self.images), BATCH):
                some = range(start, min(start + BATCH, len(self.images)))
                x = torch.stack([pixels(index) for index in some]).to(device)
                both = [vae.encode(each).latent_dist.parameters for each in (x, x.flip(-1))]
                parts.append(torch.stack(both, dim=1).cpu().numpy().astype(np.float16))
        vae.to("cpu")
        content = np.concatenate(parts)
        write_atomically(self.file, lambda file: np.save(file, content, allow_pickle=False))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> np.ndarray:
        """Return the moments of one image and of its mirror image. Raises DataError without any."""
        if self._opened is None:  # in each reader process; the pages are shared between them
            self._opened = np.load(self.file, mmap_mode="r", allow_pickle=False)
        moments = np.array(self._opened[index])
        if np.isnan(moments).all():
            raise DataError(f"{self.describe(index)} could not be read when its latents were computed")
        return moments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def target(self, index: int) -> Any:
        """Return the class number or prompt of one image."""
        return self.images.target(index)

    def describe(self, index: int) -> str:
        """Return which image this is."""
        return self.images.describe(index)

    def short(self, index: int) -> str:
        """Return the short name of one image."""
        return self.images.short(index)


def _key(images: Images, vae: nn.Module, transform: Callable[[Image.Image], Tensor]) -> str:
    """What the latents follow from, as a file name: weights, transform, names and times (or checksums)."""
    found = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found.update(repr(transform).encode())
    for index in range(len(images)):
        name = images.describe(index)
        if isinstance(images, ImageShards):
            found.update(json.dumps([name, *images.mark(index)]).encode())
            continue
        file = Path(name)
        stat = file.stat() if file.is_file() else None
        found.update(json.dumps([name, stat and stat.st_size, stat and stat.st_mtime_ns]).encode())
    return found.hexdigest()[:32]


@dataclass(frozen=True)
class DrawLatents:
    """Moments to latents as the network sees them: mirrored as often as `hflip` says, drawn if `noisy`."""

    scale: float
    shift: float
    hflip: float
    noisy: bool

    @classmethod
    def of(cls, vae: nn.Module, *, hflip: float = 0.0, noisy: bool = False) -> DrawLatents:
        """The transform for a VAE's latents."""
        return cls(vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0, hflip, noisy)

    def __call__(self, moments: np.ndarray, target: Any) -> tuple[Tensor, Any]:
        mirrored = int(torch.rand(()) < self.hflip)
        mean, log_variance = torch.from_numpy(moments[mirrored]).float().chunk(2)
        if self.noisy:
            mean = mean + torch.randn(mean.shape) * (0.5 * log_variance.clamp(-30, 20)).exp()
        return (mean - self.shift) * self.scale, target
