"""Training-free attention processors for diffusers: one call in, one handle out.

handle = diffusion.apply_neighborhood(pipe, kernel_size=(32, 32), dense_steps=4)
...
handle.remove()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo.errors import ConfigError, ResourceError

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ResourceError(
        "zoo.diffusion needs diffusers, which is not installed; run: pip install 'attnzoo[diffusion]'"
    ) from error

from zoo.diffusion.agent import AgentConfig, agentsd_attention, apply_agent
from zoo.diffusion.handle import Comparison, Handle, Stats, handles
from zoo.diffusion.neighborhood import NeighborhoodConfig, apply_neighborhood
from zoo.diffusion.pka import PKAConfig, apply_group_mask, apply_pka
from zoo.diffusion.radial import RadialConfig, apply_radial_attention
from zoo.diffusion.sampling import ImagePipeline, make_scheduler, sample
from zoo.diffusion.sites import find_sites
from zoo.diffusion.transformers import DiTModel, MMDiTModel, VideoDiTModel
from zoo.layers.pka import (
    ConditionCache,
    KeywordState,
    csas_timesteps,
    find_keywords,
    group_attention,
    keyword_routing,
    pka_attention,
    relation_mask,
    relation_pairs,
)
from zoo.layers.radial import radial_block_mask, radial_token_mask
from zoo.layers.tokens import TokenLayout

__all__ = [
    "AgentConfig",
    "Comparison",
    "ConditionCache",
    "DiTModel",
    "Handle",
    "ImagePipeline",
    "KeywordState",
    "MMDiTModel",
    "NeighborhoodConfig",
    "PKAConfig",
    "RadialConfig",
    "Stats",
    "Support",
    "TokenLayout",
    "VideoDiTModel",
    "agentsd_attention",
    "apply_agent",
    "apply_group_mask",
    "apply_neighborhood",
    "apply_pka",
    "apply_radial_attention",
    "csas_timesteps",
    "find_keywords",
    "group_attention",
    "handles",
    "keyword_routing",
    "make_scheduler",
    "pka_attention",
    "radial_block_mask",
    "radial_token_mask",
    "relation_mask",
    "relation_pairs",
    "sample",
    "supported",
]

METHODS = ("neighborhood", "radial", "pka", "agent")


@dataclass(frozen=True)
class Support:
    """Whether a method can be applied (the truth value) and to what, or why not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def supported(pipe_or_transformer: Any) -> dict[str, Support]:
    """Say for every method whether it can be applied to this pipeline or transformer now; changes nothing."""
    report = {}
    for method in METHODS:
        try:
            sites = find_sites(pipe_or_transformer, method)
        except ConfigError as error:
            report[method] = Support(False, str(error))
        else:
            what = ", ".join(f"{len(site.layers)} layers of {type(site.model).__name__}" for site in sites)
            report[method] = Support(True, what)
    return report
