"""Finite groups and their irreducible real representations.

Elements are the integers ``0 .. order - 1`` and 0 is the identity. Everything here is computed on the CPU in
float64 with numpy, whatever torch's default device or dtype is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

IrrepType = Literal["real", "complex", "quaternionic"]

#: Dimension of the endomorphism algebra of an irrep of each type (Schur's lemma over the reals).
ENDOMORPHISM_DIM: dict[str, int] = {"real": 1, "complex": 2, "quaternionic": 4}

#: The largest group that :meth:`FiniteGroup.from_permutations` enumerates.
MAX_ORDER = 5040

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


class FiniteGroup:
    """A finite group given by its Cayley table.

    Args:
        table: ``table[a][b]`` is the product ``a b``; integers ``0 .. order - 1`` with 0 the identity.
        irreps: the real irreps, trivial one first, or a function that computes them when they are first asked for.
            By default the regular representation is decomposed numerically.
        name: what the group is called in messages.

    Raises:
        ValueError: if the table is not that of a group with identity 0.

    >>> z3 = FiniteGroup([[0, 1, 2], [1, 2, 0], [2, 0, 1]], name="Z3")
    >>> [(irrep.dim, irrep.type) for irrep in z3.irreps]
    [(1, 'real'), (2, 'complex')]
    """

    def __init__(
        self,
        table: Sequence[Sequence[int]] | np.ndarray,
        irreps: Sequence[Irrep] | Callable[[FiniteGroup], Sequence[Irrep]] | None = None,
        name: str = "G",
    ) -> None:
        self.table = _checked_table(table)
        self.table.setflags(write=False)
        self.name = name
        self._irreps_source = irreps

    @classmethod
    def from_permutations(cls, generators: Sequence[Sequence[int]], name: str | None = None) -> FiniteGroup:
        """The group generated by permutations.

        Args:
            generators: each a sequence of the images of ``0 .. n - 1``; the product ``a b`` applies ``b`` first.
            name: what to call it; by default ``"G<order>"``.

        Raises:
            ValueError: if a generator is not a permutation, if their lengths differ, or if the group has more than
                ``MAX_ORDER`` elements.

        >>> FiniteGroup.from_permutations([[1, 2, 3, 0], [3, 2, 1, 0]]).order
        8
        """
        points = _checked_generators(generators)
        elements = [tuple(range(points.shape[1]))]
        index = {elements[0]: 0}
        for element in elements:  # grows while it is walked: breadth first from the identity
            for generator in points:
                product = tuple(generator[list(element)].tolist())
                if product not in index:
                    if len(elements) == MAX_ORDER:
                        raise ValueError(f"generators={points.tolist()} generate more than {MAX_ORDER} elements")
                    index[product] = len(elements)
                    elements.append(product)
        return cls(_permutation_table(np.array(elements)), name=name or f"G{len(elements)}")

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.table)

    def multiply(self, a: int, b: int) -> int:
        """The product ``a b``."""
        return int(self.table[self._element("a", a), self._element("b", b)])

    def inverse(self, a: int) -> int:
        """The inverse of ``a``."""
        return int(self.inverses[self._element("a", a)])

    @cached_property
    def inverses(self) -> np.ndarray:
        """The inverse of every element, shape ``(order,)``."""
        return np.argmin(self.table, axis=1)

    @cached_property
    def irreps(self) -> tuple[Irrep, ...]:
        """The irreducible real representations, each once, the trivial one first."""
        source = self._irreps_source
        if source is None:
            from equiflop.groups.decompose import decompose_regular

            source = decompose_regular
        irreps = tuple(source(self) if callable(source) else source)
        _check_irreps(self, irreps)
        return irreps

    def regular_matrix(self, a: int) -> torch.Tensor:
        """The left regular representation: ``a`` sends basis vector ``h`` to ``a h``. Shape ``(order, order)``."""
        matrix = torch.zeros(self.order, self.order, dtype=torch.float64, device="cpu")
        matrix[torch.from_numpy(self.table[a].copy()), torch.arange(self.order, device="cpu")] = 1.0
        return matrix

    def __getstate__(self) -> dict[str, object]:
        """For pickling: the irreps themselves instead of the function that computes them."""
        return {**self.__dict__, "_irreps_source": self.irreps, "irreps": self.irreps}

    def _element(self, argument: str, a: int) -> int:
        if not 0 <= a < self.order:
            raise ValueError(f"{argument}={a} is not an element of {self.name}; elements are 0..{self.order - 1}")
        return a

    def __eq__(self, other: object) -> bool:
        """Groups are equal if their tables and the matrices of their irreps are."""
        if self is other:
            return True
        if not isinstance(other, FiniteGroup) or not np.array_equal(self.table, other.table):
            return False
        return len(self.irreps) == len(other.irreps) and all(
            a.name == b.name and np.array_equal(a.matrices, b.matrices)
            for a, b in zip(self.irreps, other.irreps, strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.order, self.table.tobytes()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, order={self.order})"


def _checked_table(table: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    array = np.array(table)
    n = len(array)
    if array.ndim != 2 or array.shape != (n, n) or n == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"table has shape {array.shape} and type {array.dtype}; a Cayley table is a square of integers"
        )
    array = array.astype(np.int64)
    numbers = np.arange(n)
    if not (np.array_equal(array[0], numbers) and np.array_equal(array[:, 0], numbers)):
        raise ValueError("table: element 0 is not the identity (row 0 and column 0 must be 0, 1, 2, ...)")
    if not ((np.sort(array, axis=1) == numbers).all() and (np.sort(array, axis=0) == numbers[:, None]).all()):
        raise ValueError("table: a row or a column does not hold every element once, so it is not a group")
    for a in range(n):  # (a b) c == a (b c), one a at a time to keep memory at n^2
        if not np.array_equal(array[array[a]], array[a][array]):
            raise ValueError(f"table is not associative: (a b) c != a (b c) for a={a}")
    return array


def _checked_generators(generators: Sequence[Sequence[int]]) -> np.ndarray:
    if not len(generators):
        raise ValueError("generators=[] is empty; give at least one permutation")
    lengths = {len(generator) for generator in generators}
    if len(lengths) != 1:
        raise ValueError(f"generators have different lengths {sorted(lengths)}; all must permute the same points")
    n = lengths.pop()
    for generator in generators:
        if sorted(generator) != list(range(n)):
            raise ValueError(f"generator {list(generator)} is not a permutation of 0..{n - 1}")
    return np.array([list(generator) for generator in generators], dtype=np.int64).reshape(len(generators), n)


def _permutation_table(elements: np.ndarray) -> np.ndarray:
    """Cayley table of a set of permutations (rows) that is closed under composition."""
    order = len(elements)
    index = {element.tobytes(): i for i, element in enumerate(elements)}
    table = np.empty((order, order), dtype=np.int64)
    for a in range(order):
        products = elements[a][elements]  # row b: apply b, then a
        table[a] = [index[product.tobytes()] for product in products]
    return table


def _check_irreps(group: FiniteGroup, irreps: tuple[Irrep, ...]) -> None:
    if not irreps or irreps[0].dim != 1 or not (irreps[0].matrices == 1).all():
        raise ValueError(f"irreps of {group.name}: the first one must be the trivial one")
    total = sum(irrep.dim**2 // irrep.endomorphism_dim for irrep in irreps)
    if total != group.order:
        raise ValueError(
            f"irreps of {group.name} are incomplete: sum of dim^2 / endomorphism_dim is {total}, not {group.order}"
        )
