"""Many conditions beside the image of a Flux pipeline, at a cost that grows only linearly with their number.

Source: arXiv:2602.06850 (PKA); the attention itself is in zoo/layers/pka.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.diffusion.adapters import Adapter, flux_layout
from zoo.diffusion.handle import Handle, apply
from zoo.diffusion.processor import Config, Processor, check_backend
from zoo.diffusion.steps import Call
from zoo.errors import ConfigError
from zoo.layers.pka import (
    COMBINES,
    NORMS,
    REFRESHES,
    RELATIONS,
    KeywordState,
    check_choice,
    check_epsilon,
    group_attention,
    pka_attention,
    relation_pairs,
)
from zoo.layers.tokens import TokenLayout

KINDS = ("spatial", "subject")


@dataclass(frozen=True, kw_only=True)
class PKAConfig(Config):
    """Kinds of conditions in the order of their tokens, one tuple of keyword tokens for each subject."""

    conditions: tuple[str, ...]
    keywords: tuple[tuple[int, ...] | None, ...] = ()
    relation: str = "pka"
    epsilon: float = 0.2
    norm: str = "minmax"
    refresh: str = "every"
    share_routing: bool = False
    paa_radius: int = 0
    combine: str = "joint"
    text_to_condition: bool = False
    backend: str = "auto"

    def check(self, axes: int) -> None:
        """Raise ConfigError for settings that no image could have."""
        for name, choices in (("norm", NORMS), ("combine", COMBINES), ("relation", RELATIONS),
                              ("refresh", REFRESHES)):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        check_epsilon(self.epsilon)
        if not self.conditions or any(kind not in KINDS for kind in self.conditions):
            raise ConfigError(f"conditions must be some of {', '.join(KINDS)}, found {self.conditions}")
        if list(self.conditions) != sorted(self.conditions, key=KINDS.index):
            raise ConfigError(f"spatial conditions must come before subjects, found {self.conditions}")
        subjects = self.conditions.count("subject")
        if len(self.keywords) != subjects:
            raise ConfigError(
                f"keywords must have token indices (or None) for each of {subjects} subjects, found "
                f"{self.keywords}"
            )
        for words in self.keywords:
            places = words if isinstance(words, tuple) and words else (None,)
            if words is not None and any(type(place) is not int or place < 0 for place in places):
                raise ConfigError(
                    f"keywords must be places of tokens in the prompt, whole numbers >= 0, found {words!r}; "
                    "find_keywords gives them"
                )
        if type(self.paa_radius) is not int or self.paa_radius < 0:
            raise ConfigError(f"radius must be a whole number >= 0, found {self.paa_radius!r}")
        for name in ("share_routing", "text_to_condition"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be True or False, found {getattr(self, name)!r}")
        check_backend(self.backend, "attention")

    def layout(self, adapter: Adapter, model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout:
        """Read image and conditions from the first column of `img_ids`, which numbers them."""
        ids = arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        numbers, lengths = (x.tolist() for x in ids[:, 0].unique_consecutive(return_counts=True))
        if len(numbers) != 1 + len(self.conditions) or len(set(numbers)) != len(numbers):
            raise ConfigError(
                f"img_ids must number the image and {len(self.conditions)} conditions one after the other "
                f"({', '.join(self.conditions)}), found {numbers}; remove the handle to go on without them"
            )
        layout = flux_layout(model, {**arguments, "img_ids": ids[: lengths[0]]})
        spatial = self.conditions.count("spatial")
        if any(length != layout.image for length in lengths[1 : 1 + spatial]):
            raise ConfigError(
                f"a spatial condition must have the image's {layout.image} tokens, found {lengths[1:]}"
            )
        return TokenLayout(layout.text, layout.grid, spatial, tuple(lengths[1 + spatial :]))

    def prompt(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Where keywords are is remembered for their prompt."""
        return arguments["encoder_hidden_states"] if self.relation == "pka" else None

    def plan(self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any) -> str:
        """There is always something that conditions do not see."""
        return self.relation

    def pairs(self, layout: TokenLayout, text: int, plan: Any) -> int:
        """Query-key pairs of one head, as if every image token were routed: the most there can be."""
        return relation_pairs(
            layout, self.relation, paa_radius=self.paa_radius, text_to_condition=self.text_to_condition
        )

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: Any) -> str:
        """Name of the backend of the dense parts."""
        merged = self.relation == "pka"
        backend = self.backend if merged else "auto"
        return ops.explain("attention", query, key, key, return_lse=merged, backend=backend).backend


@dataclass(eq=False)
class Memory:
    """Masks [B, N] of one forward in one layer: by which the image is routed, and where the keywords are."""

    routed: list[Tensor | None]
    found: list[Tensor | None] | None = None


