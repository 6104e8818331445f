"""Attention modules, one file for each mechanism, and the capture of their weights."""

from zoo.attention.capture import AttentionRecord, capture_attention
from zoo.attention.deformable import DeformableAttention
from zoo.attention.neighborhood import NeighborhoodAttention
from zoo.attention.window import WindowAttention

__all__ = [
    "AttentionRecord",
    "DeformableAttention",
    "NeighborhoodAttention",
    "WindowAttention",
    "capture_attention",
]
