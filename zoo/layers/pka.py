"""Attention to many conditions at a cost that grows with their number only linearly.

PKA, position-aligned and keyword-scoped attention: an image token sees a spatial condition at its own place,
and a subject only where the prompt's keyword for it is; conditions see themselves. The relations of
OminiControl, EasyControl and UniCombine over the same tokens are here as well.

Source: arXiv:2602.06850. Where it says nothing (norm, heads, how branches are joined) the docstrings do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from zoo import ops
from zoo.errors import ConfigError, did_you_mean
from zoo.layers.tokens import TokenLayout

NORMS = ("minmax", "softmax_max")
COMBINES = ("joint", "sum")
REFRESHES = ("every", "once")
RELATIONS = ("pka", "omini", "easycontrol", "unicombine")

# Routing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def keyword_routing(
    query_image: Tensor,
    key_text: Tensor,
    keyword_indices: Sequence[int],
    *,
    epsilon: float = 0.2,
    norm: str = "minmax",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return where the image is about a keyword: a score from 0 to 1 and whether it reaches `epsilon`.

    The logits of the keyword's tokens are summed and averaged over heads. norm "minmax" stretches them to
    0..1 over the image, and routes all where they are equal; "softmax_max" takes the keyword's share of the
    softmax over the text and divides by its maximum. With epsilon 0 everything is routed. No gradient.

    Shapes: query_image [B, N, H, D], key_text [B, M, H, D]; returns score [B, N], at least float32, and
        routed [B, N], bool.
    Units: keyword_indices are places in the text, sub-words each; scale multiplies q.k, D**-0.5 by default.
    Raises: ConfigError for indices outside the text, an unknown norm, or an epsilon outside 0..1.
    Source: arXiv:2602.06850, Eq. 3.
    """
    indices = [int(i) for i in keyword_indices]
    check_choice("norm", norm, NORMS)
    check_epsilon(epsilon)
    if not indices or not all(0 <= i < key_text.shape[1] for i in indices):
        raise ConfigError(
            f"keyword_indices must name tokens of the text, 0..{key_text.shape[1] - 1}, found {indices}"
        )
    scale = query_image.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query_image.dtype, torch.float32)
    query, key = query_image.to(dtype), key_text.to(dtype)
    if norm == "minmax":
        # The mean over heads of a sum over keywords is one product, over heads and channels.
        keyword = key[:, indices].sum(dim=1) * (scale / query.shape[2])  # [B, H, D]
        raw = torch.einsum("bnhd,bhd->bn", query, keyword)
        low, high = raw.amin(dim=1, keepdim=True), raw.amax(dim=1, keepdim=True)
        span = high - low
        score = torch.where(span > 0, (raw - low) / span.masked_fill(span == 0, 1.0), 1.0)
    else:
        share = torch.einsum("bnhd,bmhd->bnhm", query * scale, key).softmax(dim=-1)
        raw = share[..., indices].sum(dim=-1).mean(dim=-1)
        score = raw / raw.amax(dim=1, keepdim=True)
    return score, score >= epsilon


