"""What a model attends to: maps, one query's view, rollout, relevance, distance, entropy, receptive field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.analysis.capture import BlockAttention, block_attention, run_with_attention, weights_with_gradient
from zoo.analysis.tokens import GroupAttention, TokenAttention
from zoo.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class QueryView:
    """What one token of one block sees.

    `heat` is what every token gives to it; `cells` are the tokens it can see at all. Sampled keys also have
    `points` (rows and columns, in tokens) with the weights of each head, agents what each of them takes from
    the map. Under channel attention a token sees no other: `groups` hold the weights between channels.
    """

    block: str
    mechanism: str
    query: tuple[int, int] | None  # row and column of the token; None: the class token
    grid: tuple[int, int]
    heat: Tensor | None = None  # [H, Y, X]
    cells: Tensor | None = None  # bool [Y, X]
    points: Tensor | None = None  # [H, keys, 2]
    point_weights: Tensor | None = None  # [H, keys]
    agent_weights: Tensor | None = None  # [H, agents]
    agent_maps: Tensor | None = None  # [H, agents, Y, X]
    groups: Tensor | None = None  # [groups, channels, channels]


@dataclass(frozen=True)
class HeadStatistics:
    """How far and how broadly each head of one block looks, as means over images and queries."""

    block: str
    mechanism: str
    distance: Tensor  # [H] mean distance between query and key, in pixels
    entropy: Tensor  # [H] of the weights over tokens, in nats


def choose_block(blocks: dict[str, BlockAttention], block: str | int | None = None) -> BlockAttention:
    """The block of this name or number; the last one by default. Raises: ConfigError for an unknown one."""
    names = list(blocks)
    if block is None:
        return blocks[names[-1]]
    text = str(block)
    if text in blocks:
        return blocks[text]
    if text.removeprefix("-").isdecimal() and -len(names) <= int(text) < len(names):
        return blocks[names[int(text)]]
    raise ConfigError(
        f"no attention block {text!r} in this model, which has {len(names)}: a number from 0 or a name "
        f"such as {names[0]}{did_you_mean(text, names)}"
    )


def attention_map(
    attention: BlockAttention, query: tuple[float, float] | None = None, *, image: int = 0
) -> Tensor:
    """What each head of a block attends to over the map, [H, Y, X].

    Units: `query` is (down, right) as fractions of the image, 0 to 1. Without one it is the class token's
    map, or where there is none the mean over all queries: how much every token is attended.
    """
    attention = _of_tokens(attention)
    if query is None and not attention.prefix:
        total = sum(rows[image].sum(1) for _, rows in attention.chunks()) / attention.tokens
        return attention.on_map(total)
    number = 0 if query is None else _number(attention, query)
    return attention.on_map(attention.rows(number, number + 1)[image, :, 0])


def query_view(attention: BlockAttention, query: tuple[float, float], *, image: int = 0) -> QueryView:
    """What the token at `query` sees in one block, under any mechanism.

    Units: `query` is (down, right) as fractions of the image, 0 to 1.
    """
    row, column = query_token(attention.grid, query)
    common = {
        "block": attention.name,
        "mechanism": attention.mechanism,
        "query": (row, column),
        "grid": attention.grid,
    }
    if isinstance(attention, GroupAttention):
        return QueryView(groups=attention.weights[image], **common)
    number = _number(attention, query)
    heat = attention.on_map(attention.rows(number, number + 1)[image, :, 0])
    own = attention.weights[image, :, number]  # [H, slots]
    if attention.points is not None:
        points = attention.points[image].repeat_interleave(attention.heads // attention.points.shape[1], 0)
        # Every sampled key stands as four tokens, one after another.
        weights = own.unflatten(-1, (4, -1)).sum(1)
        return QueryView(heat=heat, cells=heat.sum(0) > 0, points=points, point_weights=weights, **common)
    if attention.inner is not None:
        maps = attention.on_map(attention.inner[image])
        everything = torch.ones(attention.grid, dtype=torch.bool, device=heat.device)
        return QueryView(heat=heat, cells=everything, agent_weights=own, agent_maps=maps, **common)
    if attention.keys is None:
        return QueryView(heat=heat, cells=torch.ones_like(heat[0], dtype=torch.bool), **common)
    keys = attention.keys[min(image, len(attention.keys) - 1), 0, number]
    cells = torch.zeros(attention.tokens, dtype=torch.bool, device=heat.device)
    cells[keys[keys >= 0]] = True
    return QueryView(heat=heat, cells=attention.on_map(cells), **common)


def query_token(grid: tuple[int, int], query: tuple[float, float]) -> tuple[int, int]:
    """Row and column of the token at (down, right), fractions of the image.

    Raises: ConfigError for a query outside the image.
    """
    if len(query) != 2 or not all(0.0 <= fraction <= 1.0 for fraction in query):
        raise ConfigError(f"query must be two fractions between 0 and 1 (down, right), found {query}")
    row, column = (min(int(f * side), side - 1) for f, side in zip(query, grid, strict=True))
    return row, column


def attention_rollout(
    model: nn.Module, images: Tensor, *, fuse: str = "mean", residual: float = 0.5
) -> Tensor:
    """How much of every place of the image reaches the output through all blocks, [B, Y, X], summing to 1.

    Y and X are those of the first block. Every block's matrix is `residual` times the identity plus the rest
    times its weights, rows normalised; `fuse` joins heads by "mean", "max" or "min". What is followed back is
    the class token, or the mean of all tokens where there is none. Between stages of falling resolution a
    token's share is spread evenly over the tokens it was made from. Only products of a row with a matrix are
    needed, so memory stays linear in tokens. A block that attends between channels keeps every token's share.
    Raises: ConfigError where no block attends between tokens.
    Source: Abnar & Zuidema 2020 (arXiv:2005.00928) Sec. 3; identity for the residual: Eq. 1.
    """
    if not 0.0 <= residual < 1.0:
        raise ConfigError(f"residual must be from 0 to less than 1, found {residual}")
    blocks = _between_tokens(block_attention(model, images).values())

    def step(block: TokenAttention, mass: Tensor) -> Tensor:
        # Rows sum to less than 1 where padding is attended, and to anything after max or min.
        sums = torch.cat([_fused(rows, fuse).sum(-1) for _, rows in block.chunks()], dim=1)
        return residual * mass + (1 - residual) * block.pull(mass / sums.clamp_min(1e-12), fuse)

    mass = _walk_back(blocks, _start(model, blocks[-1]), step)
    mass = blocks[0].on_map(mass)
    return mass / mass.sum((1, 2), keepdim=True).clamp_min(1e-12)


def gradient_relevance(
    model: nn.Module, images: Tensor, *, target: int | Tensor | None = None, guided: bool = False
) -> Tensor:
    """How much every place of the image speaks for a class, [B, Y, X] of the first block, never negative.

    A block's matrix is the mean over heads of (weights * gradient of the class score), negative products as
    0; relevance R starts as the identity and becomes R + matrix R at every block. `target` is the class, one
    for all images or one each; by default the one the model predicts. Followed back from the class token or
    from the mean of all tokens, and through stages and blocks of channels, as in `attention_rollout`.
    The mean of all tokens holds no place: where several things are to be seen, `guided` multiplies relevance
    by the Grad-CAM of the last map, enlarged bilinearly, as Guided Grad-CAM does with its fine gradients.
    Raises: ConfigError where no block attends between tokens, or a block's output is not its weights times
    its values, or a guided model does not classify by the mean of a map.
    Source: Chefer et al. 2021 (arXiv:2103.15679) Sec. 3.1, Eq. 5 and 6; guided: Selvaraju et al. 2017
    (arXiv:1610.02391) Sec. 3, Eq. 1 and 2, Sec. 3.2.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: nothing compiled runs here
    training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(False),  # where there would be no gradients at all
            torch.enable_grad(),
            weights_with_gradient(model) as blocks_of,
        ):
            # Of the image too, so that a model with frozen parameters has gradients inside.
            images = images.detach().clone().requires_grad_(True)
            last = _last_map(model, images) if guided else None
            logits = model(images) if last is None else model.forward_head(last)
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 1:
                raise ConfigError(f"relevance needs class scores [B, classes], found {found}")
            classes = _classes(logits, target)
            score = logits.gather(1, classes[:, None])[:, 0]
            cam = None if last is None else _grad_cam(last, score)
            blocks = _between_tokens(blocks_of(images, score).values())
    finally:
        model.train(training)
    start = _start(model, blocks[-1])
    through = _walk_back(blocks, start, lambda block, mass: mass + block.pull(mass))
    alone = _walk_back(blocks, start, lambda block, mass: mass)  # the identity, which says nothing
    relevance = blocks[0].on_map(through - alone).clamp_min(0)
    if cam is None:
        return relevance
    return relevance * F.interpolate(cam[:, None], size=relevance.shape[1:], mode="bilinear")[:, 0]


