"""Finite groups, their real irreps, representations of feature axes, and the group Fourier transform."""

from equiflop.groups.fourier import FourierPlan, fourier_matrix, fourier_plan
from equiflop.groups.group import FiniteGroup, Irrep
from equiflop.groups.named import (
    alternating,
    cyclic,
    dihedral,
    direct_product,
    flop,
    full_octahedral,
    full_octahedral_matrices,
    octahedral,
    octahedral_rotations,
    quaternion,
    symmetric,
)
from equiflop.groups.rep import Block, Rep

__all__ = [
    "Block",
    "FiniteGroup",
    "FourierPlan",
    "Irrep",
    "Rep",
    "alternating",
    "cyclic",
    "dihedral",
    "direct_product",
    "flop",
    "fourier_matrix",
    "fourier_plan",
    "full_octahedral",
    "full_octahedral_matrices",
    "octahedral",
    "octahedral_rotations",
    "quaternion",
    "symmetric",
]
