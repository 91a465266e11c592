"""Irreducible real representations and the algebras R, C, H of the maps that commute with them.

Everything here is computed on the CPU in float64 with numpy, whatever torch's default device or dtype is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

IrrepType = Literal["real", "complex", "quaternionic"]

#: Dimension of the endomorphism algebra of an irrep of each type (Schur's lemma over the reals).
ENDOMORPHISM_DIM: dict[str, int] = {"real": 1, "complex": 2, "quaternionic": 4}

# Left multiplication by 1, i, j, k on the basis (1, i, j, k) of the quaternions, of the complex numbers (the first
# two, on the first two basis elements) and of the reals (the first alone).
_UNITS = np.array(
    [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
        [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
        [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    ],
    dtype=np.float64,
)


def algebra_units(e: int) -> np.ndarray:
    """The ``e`` basis elements of R, C or H as signed ``e x e`` permutation matrices, shape ``(e, e, e)``."""
    return _UNITS[:e, :e, :e].copy()


def algebra_table(e: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Which unit has an entry at row ``a``, column ``b``, and its sign: ``sum_k U_k (x) W_k`` as a table of blocks."""
    units = algebra_units(e)
    where = np.abs(units).argmax(axis=0)
    return tuple(tuple((int(where[a, b]), float(units[where[a, b], a, b])) for b in range(e)) for a in range(e))


@dataclass(frozen=True, eq=False)
class Irrep:
    """An irreducible orthogonal real representation.

    The basis is chosen so that the endomorphism algebra (R, C or H, by ``type``) acts on it as signed
    permutations: with ``e`` the dimension of the algebra, row ``a * (dim / e) + j`` is the algebra's basis element
    ``a`` applied to vector ``j``.

    Attributes:
        name: a short name that is also valid in parameter names, such as ``"A1"``.
        dim: dimension ``d``.
        type: ``"real"``, ``"complex"`` or ``"quaternionic"``.
        matrices: shape ``(order, d, d)``, float64, one orthogonal matrix per group element. Read-only.
    """

    name: str
    dim: int
    type: IrrepType
    matrices: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        self.matrices.setflags(write=False)

    @property
    def endomorphism_dim(self) -> int:
        """1, 2 or 4: how many independent parameters one entry of an equivariant map has."""
        return ENDOMORPHISM_DIM[self.type]

    @property
    def regular_multiplicity(self) -> int:
        """How often the irrep occurs in the regular representation: ``dim / endomorphism_dim``."""
        return self.dim // self.endomorphism_dim

    @property
    def endomorphisms(self) -> np.ndarray:
        """The matrices ``J_k`` that commute with the irrep, shape ``(e, d, d)``; ``J_0`` is the identity."""
        identity = np.eye(self.regular_multiplicity)
        return np.stack([np.kron(unit, identity) for unit in algebra_units(self.endomorphism_dim)])

    def matrix(self, a: int) -> torch.Tensor:
        """The matrix of element ``a``, shape ``(dim, dim)``, float64 on the CPU."""
        return torch.from_numpy(self.matrices[a].copy())

    def character(self) -> np.ndarray:
        """The trace of every element's matrix, shape ``(order,)``."""
        return np.trace(self.matrices, axis1=1, axis2=2)
