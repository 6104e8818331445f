"""Attention modules, one file for each mechanism, and the capture of their weights."""

from zoo.attention.agent import AgentAttention
from zoo.attention.bilevel import BilevelRoutingAttention, RaggedRoutingAttention
from zoo.attention.capture import AttentionRecord, capture_attention
from zoo.attention.channel import ChannelAttention
from zoo.attention.deformable import DeformableAttention
from zoo.attention.global_attention import GlobalAttention
from zoo.attention.neighborhood import NeighborhoodAttention
from zoo.attention.window import WindowAttention

__all__ = [
    "AgentAttention",
    "AttentionRecord",
    "ChannelAttention",
    "BilevelRoutingAttention",
    "DeformableAttention",
    "GlobalAttention",
    "NeighborhoodAttention",
    "RaggedRoutingAttention",
    "WindowAttention",
    "capture_attention",
]
