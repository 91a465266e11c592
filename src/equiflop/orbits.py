"""What a group does to the points of a grid: orbits, and fields that are stored once per orbit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from equiflop.groups import Irrep
from equiflop.image_group import ImageGroup


@dataclass(frozen=True)
class Orbit:
    """Points that the group moves into each other.

    Attributes:
        points: raster indices of the points, the representative first.
        movers: for every point an element that moves the representative there.
        images: where each element of the group moves the representative, shape ``(order,)``.
        stabiliser: the elements that leave the representative in place.
    """

    points: tuple[int, ...]
    movers: tuple[int, ...]
    images: np.ndarray
    stabiliser: tuple[int, ...]


@lru_cache(maxsize=256)
def grid_orbits(group: ImageGroup, height: int, width: int) -> tuple[Orbit, ...]:
    """The orbits of a grid, by their first point in raster order, which is the representative.

    Raises:
        ValueError: if the group swaps the axes and the grid is not square.
    """
    if group.swaps_axes and height != width:
        raise ValueError(f"group {group.name} swaps height and width, so it does not act on a {height}x{width} grid")
    moved = np.stack([group.act_on_grid(a, height, width) for a in range(group.order)])
    orbits = []
    seen = np.zeros(height * width, dtype=bool)
    for start in range(height * width):
        if seen[start]:
            continue
        images = moved[:, start]
        points, movers = np.unique(images, return_index=True)
        first = np.argsort(points != start, kind="stable")
        seen[points] = True
        orbits.append(
            Orbit(
                tuple(points[first].tolist()),
                tuple(movers[first].tolist()),
                images,
                tuple(np.flatnonzero(images == start).tolist()),
            )
        )
    return tuple(orbits)


def fixed_vectors(irrep: Irrep, subgroup: Sequence[int]) -> np.ndarray:
    """Vectors ``u_k`` such that ``{J_a u_k}`` is an orthonormal basis of the vectors that a subgroup leaves fixed.

    Each is the normalised projection of a basis vector where that is possible.

    Returns:
        shape ``(dim, k)``, float64.
    """
    projector = np.mean(irrep.matrices[np.array(subgroup)], axis=0)
    span = np.zeros((irrep.dim, 0))
    chosen = []
    for vector in projector.T:
        vector = vector - span @ (span.T @ vector)
        size = float(np.linalg.norm(vector))
        if size > 1e-6:
            chosen.append(vector / size)
            span = np.column_stack([span, (irrep.endomorphisms @ chosen[-1]).T])
    return np.column_stack(chosen) if chosen else np.zeros((irrep.dim, 0))


def field_tables(
    group: ImageGroup, irrep: Irrep, grid_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields on a grid with ``f(g p) = rho(g) f(p)``: how each point reads its value from values stored per orbit.

    Where a point stays in place under part of the group, only the components which that part leaves fixed are stored.

    Returns:
        index: shape ``(points, components)``, the stored rows that a point reads (0 where its coefficients are 0).
        coefficients: shape ``(points, d, components)``.
        stabilisers: shape ``(rows,)``, for every stored row how many elements leave its point in place.
    """
    points = grid_size[0] * grid_size[1]
    index = np.zeros((points, irrep.dim), dtype=np.int64)
    coefficients = np.zeros((points, irrep.dim, irrep.dim))
    stabilisers: list[int] = []
    for orbit in grid_orbits(group, *grid_size):
        vectors = fixed_vectors(irrep, orbit.stabiliser)
        basis = np.concatenate([endomorphism @ vectors for endomorphism in irrep.endomorphisms], axis=1)
        components = basis.shape[1]
        places = np.array(orbit.points)
        index[places, :components] = len(stabilisers) + np.arange(components)
        coefficients[places, :, :components] = irrep.matrices[list(orbit.movers)] @ basis
        stabilisers += [len(orbit.stabiliser)] * components
    return index, coefficients, np.array(stabilisers, dtype=np.int64)
