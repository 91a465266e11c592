"""Named finite groups with exact irreps."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np

from equiflop.groups.decompose import standard_irrep
from equiflop.groups.group import FiniteGroup
from equiflop.groups.irrep import Irrep, algebra_units


def flop() -> FiniteGroup:
    """Another name of ``cyclic(2)``, the group C2 = {e, m}; irreps ``A`` (invariant) and ``B`` (sign-flipping).

    The name is that of an action, mirroring images left to right; the abstract group knows nothing of images and is
    the same for every mirror. The action itself is ``equiflop.grids.named_image_group("flop")``.

    >>> flop()
    FiniteGroup(C2, order=2)
    >>> [irrep.name for irrep in flop().irreps]
    ['A', 'B']
    """
    return cyclic(2)


def cyclic(n: int) -> FiniteGroup:
    """C_n, the rotations by multiples of ``360 / n`` degrees; element ``k`` is the ``k``-fold rotation.

    Irreps: ``A``, for even ``n`` the sign irrep ``B``, and ``E1, E2, ...`` of complex type: rotations of the plane by
    ``k`` times the angle.

    Raises:
        ValueError: if ``n < 1``.
    """
    _check_positive("n", n)
    k = np.arange(n)
    irreps = [Irrep("A", 1, "real", np.ones((n, 1, 1)))]
    if n % 2 == 0:
        irreps.append(Irrep("B", 1, "real", (1.0 - 2.0 * (k % 2)).reshape(n, 1, 1)))
    for frequency in range(1, (n + 1) // 2):
        irreps.append(Irrep(f"E{frequency}", 2, "complex", _rotations(frequency * k % n, n)))
    return FiniteGroup((k[:, None] + k) % n, irreps, name=f"C{n}")


def dihedral(n: int) -> FiniteGroup:
    """D_n, the symmetries of a regular n-gon (order ``2n``); all irreps are of real type.

    Element ``k < n`` is the rotation ``r^k``; element ``n + k`` is ``m r^k`` (first ``r^k``, then the mirror ``m``).
    Irreps: ``A1``; ``A2`` (-1 on mirrors); for even ``n`` also ``B1`` (r = -1, m = +1) and ``B2`` (r = m = -1); then
    ``E`` or ``E1, E2, ...`` with ``r`` a rotation of the plane and ``m = diag(-1, 1)``, the mirror left to right.

    Raises:
        ValueError: if ``n < 1``.
    """
    _check_positive("n", n)
    k = np.arange(n)
    rotation = np.concatenate([k, k])
    mirror = np.repeat([0, 1], n)
    # m^s r^k m^t r^l = m^(s+t) r^((-1)^t k + l)
    turned = (np.where(mirror[None, :] == 1, -rotation[:, None], rotation[:, None]) + rotation[None, :]) % n
    table = turned + n * (mirror[:, None] ^ mirror[None, :])

    def one_dimensional(name: str, r: int, m: int) -> Irrep:
        return Irrep(name, 1, "real", (np.float64(r) ** rotation * np.float64(m) ** mirror).reshape(-1, 1, 1))

    irreps = [one_dimensional("A1", 1, 1), one_dimensional("A2", 1, -1)]
    if n % 2 == 0:
        irreps += [one_dimensional("B1", -1, 1), one_dimensional("B2", -1, -1)]
    planar = (n - 1) // 2
    for frequency in range(1, planar + 1):
        matrices = _rotations(frequency * rotation % n, n)
        matrices[n:, 0] *= -1.0
        irreps.append(Irrep("E" if planar == 1 else f"E{frequency}", 2, "real", matrices + 0.0))
    return FiniteGroup(table, irreps, name=f"D{n}")


def quaternion() -> FiniteGroup:
    """The quaternion group Q8 = {1, i, j, k, -1, -i, -j, -k}; ``H`` is its irrep of quaternionic type."""
    units = algebra_units(4)
    left = np.concatenate([units, -units])
    table = _matrix_table(left)
    characters = {"A": (1, 1, 1, 1), "Bi": (1, 1, -1, -1), "Bj": (1, -1, 1, -1), "Bk": (1, -1, -1, 1)}
    irreps = [
        Irrep(name, 1, "real", np.tile(np.array(values, dtype=np.float64), 2).reshape(8, 1, 1))
        for name, values in characters.items()
    ]
    # x -> x q^-1 commutes with all left multiplications, which are then the endomorphisms.
    conjugate = np.diag([1.0, -1.0, -1.0, -1.0])
    right_by_inverse = np.stack([conjugate @ q @ conjugate for q in left])
    return FiniteGroup(table, [*irreps, Irrep("H", 4, "quaternionic", right_by_inverse + 0.0)], name="Q8")


def octahedral() -> FiniteGroup:
    """O, the 24 rotations of a cube; irreps ``A1 A2 E T1 T2``, where ``T1`` is the rotation matrix itself."""
    rotations = octahedral_rotations()
    axes = [tuple(int(i) for i in np.abs(matrix).argmax(axis=0)) for matrix in rotations]
    order3 = list(permutations(range(3)))
    standard = _young_orthogonal((2, 1))
    sign = np.array([_permutation_sign(axis) for axis in axes]).reshape(-1, 1, 1)
    irreps = [
        Irrep("A1", 1, "real", np.ones((24, 1, 1))),
        Irrep("A2", 1, "real", sign + 0.0),
        Irrep("E", 2, "real", np.stack([standard[order3.index(axis)] for axis in axes])),
        Irrep("T1", 3, "real", rotations + 0.0),
        Irrep("T2", 3, "real", sign * rotations + 0.0),
    ]
    return FiniteGroup(_matrix_table(rotations), irreps, name="O")


def octahedral_rotations() -> np.ndarray:
    """The rotation matrices of a cube in the element order of :func:`octahedral`, shape ``(24, 3, 3)``."""
    matrices = []
    for axes, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        matrix = np.zeros((3, 3))
        matrix[list(axes), range(3)] = signs
        if np.linalg.det(matrix) > 0:
            matrices.append(matrix)
    return np.stack(matrices)


def full_octahedral() -> FiniteGroup:
    """O_h, all 48 symmetries of a cube: the direct product of its rotations with the inversion ``x -> -x``.

    Element ``2 a + b`` is rotation ``a`` of :func:`octahedral`, followed by the inversion if ``b = 1``. Irreps: those
    of the rotations, each once with a ``g`` (even: the inversion is +1) and once with a ``u`` (odd: it is -1). ``T1u``
    is the matrix itself (:func:`full_octahedral_matrices`).
    """
    group = direct_product(octahedral(), flop())
    parity = {"A": "g", "B": "u"}
    irreps = []
    for irrep in group.irreps:
        rotation, sign = irrep.name.split("_")
        irreps.append(Irrep(rotation + parity[sign], irrep.dim, irrep.type, irrep.matrices))
    return FiniteGroup(group.table, irreps, name="Oh")


def full_octahedral_matrices() -> np.ndarray:
    """The orthogonal matrices of a cube in the element order of :func:`full_octahedral`, shape ``(48, 3, 3)``."""
    rotations = octahedral_rotations()
    return np.stack([rotations, -rotations], axis=1).reshape(48, 3, 3) + 0.0


def symmetric(n: int) -> FiniteGroup:
    """S_n, all permutations of ``0 .. n - 1`` in lexicographic order (at most n = 6).

    Irreps are those of the partitions of ``n`` in Young's orthogonal form, named ``S`` and the partition's parts, the
    trivial one (``S<n>``) first.

    Raises:
        ValueError: if ``n`` is not in 1..6.
    """
    if not 1 <= n <= 6:
        raise ValueError(f"n={n} is not supported: symmetric(n) takes n in 1..6 (order n!)")
    elements = np.array(list(permutations(range(n))))
    order = len(elements)
    index = {tuple(element): i for i, element in enumerate(elements.tolist())}
    table = np.array([[index[tuple(row)] for row in elements[a][elements].tolist()] for a in range(order)])
    irreps = []
    for partition in _partitions(n):
        matrices = _young_orthogonal(partition)
        irreps.append(Irrep("S" + "".join(map(str, partition)), matrices.shape[1], "real", matrices))
    return FiniteGroup(table, irreps, name=f"S{n}")


def alternating(n: int) -> FiniteGroup:
    """A_n, the even permutations of ``0 .. n - 1`` (3 <= n <= 6); its irreps are found numerically.

    Raises:
        ValueError: if ``n`` is not in 3..6.
    """
    if not 3 <= n <= 6:
        raise ValueError(f"n={n} is not supported: alternating(n) takes n in 3..6")
    cycles = []
    for last in range(2, n):
        generator = list(range(n))
        generator[0], generator[1], generator[last] = 1, last, 0
        cycles.append(generator)
    return FiniteGroup.from_permutations(cycles, name=f"A{n}")


def direct_product(g: FiniteGroup, h: FiniteGroup) -> FiniteGroup:
    """The direct product; element ``(a, b)`` has index ``a * h.order + b``.

    Its real irreps are the irreducible parts of the tensor products of those of ``g`` and ``h``: one with a factor of
    real type stays irreducible, complex (x) complex splits into two of complex type, quaternionic (x) quaternionic is
    four copies of one of real type, complex (x) quaternionic two copies of one of complex type. Names join the
    factors' names by an underscore, and the two parts of a split are marked ``p`` and ``m``.
    """
    n = h.order
    table = (g.table[:, None, :, None] * n + h.table[None, :, None, :]).reshape(g.order * n, g.order * n)

    def irreps(_: FiniteGroup) -> list[Irrep]:
        return [part for a in g.irreps for b in h.irreps for part in _tensor_parts(a, b)]

    return FiniteGroup(table, irreps, name=f"{g.name}x{h.name}")


def _tensor_parts(a: Irrep, b: Irrep) -> list[Irrep]:
    """The distinct irreducible parts of the outer tensor product of two irreps."""
    joint = np.einsum("gij,hkl->ghikjl", a.matrices, b.matrices)
    d = a.dim * b.dim
    matrices = joint.reshape(-1, d, d)
    name = f"{a.name}_{b.name}"
    if "real" in (a.type, b.type):
        return [standard_irrep(name, matrices)]
    # J (x) J' is symmetric with square 1 and commutes with the product: its eigenspaces are subrepresentations.
    involutions = [np.kron(j, k) for j, k in zip(a.endomorphisms[1:], b.endomorphisms[1:], strict=False)]
    if (a.type, b.type) == ("complex", "complex"):
        return [
            standard_irrep(name + mark, _restricted(matrices, np.eye(d) + sign * involutions[0]))
            for sign, mark in ((-1.0, "p"), (1.0, "m"))
        ]
    projector = np.eye(d)
    for involution in involutions[:2]:
        projector = projector @ (np.eye(d) + involution)
    return [standard_irrep(name, _restricted(matrices, projector))]


def _restricted(matrices: np.ndarray, projector: np.ndarray) -> np.ndarray:
    """A representation restricted to the range of a multiple of an orthogonal projector that commutes with it."""
    columns: list[np.ndarray] = []
    for column in projector.T:  # Gram-Schmidt on the columns keeps simple entries
        for other in columns:
            column = column - other * (other @ column)
        size = np.linalg.norm(column)
        if size > 1e-6:
            columns.append(column / size)
    basis = np.column_stack(columns)
    return basis.T @ matrices @ basis


def _rotations(steps: np.ndarray, n: int) -> np.ndarray:
    """Rotation matrices by ``steps * 360 / n`` degrees, shape ``(len(steps), 2, 2)``; exact at quarter turns."""
    table = np.array([_exact_cos_sin(step, n) for step in range(n)])
    cos, sin = table[steps % n].T
    return np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2) + 0.0


def _exact_cos_sin(step: int, n: int) -> tuple[float, float]:
    if 4 * step % n == 0:
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[4 * step // n]
    angle = 2.0 * math.pi * step / n
    return math.cos(angle), math.sin(angle)


def _matrix_table(matrices: np.ndarray) -> np.ndarray:
    """Cayley table of a list of distinct integer matrices that is closed under products."""
    index = {np.rint(matrix).astype(np.int64).tobytes(): i for i, matrix in enumerate(matrices)}
    return np.array([[index[np.rint(a @ b).astype(np.int64).tobytes()] for b in matrices] for a in matrices])


def _permutation_sign(images: tuple[int, ...]) -> float:
    pairs = [(i, j) for j in range(len(images)) for i in range(j)]
    return math.prod(1.0 if images[i] < images[j] else -1.0 for i, j in pairs)


def _partitions(n: int, largest: int | None = None) -> list[tuple[int, ...]]:
    """Partitions of ``n`` with parts in falling order, the largest part first: (n) comes first."""
    if n == 0:
        return [()]
    return [(first, *rest) for first in range(min(n, largest or n), 0, -1) for rest in _partitions(n - first, first)]


def _young_orthogonal(partition: tuple[int, ...]) -> np.ndarray:
    """Young's orthogonal form: one matrix per permutation of S_n in lexicographic order."""
    n = sum(partition)
    tableaux = _standard_tableaux(partition)
    index = {tableau: i for i, tableau in enumerate(tableaux)}
    d = len(tableaux)
    adjacent = []
    for i in range(n - 1):
        matrix = np.zeros((d, d))
        for t, tableau in enumerate(tableaux):
            (row, column), (next_row, next_column) = tableau[i], tableau[i + 1]
            distance = (next_column - next_row) - (column - row)  # axial distance from i to i + 1
            matrix[t, t] = 1.0 / distance
            swapped = (*tableau[:i], tableau[i + 1], tableau[i], *tableau[i + 2 :])
            if swapped in index:
                matrix[index[swapped], t] = math.sqrt(1.0 - 1.0 / distance**2)
        adjacent.append(matrix)
    matrices = []
    for images in permutations(range(n)):
        matrix = np.eye(d)
        word = list(images)
        for end in range(n - 1, 0, -1):  # bubble sort: images = product of adjacent transpositions, last one rightmost
            for i in range(end):
                if word[i] > word[i + 1]:
                    word[i], word[i + 1] = word[i + 1], word[i]
                    matrix = adjacent[i] @ matrix
        matrices.append(matrix)
    return np.stack(matrices) + 0.0


def _standard_tableaux(partition: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Standard Young tableaux, each as the tuple of the cells (row, column) of the numbers 1, 2, ..., n."""
    if not partition:
        return [()]
    found = []
    for row, length in enumerate(partition):
        if row + 1 == len(partition) or partition[row + 1] < length:  # a corner: the last number may stand here
            rest = [*partition]
            rest[row] -= 1
            smaller = tuple(part for part in rest if part)
            found += [(*tableau, (row, length - 1)) for tableau in _standard_tableaux(smaller)]
    return found


def _check_positive(argument: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{argument}={value} is not positive; the group needs {argument} >= 1")
