"""Where the tokens of one diffusion forward lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TokenLayout:
    """One joint sequence: `text` tokens, then the tokens of a row-major image grid (rows, columns).

    `text` counts tokens; `grid` counts tokens per axis.
    """

    text: int
    grid: tuple[int, ...]

    @property
    def image(self) -> int:
        """Tokens of the image."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.text + self.image
