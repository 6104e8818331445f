"""Draw the pictures of the READMEs with the zoo's own tools, on a photograph that scikit-learn ships.

python scripts/pictures.py draws into zoo/analysis/pictures, in a minute on one core. Costs over resolution
are those that `zoo bench --compare ... --output scripts/bench/results/attention_cpu.json` measured last.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from relevance import two_by_two
from sklearn.datasets import load_sample_image

import zoo
from zoo import analysis
from zoo.analysis.bench import Report
from zoo.analysis.report import draw_costs
from zoo.recipes.data.digits import Digits
from zoo.recipes.data.transforms import eval_transform
from zoo.recipes.run_folder import load_trained

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "zoo" / "analysis" / "pictures"
COSTS = ROOT / "scripts" / "bench" / "results" / "attention_cpu.json"
QUERY = (0.42, 0.4)
DIGITS = (2, 7, 4, 6)
# A model, the mechanism to show of it, and the side of the map where.
SEEN = (
    ("nat_mini", "neighborhood", 28),
    ("dinat_mini", "neighborhood", 28),
    ("davit_tiny", "window", 28),
    ("biformer_tiny", "bilevel", 28),
    ("dat_tiny", "deformable", 14),
    ("davit_tiny", "channel", 28),
)


def photograph(side: int = 224) -> torch.Tensor:
    """A Chinese temple, [3, side, side] between 0 and 1."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    edge = min(photo.size)
    photo = photo.crop((0, photo.height - edge, edge, photo.height)).resize((side, side), Image.BICUBIC)
    return torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1) / 255


def mechanisms() -> None:
    """What one place can see under each mechanism: full models, random weights."""
    image, views = photograph(), []
    for name, mechanism, side in SEEN:
        torch.manual_seed(0)
        blocks = analysis.block_attention(zoo.create_model(name).eval(), image[None]).values()
        fitting = [block for block in blocks if block.mechanism == mechanism and block.grid[0] == side]
        views.append(replace(analysis.query_view(fitting[-1], QUERY), block=name))
    save(analysis.draw_query(image, views, title="what one place of a photograph can see"), "mechanisms")


def digit() -> None:
    """A trained model on an unseen digit: weights of each head."""
    trained = load_trained("nat_digits")
    image = eval_transform(trained.settings)(Digits(train=False).load(3))[None]
    block = analysis.choose_block(analysis.block_attention(trained.model, image), 0)
    save(analysis.draw_maps(image[0], block, query=(0.4, 0.55)), "digit")


def relevance() -> None:
    """The same model on four unseen digits: what speaks for each of them."""
    trained, digits = load_trained("nat_digits"), Digits(train=False)
    numbers = [digits.labels.index(c) for c in DIGITS]
    image = two_by_two(torch.stack([eval_transform(trained.settings)(digits.load(n)) for n in numbers]))[None]
    heats = {}
    for c in DIGITS:
        heat = analysis.gradient_relevance(trained.model, image, target=c, guided=True)[0]
        heats[f"asked for {c}"] = heat / heat.max()
    label = "relevance, share of the largest"
    save(analysis.draw_heats(image[0], heats, label=label), "relevance")


def video() -> None:
    """81 frames of 480 x 832 pixels behind the VAE of Wan 2.1."""
    view = analysis.radial_view((21, 30, 52), decay_factor=0.2)
    title = f"radial attention, decay_factor=0.2: {view.kept:.1%} of all pairs of tokens are kept"
    save(analysis.draw_video(view, title=title), "radial")


def save(figure: object, name: str) -> None:
    """Write a figure as a small file."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.png"
    figure.savefig(file, dpi=80)
    Image.open(file).convert("RGB").save(file, optimize=True)
    print(file.relative_to(ROOT), file.stat().st_size // 1024, "KB")


if __name__ == "__main__":
    mechanisms()
    digit()
    relevance()
    video()
    save(draw_costs(Report.from_plain(json.loads(COSTS.read_text()))), "cost")
