"""DiT: diffusion transformers over latents, conditioned on time and class by adaptive norms.

Peebles and Xie 2023, Scalable Diffusion Models with Transformers (arXiv:2212.09748). Plain modules; saving
and loading as diffusers does is in zoo/diffusion/transformers.py. Keys are those of the published files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo import ops
from zoo.attention.global_attention import GlobalAttention
from zoo.errors import ConfigError, IntegrityError
from zoo.layers.checkpoint import checkpoint
from zoo.registry import register_generators


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Width in channels, depth in blocks; `patch_size` and `sample_size` in latent pixels.

    `time_std` and `class_std`: of the weights that embed time and class, at initialisation.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    in_channels: int = 4
    sample_size: int = 32
    num_classes: int = 1000
    learn_sigma: bool = True
    time_std: float = 0.02
    class_std: float = 0.02


class TimestepEmbedder(nn.Module):
    """Sines and cosines of a time [B], then two layers: [B, C].

    `frequency_shift` 1 spaces the frequencies as diffusers' copy of the model does.
    """

    def __init__(self, hidden_size: int, *, frequencies: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequencies, self.frequency_shift = frequencies, frequency_shift

    def forward(self, time: Tensor) -> Tensor:
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=time.device) / (half - self.frequency_shift)
        angles = time.float()[:, None] * torch.exp(-math.log(10_000) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class [B] and, with a dropout, one more for none: class `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)
        self.num_classes, self.dropout = num_classes, dropout

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class MLP(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """Shifts, scales and gates from a condition [B, C]: `parts` of [B, 1, .., C] for a map of `axes` axes."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, parts * dim))
        self.parts = parts

    def forward(self, condition: Tensor, axes: int) -> tuple[Tensor, ...]:
        values = super().forward(condition)
        return values.unflatten(0, (-1, *(1,) * axes)).chunk(self.parts, dim=-1)


class OwnAttention:
    """The processor that a block begins with: its attention as it was built."""

    def __call__(self, attention: nn.Module, *args: Any) -> Tensor:
        return attention(*args)


class Block(nn.Module):
    """A block whose attention is called through a processor that can be exchanged, as in diffusers' models.

    `processor(attention, *args)` gets the module `attn` and what its forward takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.processor = OwnAttention()

    def get_processor(self) -> Callable[..., Tensor]:
        """What calls the attention."""
        return self.processor

    def set_processor(self, processor: Callable[..., Tensor]) -> None:
        """Let `processor` call the attention from now on."""
        self._modules.pop("processor", None)  # an old one may be a module, which a plain object cannot follow
        self.processor = processor


class DiTBlock(Block):
    """Attention and MLP, each behind a norm that the condition shifts and scales and a gate that it opens."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = attention
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor, *context: Any) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition, x.ndim - 2)
        attended = self.processor(self.attn, ops.modulated_norm(x, scale, shift), *context)
        x = ops.gated_residual(x, attended, gate)
        return ops.gated_residual(x, self.mlp(ops.modulated_norm(x, scale2, shift2)), gate2)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition, x.ndim - 2)
        return self.linear(ops.modulated_norm(x, scale, shift))


