"""Agent attention with token merging in Stable Diffusion: AgentSD, training-free.

Similar tokens are merged before self-attention and parted after it; where few enough representatives are
left, they serve as agents, through which the others attend.

Source: Han et al. 2023, Agent Attention (arXiv:2312.08874), Sec. 4.4; merging: Bolya and Hoffman 2023, Token
Merging for Fast Stable Diffusion (arXiv:2303.17604).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from zoo import ops
from zoo.diffusion.adapters import Adapter, downsampling, project_out, projections
from zoo.diffusion.handle import Handle, apply
from zoo.diffusion.processor import Config, Processor, check_backend
from zoo.diffusion.sites import find_sites
from zoo.errors import ConfigError
from zoo.layers.tokens import TokenLayout

Grid = tuple[int, ...]
ROWS = 4096  # how many tokens are compared with the representatives at once

# Merging ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """How tokens are merged: one representative for each stride x stride cell of the map.

    `ratio` of all tokens are merged for queries, keys and values, `agent_ratio` for agents.
    """

    stride: int
    ratio: float
    agent_ratio: float


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which tokens of a map stand for their cell (`kept` [D]), which may be merged (`free` [S]), how many."""

    kept: Tensor
    free: Tensor
    merged: int
    merged_for_agents: int

    @property
    def tokens(self) -> int:
        """Tokens after merging."""
        return len(self.kept) + len(self.free) - self.merged

    @property
    def agents(self) -> int:
        """Agents; 0 where they would not be fewer than half of the tokens: these see each other then."""
        agents = len(self.kept) + len(self.free) - self.merged_for_agents
        return agents if 2 * agents < self.tokens else 0


def plan_merge(grid: Grid, phase: Phase, *, generator: torch.Generator | None = None) -> MergePlan | None:
    """Choose the tokens that stand for their cell: the first, or with `generator` any one of it.

    Tokens beyond the last whole cell may all be merged. None where there is nothing to merge or to gain.
    """
    rows, columns = grid
    step = phase.stride
    cells = (rows // step, columns // step)
    count = cells[0] * cells[1]
    if count == 0:
        return None
    place = torch.zeros(count, dtype=torch.int64)
    if generator is not None:
        place = torch.randint(step * step, (count,), generator=generator)
    cell = torch.arange(count)
    row = cell // cells[1] * step + place // step
    column = cell % cells[1] * step + place % step
    kept = row * columns + column
    is_free = torch.ones(rows * columns, dtype=torch.bool)
    is_free[kept] = False
    free = is_free.nonzero().flatten()
    merged, for_agents = (
        min(len(free), int(rows * columns * ratio)) for ratio in (phase.ratio, phase.agent_ratio)
    )
    plan = MergePlan(kept, free, merged, for_agents)
    return None if plan.merged == 0 and plan.agents == 0 else plan


class Merger:
    """Orders tokens [B, N, C] by their likeness to a representative; merges and parts others of that map."""

    def __init__(self, source: Tensor, plan: MergePlan) -> None:
        self.kept, self.free = plan.kept.to(source.device), plan.free.to(source.device)
        unit = functional.normalize(source.detach(), dim=-1)
        kept = unit[:, self.kept].mT
        likeness, nearest = (
            torch.cat(parts, dim=1)
            for parts in zip(*((rows @ kept).max(dim=-1) for rows in unit[:, self.free].split(ROWS, dim=1)),
                             strict=True)
        )  # fmt: skip
        order = likeness.argsort(dim=-1, descending=True)
        self.order, self.nearest = order, nearest.gather(1, order)

    def merge(self, x: Tensor, count: int) -> Tensor:
        """Let the `count` likest free tokens join the mean of their representative; [B, N - count, C]."""
        free, kept = x[:, self.free].gather(1, expand(self.order, x)), x[:, self.kept]
        target = self.nearest[:, :count]
        total = kept.scatter_add(1, expand(target, x), free[:, :count])
        members = torch.ones_like(kept[..., 0]).scatter_add(1, target, torch.ones_like(free[:, :count, 0]))
        return torch.cat([free[:, count:], total / members[..., None]], dim=1)

    def part(self, x: Tensor, count: int) -> Tensor:
        """Give every token its place again, those that were merged what their representative became."""
        free, kept = x.split([len(self.free) - count, len(self.kept)], dim=1)
        free = torch.cat([kept.gather(1, expand(self.nearest[:, :count], kept)), free], dim=1)
        out = x.new_empty(x.shape[0], len(self.free) + len(self.kept), x.shape[2])
        out = out.index_copy(1, self.kept, kept)
        return out.scatter(1, expand(self.free[self.order], free), free)


def expand(index: Tensor, x: Tensor) -> Tensor:
    """Repeat an index [B, N] over the channels of x [B, M, C]."""
    return index[..., None].expand(-1, -1, x.shape[-1])


# Attention -------------------------------------------------------------------------------------------------


def agentsd_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    scale_power: float = 0.3,
    shortcut: float = 0.075,
    backend: str = "auto",
) -> Tensor:
    """Attend through agents: softmax(Q A' s^scale_power) softmax(A K' s) V + shortcut V, with s = D^-0.5.

    Shapes: query, key and value [B, N, H, D], agents [B, A, H, D]; returns [B, N, H, D].
    Source: Han et al. 2023 (arXiv:2312.08874), Sec. 4.4.
    """
    scale = query.shape[-1] ** -0.5
    # The operation has one scale for both products; the other factor goes into the query.
    query = query * scale ** (scale_power - 1)
    out = ops.agent_attention(query, key, value, agents, scale=scale, backend=backend)
    return out + shortcut * value


