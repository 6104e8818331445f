"""What several model families share: the frame of a backbone, activation checkpointing, counting."""

# First of all: importing timm imports zoo.models, which needs this package's modules whole.
import timm  # noqa: F401, I001

from zoo.layers.backbone import Backbone
from zoo.layers.checkpoint import checkpoint
from zoo.layers.macs import count_macs

__all__ = ["Backbone", "checkpoint", "count_macs"]
