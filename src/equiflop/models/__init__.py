"""Equivariant networks and their plain twins; importing this registers them in timm."""

from equiflop.models import equivariant_deit3  # noqa: F401  (registers)
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.plain_twins import equivariant_models, plain_twin

__all__ = ["EquivariantVisionTransformer", "equivariant_models", "plain_twin"]