# Processors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AgentConfig(Config):
    """An early phase of so many steps with agents, a late one with less merging, and their constants."""

    early: Phase = Phase(stride=4, ratio=0.4, agent_ratio=0.95)
    late: Phase = Phase(stride=2, ratio=0.4, agent_ratio=0.5)
    early_steps: int = 20
    scale_power: float = 0.3
    shortcut: float = 0.075
    seed: int | None = 0
    max_downsample: int = 1
    backend: str = "auto"

    def check(self, axes: int) -> None:
        """Raise ConfigError for numbers out of range."""
        for phase in (self.early, self.late):
            if type(phase.stride) is not int or phase.stride < 2:
                raise ConfigError(f"stride must be a whole number >= 2, found {phase.stride!r}")
            for name in ("ratio", "agent_ratio"):
                value = getattr(phase, name)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                    raise ConfigError(f"{name} must be at least 0 and below 1, found {value!r}")
        if type(self.early_steps) is not int or self.early_steps < 0:
            raise ConfigError(f"early_steps must be a whole number >= 0, found {self.early_steps!r}")
        for name in ("scale_power", "shortcut"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                raise ConfigError(f"{name} must be a finite number, found {value!r}")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**32):
            raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1 or None, found {self.seed!r}")
        check_backend(self.backend, "agent_attention")

    def phase(self, step: int) -> Any:
        """What a plan depends on beside the geometry: which phase it is and which tokens are drawn."""
        return (step < self.early_steps, None if self.seed is None else step)

    def plan(
        self, adapter: Adapter, layout: TokenLayout, text: int, device: torch.device, phase: Any
    ) -> dict[Grid, MergePlan] | None:
        """Return how to merge the maps of every resolution; None where there is nothing to merge."""
        is_early, step = phase
        plans = {}
        for level in range(self.max_downsample.bit_length()):
            grid = coarser(layout.grid, 2**level)
            generator = None if step is None else torch.Generator().manual_seed(self.seed + step)
            plan = plan_merge(grid, self.early if is_early else self.late, generator=generator)
            if plan is not None:
                plans[grid] = MergePlan(
                    plan.kept.to(device), plan.free.to(device), plan.merged, plan.merged_for_agents
                )
        return plans or None

    def pairs(self, layout: TokenLayout, text: int, plan: dict[Grid, MergePlan] | None) -> int:
        """Query-key pairs of one head; through agents there are two products of tokens and agents."""
        merge = (plan or {}).get(layout.grid)
        if merge is None:
            return layout.tokens**2
        return 2 * merge.tokens * merge.agents if merge.agents else merge.tokens**2

    def chosen_backend(self, query: Tensor, key: Tensor, layout: TokenLayout, plan: Any) -> str:
        """Name of the backend for this type and device; "sdpa" in a phase without agents."""
        agents = max((merge.agents for merge in plan.values()), default=0)
        if agents == 0:
            return "sdpa"
        arguments = (query, key, key, query[:, :agents])
        return ops.explain("agent_attention", *arguments, backend=self.backend).backend


