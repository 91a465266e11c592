"""Finite groups, their actions and real irreps, representations of feature axes, and the group Fourier transform."""

from equiflop.groups.action import Action, abstract_group
from equiflop.groups.fourier import FourierPlan, fourier_matrix, fourier_plan
from equiflop.groups.group import FiniteGroup
from equiflop.groups.irrep import Irrep, algebra_table
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
from equiflop.groups.rep import IrrepBlock, Rep

__all__ = [
    "Action",
    "FiniteGroup",
    "FourierPlan",
    "Irrep",
    "IrrepBlock",
    "Rep",
    "abstract_group",
    "algebra_table",
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
