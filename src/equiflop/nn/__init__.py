"""Equivariant layers: plain tensors in and out, the type of their axes (``Rep``) kept in the module.

All take ``device`` and ``dtype`` for their parameters and constants, as torch's layers do.
"""

from equiflop.nn.activation import FourierActivation
from equiflop.nn.attention import Attention
from equiflop.nn.block import Block
from equiflop.nn.circulant import CirculantLinear
from equiflop.nn.depthwise import DepthwiseConv
from equiflop.nn.downsample import Downsample
from equiflop.nn.dropout import Dropout
from equiflop.nn.fixed import FixedTensors
from equiflop.nn.grid import GridTransform
from equiflop.nn.invariants import Invariants
from equiflop.nn.linear import AlgebraLinear, Linear
from equiflop.nn.mlp import Mlp
from equiflop.nn.norm import Affine, LayerNorm, LayerScale, RmsNorm, TiedNorm
from equiflop.nn.patch_embed import PatchEmbed
from equiflop.nn.permutation import GraphInvariants, GraphLinear, SetLinear
from equiflop.nn.point_embed import PointEmbed
from equiflop.nn.pos_embed import PositionEmbedding, act_on_channels
from equiflop.nn.position import PositionBias, RotaryPositions
from equiflop.nn.several import LinearFromSeveral, LinearToSeveral
from equiflop.nn.spatial import FromSpatial, ToSpatial
from equiflop.nn.tied_conv import TiedBatchNorm2d, TiedConv2d
from equiflop.nn.token_mixing import TokenMixing

__all__ = [
    "Affine",
    "AlgebraLinear",
    "Attention",
    "Block",
    "CirculantLinear",
    "DepthwiseConv",
    "Downsample",
    "Dropout",
    "FixedTensors",
    "FourierActivation",
    "FromSpatial",
    "GraphInvariants",
    "GraphLinear",
    "GridTransform",
    "Invariants",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "LinearFromSeveral",
    "LinearToSeveral",
    "Mlp",
    "PatchEmbed",
    "PointEmbed",
    "PositionBias",
    "PositionEmbedding",
    "RmsNorm",
    "RotaryPositions",
    "SetLinear",
    "TiedBatchNorm2d",
    "TiedConv2d",
    "TiedNorm",
    "ToSpatial",
    "TokenMixing",
    "act_on_channels",
]
