"""Decoders that make a backbone of the zoo, or of timm, tell the class of every pixel."""

from zoo.heads.inference import segment
from zoo.heads.layers import resize
from zoo.heads.segmenter import HEADS, Segmenter
from zoo.heads.semantic_fpn import SemanticFPN
from zoo.heads.upernet import FCN, UPerNet

__all__ = ["FCN", "HEADS", "Segmenter", "SemanticFPN", "UPerNet", "resize", "segment"]
