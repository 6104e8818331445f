"""Where the tokens of one diffusion forward lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from zoo.errors import ConfigError


@dataclass(frozen=True)
class TokenLayout:
    """One joint sequence: text, image, spatial conditions, subjects, one after the other.

    `text` counts tokens; `grid` counts the image's tokens per axis, row-major: (rows, columns) or (frames,
    rows, columns). `spatial` counts conditions of as many tokens as the image, each aligned with it (depth,
    edges); `subjects` holds the tokens of every free condition. `text_last` moves the text to the end.
    """

    text: int
    grid: tuple[int, ...]
    spatial: int = 0
    subjects: tuple[int, ...] = ()
    text_last: bool = False

    def __post_init__(self) -> None:
        if not self.grid or any(length < 1 for length in self.grid):
            raise ConfigError(f"grid must have a length of at least 1 for each axis, found {self.grid}")
        for name, count in (("text", self.text), ("spatial", self.spatial)):
            if count < 0:
                raise ConfigError(f"{name} must be a whole number from 0, found {count}")

    @property
    def image(self) -> int:
        """Tokens of the image."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.text + self.image * (1 + self.spatial) + sum(self.subjects)

    @property
    def image_slice(self) -> slice:
        """Where the image lies."""
        start = 0 if self.text_last else self.text
        return slice(start, start + self.image)

    @property
    def text_slice(self) -> slice:
        """Where the text lies."""
        return slice(self.tokens - self.text, self.tokens) if self.text_last else slice(0, self.text)

    @property
    def spatial_slices(self) -> tuple[slice, ...]:
        """Where each spatial condition lies."""
        return self._following(self.image_slice.stop, (self.image,) * self.spatial)

    @property
    def subject_slices(self) -> tuple[slice, ...]:
        """Where each subject lies."""
        return self._following(self.image_slice.stop + self.image * self.spatial, self.subjects)

    @staticmethod
    def _following(start: int, lengths: tuple[int, ...]) -> tuple[slice, ...]:
        slices = []
        for length in lengths:
            slices.append(slice(start, start + length))
            start += length
        return tuple(slices)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Part [B, N, ..] into text and image; keys may hold fewer text tokens than `text`: no padding."""
        if self.text_last:
            return x[:, self.image :], x[:, : self.image]
        text = x.shape[1] - self.image
        return x[:, :text], x[:, text:]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Undo `split`."""
        return torch.cat([image, text] if self.text_last else [text, image], dim=1)
