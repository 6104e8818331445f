"""Key layouts of NAT and DiNAT: the published files and Hugging Face's."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# Hugging Face's name of a part, and the published one, applied in this order.
_PARTS = (
    (r"^(?:nat|dinat)\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:nat|dinat)\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^(?:nat|dinat)\.encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^(?:nat|dinat)\.encoder\.levels\.(\d+)\.downsample\.", r"levels.\1.downsample."),
    (r"^(?:nat|dinat)\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_QKV = re.compile(r"\.attention\.self\.(query|key|value)\.(weight|bias)$")


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under the published names; a state that already has them comes back as it is.

    Hugging Face keeps query, key and value apart where the published files have one projection of all three.
    """
    if not any(key.startswith(("nat.", "dinat.")) for key in state):
        return state
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for old, new in _PARTS:
            name = re.sub(old, new, name)
        name = re.sub(r"\.layer_scale_parameters$", ".gamma", name)
        part = _QKV.search(name)
        if part is None:
            if name.endswith(".gamma"):  # both layer scales of a block in one tensor [2, C]
                renamed[f"{name}1"], renamed[f"{name}2"] = value.unbind(0)
            else:
                renamed[name] = value
        elif part[1] == "query":
            stem = key[: key.index(".self.query.")]
            names = [f"{stem}.self.{which}.{part[2]}" for which in ("query", "key", "value")]
            if all(each in state for each in names):  # else the loader says that the whole is missing
                whole = torch.cat([state[each] for each in names])
                renamed[f"{name[: part.start()]}.attn.qkv.{part[2]}"] = whole
    return renamed
