"""What several model families share: the frame of a backbone, activation checkpointing, counting."""

from zoo.layers.backbone import Backbone
from zoo.layers.checkpoint import checkpoint
from zoo.layers.macs import count_macs

__all__ = ["Backbone", "checkpoint", "count_macs"]
