"""What a run leaves is used in plain PyTorch, timm and diffusers, by the code of recipes/README.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from zoo.recipes import api, pictures

README = (Path(__file__).resolve().parents[3] / "recipes" / "README.md").read_text()
GENERATION = """
task: generation
model: {name: dit_digits, args: {depth: 1, hidden_size: 32, num_heads: 2, in_channels: 3}}
data: {name: folder, root: ROOT, batch_size: 8, val_batch_size: 4, workers: 0}
sampling: {steps: 2, count: 0, shown: 4}
optim: {epochs: 1, warmup_epochs: 0}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2
def test_the_page_runs_as_printed(finished, segmented, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "curves", lambda *_, **__: None)
    (tmp_path / "patches.yaml").write_text(GENERATION.replace("ROOT", str(image_folder)))
    api.train(api.recipe("patches.yaml"), run_dir="runs/dit")
    for name, folder in (("digits", finished), ("scenes", segmented)):
        Path("runs", name).symlink_to(folder)
    (block,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    Path("page.py").write_text(block)
    left = runpy.run_path("page.py")
    image = torch.randn(1, 3, 32, 32)
    ours = api.load_trained(finished).model.eval()
    assert torch.equal(left["classifier"].eval()(image), ours(image))
    ours = api.load_trained(segmented).model.eval()
    assert torch.equal(left["segmenter"].eval()(image), ours(image))
    drawn = api.load_trained("runs/dit").model.state_dict()
    assert all(torch.equal(value, drawn[key]) for key, value in left["transformer"].state_dict().items())
    assert len(left["images"]) == 2