def head_statistics(model: nn.Module, images: Tensor) -> list[HeadStatistics]:
    """Mean attention distance and entropy of every head of every block, in running order.

    Distances are between centres of tokens on the map, in pixels of the image, weighted by attention; tokens
    before the map count in neither. Blocks that attend between channels are left out.
    Source: Dosovitskiy et al. 2021 (arXiv:2010.11929) App. D.7; Raghu et al. 2021 (arXiv:2108.08810) Sec. 3.
    """
    return [
        statistics_of(block, tuple(images.shape[-2:]))
        for block in block_attention(model, images).values()
        if isinstance(block, TokenAttention)
    ]


def statistics_of(attention: TokenAttention, image_size: tuple[int, int]) -> HeadStatistics:
    """The same for one block, of an image of this size in pixels."""
    attention = _of_tokens(attention)
    scale = [pixels / side for pixels, side in zip(image_size, attention.grid, strict=True)]
    device = attention.weights.device
    axes = [torch.arange(n, device=device) * s for n, s in zip(attention.grid, scale, strict=True)]
    places = torch.cartesian_prod(*axes).float()  # [tokens on the map, 2] in pixels
    distance = torch.zeros(attention.heads, device=device)
    entropy = torch.zeros(attention.heads, device=device)
    for start, rows in attention.chunks():
        first = max(attention.prefix - start, 0)
        rows = rows[:, :, first:, attention.prefix :].float()
        own = places[start + first - attention.prefix :][: rows.shape[2]]
        rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-12)
        distance += (rows * torch.cdist(own, places)).sum(-1).mean(0).sum(-1)
        entropy += torch.special.entr(rows).sum(-1).mean(0).sum(-1)
    count = len(places)
    return HeadStatistics(attention.name, attention.mechanism, distance / count, entropy / count)


