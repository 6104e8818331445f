"""How many multiply-adds a model needs, counted by layer and without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Count the multiply-adds of one forward pass for one image of [channels, height, width].

    Linear and convolution layers are counted by their shapes, attention by `attention_macs(input shape)` of
    its module: what the mathematics needs, whichever backend runs it. Norms, activations and biases count
    nothing.
    """
    total = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        else:
            total += module.attention_macs(arguments[0].shape)

    counted = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) or hasattr(module, "attention_macs")
    ]
    hooks = [module.register_forward_hook(add) for module in counted]
    training = model.training
    try:
        with torch.no_grad():
            parameter = next(model.parameters())
            model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total
