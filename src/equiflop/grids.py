"""Groups that act on images, and what they do to a grid of pixels or tokens.

Coordinates: ``x`` points right along columns, ``y`` up against rows, the origin is the centre of the grid. An element
``g`` moves the value at position ``p`` to ``g p``: ``(g I)[g p] = I[p]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from equiflop.groups import FiniteGroup, FourierPlan, Irrep, Rep, cyclic, dihedral, direct_product, flop, fourier_plan

_ELEMENT_NAMES = {
    (1, 0, 0, 1): "identity",
    (0, -1, 1, 0): "quarter turn left",
    (-1, 0, 0, -1): "half turn",
    (0, 1, -1, 0): "quarter turn right",
    (-1, 0, 0, 1): "mirror left-right",
    (1, 0, 0, -1): "mirror up-down",
    (0, 1, 1, 0): "mirror at the diagonal /",
    (0, -1, -1, 0): "mirror at the diagonal \\",
}


@dataclass(frozen=True)
class ImageMove:
    """A symmetry of the image plane: first mirror at the diagonal ``x = y`` or not, then reverse axes.

    Attributes:
        transposes: whether height and width are exchanged.
        reverses: the axes, of -1 and -2, that are reversed afterwards.
    """

    transposes: bool
    reverses: tuple[int, ...]

    @classmethod
    def of(cls, matrix: np.ndarray) -> ImageMove:
        """The move of a signed 2x2 permutation matrix."""
        transposes = bool(matrix[0, 0] == 0)
        signs = matrix.sum(axis=1).tolist()
        return cls(transposes, tuple(axis for axis, sign in zip((-1, -2), signs, strict=True) if sign < 0))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Shape ``(..., H, W)`` to the same, or to ``(..., W, H)``."""
        if self.transposes:
            image = image.transpose(-1, -2).flip(-1, -2)
        return image.flip(self.reverses) if self.reverses else image


class ImageGroup(FiniteGroup):
    """A finite group with a signed 2x2 permutation matrix per element: how it moves ``(x, y)`` on the image plane.

    Args:
        group: the abstract group.
        matrices: shape ``(order, 2, 2)``; entries 0, 1, -1, one non-zero entry in every row and column.
        name: what it is called in messages; by default the group's name.

    Raises:
        ValueError: if the matrices are not signed permutations or do not multiply like the group's elements.

    >>> ImageGroup(flop(), [[[1, 0], [0, 1]], [[-1, 0], [0, 1]]]).swaps_axes
    False
    """

    def __init__(
        self, group: FiniteGroup, matrices: Sequence[Sequence[Sequence[int]]] | np.ndarray, name: str | None = None
    ) -> None:
        super().__init__(group.table, lambda _: group.irreps, name or group.name)
        self.matrices = _checked_matrices(group, np.array(matrices))
        self.matrices.setflags(write=False)
        #: What each element does to the last two axes of an image; plain Python, so that compilers can trace it.
        self.moves = tuple(ImageMove.of(matrix) for matrix in self.matrices)

    @cached_property
    def swaps_axes(self) -> bool:
        """Whether some element exchanges height and width (quarter turns and diagonal mirrors)."""
        return any(self.swaps_axes_by(a) for a in range(self.order))

    @cached_property
    def mirrors_columns(self) -> bool:
        """Whether some element reverses the order of columns, or swaps them with rows."""
        return bool((self.matrices[:, 0, 0] != 1).any())

    @cached_property
    def mirrors_rows(self) -> bool:
        """Whether some element reverses the order of rows, or swaps them with columns."""
        return bool((self.matrices[:, 1, 1] != 1).any())

    def swaps_axes_by(self, a: int) -> bool:
        """Whether element ``a`` exchanges height and width."""
        return bool(self.matrices[a, 0, 0] == 0)

    def element_name(self, a: int) -> str:
        """What element ``a`` does to an image, in words."""
        return _ELEMENT_NAMES[tuple(self.matrices[a].ravel().tolist())]

    def act_on_grid(self, a: int, height: int, width: int) -> np.ndarray:
        """Where element ``a`` moves the points of a grid: raster index of ``a p`` for every raster index ``p``.

        Indices of the result refer to the moved grid, which is ``width x height`` if ``a`` swaps the axes.

        Returns:
            integers, shape ``(height * width,)``.
        """
        rows, columns = np.divmod(np.arange(height * width), width)
        x, y = self.matrices[a] @ np.stack([2 * columns - (width - 1), (height - 1) - 2 * rows])
        new_height, new_width = (width, height) if self.swaps_axes_by(a) else (height, width)
        return ((new_height - 1 - y) // 2) * new_width + (x + new_width - 1) // 2

    def act_on_image(self, a: int, image: torch.Tensor) -> torch.Tensor:
        """Apply element ``a`` to an image, ``(..., H, W)`` to ``(..., H, W)``, or ``(..., W, H)`` if it swaps axes."""
        return self.moves[a](image)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ImageGroup) and not np.array_equal(self.matrices, other.matrices):
            return False
        return super().__eq__(other)

    __hash__ = FiniteGroup.__hash__


