"""How a regular feature falls into lanes of equal length, and how kernels are told of it in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from equiflop.groups import FourierPlan


@dataclass(frozen=True)
class Lanes:
    """The lanes of a multiple of the regular representation: irrep after irrep, row after row.

    Attributes:
        spans: of every irrep its dimension and the lanes of one row.
        plan: the transform by additions.
    """

    spans: tuple[tuple[int, int], ...]
    plan: FourierPlan

    @property
    def count(self) -> int:
        """``|G|``."""
        return sum(dim * width for dim, width in self.spans)

    @property
    def weights(self) -> int:
        """Blocks of ``n_out x n_in`` numbers that a product has."""
        return sum(width * width for _, width in self.spans)

    @property
    def parameters(self) -> int:
        """Lanes of factors per (irrep, multiplicity)."""
        return sum(width for _, width in self.spans)

    def before(self, i: int) -> int:
        """The lanes before an irrep's."""
        return sum(dim * width for dim, width in self.spans[:i])

    def places(self) -> list[tuple[int, int, int]]:
        """Of every lane its irrep, row, and number within the row."""
        return [(i, row, j) for i, (dim, width) in enumerate(self.spans) for row in range(dim) for j in range(width)]

    def parameter_places(self) -> list[int]:
        """Of every lane the place, in lanes, of its factors among those per (irrep, multiplicity)."""
        starts = [sum(width for _, width in self.spans[:i]) for i in range(len(self.spans))]
        return [starts[i] + j for i, _, j in self.places()]

    def code(self) -> tuple[int, ...]:
        """The lanes as numbers, which operators take as an argument; :func:`decode` reads them."""
        numbers = [len(self.spans), *(number for span in self.spans for number in span), *self.plan.order]
        for stage in self.plan.stages:
            for terms in stage:
                numbers += [len(terms), *(2 * i + (sign < 0) for i, sign in terms)]
        return tuple(numbers)


def decode(code: Sequence[int]) -> Lanes:
    """The lanes that :meth:`Lanes.code` wrote; the plan's scale, which parameters carry, is left out."""
    return _decode(tuple(code))


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> Lanes:
    numbers = iter(code)
    spans = tuple((next(numbers), next(numbers)) for _ in range(next(numbers)))
    order = sum(dim * width for dim, width in spans)
    permutation = tuple(next(numbers) for _ in range(order))
    rows = [tuple((n // 2, -1 if n % 2 else 1) for n in (next(numbers) for _ in range(count))) for count in numbers]
    stages = tuple(tuple(rows[start : start + order]) for start in range(0, len(rows), order))
    return Lanes(spans, FourierPlan(permutation, stages, (1.0,) * order))