class PatchEmbed(nn.Module):
    """Latents [B, C, *size] to tokens [B, *grid, D]."""

    def __init__(self, in_channels: int, dim: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = convolution(in_channels, dim, kernel_size=patch, stride=patch)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 + len(self.patch) or any(n % p for n, p in zip(x.shape[2:], self.patch, strict=True)):
            raise ConfigError(
                f"latents must be [B, C, *size] with a size that {self.patch} divides, found {tuple(x.shape)}"
            )
        # One layout for every block: norms read it in one pass.
        return self.proj(x).movedim(1, -1).contiguous()


class DiT(nn.Module):
    """Predict noise (and, with `learn_sigma`, its variance) from noisy latents, a time and a class.

    Shapes: latents [B, C, height, width] that `patch_size` divides, time [B] or a number, labels [B];
        returns [B, C or 2 C, height, width]. Any size: positions are computed.
    Units: `sample_size` in latent pixels, what the model is meant for. `attention` names a mechanism
        (`zoo.attention.swap.MECHANISMS`), `attention_kwargs` its arguments; "global" is the published one.
    Raises: ConfigError for a size that does not divide or an unknown mechanism.
    """

    def __init__(
        self,
        *,
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        sample_size: int = 32,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        time_std: float = 0.02,
        class_std: float = 0.02,
        attention: str = "global",
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, in_channels * (1 + learn_sigma)
        self.num_classes, self.sample_shape = num_classes, (in_channels, sample_size, sample_size)
        self.x_embedder = PatchEmbed(in_channels, hidden_size, (patch_size, patch_size))
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout)
        size = (sample_size // patch_size,) * 2
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                image_attention(attention, hidden_size, num_heads, size, number, attention_kwargs),
                mlp_ratio,
            )
            for number in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        init_as_published(self, time_std, class_std)

    def forward(self, latents: Tensor, time: Tensor | float, labels: Tensor) -> Tensor:
        x = self.x_embedder(latents)
        x = x + sincos(x.shape[1:-1], x.shape[-1], device=x.device).to(x.dtype)
        condition = self.t_embedder(per_sample(time, latents)) + self.y_embedder(labels)
        for block in self.blocks:
            x = run_block(self, block, x, condition)
        x = self.final_layer(x, condition).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of forward for one sample of the size the model is meant for, all zero."""
        return torch.zeros(1, *self.sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)

    @staticmethod
    def filter_checkpoint(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Published files as they are, see `filter_checkpoint` of this file."""
        return filter_checkpoint(state)


def image_attention(
    name: str, dim: int, num_heads: int, size: tuple[int, int], number: int, given: Mapping[str, Any] | None
) -> nn.Module:
    """Build the mechanism `name` for one block of an isotropic model."""
    from zoo.attention.swap import MECHANISMS, Place

    if name == "global":
        return GlobalAttention(dim, num_heads, **{"lepe_of": None, **(given or {})})
    if name not in MECHANISMS:
        raise ConfigError(f"unknown attention {name!r}; use {', '.join(MECHANISMS)}")
    given = dict(given or {})
    kind, defaults = MECHANISMS[name][1](Place(dim, num_heads, size, 2, number, number), given)
    return kind(dim, num_heads, **{**defaults, **given})


def sincos(grid: tuple[int, ...], dim: int, *, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a (rows, columns) grid, [rows, columns, C]: columns first, then rows."""
    if dim % 4:
        raise ConfigError(f"hidden_size must be a multiple of 4 for positions of two axes, found {dim}")
    omega = 1 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    row, column = (torch.arange(n, dtype=torch.float64, device=device)[:, None] * omega for n in grid)
    row, column = (torch.cat([x.sin(), x.cos()], dim=-1) for x in (row, column))
    rows, columns = grid
    return torch.cat(
        [column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)], dim=-1
    ).float()


def per_sample(time: Tensor | float, latents: Tensor) -> Tensor:
    """One time for each sample, [B]."""
    time = torch.as_tensor(time, device=latents.device)
    return time.expand(len(latents)) if time.ndim == 0 else time


def run_block(model: nn.Module, block: nn.Module, *args: Any) -> Tensor:
    """Run a block, forgetting what it can compute again where the model says so."""
    if model.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args)
    return block(*args)


def init_as_published(model: nn.Module, time_std: float = 0.02, class_std: float = 0.02) -> None:
    """Xavier weights, small embeddings; gates and output begin at zero, so that a block changes nothing."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.view(module.proj.weight.shape[0], -1))
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=class_std)
    for module in model.modules():
        if isinstance(module, TimestepEmbedder):
            for layer in (module.mlp[0], module.mlp[2]):
                nn.init.normal_(layer.weight, std=time_std)
        elif isinstance(module, Modulation):
            nn.init.zeros_(module[1].weight)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)


# Published files -------------------------------------------------------------------------------------------

_DIFFUSERS = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.0.norm1.emb.class_embedder": "y_embedder",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def filter_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published state dict, the authors' or diffusers' layout, to ours; positions are computed.

    Raises: IntegrityError where the copies that diffusers keeps in every block differ.
    """
    if "x_embedder.proj.weight" in state:
        return {name: x for name, x in state.items() if name != "pos_embed"}
    found, parts = {}, {}
    for name, x in state.items():
        if name == "pos_embed.pos_embed":
            continue
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
        if block and ".emb." in f".{block[2]}.":
            # Every block has a copy of the embedders; they came from one.
            first = re.sub(r"^transformer_blocks\.\d+", "transformer_blocks.0", name)
            if not torch.equal(state[first], x):
                raise IntegrityError(f"{name} must equal {first}, found another embedder in this block")
            if name != first:
                continue
        elif block:
            number, layer, leaf = block.groups()
            if layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
                parts.setdefault((number, leaf), {})[layer[-1]] = x
            else:
                found[f"blocks.{number}.{_DIFFUSERS_BLOCK.get(layer, layer)}.{leaf}"] = x
            continue
        prefix = next((p for p in _DIFFUSERS if name.startswith(p + ".")), None)
        found[name if prefix is None else _DIFFUSERS[prefix] + name[len(prefix) :]] = x
    for (number, leaf), qkv in parts.items():
        found[f"blocks.{number}.attn.qkv.{leaf}"] = torch.cat([qkv[letter] for letter in "qkv"])
    return found


_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
VARIANTS = {
    f"dit_{size}_{patch}": DiTConfig(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
# Ours, for 16 x 16 pixels of handwritten digits: small enough to train on a CPU in minutes. The digits were
# scanned at 8 x 8, so a patch of 4 x 4 loses nothing and pays for four times as many images. The published
# embeddings are small beside the rest at this width, and time and class count late: these are larger.
VARIANTS["dit_digits"] = DiTConfig(
    depth=4, hidden_size=96, num_heads=4, patch_size=4, in_channels=1, sample_size=16, num_classes=10,
    learn_sigma=False, time_std=0.1, class_std=1.0,
)  # fmt: skip
register_generators(DiT, VARIANTS, paper="arXiv:2212.09748", attention="global")
