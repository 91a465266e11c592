"""The type of a feature axis: how often each irrep of a group occurs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from equiflop.groups.action import Action, abstract_group
from equiflop.groups.group import FiniteGroup
from equiflop.groups.irrep import Irrep


@dataclass(frozen=True)
class IrrepBlock:
    """One irrep's place on the feature axis: ``[dim, multiplicity]``, row-major, from ``start`` to ``stop``."""

    irrep: Irrep
    multiplicity: int
    start: int
    stop: int


class Rep:
    """A representation of a group as multiplicities of its irreps, and with it the layout of a feature axis.

    The axis holds, irrep after irrep in the order of ``group.irreps``, a block ``[dim, multiplicity]``, row-major:
    all multiplicities of row 0, then of row 1, and so on. A ``Rep`` is immutable, hashable and holds no feature.

    Args:
        group: the group, or an action of it; ``rep.group`` is the abstract group, however it acts elsewhere.
        multiplicities: one count per irrep, in the order of ``group.irreps``.

    Raises:
        TypeError: if ``group`` is neither.
        ValueError: if the number of multiplicities is wrong or one is negative.

    >>> from equiflop.groups import dihedral
    >>> Rep(dihedral(4), (4, 0, 0, 0, 2))
    Rep(D4: 4 A1 + 2 E)
    >>> Rep.regular(dihedral(4), 3).dim
    24
    """

    __slots__ = ("group", "multiplicities")

    group: FiniteGroup
    multiplicities: tuple[int, ...]

    def __init__(self, group: FiniteGroup | Action, multiplicities: Sequence[int]) -> None:
        group = abstract_group(group)
        counts = tuple(int(m) for m in multiplicities)
        names = [irrep.name for irrep in group.irreps]
        if len(counts) != len(names):
            raise ValueError(
                f"multiplicities={counts} has {len(counts)} entries; group {group.name} has {len(names)} irreps {names}"
            )
        if min(counts) < 0:
            raise ValueError(f"multiplicities={counts} holds a negative number; counts start at 0")
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "multiplicities", counts)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Rep is immutable; cannot set {name!r}")

    def __reduce__(self) -> tuple[type[Rep], tuple[FiniteGroup, tuple[int, ...]]]:
        return Rep, (self.group, self.multiplicities)

    @classmethod
    def regular(cls, group: FiniteGroup | Action, n: int) -> Rep:
        """``n`` copies of the regular representation: every irrep ``n * dim / endomorphism_dim`` times.

        Raises:
            ValueError: if ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} is negative; a Rep has n >= 0 copies of the regular representation")
        return cls(group, [n * irrep.regular_multiplicity for irrep in group.irreps])

    @classmethod
    def regular_of_dim(cls, group: FiniteGroup | Action, dim: int, argument: str = "dim") -> Rep:
        """The multiple of the regular representation of the given dimension; ``argument`` names it in the error.

        Raises:
            ValueError: if ``dim`` is not a positive multiple of the group's order.
        """
        group = abstract_group(group)
        if dim <= 0 or dim % group.order:
            raise ValueError(f"{argument}={dim} is not divisible by |G|={group.order} (group {group.name})")
        return cls.regular(group, dim // group.order)

    @classmethod
    def trivial(cls, group: FiniteGroup | Action, n: int) -> Rep:
        """``n`` invariant channels."""
        return cls(group, [n] + [0] * (len(group.irreps) - 1))

    @property
    def dim(self) -> int:
        """Length of the feature axis."""
        return sum(irrep.dim * m for irrep, m in zip(self.group.irreps, self.multiplicities, strict=True))

    @property
    def regular_copies(self) -> int | None:
        """How many copies of the regular representation this is, or None if it is not a multiple of it."""
        n = self.multiplicities[0]
        return n if self.multiplicities == Rep.regular(self.group, n).multiplicities else None

    def blocks(self) -> Iterator[IrrepBlock]:
        """The blocks of the axis, one per irrep, empty ones included."""
        start = 0
        for irrep, multiplicity in zip(self.group.irreps, self.multiplicities, strict=True):
            stop = start + irrep.dim * multiplicity
            yield IrrepBlock(irrep, multiplicity, start, stop)
            start = stop

    def matrix(self, a: int) -> torch.Tensor:
        """The action of element ``a`` on the feature axis, shape ``(dim, dim)``, float64 on the CPU."""
        matrix = torch.zeros(self.dim, self.dim, dtype=torch.float64, device="cpu")
        for block in self.blocks():
            identity = torch.eye(block.multiplicity, dtype=torch.float64, device="cpu")
            matrix[block.start : block.stop, block.start : block.stop] = torch.kron(block.irrep.matrix(a), identity)
        return matrix

    def act(self, a: int, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Apply ``matrix(a)`` to an axis of a tensor, irrep by irrep, in the tensor's own dtype.

        Raises:
            ValueError: if the axis does not have ``dim`` entries.
        """
        if x.ndim == 0 or x.shape[dim] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; {self!r} acts on {self.dim} entries along axis {dim}")
        moved = x.movedim(dim, -1)
        parts = []
        for block in self.blocks():
            part = moved[..., block.start : block.stop]
            if block.irrep.dim == 1:
                parts.append(part * block.irrep.matrices[a].item())
            elif block.multiplicity:
                rows = part.unflatten(-1, (block.irrep.dim, block.multiplicity))
                parts.append((block.irrep.matrix(a).to(x) @ rows).flatten(-2))
        return torch.cat(parts, dim=-1).movedim(-1, dim)

    def __add__(self, other: Rep) -> Rep:
        """The direct sum (its axis is ordered by irrep, so it is not the two axes one after the other)."""
        if not isinstance(other, Rep):
            return NotImplemented
        if self.group != other.group:
            raise ValueError(f"cannot add a Rep of {self.group.name} and one of {other.group.name}")
        return Rep(self.group, [a + b for a, b in zip(self.multiplicities, other.multiplicities, strict=True)])

    def __mul__(self, n: int) -> Rep:
        """``n`` copies."""
        return Rep(self.group, [n * m for m in self.multiplicities])

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rep) and self.multiplicities == other.multiplicities and self.group == other.group

    def __hash__(self) -> int:
        return hash((self.group, self.multiplicities))

    def __str__(self) -> str:
        terms = [f"{m} {irrep.name}" for irrep, m in zip(self.group.irreps, self.multiplicities, strict=True) if m]
        return f"{self.group.name}: {' + '.join(terms) or '0'}"

    def __repr__(self) -> str:
        return f"Rep({self})"
