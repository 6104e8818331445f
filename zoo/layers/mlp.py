"""The MLP of a transformer block."""

from __future__ import annotations

import timm.layers
import torch
from torch import Tensor

from zoo.kernels.checks import in_graph

# Memory of over 32 MB goes back to the system at once and comes cleared for the next layer, which can cost as
# much as the layer. So many hidden numbers also stay in a CPU's cache from one layer to the next.
HIDDEN_AT_ONCE = 1 << 21


class Mlp(timm.layers.Mlp):
    """Two linear layers around an activation, as timm's, which on a CPU take a few tokens at a time.

    Shapes: [.., C] in and out. Where gradients are wanted everything is kept anyway, and taken at once, as
    where somebody watches the layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] to [.., C]."""
        tokens = max(1, HIDDEN_AT_ONCE // self.fc1.out_features)
        if (
            x.device.type != "cpu"
            or torch.is_grad_enabled()
            or in_graph()
            or any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.children())
            or x[..., 0].numel() <= 2 * tokens
        ):
            return super().forward(x)
        parts = [super(Mlp, self).forward(part) for part in x.flatten(0, -2).split(tokens)]
        return torch.cat(parts).view(*x.shape[:-1], -1)
