"""Grids of pixels or tokens taken apart into irreps, by a matrix or by additions.

How a group moves images stands in :mod:`equiflop.image_group`, its orbits on a grid in :mod:`equiflop.orbits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from equiflop.groups import FourierPlan, Irrep, Rep, fourier_plan
from equiflop.image_group import NAMED_IMAGE_GROUPS, ImageGroup, ImageMove, as_image_group, named_image_group
from equiflop.orbits import Orbit, field_tables, fixed_vectors, grid_orbits

__all__ = [
    "NAMED_IMAGE_GROUPS",
    "GridDecomposition",
    "GridPlan",
    "ImageGroup",
    "ImageMove",
    "Orbit",
    "as_image_group",
    "field_tables",
    "fixed_vectors",
    "grid_decomposition",
    "grid_orbits",
    "named_image_group",
]


@dataclass(frozen=True)
class _Coordinate:
    """One multiplicity of an irrep in the permutation representation of a grid."""

    orbit: int
    vector: np.ndarray  # the fixed vector u, shape (dim,)


class GridDecomposition:
    """The permutation representation of a group on the points of a grid, decomposed into irreps.

    An orbit with stabiliser S contains an irrep as often as S leaves vectors of it fixed (Frobenius reciprocity).
    Within an irrep, the multiplicities of the free orbits come first (basis vector slow, orbit fast), then those of the
    other orbits.

    Args:
        group: the group.
        height: rows of the grid.
        width: columns of the grid.

    Raises:
        ValueError: if the group does not act on a grid of this shape.
    """

    def __init__(self, group: ImageGroup, height: int, width: int) -> None:
        self.group = group
        self.size = (height, width)
        self.orbits = grid_orbits(group, height, width)
        self._coordinates = [self._coordinates_of(irrep) for irrep in group.irreps]
        self.rep = Rep(group, [len(coordinates) for coordinates in self._coordinates])

    @cached_property
    def matrix(self) -> np.ndarray:
        """The orthogonal change of basis, points to the layout of ``rep``: shape ``(points, points)``, float64."""
        n = self.size[0] * self.size[1]
        matrix = np.zeros((n, n))
        for block, coordinates in zip(self.rep.blocks(), self._coordinates, strict=True):
            for k, coordinate in enumerate(coordinates):
                orbit = self.orbits[coordinate.orbit]
                rows = block.start + block.multiplicity * np.arange(block.irrep.dim) + k
                values = block.irrep.matrices[list(orbit.movers)] @ coordinate.vector
                scale = np.sqrt(block.irrep.dim / len(orbit.points))
                matrix[np.ix_(rows, np.array(orbit.points))] = scale * values.T
        return matrix

    @cached_property
    def fast_plan(self) -> GridPlan | None:
        """The same change of basis by additions, or None where the group has no :class:`FourierPlan` that fits."""
        plan = fourier_plan(self.group.group)
        if plan is None:
            return None
        order, orbits = self.group.order, len(self.orbits)
        gather = np.stack([orbit.images for orbit in self.orbits], axis=1)
        picked: list[int] = []
        scales: list[float] = []
        source, back_scale = np.zeros((order, orbits), dtype=np.int64), np.zeros((order, orbits))
        row_of_irrep = 0
        for irrep, coordinates in zip(self.group.irreps, self._coordinates, strict=True):
            columns = irrep.regular_multiplicity
            for i in range(irrep.dim):
                for coordinate in coordinates:
                    stabiliser = np.array(self.orbits[coordinate.orbit].stabiliser)
                    projected = np.mean(irrep.matrices[stabiliser], axis=0)[:, :columns]
                    overlap = coordinate.vector @ projected
                    sizes = np.linalg.norm(projected, axis=0)
                    parallel = np.flatnonzero((np.abs(np.abs(overlap) - sizes) < 1e-9) & (sizes > 1e-6))
                    if not parallel.size:
                        return None
                    j = int(parallel[0])
                    row = row_of_irrep + i * columns + j
                    scale = np.sign(overlap[j]) / (np.sqrt(len(stabiliser)) * sizes[j])
                    rows = row_of_irrep + i * columns + np.flatnonzero(np.abs(coordinate.vector[:columns]) > 1e-9)
                    if (
                        np.abs(coordinate.vector[columns:]).max(initial=0.0) > 1e-9
                        or back_scale[rows, coordinate.orbit].any()
                    ):
                        return None
                    source[rows, coordinate.orbit] = len(picked)
                    back_scale[rows, coordinate.orbit] = (
                        np.array(plan.scale)[rows]
                        * np.sqrt(len(stabiliser))
                        * coordinate.vector[rows - row_of_irrep - i * columns]
                    )
                    picked.append(row * orbits + coordinate.orbit)
                    scales.append(plan.scale[row] * scale)
            row_of_irrep += irrep.dim * columns
        scatter = np.zeros(self.size[0] * self.size[1], dtype=np.int64)
        scatter[gather.ravel()] = np.arange(gather.size)
        return GridPlan(plan, gather, np.array(picked), np.array(scales), source, back_scale, scatter)

    def _coordinates_of(self, irrep: Irrep) -> list[_Coordinate]:
        free = [i for i, orbit in enumerate(self.orbits) if len(orbit.stabiliser) == 1]
        vectors = fixed_vectors(irrep, [0])
        coordinates = [_Coordinate(i, vector) for vector in vectors.T for i in free]
        for i, orbit in enumerate(self.orbits):
            if len(orbit.stabiliser) > 1:
                coordinates += [_Coordinate(i, vector) for vector in fixed_vectors(irrep, orbit.stabiliser).T]
        return coordinates


@dataclass(frozen=True)
class GridPlan:
    """How to decompose a grid by additions: gather every orbit's images, transform over the group, pick and scale.

    Attributes:
        fourier: the transform over the group.
        gather: point of each group element and orbit, shape ``(order, orbits)``.
        pick: for each coordinate its index among the ``order * orbits`` transformed values.
        scale: factor per coordinate, the transform's own scale included.
        source: on the way back, the coordinate that each of the ``order * orbits`` values is read from.
        back_scale: its factor, 0 where there is no coordinate; shape ``(order, orbits)``.
        scatter: on the way back, for each point its place among the ``order * orbits`` values.
    """

    fourier: FourierPlan
    gather: np.ndarray
    pick: np.ndarray
    scale: np.ndarray
    source: np.ndarray
    back_scale: np.ndarray
    scatter: np.ndarray


@lru_cache(maxsize=256)
def grid_decomposition(group: ImageGroup, height: int, width: int) -> GridDecomposition:
    """The decomposition of a grid, computed once per group and size."""
    return GridDecomposition(group, height, width)
