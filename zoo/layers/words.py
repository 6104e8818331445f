"""Prompts of a small closed vocabulary as vectors: fixed, so that nothing is trained or downloaded."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean

LENGTH = 16  # words, the longest prompt
PAUSE = ""  # what fills a shorter one


class WordEncoder:
    """A fixed random vector for each word plus one for its place; the whole prompt is their mean.

    Shapes: returns text [B, LENGTH, dim] and pooled [B, dim].
    Raises: ConfigError for a word outside the vocabulary or a prompt that is too long.
    """

    def __init__(self, words: Sequence[str], dim: int) -> None:
        self.words, self.dim = tuple(words), dim
        self.vectors = {word: _vector(f"word {word}", dim) for word in (PAUSE, *words)}
        self.places = torch.stack([_vector(f"place {place}", dim) for place in range(LENGTH)])

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text = torch.stack([self.encode(prompt) for prompt in prompts])
        return text, text.mean(1)

    def encode(self, prompt: str) -> Tensor:
        """[LENGTH, dim] of one prompt."""
        found = re.findall(r"\w+", prompt.lower())
        for word in found:
            if word not in self.vectors:
                near = did_you_mean(word, self.words) or f"; it knows {', '.join(self.words)}"
                raise ConfigError(f"the model does not know the word {word!r}{near}")
        if not 0 < len(found) <= LENGTH:
            raise ConfigError(f"a prompt has 1 to {LENGTH} words, found {len(found)} in {prompt!r}")
        padded = [*found, *[PAUSE] * (LENGTH - len(found))]
        return torch.stack([self.vectors[word] for word in padded]) + self.places


def _vector(name: str, dim: int) -> Tensor:
    """Normal numbers that follow from a name, on every machine the same: Box-Muller over its hash."""
    data = hashlib.shake_256(name.encode()).digest(8 * dim)
    pairs = [int.from_bytes(data[i : i + 4], "little") / 2**32 for i in range(0, len(data), 4)]
    return torch.tensor(
        [
            math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
            for u, v in zip(pairs[::2], pairs[1::2], strict=True)
        ]
    )