def effective_receptive_field(
    model: nn.Module,
    images: Tensor,
    *,
    stage: int = -1,
    position: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """How much each pixel moves the feature at one place of a stage's map, [height, width], at most 1.

    It is the gradient of that feature's channels, all added, by the image: absolute values summed over the
    image's channels, averaged over the images, divided by the largest. Units: `position` is (down, right) as
    fractions, the centre by default; `stage` counts as `forward_intermediates` does.
    Raises: ConfigError for a model without `forward_intermediates` or a stage it has not.
    Source: Luo et al. 2016 (arXiv:1701.04128) Sec. 2 and 4.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"{type(model).__name__} has no forward_intermediates to take a stage's map from")
    count = len(getattr(model, "feature_info", ()) or ()) or len(getattr(model, "blocks", ()))
    is_whole = isinstance(stage, Integral) and not isinstance(stage, bool)
    if not is_whole or (count and not -count <= stage < count):
        allowed = f" from {-count} to {count - 1}" if count else ""
        raise ConfigError(f"stage must be a whole number{allowed}, found {stage!r}")
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            images = images.detach().clone().requires_grad_(True)
            (features,) = model.forward_intermediates(
                images, indices=[stage % count if count else stage], intermediates_only=True
            )  # [B, C, Y, X]
            row, column = query_token(tuple(features.shape[2:]), position)
            (gradient,) = torch.autograd.grad(features[:, :, row, column].sum(), images)
    finally:
        model.train(training)
    field = gradient.abs().sum(1).mean(0)
    return field / field.max().clamp_min(1e-30)


def on_image(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread a map [.., Y, X] over an image of this size, every token over its cell."""
    flat = values.reshape(-1, 1, *values.shape[-2:]).float()
    return F.interpolate(flat, size=size, mode="nearest-exact").view(*values.shape[:-2], *size)


def predictions(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, BlockAttention]]:
    """Class probabilities [B, classes] and the attention of every block, from one run."""
    with torch.no_grad():
        logits, blocks = run_with_attention(model, images)
    return logits.softmax(-1), blocks


