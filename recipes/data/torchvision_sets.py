"""Data sets of torchvision by name; nothing is downloaded unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from zoo.errors import DataError

# name: torchvision's class, its arguments for the training and for the validation half
SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "val"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "val"}),
    "gtsrb": ("GTSRB", {"split": "train"}, {"split": "test"}),
}
CLASS_COUNTS = {"svhn": 10, "stl10": 10, "flowers102": 102, "gtsrb": 43}


class TorchvisionSet:
    """One half of a torchvision data set. Raises DataError where its files are missing or damaged."""

    def __init__(self, name: str, root: str | Path, *, train: bool, download: bool) -> None:
        from torchvision import datasets

        kind, for_train, for_val = SETS[name]
        self.name = f"{name} {'train' if train else 'val'}"
        try:
            self.base = getattr(datasets, kind)(
                str(root), download=download, **(for_train if train else for_val)
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            fix = (
                "check the network" if download else "give data.download=true, or the data.root that holds it"
            )
            raise DataError(f"data set {name!r} is not usable in {root} ({reason}); {fix}") from None
        self.classes = [str(each) for each in getattr(self.base, "classes", range(CLASS_COUNTS.get(name, 0)))]
        self.labels = self._labels()
        self.notes: list[str] = []

    def _labels(self) -> list[int]:
        for attribute in ("targets", "labels", "_labels"):
            if (labels := getattr(self.base, attribute, None)) is not None:
                return [int(label) for label in labels]
        return [int(sample[1]) for sample in self.base._samples]

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> Image.Image:
        """Return one image as RGB."""
        try:
            return self.base[index][0].convert("RGB")
        except Exception as error:
            raise DataError(f"{self.describe(index)} cannot be read ({error})") from None

    def target(self, index: int) -> int:
        """Return the class number of one image."""
        return self.labels[index]

    def describe(self, index: int) -> str:
        """Return which image this is."""
        return f"{self.name} image {index}"

    short = describe
