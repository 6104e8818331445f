"""How many multiply-adds a model needs, counted by layer and without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def count_macs(model: nn.Module, input_size: tuple[int, ...], *arguments: Any) -> int:
    """Count the multiply-adds of one forward pass for one image of [channels, height, width].

    Linear and convolution layers are counted by their shapes, attention by `attention_macs(input shape)` of
    its module, or `macs(arguments of its forward)` where the shape does not say it all: what the mathematics
    needs, whichever backend runs it. Norms, activations and biases count nothing. `arguments` are what the
    model's forward takes beside the image.
    """
    total = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, _CONVOLUTIONS):
            total += output.numel() * module.weight[0].numel()
        elif hasattr(module, "macs"):
            total += module.macs(*arguments)
        else:
            total += module.attention_macs(arguments[0].shape)

    counted = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        or hasattr(module, "attention_macs")
        or hasattr(module, "macs")
    ]
    hooks = [module.register_forward_hook(add) for module in counted]
    training = model.training
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
            model.eval()(image, *arguments)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total