def _of_tokens(attention: BlockAttention) -> TokenAttention:
    if isinstance(attention, GroupAttention):
        raise ConfigError(f"{attention.name} attends between channels: it has no weights from token to token")
    return attention


def _between_tokens(blocks: Iterable[BlockAttention]) -> list[TokenAttention]:
    """Blocks through which something moves from token to token."""
    found = [block for block in blocks if isinstance(block, TokenAttention)]
    if not found:
        raise ConfigError("no block of this model attends between tokens, only between channels")
    return found


def _number(attention: TokenAttention, query: tuple[float, float]) -> int:
    row, column = query_token(attention.grid, query)
    return attention.prefix + row * attention.grid[1] + column


def _fused(rows: Tensor, fuse: str) -> Tensor:
    if fuse not in ("mean", "max", "min"):
        raise ConfigError(f"fuse must be 'mean', 'max' or 'min', found {fuse!r}")
    return {"mean": rows.mean, "max": rows.amax, "min": rows.amin}[fuse](1)


def _start(model: nn.Module, last: TokenAttention) -> Tensor:
    """Where the classifier looks, [B, tokens]: the class token, or the mean over the map."""
    pool = getattr(model, "global_pool", None)
    mass = last.weights.new_zeros(len(last.weights), last.tokens)
    if last.prefix and (pool in ("token", "") or not isinstance(pool, str)):
        mass[:, 0] = 1
    else:
        mass[:, last.prefix :] = 1 / (last.tokens - last.prefix)
    return mass


def _classes(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of each image, [B]: those that are asked for, or the ones predicted."""
    if target is None:
        return logits.argmax(1)
    target = torch.as_tensor(target, device=logits.device)
    images, classes = logits.shape
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if not whole or target.shape not in ((), (1,), (images,)):
        raise ConfigError(
            f"target must be the number of a class or one for each of the {images} images, found "
            f"{target.tolist()}"
        )
    if target.min() < 0 or target.max() >= classes:
        raise ConfigError(f"target must be from 0 to {classes - 1}, found {target.tolist()}")
    return target.long().expand(images)


def _last_map(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier takes the mean of, [B, Y, X, C]."""
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        last = model.forward_features(images)
        if last.ndim == 4:
            return last
    raise ConfigError(
        f"guided relevance needs a classifier of the mean of a map; {type(model).__name__} has none: leave "
        "guided out"
    )


def _grad_cam(features: Tensor, score: Tensor) -> Tensor:
    """Channels [B, Y, X, C] added with the score's mean gradients as weights, [B, Y, X], never negative."""
    (gradient,) = torch.autograd.grad(score.sum(), features, retain_graph=True)
    return (features * gradient.mean((1, 2), keepdim=True)).sum(-1).clamp(min=0).detach()  # Eq. 1 and 2


def _walk_back(blocks: Sequence[TokenAttention], mass: Tensor, step) -> Tensor:  # noqa: ANN001
    """Take a row from the last block's tokens to the first block's, one `step` for each block."""
    grid = blocks[-1].grid
    for block in reversed(blocks):
        if block.grid != grid:
            if block.prefix:
                raise ConfigError(f"{block.name} has tokens beside a map of falling resolution; not followed")
            mass, grid = _spread(mass.unflatten(1, grid), block.grid).flatten(1), block.grid
        mass = step(block, mass)
    return mass


def _spread(mass: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share [B, Y, X] evenly among the cells of a finer grid that lie in each cell."""
    for axis, (coarse, fine) in enumerate(zip(mass.shape[1:], grid, strict=True), start=1):
        parent = torch.arange(fine, device=mass.device) * coarse // fine
        share = 1 / torch.bincount(parent, minlength=coarse).clamp_min(1)
        shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
        mass = mass.index_select(axis, parent) * share[parent].view(shape)
    return mass
