"""What generated images are worth: recognised by a classifier, like real ones, and no copies of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.recipes.data.transforms import eval_transform
from zoo.recipes.run_folder import Trained, load_trained

BATCH = 128
KID_SUBSET = 100  # images in each of the hundred subsets of KID, fewer where there are fewer


class Judge:
    """A classifier that was trained apart: what it sees in images, and the features it sees it by."""

    def __init__(self, source: str) -> None:
        self.trained: Trained = load_trained(source)
        if self.trained.recipe is not None and self.trained.recipe.task != "classification":
            raise ConfigError(f"{source} does {self.trained.recipe.task}; a judge must classify")
        self.transform = eval_transform(self.trained.settings)

    @torch.inference_mode()
    def see(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the class that each image shows."""
        found = []
        for batch in self._batches(images):
            found += self.trained.model(batch).argmax(1).tolist()
        return [self.trained.classes[number] for number in found]

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return what the classifier of the network gets, [B, C]."""
        model = self.trained.model
        found = [
            model.forward_head(model.forward_features(batch), pre_logits=True)
            for batch in self._batches(images)
        ]
        return torch.cat(found).flatten(1)

    def _batches(self, images: Sequence[Image.Image]) -> list[Tensor]:
        seen = [self.transform(image.convert("RGB")) for image in images]
        return [torch.stack(seen[start : start + BATCH]) for start in range(0, len(seen), BATCH)]


class _Ready(nn.Module):
    """Hands on features that are known already: torchmetrics wants the network that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(real: Tensor, made: Tensor) -> dict[str, float]:
    """Return FID and KID between two sets of features [N, C]; nothing where one is of fewer than two images.

    They compare with other values of the same features only, not with published ones, which are Inception's.
    """
    if min(len(real), len(made)) < 2:  # which have no covariance
        return {}
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    ready = _Ready(real.shape[1])
    fid = FrechetInceptionDistance(feature=ready)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")  # of memory
        kid = KernelInceptionDistance(feature=ready, subset_size=min(KID_SUBSET, len(real), len(made)))
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(made, real=False)
    with torch.random.fork_rng(devices=[]):  # KID draws its subsets
        torch.manual_seed(0)
        return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}


def nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image the distance to the nearest of others, and which that is.

    Shapes: uint8 [N, height, width, C] both. Units: Euclidean, over pixels in 0..1.
    """
    flat, theirs = (torch.from_numpy(x.reshape(len(x), -1)).double() / 255 for x in (images, others))
    exact = "donot_use_mm_for_euclid_dist"  # so that a copy is at distance 0
    closest = [torch.cdist(part, theirs, compute_mode=exact).min(1) for part in flat.split(BATCH)]
    return (
        torch.cat([each.values for each in closest]).numpy(),
        torch.cat([each.indices for each in closest]).numpy(),
    )
