"""The command line as somebody types it, in a folder with a few images and a recipe on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main

RECIPE = """
model: {name: nat_digits}
data: {name: folder, root: images, batch_size: 4, workers: 0}
optim: {epochs: 1, warmup_epochs: 0}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which commands are typed: images/{train,val}/{dark,light}/*.png and tiny.yaml."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(level - 50, level + 50, (14, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """Type a command that must fail: `refused(2, "train", "x.yaml")` is its one sentence."""

    def run(status: int, *arguments: str) -> str:
        assert main(list(arguments)) == status
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        assert not lines[0].startswith("error: unexpected"), lines
        return lines[0]

    return run
