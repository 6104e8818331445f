"""Probes: small classifiers on a frozen backbone, which tell how good its features are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError

MOST_QUERIES = 32


def freeze_all_but_classifier(model: nn.Module) -> nn.Module:
    """Leave only a model's classifier to train, a linear probe. Raises ConfigError where it has none."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    trained = [parameter for head in heads for parameter in head.parameters()]
    if not trained:
        raise ConfigError(f"{type(model).__name__} has no classifier to train; give it num_classes")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


class AttentiveProbe(nn.Module):
    """A frozen backbone and a classifier that chooses by attention where to look; images to logits.

    Learned queries attend to the last feature map, which is its own keys, and each gathers its own slice of
    the projected channels. Any timm model with `forward_intermediates` is a backbone; it stays in evaluation.
    Source: efficient probing, Psomas et al. 2025 (arXiv:2506.10178) Sec. 3.
    """

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        dim = list(backbone.feature_info)[-1]["num_chs"]  # where a convolution widens it, before that
        parameter = next(backbone.parameters())
        factory: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        self.num_classes, self.num_features = num_classes, dim
        self.pretrained_cfg = self.default_cfg = backbone.pretrained_cfg
        self.backbone = backbone.requires_grad_(False)
        self.queries = nn.Parameter(torch.empty(math.gcd(dim, MOST_QUERIES), dim, **factory))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.value = nn.Linear(dim, dim, bias=False, **factory)
        self.head = nn.Linear(dim, num_classes, **factory)

    def train(self, mode: bool = True) -> AttentiveProbe:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            (features,) = self.backbone.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )
        tokens = features.flatten(2).mT  # [B, N, C]
        logits = tokens @ (self.queries * self.queries.shape[1] ** -0.5).mT  # [B, N, M]
        values = self.value(tokens).unflatten(-1, (len(self.queries), -1))  # [B, N, M, C / M]
        seen = torch.einsum("bnm,bnmc->bmc", logits.float().softmax(1).to(values.dtype), values)
        return self.head(seen.flatten(1))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say to which layer each parameter belongs: what is trained is all one."""
        return {"stem": r"^backbone", "blocks": [(r"^(?:queries|value|head)", (0,))]}