def find_keywords(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """Return for every word the places of its tokens in the tokenized prompt; a word may have several.

    Raises: ConfigError for a word that the prompt does not have, or a tokenizer that cannot say where tokens
        lie (only the fast ones of transformers can).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"find_keywords needs a fast tokenizer, found {type(tokenizer).__name__}; count tokens yourself"
        )
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for word in words:
        start = prompt.lower().find(word.lower())
        places = [i for i, (a, b) in enumerate(spans) if a < start + len(word) and b > start and a < b]
        if start < 0 or not places:
            raise ConfigError(f"the prompt must have the word {word!r}, found {prompt!r}")
        found.append(places)
    return found


# Attention -------------------------------------------------------------------------------------------------


def pka_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    routed: Sequence[Tensor | None],
    paa_radius: int = 0,
    combine: str = "joint",
    scale: float | None = None,
    text_to_condition: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attend from text and image to each other, from the image to its conditions, from these to themselves.

    "joint" is one softmax over all that a token sees. "sum" is the printed form: the image adds to its
    attention to text and image those to every condition, each with a softmax of its own; where a subject is
    not routed it adds 0.

    Shapes: query, key and value [B, S, H, D] in the order of `layout`, S = layout.tokens. `routed` has one
        mask [B, N] over the image for each subject, or None where all of it sees the subject. The query may
        end with the image, for conditions that are cached: so does the result, [B, S, H, D].
    Units: paa_radius in tokens of the grid, 0 is one to one; scale multiplies q.k, D**-0.5 by default.
        `text_to_condition`: the text sees the conditions too (as in OminiControl); the paper says nothing.
    Numerics: sums in at least float32, result in query's dtype. Linear in the number of conditions.
    Raises: ConfigError for tensors that do not fit the layout.
    Source: arXiv:2602.06850, Eq. 2 and 4; the joint softmax is ours (Eq. 2 at radius 0 is the value alone).
    """
    check_choice("combine", combine, COMBINES)
    routed = check_tokens(query, key, value, layout, routed)
    base = slice(0, layout.text + layout.image)
    attend = partial(ops.attention, scale=scale, return_lse=True, backend=backend)

    out, lse = attend(query[:, base], key[:, base], value[:, base])
    (text, image), (_, image_lse) = layout.split(out), layout.split(lse)
    if text_to_condition and layout.text:
        text, _ = attend(query[:, layout.text_slice], key, value)

    image_query = query[:, layout.image_slice]
    parts = [(image, image_lse)]
    for where in layout.spatial_slices:
        q, k, v = (x.unflatten(1, layout.grid) for x in (image_query, key[:, where], value[:, where]))
        part = ops.aligned_attention(q, k, v, paa_radius, scale=scale, return_lse=True)
        parts.append(tuple(x.flatten(1, len(layout.grid)) for x in part))
    for where, mask in zip(layout.subject_slices, routed, strict=True):
        parts.append(routed_attention(image_query, key[:, where], value[:, where], mask, scale, backend))
    outs, lses = zip(*parts, strict=True)
    if combine == "joint":
        image = ops.merge_attentions(outs, lses)[0]
    else:
        image = torch.stack([x.to(lse.dtype) for x in outs]).sum(dim=0).to(query.dtype)

    rows = [text, image]
    if query.shape[1] == layout.tokens:
        conditions = (*layout.spatial_slices, *layout.subject_slices)
        rows += [ops.attention(query[:, c], key[:, c], value[:, c], scale=scale) for c in conditions]
    return torch.cat(rows, dim=1)


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, routed: Tensor | None, scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Attend from the routed rows [B, N] of a query [B, N, H, D] alone; the others are 0 with LSE -inf."""
    attend = partial(ops.attention, scale=scale, return_lse=True, backend=backend)
    if routed is None:
        return attend(query, key, value)
    if torch.compiler.is_compiling():  # how many rows there are would have to be known
        order = None
        out, lse = attend(query, key, value)
        visible = routed
    else:
        counts = routed.sum(dim=1).tolist()
        if all(count == routed.shape[1] for count in counts):
            return attend(query, key, value)
        rows = max(counts, default=0)
        order = routed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :rows]
        index = order[..., None, None].expand(-1, -1, *query.shape[2:])
        out, lse = attend(query.gather(1, index), key, value)
        visible = routed.gather(1, order)  # rows of samples with fewer than the most
    out = out.masked_fill(~visible[..., None, None], 0.0)
    lse = lse.masked_fill(~visible[..., None], float("-inf"))
    if order is None:
        return out, lse
    everywhere = query.new_zeros(*query.shape[:3], value.shape[-1])
    nowhere = lse.new_full(query.shape[:3], float("-inf"))
    return (
        everywhere.scatter(1, order[..., None, None].expand_as(out), out),
        nowhere.scatter(1, order[..., None].expand_as(lse), lse),
    )


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    *,
    relation: str,
    scale: float | None = None,
) -> Tensor:
    """Attend as another system relates the same groups of tokens.

    Text and image see everything. Conditions see themselves ("omini", "easycontrol") or text, image and
    themselves ("unicombine"), never each other.

    Shapes: query, key and value [B, S, H, D] in the order of `layout`; returns the same.
    Source: OminiControl arXiv:2411.15098, EasyControl arXiv:2503.07027, UniCombine arXiv:2503.09277.
    """
    check_choice("relation", relation, RELATIONS[1:])
    check_tokens(query, key, value, layout, [None] * len(layout.subjects))
    base = layout.text + layout.image
    rows = [ops.attention(query[:, :base], key, value, scale=scale)]
    for where in (*layout.spatial_slices, *layout.subject_slices):
        k, v = key[:, where], value[:, where]
        if relation == "unicombine":
            k, v = torch.cat([key[:, :base], k], dim=1), torch.cat([value[:, :base], v], dim=1)
        rows.append(ops.attention(query[:, where], k, v, scale=scale))
    return torch.cat(rows, dim=1)


def relation_mask(
    layout: TokenLayout,
    relation: str = "pka",
    *,
    routed: Sequence[Tensor | None] | None = None,
    paa_radius: int = 0,
    text_to_condition: bool = False,
    batch: int = 1,
) -> Tensor:
    """Return who sees whom, bool [B, S, S]: the definition, for tests and pictures; quadratic.

    The arguments are those of `pka_attention`; the other relations read `layout` alone.
    """
    check_choice("relation", relation, RELATIONS)
    routed = [None] * len(layout.subjects) if routed is None else list(routed)
    mask = torch.zeros(batch, layout.tokens, layout.tokens, dtype=torch.bool)
    base = slice(0, layout.text + layout.image)
    conditions = (*layout.spatial_slices, *layout.subject_slices)
    mask[:, base, base] = True
    for where in conditions:
        mask[:, where, where] = True
    if relation != "pka":
        mask[:, base] = True
        for where in conditions:
            mask[:, where, base] = relation == "unicombine"
        return mask
    places = torch.cartesian_prod(*map(torch.arange, layout.grid)).view(-1, len(layout.grid))
    near = ((places[:, None] - places).abs() <= paa_radius).all(dim=-1)
    for where in layout.spatial_slices:
        mask[:, layout.image_slice, where] = near
    for where, seen in zip(layout.subject_slices, routed, strict=True):
        mask[:, layout.image_slice, where] = True if seen is None else seen.cpu()[..., None]
    if text_to_condition:
        mask[:, layout.text_slice] = True
    return mask


def relation_pairs(
    layout: TokenLayout,
    relation: str = "pka",
    *,
    routed: Sequence[int | None] | None = None,
    paa_radius: int = 0,
    text_to_condition: bool = False,
) -> int:
    """Count the query-key pairs of one head without a mask; `routed` holds numbers of rows, None for all."""
    base = layout.text + layout.image
    conditions = [layout.image] * layout.spatial + list(layout.subjects)
    own = base**2 + sum(n * n for n in conditions)
    if relation != "pka":
        return own + base * sum(conditions) * (2 if relation == "unicombine" else 1)
    # Clipped windows: along each axis, the pairs at most `paa_radius` apart.
    near = prod(
        sum(min(i, paa_radius) + min(n - 1 - i, paa_radius) + 1 for i in range(n)) for n in layout.grid
    )
    rows = [None] * len(layout.subjects) if routed is None else routed
    seen = sum((layout.image if r is None else r) * n for r, n in zip(rows, layout.subjects, strict=True))
    return own + layout.spatial * near + seen + text_to_condition * layout.text * sum(conditions)


# State and sampling ----------------------------------------------------------------------------------------


class KeywordState:
    """Where the keywords of each subject were at the step before, for every layer; for one generation."""

    def __init__(
        self,
        keywords: Sequence[Sequence[int] | None],
        *,
        epsilon: float = 0.2,
        norm: str = "minmax",
        refresh: str = "every",
    ) -> None:
        check_choice("refresh", refresh, REFRESHES)
        check_choice("norm", norm, NORMS)
        check_epsilon(epsilon)
        self.keywords = [None if words is None else list(words) for words in keywords]
        self.epsilon, self.norm, self.refresh = epsilon, norm, refresh
        self.reset()

    def reset(self) -> None:
        """Forget everything; for a new generation."""
        self._routed: dict[Hashable, list[Tensor | None]] = {}

    def routed(self, layer: Hashable) -> list[Tensor | None]:
        """One mask [B, N] for each subject, None at the first step: the whole image sees it."""
        return self._routed.get(layer, [None] * len(self.keywords))

    def look(self, layer: Hashable, query_image: Tensor, key_text: Tensor) -> None:
        """Remember where the keywords are now, by this step's queries and keys [B, N, H, D]."""
        if layer not in self._routed or self.refresh == "every":
            self._routed[layer] = self.routed_by(query_image, key_text)

    def routed_by(self, query_image: Tensor, key_text: Tensor) -> list[Tensor | None]:
        """The masks of these queries and keys [B, N, H, D], of which nothing is remembered."""
        return [
            None
            if words is None
            else keyword_routing(query_image, key_text, words, epsilon=self.epsilon, norm=self.norm)[1]
            for words in self.keywords
        ]


class ConditionCache:
    """Keys and values of conditions, made at the first step and reused at all later ones.

    That is exact where conditions do not depend on time: nothing that modulates them may. The cache proves
    it: it makes them anew until a second timestep has come, and compares; after that it begins to save work.
    """

    def __init__(self, *, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self.reset()

    def reset(self) -> None:
        """Forget everything; for a new generation."""
        self._made: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._times: dict[Hashable, Tensor] = {}
        self._proved: set[Hashable] = set()

    def get(
        self, layer: Hashable, make: Callable[[], tuple[Tensor, Tensor]], time: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, by `make` while they are not known or not proved.

        `time` is the timestep of this call, of any shape: several calls of one step prove nothing.
        Raises: ConfigError where a call made others than the first one.
        """
        if layer in self._proved:
            return self._made[layer]
        made = make()
        if layer not in self._made:
            self._made[layer] = made
            # A copy: some schedulers count in place.
            self._times[layer] = torch.as_tensor(time).detach().cpu().clone()
            return made
        apart = max(float((a - b).abs().max()) for a, b in zip(made, self._made[layer], strict=True))
        if not apart <= self.tolerance:
            raise ConfigError(
                f"conditions at {layer} must not depend on time to be cached, found them {apart:.3g} apart "
                "later; modulate them with a constant timestep or do without the cache"
            )
        if not torch.equal(torch.as_tensor(time).detach().cpu(), self._times[layer]):
            self._proved.add(layer)
        return self._made[layer]


def csas_timesteps(
    count: int,
    *,
    mean: float = 0.5,
    std: float = 1.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw times for training on conditions: t = sigmoid(mean + std z), z normal; t = 1 is noise, 0 data.

    A mean above 0 prefers noisy times, where conditions decide most. `mean` has the opposite sign in
    diffusers' training scripts, which index a list of timesteps that begins with noise.

    Shapes: returns [count] float32, strictly between 0 and 1.
    Source: arXiv:2602.06850 (CSAS); logit-normal times: Esser et al. 2024 (arXiv:2403.03206).
    """
    z = torch.randn(count, generator=generator, device=device)
    tiny = torch.finfo(z.dtype).eps
    return torch.sigmoid(mean + std * z).clamp(tiny, 1 - tiny)


# Checks ----------------------------------------------------------------------------------------------------


def check_tokens(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, routed: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Raise ConfigError for tensors that do not fit the layout."""
    if layout.text_last:
        raise ConfigError("layout must begin with the text, found text_last=True")
    base = layout.text + layout.image
    for name, x, sizes in (
        ("query", query, {layout.tokens, base}),
        ("key", key, {layout.tokens}),
        ("value", value, {layout.tokens}),
    ):
        if x.ndim != 4 or x.shape[1] not in sizes:
            raise ConfigError(f"{name} must be [B, {layout.tokens}, H, D], found {tuple(x.shape)}")
    if len(routed) != len(layout.subjects):
        raise ConfigError(
            f"routed must have {len(layout.subjects)} masks, one per subject, found {len(routed)}"
        )
    for mask in routed:
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], layout.image)):
            raise ConfigError(
                f"routed masks must be bool [B, N] = {[query.shape[0], layout.image]}, found {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
    return list(routed)


def check_epsilon(epsilon: float) -> None:
    """Raise ConfigError outside 0..1."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon must lie in 0..1, found {epsilon!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError for a word that is none of the choices."""
    if value not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, found {value!r}{did_you_mean(str(value), choices)}"
        )
