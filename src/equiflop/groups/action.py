"""A finite group that acts: one orthogonal matrix per element, on whatever the matrices' axis stands for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from equiflop.groups.decompose import snapped
from equiflop.groups.group import FiniteGroup
from equiflop.groups.irrep import Irrep

_TOLERANCE = 1e-10


class Action:
    """A finite group with an orthogonal matrix per element: how it moves what stands along an axis of length ``n``.

    The axis can be the coordinates of a pixel or of a point in space, tokens, or label channels: a mirrored face
    exchanges the channels of the left and of the right eye. The group itself is abstract (``action.group``) and can act
    in many ways; two actions are equal if their groups are and their matrices. An action is immutable.

    Args:
        group: the abstract group; of another action, its group is taken.
        matrices: shape ``(order, n, n)``, in the order of the group's elements. Entries within rounding error of
            0, 1/2 and 1 in size are made exact.
        name: what the action is called in messages; by default the group's name.

    Attributes:
        matrices: float64, read-only.

    Raises:
        TypeError: if ``group`` is no group.
        ValueError: if the matrices do not have that shape, are not orthogonal, or do not multiply like the elements.

    >>> from equiflop.groups import cyclic
    >>> eyes = Action.permuting(cyclic(2), [(0, 1, 2), (0, 2, 1)], name="face, left eye, right eye")
    >>> eyes.act(1, torch.tensor([5.0, 1.0, 2.0]))
    tensor([5., 2., 1.])
    """

    group: FiniteGroup
    matrices: np.ndarray
    name: str

    def __init__(self, group: FiniteGroup | Action, matrices: Any, name: str | None = None) -> None:
        self.group = abstract_group(group)
        self.name = self.group.name if name is None else name
        self.matrices = _checked_matrices(self.group, matrices)
        self.matrices.setflags(write=False)

    @classmethod
    def permuting(
        cls,
        group: FiniteGroup | Action,
        images: Sequence[Sequence[int]] | np.ndarray,
        signs: Sequence[Sequence[int]] | np.ndarray | None = None,
        name: str | None = None,
    ) -> Action:
        """The action that moves entry ``i`` to place ``images[a][i]``, with the sign ``signs[a][i]`` if given.

        Raises:
            ValueError: if ``images`` is not a permutation for every element, ``signs`` is not of its shape and made of
                1 and -1, or they do not multiply like the elements.
        """
        order = abstract_group(group).order
        where = np.asarray(images)
        if where.ndim != 2 or len(where) != order or not np.issubdtype(where.dtype, np.integer):
            raise ValueError(
                f"images has shape {where.shape} and type {where.dtype}; it needs one sequence of integers for each of "
                f"the {order} elements"
            )
        n = where.shape[1]
        bad = np.flatnonzero((np.sort(where, axis=1) != np.arange(n)).any(axis=1))
        if bad.size:
            raise ValueError(f"images[{bad[0]}]={where[bad[0]].tolist()} is not a permutation of 0..{n - 1}")
        factors = np.ones(where.shape) if signs is None else np.asarray(signs, dtype=np.float64)
        if factors.shape != where.shape or not (np.abs(factors) == 1).all():
            raise ValueError(f"signs={factors.tolist()} must hold 1 or -1 and have the shape {where.shape} of images")
        matrices = np.zeros((order, n, n))
        matrices[np.arange(order)[:, None], where, np.arange(n)] = factors
        return cls(group, matrices, name)

    @property
    def dim(self) -> int:
        """Length of the axis that the group acts on."""
        return self.matrices.shape[1]

    @property
    def order(self) -> int:
        """Number of the group's elements."""
        return self.group.order

    @property
    def irreps(self) -> tuple[Irrep, ...]:
        """The group's irreps."""
        return self.group.irreps

    @property
    def table(self) -> np.ndarray:
        """The group's Cayley table."""
        return self.group.table

    @property
    def inverses(self) -> np.ndarray:
        """The inverse of every element, shape ``(order,)``."""
        return self.group.inverses

    def multiply(self, a: int, b: int) -> int:
        """The product ``a b`` in the group."""
        return self.group.multiply(a, b)

    def inverse(self, a: int) -> int:
        """The inverse of ``a`` in the group."""
        return self.group.inverse(a)

    def matrix(self, a: int) -> torch.Tensor:
        """The matrix of element ``a``, shape ``(dim, dim)``, float64 on the CPU."""
        return torch.tensor(self.matrices[a], dtype=torch.float64, device="cpu")

    def act(self, a: int, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Apply the matrix of element ``a`` to an axis of a tensor, in the tensor's own dtype.

        Signed permutations move entries and change their signs, without a product: they are exact in every dtype.

        Raises:
            ValueError: if the axis does not have the action's ``dim`` entries, or the dtype cannot hold the result:
                integers under matrices that are no permutations, unsigned numbers under signs.
        """
        if x.ndim == 0 or x.shape[dim] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; {self!r} acts on {self.dim} entries along axis {dim}")
        if self._signed_permutations is None:
            if not (x.is_floating_point() or x.is_complex()):
                raise ValueError(
                    f"x has dtype {x.dtype}; {self!r} is no permutation and acts on floating-point numbers"
                )
            return (x.movedim(dim, -1) @ self.matrix(a).to(x).mT).movedim(-1, dim)
        sources, signs = self._signed_permutations[a]
        moved = x.index_select(dim, torch.tensor(sources, device=x.device))
        if min(signs, default=1) > 0:
            return moved
        if not (x.dtype.is_signed or x.is_complex()):
            raise ValueError(f"x has dtype {x.dtype}, which has no negative numbers; {self!r} changes signs")
        factors = torch.tensor(signs, device=x.device, dtype=x.dtype)
        return moved * factors.view(-1, *[1] * (x.ndim - 1 - dim % x.ndim))

    def element_name(self, a: int) -> str:
        """What element ``a`` is called in messages; that of a permutation is its cycles, such as ``(0 1)(2 3)``."""
        if a == 0 or self._signed_permutations is None:
            return self.group.element_name(a)
        sources, signs = self._signed_permutations[a]
        if min(signs, default=1) < 0:
            return self.group.element_name(a)
        images = {source: place for place, source in enumerate(sources)}
        cycles, seen = [], set[int]()
        for start in range(self.dim):
            cycle = []
            while start not in seen:
                seen.add(start)
                cycle.append(str(start))
                start = images[start]
            if len(cycle) > 1:
                cycles.append(f"({' '.join(cycle)})")
        return "".join(cycles) or self.group.element_name(a)

    @cached_property
    def _signed_permutations(self) -> list[tuple[list[int], list[int]]] | None:
        """For every element where each entry comes from, and its sign; None if a matrix is no signed permutation."""
        magnitudes = np.abs(self.matrices)
        if not (((magnitudes == 0) | (magnitudes == 1)).all() and (magnitudes.sum(axis=2) == 1).all()):
            return None
        sources = magnitudes.argmax(axis=2)
        signs = np.rint(self.matrices.sum(axis=2)).astype(np.int64)
        return list(zip(sources.tolist(), signs.tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        """Actions are equal if their groups are and their matrices; an action never equals a group."""
        if self is other:
            return True
        if not isinstance(other, Action):
            return NotImplemented
        return np.array_equal(self.matrices, other.matrices) and self.group == other.group

    def __hash__(self) -> int:
        return hash((self.group, self.matrices.astype(np.float64).tobytes()))

    def __reduce__(self) -> tuple[type[Action], tuple[FiniteGroup, np.ndarray, str]]:
        return type(self), (self.group, self.matrices, self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, order={self.order}, dim={self.dim})"


def abstract_group(group: FiniteGroup | Action) -> FiniteGroup:
    """The group itself, or the group of an action.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(group, Action):
        return group.group
    if isinstance(group, FiniteGroup):
        return group
    raise TypeError(f"group={group!r} is not a group; give a FiniteGroup or an Action")


def _checked_matrices(group: FiniteGroup, matrices: Any) -> np.ndarray:
    try:
        array = np.array(matrices, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"matrices is no array of numbers: {error}") from None
    n = array.shape[-1] if array.ndim else 0
    if array.shape != (group.order, n, n):
        raise ValueError(
            f"matrices has shape {array.shape}; group {group.name} needs ({group.order}, n, n), a matrix per element"
        )
    array = snapped(array)
    products = array @ array.transpose(0, 2, 1)
    bad = np.flatnonzero(~(np.abs(products - np.eye(n)) <= _TOLERANCE).all(axis=(1, 2)))
    if bad.size:
        raise ValueError(
            f"the matrices of {group.name} are not orthogonal: matrices[{bad[0]}]={array[bad[0]].tolist()}"
        )
    for a in range(group.order):
        wrong = np.flatnonzero(~(np.abs(array[a] @ array - array[group.table[a]]) <= _TOLERANCE).all(axis=(1, 2)))
        if wrong.size:
            b = int(wrong[0])
            raise ValueError(
                f"the matrices do not multiply like the elements of {group.name}: matrices[{a}] @ matrices[{b}] is not "
                f"matrices[{group.table[a, b]}]"
            )
    return array