_IDENTITY, _MIRROR, _UPSIDE_DOWN = np.eye(2, dtype=np.int64), np.diag([-1, 1]), np.diag([1, -1])
_TURNS = np.stack([np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), k) for k in range(4)])

#: The image groups that have a name: how to make the abstract group, and the matrices of its elements in its numbering.
#: A new entry here is all that a new group needs.
NAMED_IMAGE_GROUPS: dict[str, tuple[Callable[[], FiniteGroup], np.ndarray]] = {
    "flop": (flop, np.stack([_IDENTITY, _MIRROR])),
    "updown": (flop, np.stack([_IDENTITY, _UPSIDE_DOWN])),
    "flips": (
        lambda: direct_product(flop(), flop()),
        np.stack([_IDENTITY, _UPSIDE_DOWN, _MIRROR, _MIRROR @ _UPSIDE_DOWN]),
    ),
    "rot4": (lambda: cyclic(4), _TURNS),
    "octic": (lambda: dihedral(4), np.concatenate([_TURNS, _MIRROR @ _TURNS])),
}


@lru_cache(maxsize=16)
def named_image_group(name: str) -> ImageGroup:
    """The image group of a name, one of :data:`NAMED_IMAGE_GROUPS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NAMED_IMAGE_GROUPS:
        raise ValueError(
            f"group={name!r} is unknown; choose from {', '.join(NAMED_IMAGE_GROUPS)} or give an ImageGroup"
        )
    make, matrices = NAMED_IMAGE_GROUPS[name]
    return ImageGroup(make(), matrices, name)


def as_image_group(group: str | ImageGroup) -> ImageGroup:
    """The group itself, or the one of that name.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if it is neither a name nor an :class:`ImageGroup`.
    """
    if isinstance(group, ImageGroup):
        return group
    if isinstance(group, str):
        return named_image_group(group)
    raise TypeError(
        f"group={group!r} is not an ImageGroup; give one of {', '.join(NAMED_IMAGE_GROUPS)} or an ImageGroup"
    )


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
        plan = fourier_plan(self.group)
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


def _checked_matrices(group: FiniteGroup, matrices: np.ndarray) -> np.ndarray:
    if matrices.shape != (group.order, 2, 2):
        raise ValueError(f"matrices has shape {matrices.shape}; group {group.name} needs ({group.order}, 2, 2)")
    whole = np.rint(matrices).astype(np.int64)
    magnitude = np.abs(whole)
    if not (
        np.array_equal(whole, matrices)
        and magnitude.max() <= 1
        and (magnitude.sum(axis=1) == 1).all()
        and (magnitude.sum(axis=2) == 1).all()
    ):
        raise ValueError("matrices must be signed permutations: one entry 1 or -1 in every row and column, else 0")
    if not np.array_equal(np.einsum("aij,bjk->abik", whole, whole), whole[group.table]):
        raise ValueError(f"matrices do not multiply like the elements of {group.name}")
    return whole
