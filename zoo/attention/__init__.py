"""Attention modules, one file for each mechanism, and the capture of their weights."""

from zoo.attention.capture import AttentionRecord, capture_attention
from zoo.attention.deformable import DeformableAttention
from zoo.attention.neighborhood import NeighborhoodAttention

__all__ = ["AttentionRecord", "DeformableAttention", "NeighborhoodAttention", "capture_attention"]
