"""Key layouts of DaViT: timm's, which is ours, the published files', and that of Florence-2's towers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# A published name, and timm's, applied in this order.
_PUBLISHED = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_TOWER = "vision_tower."
# Microsoft's own names (proj, conv1.fn.dw, window_attn.fn ...) and those of the transformers library.
_FLORENCE = (
    (r"^convs\.0\.(?:proj|conv)\.", "stem.conv."),
    (r"^convs\.0\.norm\.", "stem.norm."),
    (r"^convs\.(\d+)\.(?:proj|conv)\.", r"stages.\1.downsample.conv."),
    (r"^convs\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.conv([12])(?:\.fn\.dw)?\.", r".cpe\1.proj."),
    (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(?:window|channel)_attn(?:\.fn)?\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn(?:\.fn\.net)?\.", ".mlp."),
)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under timm's names; a state that already has them comes back as it is.

    Of a Florence-2 file only the image tower is taken. It ends without a norm, so that of the model, which
    follows the pooling, starts as one.
    """
    tower = {key.partition(_TOWER)[2]: value for key, value in state.items() if _TOWER in key}
    state = tower or state
    if "convs.0.norm.weight" in state:
        state = {key: value for key, value in state.items() if key.startswith(("convs.", "blocks."))}
        renamed = _renamed(state, _FLORENCE)
        width = max(len(v) for key, v in renamed.items() if key.endswith("downsample.conv.bias"))
        return renamed | {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
    return _renamed(state, _PUBLISHED) if "patch_embeds.0.proj.weight" in state else state


def _renamed(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for old, new in names:
            key = re.sub(old, new, key)
        renamed[key] = value
    return renamed
