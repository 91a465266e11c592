"""Equivariant networks and their plain twins; importing this registers them in timm."""

from equiflop.models.entry_points import equivariant_models, plain_twin
from equiflop.models.equivariant_convnext import EquivariantConvNeXt, EquivariantIsotropicConvNeXt
from equiflop.models.equivariant_resmlp import EquivariantResMLP
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.graph_network import GraphNetwork, SetNetwork
from equiflop.models.isotropic_convnext import IsotropicConvNeXt
from equiflop.models.point_transformer import PlainPointTransformer, PointTransformer
from equiflop.models.pose import PoseEstimator
from equiflop.models.segmentation import Segmenter
from equiflop.models.signal_network import SignalNetwork
from equiflop.models.twin import twin

__all__ = [
    "EquivariantConvNeXt",
    "EquivariantIsotropicConvNeXt",
    "EquivariantResMLP",
    "EquivariantVisionTransformer",
    "GraphNetwork",
    "IsotropicConvNeXt",
    "PlainPointTransformer",
    "PointTransformer",
    "PoseEstimator",
    "Segmenter",
    "SetNetwork",
    "SignalNetwork",
    "equivariant_models",
    "plain_twin",
    "twin",
]