class AgentProcessor(Processor):
    """Merges similar tokens, attends through agents where they are few, and parts the tokens again."""

    config: AgentConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.source: Tensor | None = None

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Tokens are alike by what enters the block, before its first norm."""
        self.downsample = downsampling(model, self.name)
        block = model.get_submodule(self.name.rpartition(".")[0])
        return [block.norm1.register_forward_pre_hook(self.remember)]

    def remember(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of the block until its attention is called."""
        self.source = args[0]

    @property
    def layout(self) -> TokenLayout | None:
        """The map of this layer's resolution."""
        layout = self.state.layout
        return None if layout is None else TokenLayout(text=0, grid=coarser(layout.grid, self.downsample))

    def compute(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        *others: Any,
    ) -> Any:
        others = (encoder_hidden_states, attention_mask, *others)
        source, self.source = self.source, None
        plans = self.state.groups[0].plan if self.state.sparse else None
        plan = plans.get(self.layout.grid) if plans else None
        if plan is None or attention_mask is not None or source is None:
            return super().compute(attn, hidden_states, *others)
        self.layout_for(hidden_states)
        merger = Merger(source, plan)
        out = self.attention(attn, hidden_states, merger, plan)
        if self.state.errors is not None:
            out = self.compared(out, super().compute(attn, hidden_states, *others))
        return out

    def attention(self, attn: nn.Module, hidden_states: Tensor, merger: Merger, plan: MergePlan) -> Tensor:
        """From tokens to tokens, [B, N, C], with output projection."""
        tokens = merger.merge(hidden_states, plan.merged)
        heads = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731
        query, key, value = (heads(x) for x in projections(attn, tokens))  # [B, N, H, D]
        if plan.agents:
            agents = heads(attn.to_q(merger.merge(hidden_states, plan.merged_for_agents)))
            out = agentsd_attention(
                query, key, value, agents, scale_power=self.config.scale_power,
                shortcut=self.config.shortcut, backend=self.config.backend,
            )  # fmt: skip
        else:
            out = self.dense(query, key, value)
        return merger.part(project_out(attn, out.flatten(2, 3).to(query.dtype)), plan.merged)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Any) -> Tensor:
        return self.dense(query, key, value)  # a map too small to merge anything


def apply_agent(
    pipe_or_unet: Any,
    *,
    stride: int = 4,
    ratio: float = 0.4,
    agent_ratio: float = 0.95,
    early_steps: int = 20,
    late_stride: int = 2,
    late_ratio: float = 0.4,
    late_agent_ratio: float = 0.5,
    scale_power: float = 0.3,
    shortcut: float = 0.075,
    max_downsample: int | None = None,
    seed: int | None = 0,
    dense_steps: int = 0,
    dense_layers: int | Sequence[int | str] = 0,
    backend: str = "auto",
) -> Handle:
    """Merge similar tokens in the self-attention of Stable Diffusion 1.5, 2.1 or XL, attend through agents.

    Of every stride x stride cell one token is kept and `ratio` of all tokens are merged into the kept ones
    most like them; `agent_ratio` merged so give the agents, which are used while they are fewer than half of
    the tokens. The first `early_steps` steps (20 of 50 published) have agents, the others merge alone.

    Units: strides in tokens; ratios of all tokens. `scale_power` and `shortcut` as in `agentsd_attention`.
        `max_downsample`: layers whose map is at most so many times coarser than the latents, by default the
        finest that have attention (1 for SD 1.5 and 2.1, 2 for XL). `seed` draws the kept tokens anew at
        every step, the same for every generation; None keeps the first of each cell.
    Returns: a handle with `remove()`, `stats()` (attention alone, not the comparison of tokens) and
        `compare_dense()`, also a context manager.
    Raises: ConfigError, with nothing changed, as the other methods.
    Source: Han et al. 2023 (arXiv:2312.08874), Sec. 4.4, and its published settings.
    """
    if max_downsample is not None and type(max_downsample) is not int:
        raise ConfigError(f"max_downsample must be a whole number or None, found {max_downsample!r}")
    (site,) = find_sites(pipe_or_unet, "agent", dense_layers)
    levels = {name: downsampling(site.model, name) for name in site.layers}
    wanted = min(levels.values()) if max_downsample is None else max_downsample
    if not any(level <= wanted for level in levels.values()):
        raise ConfigError(
            f"max_downsample must reach one of the maps with attention, at {sorted(set(levels.values()))}, "
            f"found {max_downsample!r}"
        )
    every = site.adapter.layers(site.model)
    changed = {name for name, level in levels.items() if level <= wanted}
    config = AgentConfig(
        early=Phase(stride, ratio, agent_ratio), late=Phase(late_stride, late_ratio, late_agent_ratio),
        early_steps=early_steps, scale_power=scale_power, shortcut=shortcut, seed=seed,
        max_downsample=wanted, backend=backend,
    )  # fmt: skip
    return apply(
        pipe_or_unet,
        AgentProcessor,
        config,
        method="agent",
        dense_steps=dense_steps,
        dense_layers=[name for name in every if name not in changed],
    )


def coarser(grid: Grid, times: int) -> Grid:
    """The map after convolutions with stride 2, which round up."""
    return tuple(-(-size // times) for size in grid)
