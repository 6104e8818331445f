"""The zoo's diffusion transformers as diffusers models: they save, load, take LoRA and processors alike.

zoo.create_model("video_dit_s", attention="radial") builds one by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.models import dit, mmdit, video_dit


class _Diffusers(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """What all models take from diffusers; names of arguments are those of its own transformers.

    A processor of theirs is called as `processor(attention, *arguments)` with what the attention module
    would get; `attn_processors` names them after the blocks.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock", "MMDiTBlock")
    _repeated_blocks = ("DiTBlock", "MMDiTBlock")


class DiTModel(_Diffusers, dit.DiT):
    """DiT with the interface of diffusers; its DiTPipeline generates with it."""

    @register_to_config
    def __init__(
        self,
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
        dit.DiT.__init__(self, **_plain(locals()))

    @property
    def config(self) -> FrozenDict:
        """The arguments it was built with, and what DiTPipeline asks for beside them."""
        return FrozenDict({**super().config, "out_channels": self.out_channels})

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Shapes as in `DiT`."""
        sample = dit.DiT.forward(self, hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class VideoDiTModel(_Diffusers, video_dit.VideoDiT):
    """VideoDiT with the interface of diffusers."""

    @register_to_config
    def __init__(
        self,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 16,
        text_dim: int | None = None,
        mlp_ratio: float = 4.0,
        attention: str = "global",
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        video_dit.VideoDiT.__init__(self, **_plain(locals()))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        encoder_attention_mask: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Shapes as in `VideoDiT`."""
        sample = video_dit.VideoDiT.forward(
            self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class MMDiTModel(_Diffusers, mmdit.MMDiT):
    """MMDiT with the interface of diffusers."""

    @register_to_config
    def __init__(
        self,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: int = 2,
        in_channels: int = 16,
        text_dim: int = 768,
        pooled_dim: int = 768,
        mlp_ratio: float = 4.0,
        attention: str = "global",
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        mmdit.MMDiT.__init__(self, **_plain(locals()))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Shapes and `conditions` (spatial, subjects, keywords, cache ...) as in `MMDiT`.

        Raises: ConfigError for a mask of the text: as in the published model, padding is text like any other.
        """
        if conditions.pop("encoder_attention_mask", None) is not None:
            raise ConfigError(
                "encoder_attention_mask must be left out, found one: MMDiT reads padding as text; pad all "
                "prompts to one length, in training as well"
            )
        sample = mmdit.MMDiT.forward(
            self, hidden_states, timestep, encoder_hidden_states, pooled_projections, **conditions
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


_MODELS = {dit.DiT: DiTModel, mmdit.MMDiT: MMDiTModel, video_dit.VideoDiT: VideoDiTModel}


def as_diffusers(model: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Build the diffusers model of a plain class of zoo/models."""
    return _MODELS[model](**arguments)
