"""What a model attends to, as tensors and as pictures, and what it costs."""

from zoo.analysis.capture import block_attention
from zoo.analysis.choosing import Candidate, Choice, choose
from zoo.analysis.maps import (
    HeadStatistics,
    QueryView,
    attention_map,
    attention_rollout,
    choose_block,
    effective_receptive_field,
    gradient_relevance,
    head_statistics,
    query_view,
)
from zoo.analysis.neighborhood import explain_neighborhood
from zoo.analysis.page import attention_page
from zoo.analysis.pictures import draw_field, draw_heat, draw_heats, draw_maps, draw_query, draw_statistics
from zoo.analysis.sparsity import TileCount, best_tiles, block_tiles, launched_tiles, neighborhood_tiles
from zoo.analysis.tokens import GroupAttention, TokenAttention
from zoo.analysis.video import VideoView, draw_video, radial_view

__all__ = [
    "Candidate",
    "Choice",
    "GroupAttention",
    "HeadStatistics",
    "QueryView",
    "TileCount",
    "TokenAttention",
    "VideoView",
    "attention_map",
    "attention_page",
    "attention_rollout",
    "best_tiles",
    "block_attention",
    "block_tiles",
    "choose",
    "choose_block",
    "draw_field",
    "draw_heat",
    "draw_heats",
    "draw_maps",
    "draw_query",
    "draw_statistics",
    "draw_video",
    "effective_receptive_field",
    "explain_neighborhood",
    "gradient_relevance",
    "head_statistics",
    "launched_tiles",
    "neighborhood_tiles",
    "query_view",
    "radial_view",
]