class PKAProcessor(Processor):
    """Relates text, image and conditions; remembers from step to step where the keywords are.

    What changes from step to step is decided in `prepare` and `keep`, outside of compiled graphs: these take
    masks and give masks, at every step the same way.
    """

    config: PKAConfig
    memory: Memory | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = self.config
        self.keywords = KeywordState(
            config.keywords, epsilon=config.epsilon, norm=config.norm, refresh=config.refresh
        )
        self.masks: dict[int, list[Tensor | None]] = {}  # of each prompt, by the latest step
        self.routed: list[Tensor | None] | None = None  # by what this step attends, None for all
        self.keeps: int | None = None  # the prompt for which the latest forward is to be remembered

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: str) -> Tensor:
        if plan != "pka":
            return group_attention(query, key, value, layout, relation=plan)
        config = self.config
        routed = self.keywords.routed_by(query[:, layout.image_slice], key[:, layout.text_slice])
        if not self.state.is_training:  # there, there is no step before
            self.memory.found = routed
            # Offloading moves the inputs after the masks were made.
            routed = [None if mask is None else mask.to(query.device) for mask in self.memory.routed]
        return pka_attention(
            query, key, value, layout, routed=routed, paa_radius=config.paa_radius, combine=config.combine,
            text_to_condition=config.text_to_condition, backend=config.backend,
        )  # fmt: skip

    def prepare(self, call: Call, layout: TokenLayout, batch: int, device: torch.device) -> None:
        """Choose the masks of this call, which are those of the step before.

        At the first step there are none, and any of its calls may be the one with the prompt. Later it is
        the first call of a step that has it: guidance calls again without the keywords.
        """
        if call.is_first_step and not call.is_comparing:
            self.masks.pop(call.prompt, None)  # of a generation before; dense steps may not find new ones
        routed = known = self.masks.get(call.prompt)
        if not call.is_comparing:
            if call.is_first_step or call.is_first_call:
                self.routed = None if call.is_first_step else known
                if call.is_first_step or known is None or self.config.refresh == "every":
                    self.keeps = call.prompt
            routed = self.routed if call.has_prompt or self.config.share_routing else None
        everywhere = torch.ones(batch, layout.image, dtype=torch.bool, device=device)
        routed = [None] * len(self.config.keywords) if routed is None else routed
        self.memory = Memory([
            None if words is None else everywhere if mask is None or mask.shape != everywhere.shape else mask
            for words, mask in zip(self.config.keywords, routed, strict=True)
        ])  # fmt: skip

    def keep(self) -> None:
        found = None if self.memory is None else self.memory.found
        if self.keeps is not None and found is not None:
            # Copies: what a recorded CUDA graph gives is overwritten when it runs again.
            self.masks[self.keeps] = [None if mask is None else mask.clone() for mask in found]
        self.keeps = None


def apply_pka(
    pipe_or_transformer: Any,
    *,
    conditions: Sequence[str],
    keywords: Sequence[Sequence[int] | None] = (),
    epsilon: float = 0.2,
    norm: str = "minmax",
    refresh: str = "every",
    share_routing: bool = False,
    paa_radius: int = 0,
    combine: str = "joint",
    text_to_condition: bool = False,
    cache: bool = False,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
    backend: str = "auto",
) -> Handle:
    """Let conditions beside the image of a Flux pipeline cost linearly: position-aligned, keyword-scoped.

    Conditions are tokens that follow the image's in `hidden_states`, numbered by the first column of
    `img_ids`, as FluxKontextPipeline passes its reference image. At the first step the whole image sees every
    subject; later, only where the keywords were at the step before (`refresh="once"`: at the first). In
    training there is no such step, and the masks are those of the same forward.

    Units: `conditions` names each of them "spatial" (as many tokens as the image, aligned with it) or
        "subject"; `keywords` has, for each subject, the places of its keyword's tokens in the prompt
        (`find_keywords`) or None. Further arguments as in `pka_attention` and `keyword_routing`.
        `share_routing`: the call without the prompt, which guidance makes, takes the masks of the other.
    Returns: a handle with `remove()`, `stats()` (all image tokens counted as routed) and `compare_dense()`.
    Raises: ConfigError, with nothing changed, as the other methods; and for `cache=True`: Flux modulates all
        tokens by the timestep, so that keys and values of conditions change from step to step.
    Source: arXiv:2602.06850. Trained adapters for such conditions are the caller's.
    """
    if cache:
        raise ConfigError(
            "cache=True needs conditions that do not depend on time, found Flux, which modulates every token "
            "by the timestep; leave it out"
        )
    return _apply(
        pipe_or_transformer, dense_steps, dense_layers,
        conditions=conditions, keywords=keywords, epsilon=epsilon, norm=norm, refresh=refresh,
        share_routing=share_routing, paa_radius=paa_radius, combine=combine,
        text_to_condition=text_to_condition, backend=backend,
    )  # fmt: skip


def apply_group_mask(
    pipe_or_transformer: Any,
    relation: str,
    *,
    conditions: Sequence[str],
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
) -> Handle:
    """Relate text, image and conditions of a Flux pipeline as OminiControl, EasyControl or UniCombine do.

    Conditions as in `apply_pka`; relations as in `group_attention`.
    """
    check_choice("relation", relation, RELATIONS[1:])
    subjects = list(conditions).count("subject") if isinstance(conditions, Sequence) else 0
    nothing = (None,) * subjects
    return _apply(
        pipe_or_transformer, dense_steps, dense_layers,
        conditions=conditions, keywords=nothing, relation=relation,
    )  # fmt: skip


def _apply(
    target: Any,
    dense_steps: int,
    dense_layers: int | Sequence[int | str],
    *,
    conditions: Sequence[str],
    keywords: Sequence[Sequence[int] | None],
    **settings: Any,
) -> Handle:
    for name, given in (("conditions", conditions), ("keywords", keywords)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ConfigError(f"{name} must be a sequence, one item for each, found {given!r}")
    config = PKAConfig(
        conditions=tuple(conditions),
        keywords=tuple(tuple(words) if isinstance(words, Sequence) else words for words in keywords),
        **settings,
    )
    return apply(
        target, PKAProcessor, config, method="pka", dense_steps=dense_steps, dense_layers=dense_layers
    )
