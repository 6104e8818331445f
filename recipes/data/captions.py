"""Images or clips with captions, as a pipeline's VAE and text encoders see them, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from timm.utils import natural_key
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.recipes.data.images import ENDINGS, read_image
from zoo.recipes.files import write_atomically

Encode = Callable[[Tensor, str, list[Tensor]], dict[str, Tensor]]


class Captioned:
    """Latents and text embeddings of `root/split`: `<name>.png` or frames in `<name>/`
    (frame 2 before frame 10), and `<name>.txt`.

    Conditions of an image are `<name>.1.png`, `<name>.2.png`, as many as `conditions`; what has another
    number, or no item `<name>` beside it, is an item too. `encoder()` is called if anything is not in the
    cache yet and returns what makes named tensors of pixels [3, T, height, width], a caption and conditions
    [3, height, width]; `key` says what the tensors follow from beside the files. Raises DataError for what is
    missing, unreadable or of too few frames.
    """

    classes = ["caption"]

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        key: str,
        encoder: Callable[[], Encode],
        cache: Path,
        size: tuple[int, int],
        frames: int = 1,
        conditions: int = 0,
    ) -> None:
        self.root, self.notes = Path(root) / split, []
        self.size, self.frames, self.conditions = size, frames, conditions
        if not self.root.is_dir():
            raise DataError(f"no folder {self.root}; wanted images or folders of frames, each with a .txt")
        self.items = self._find()
        if not self.items:
            raise DataError(f"{self.root} holds neither images nor folders of frames")
        self.files = [cache / f"{self._name(item, key)}.safetensors" for item in self.items]
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            missing = [pair for pair in zip(self.items, self.files, strict=True) if not pair[1].exists()]
            encode = encoder() if missing else None
            for item, file in missing:
                found = {name: x.contiguous().cpu() for name, x in encode(*self._read(item)).items()}
                data = save(found)
                write_atomically(file, lambda opened, data=data: opened.write(data))

    def _find(self) -> list[Path]:
        numbers = {str(i + 1) for i in range(self.conditions)}
        items, names = [], set()
        # What `<name>.1` is a condition of has a shorter name.
        for path in sorted(filter(_is_item, self.root.iterdir()), key=lambda path: len(path.name)):
            name, _, number = path.stem.rpartition(".")
            if path.is_dir() or number not in numbers or name not in names:
                items.append(path)
                names.add(path.name if path.is_dir() else path.stem)
        return sorted(items)

    def _parts(self, item: Path) -> tuple[Path, list[Path], list[Path]]:
        """Caption, frames and conditions of an item."""
        stem = item.with_suffix("") if item.is_file() else item
        frames = [item]
        if item.is_dir():
            frames = [file for file in item.iterdir() if file.suffix.lower() in ENDINGS]
            frames.sort(key=lambda file: (natural_key(file.name), file.name))
        conditions = [stem.with_name(f"{stem.name}.{i + 1}.png") for i in range(self.conditions)]
        return stem.with_name(f"{stem.name}.txt"), frames[: self.frames], conditions

    def _name(self, item: Path, key: str) -> str:
        caption, frames, conditions = self._parts(item)
        wanted = [caption, *frames, *conditions]
        absent = [file.name for file in wanted if not file.is_file()]
        if absent:
            raise DataError(f"{item} needs {absent[0]} beside it")
        if len(frames) < self.frames:
            raise DataError(f"{item} has {len(frames)} of data.frames={self.frames} frames")
        stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in wanted]
        facts = json.dumps([key, str(item.resolve()), stats, self.size, self.frames])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def _read(self, item: Path) -> tuple[Tensor, str, list[Tensor]]:
        caption, frames, conditions = self._parts(item)
        pixels = torch.stack([self._pixels(file) for file in frames], dim=1)
        return (
            pixels,
            caption.read_text(encoding="utf-8").strip(),
            [self._pixels(file) for file in conditions],
        )

    def _pixels(self, file: Path) -> Tensor:
        """[3, height, width] in -1..1: resized to cover, the centre cut out."""
        from torchvision.transforms import functional as F

        image, (height, width) = read_image(file), self.size
        factor = max(height / image.height, width / image.width)
        sides = max(height, round(image.height * factor)), max(width, round(image.width * factor))
        image = F.resize(image, list(sides), F.InterpolationMode.BICUBIC)
        return F.to_tensor(F.center_crop(image, [height, width])) * 2 - 1

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one item."""
        return load_file(self.files[index])

    def target(self, index: int) -> int:
        """Return 0: all that is wanted of an item is in its tensors."""
        return 0

    def describe(self, index: int) -> str:
        """Return the path of one item."""
        return str(self.items[index])

    def short(self, index: int) -> str:
        """Return the path of one item below the root."""
        return f"{self.root.name}/{self.items[index].name}"


def _is_item(path: Path) -> bool:
    """Tell images and folders of frames from captions and hidden files."""
    return not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in ENDINGS)


def key_of(folder: Path, parts: Sequence[str]) -> str:
    """Names, sizes and times of the files of a pipeline's parts: too large to read each time."""
    files = sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    facts: list[Any] = [[str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    if not files:
        raise ConfigError(f"{folder} holds none of {', '.join(parts)}; wanted the folder of a pipeline")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
