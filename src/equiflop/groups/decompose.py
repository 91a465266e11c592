"""Numerical irreps: bring a real representation to standard form, and decompose the regular representation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equiflop.groups.irrep import Irrep, IrrepType

_TYPE_OF_NORM: dict[int, IrrepType] = {1: "real", 2: "complex", 4: "quaternionic"}


def standard_irrep(name: str, matrices: np.ndarray) -> Irrep:
    """An irrep from orthogonal matrices in any basis, turned to the basis that :class:`Irrep` promises.

    The type follows from the norm of the character, ``<chi, chi> = 1, 2, 4`` for real, complex and quaternionic type.

    Args:
        name: name of the irrep.
        matrices: shape ``(order, d, d)``, an irreducible orthogonal representation.

    Raises:
        ValueError: if the representation is reducible over the reals.
    """
    character = np.trace(matrices, axis1=1, axis2=2)
    norm = float(np.mean(character**2))
    if round(norm) not in _TYPE_OF_NORM or abs(norm - round(norm)) > 1e-6:
        raise ValueError(f"representation {name!r} is reducible: <chi, chi> = {norm:.6g} is none of 1, 2, 4")
    kind = _TYPE_OF_NORM[round(norm)]
    if kind != "real":
        basis = _algebra_basis(_complex_structures(matrices, quaternionic=kind == "quaternionic"))
        if not np.array_equal(basis, np.eye(len(basis))):
            matrices = basis.T @ matrices @ basis
    return Irrep(name, matrices.shape[1], kind, snapped(matrices))


def decompose_regular(table: np.ndarray) -> Sequence[Irrep]:
    """All real irreps of the group with this Cayley table, found numerically in its regular representation.

    A generic symmetric matrix that commutes with the regular representation has the irreducible subrepresentations as
    its eigenspaces (its restriction to an isotypic component is a generic Hermitian matrix over R, C or H). Each
    eigenspace is then polished: averaging its projector over the group makes it invariant to rounding error.

    Irreps are ordered by dimension, then by character, largest first, so the trivial one comes first; they are named
    by dimension and a letter, ``"1a"`` being the trivial one.
    """
    n = len(table)
    for seed in range(8):
        spaces = _invariant_subspaces(table, np.random.default_rng(seed))
        found: dict[tuple[float, ...], np.ndarray] = {}
        for vectors in spaces:
            matrices = np.stack([vectors.T @ vectors[_left_rows(table, a)] for a in range(n)])
            character = np.trace(matrices, axis1=1, axis2=2)
            norm = np.mean(character**2)
            if abs(norm - round(norm)) > 1e-6 or round(norm) not in _TYPE_OF_NORM:
                break  # two eigenvalues fell together: try another random matrix
            found.setdefault(tuple((np.round(character, 6) + 0.0).tolist()), matrices)
        else:
            ordered = sorted(found.items(), key=lambda item: (item[1].shape[1], tuple(-x for x in item[0])))
            return _named_by_dimension([matrices for _, matrices in ordered])
    raise RuntimeError(f"the regular representation of a group of order {n} could not be decomposed")


def _left_rows(table: np.ndarray, a: int) -> np.ndarray:
    """Row indices that apply the left translation by ``a`` to a vector: ``(a v)[h] = v[a^-1 h]``."""
    return table[np.argmin(table[a])]


def _invariant_subspaces(table: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Orthonormal bases of irreducible subspaces that span the regular representation."""
    coefficients = rng.standard_normal(len(table))
    # Right translations commute with left ones: M[h, k] = c[h^-1 k] is a generic element of the commutant.
    commuting = coefficients[table[np.argmin(table, axis=1)]]
    values, vectors = np.linalg.eigh(commuting + commuting.T)
    gap = 1e-7 * max(abs(values[0]), abs(values[-1]))
    cuts = np.flatnonzero(np.diff(values) > gap) + 1
    return [_polished(table, space) for space in np.split(vectors, cuts, axis=1)]


def _polished(table: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    projector = vectors @ vectors.T
    average = np.zeros_like(projector)
    for a in range(len(table)):
        rows = _left_rows(table, a)
        average += projector[np.ix_(rows, rows)]
    return np.linalg.eigh(average / len(table))[1][:, -vectors.shape[1] :]


def _named_by_dimension(representations: list[np.ndarray]) -> list[Irrep]:
    irreps: list[Irrep] = []
    count: dict[int, int] = {}
    for matrices in representations:
        d = matrices.shape[1]
        index = count[d] = count.get(d, -1) + 1
        letters = ""
        while True:
            letters = chr(ord("a") + index % 26) + letters
            index = index // 26 - 1
            if index < 0:
                break
        irreps.append(standard_irrep(f"{d}{letters}", matrices))
    return irreps


def _complex_structures(matrices: np.ndarray, quaternionic: bool) -> list[np.ndarray]:
    """Orthogonal antisymmetric matrices that commute with the representation: ``[I, J]`` or ``[I, J1, J2, J1 J2]``."""
    d = matrices.shape[1]
    found: list[np.ndarray] = []
    wanted = 2 if quaternionic else 1
    for row in range(d):
        for column in range(row):
            seed = np.zeros((d, d))
            seed[row, column], seed[column, row] = 1.0, -1.0
            # The group average of an antisymmetric matrix is antisymmetric and commutes with the representation.
            average = np.mean(matrices @ seed @ matrices.transpose(0, 2, 1), axis=0)
            for other in found:
                average -= other * np.sum(other * average) / d
            size = np.linalg.norm(average) / np.sqrt(d)
            if size > 1e-3 / d:
                found.append(average / size)
            if len(found) == wanted:
                return [np.eye(d), *found, *([found[0] @ found[1]] if quaternionic else [])]
    raise RuntimeError("no complex structure found; the representation is not of complex or quaternionic type")


def _algebra_basis(structures: list[np.ndarray]) -> np.ndarray:
    """Orthonormal columns ``J_a v_j`` (index ``a`` slow, ``j`` fast) for vectors ``v_j`` chosen greedily."""
    d = len(structures[0])
    chosen: list[np.ndarray] = []
    span = np.zeros((d, 0))
    while span.shape[1] < d:
        residual = np.eye(d) - span @ span.T
        vector = residual[:, int(np.argmax(np.round(np.linalg.norm(residual, axis=0), 9)))]
        vector = vector / np.linalg.norm(vector)
        chosen.append(vector)
        span = np.column_stack([span, *(structure @ vector for structure in structures)])
    return np.column_stack([structure @ vector for structure in structures for vector in chosen])


def snapped(matrices: np.ndarray) -> np.ndarray:
    """Entries within rounding error of 0, 1/2 or 1 in size, made exact."""
    twice = np.round(2 * matrices)
    return np.ascontiguousarray(np.where(np.abs(2 * matrices - twice) < 4e-15, twice / 2, matrices) + 0.0)
