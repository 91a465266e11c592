"""The group Fourier transform: the change of basis between the spatial domain and the irreps.

In the spatial domain one copy of the regular representation is a function on the group, which the group permutes:
``(g f)(h) = f(g^-1 h)``. In the isotypic domain it is an axis in the layout of ``Rep.regular(group, 1)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from equiflop.groups.group import FiniteGroup


def fourier_matrix(group: FiniteGroup) -> np.ndarray:
    """The orthogonal matrix ``Q`` from the spatial to the isotypic domain, shape ``(order, order)``, float64.

    Row ``(irrep, i, j)`` holds ``sqrt(d / |G|) rho(h)[i, j]`` for ``j < d / e``; with complex and quaternionic type the
    other columns repeat the same functions. ``Q regular(g) Q^T`` is the matrix of ``Rep.regular(group, 1)``.
    """
    rows = [
        np.sqrt(irrep.dim / group.order) * irrep.matrices[:, :, : irrep.regular_multiplicity].reshape(group.order, -1).T
        for irrep in group.irreps
    ]
    return np.concatenate(rows)


Term = tuple[int, int]  # (index of the input, sign +1 or -1)


@dataclass(frozen=True)
class FourierPlan:
    """The Fourier matrix as a product of sparse factors with entries 0, +1, -1: additions instead of a product.

    ``Q = diag(scale) F_k ... F_1 P``, where ``P`` permutes the inputs and every row of a factor ``F`` has at most two
    entries. It is derived from a chain of subgroups of index 2, and exists for groups whose order is a power of two
    when the bases of their irreps are adapted to such a chain (those of the named groups are).

    Attributes:
        order: the permutation ``P``: input ``order[i]`` goes to place ``i``.
        stages: the factors; a factor is a tuple with the terms of each row.
        scale: shape ``(order,)``.
    """

    order: tuple[int, ...]
    stages: tuple[tuple[tuple[Term, ...], ...], ...]
    scale: tuple[float, ...]

    def irrep_scales(self, group: FiniteGroup) -> tuple[float, ...]:
        """The scale of each irrep's rows, which is the same for all of them."""
        starts = np.cumsum([0] + [irrep.dim * irrep.regular_multiplicity for irrep in group.irreps])
        return tuple(self.scale[start] for start in starts[:-1])

    def analyse(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Spatial to isotypic domain without the final ``scale``: one tensor per group element in, one per row out."""
        rows = [values[i] for i in self.order]
        for stage in self.stages:
            rows = [_signed_sum(rows, terms) for terms in stage]
        return rows

    def analyse_(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Like :meth:`analyse`, but empties the list and overwrites its tensors, to hold less memory."""
        rows = [values[i] for i in self.order]
        values.clear()
        for stage in self.stages:
            rows = _butterflies_(rows, stage)
        return rows

    def synthesise_(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Like :meth:`synthesise`, but empties the list and overwrites its tensors, to hold less memory."""
        current = list(rows)
        rows.clear()
        for stage in reversed(self.stages):
            current = _butterflies_(current, _transposed(stage))
        return self._in_group_order(current)

    def synthesise(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Isotypic to spatial domain of rows that already carry ``scale``; the transpose of :meth:`analyse`."""
        current = list(rows)
        for stage in reversed(self.stages):
            current = [_signed_sum(current, terms) for terms in _transposed(stage)]
        return self._in_group_order(current)

    def _in_group_order(self, current: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        values: list[torch.Tensor] = [current[0]] * len(current)
        for place, i in enumerate(self.order):
            values[i] = current[place]
        return values


@lru_cache(maxsize=64)
def fourier_plan(group: FiniteGroup) -> FourierPlan | None:
    """The transform of ``group`` by additions, or None where it has to be a matrix product."""
    if group.order & (group.order - 1):
        return None
    plan = _factorise(fourier_matrix(group), group.table)
    if plan is None:
        return None
    rows = [irrep.dim * irrep.regular_multiplicity for irrep in group.irreps]
    by_row = np.repeat(plan.irrep_scales(group), rows)
    return plan if np.array_equal(by_row, plan.scale) else None


def _transposed(stage: Sequence[Sequence[Term]]) -> list[list[Term]]:
    transposed: list[list[Term]] = [[] for _ in stage]
    for row, terms in enumerate(stage):
        for i, sign in terms:
            transposed[i].append((row, sign))
    return transposed


def _butterflies_(inputs: Sequence[torch.Tensor], rows: Sequence[Sequence[Term]]) -> list[torch.Tensor]:
    """The signed sums of all rows; where two rows take the same two inputs, the second overwrites one of them."""
    outputs: list[torch.Tensor | None] = [None] * len(rows)
    partner: dict[frozenset[int], int] = {}
    uses = Counter(i for terms in rows for i, _ in terms)
    for row, terms in enumerate(rows):
        pair = frozenset(i for i, _ in terms)
        (first, sign), *rest = sorted(terms, key=lambda term: -term[1])
        only_here = len(rest) == 1 and sign > 0 and all(uses[i] == 2 for i in pair)
        if only_here and pair in partner:
            other, other_sign = rest[0]
            outputs[row] = inputs[first].add_(inputs[other], alpha=other_sign)
        else:
            outputs[row] = _signed_sum(inputs, terms)
            if only_here:
                partner[pair] = row
    return [output for output in outputs if output is not None]


def _signed_sum(inputs: Sequence[torch.Tensor], terms: Sequence[Term]) -> torch.Tensor:
    ordered = sorted(terms, key=lambda term: -term[1])  # a positive term first: b - a instead of -a + b
    (first, sign), *rest = ordered
    total = inputs[first] if sign > 0 else -inputs[first]
    for i, sign in rest:
        total = total + inputs[i] if sign > 0 else total - inputs[i]
    return total


def _factorise(matrix: np.ndarray, table: np.ndarray) -> FourierPlan | None:
    n = len(table)
    if n == 1:
        return FourierPlan((0,), (), (1.0,))
    plans: list[FourierPlan] = []
    for character in _sign_characters(matrix, table):
        subgroup = np.flatnonzero(character > 0)
        plan = _factor_over(matrix, table, subgroup, table[np.flatnonzero(character < 0)[0], subgroup])
        if plan is not None:
            plans.append(plan)
    return min(plans, key=lambda plan: sum(len(terms) - 1 for stage in plan.stages for terms in stage), default=None)


def _sign_characters(matrix: np.ndarray, table: np.ndarray) -> list[np.ndarray]:
    """The rows that are non-trivial homomorphisms to +1, -1; their kernels are subgroups of index 2."""
    found = []
    for row in matrix:
        values = row / row[0] if row[0] else np.zeros_like(row)
        signs = np.sign(values)
        if np.allclose(values, signs) and (signs < 0).any() and (signs[table] == np.outer(signs, signs)).all():
            found.append(signs)
    return found


def _factor_over(matrix: np.ndarray, table: np.ndarray, subgroup: np.ndarray, coset: np.ndarray) -> FourierPlan | None:
    """One step down the chain: a row restricted to the subgroup, or to its coset, is a row of a smaller transform."""
    half = len(subgroup)
    smaller: list[np.ndarray] = []
    terms_of_rows: list[list[tuple[int, float]]] = []
    for row in matrix:
        terms: list[tuple[int, float]] = []
        for side, columns in enumerate((subgroup, coset)):
            part = row[columns]
            size = float(np.linalg.norm(part))
            if size < 1e-9:
                continue
            place = next((i for i, other in enumerate(smaller) if abs(abs(other @ part) - size) < 1e-9), None)
            if place is None:
                place = len(smaller)
                smaller.append(part / size * np.sign(part[np.flatnonzero(np.abs(part) > 1e-9)[0]]))
            terms.append((side * half + place, float(smaller[place] @ part)))
        terms_of_rows.append(terms)
    if len(smaller) != half:
        return None
    position = {int(element): i for i, element in enumerate(subgroup)}
    small_table = np.array([[position[int(table[a, b])] for b in subgroup] for a in subgroup])
    inner = _factorise(np.stack(smaller), small_table)
    if inner is None:
        return None
    doubled = tuple(
        stage + tuple(tuple((i + half, sign) for i, sign in terms) for terms in stage) for stage in inner.stages
    )
    last, scale = [], []
    for terms in terms_of_rows:
        weights = [weight * inner.scale[i % half] for i, weight in terms]
        if max(map(abs, weights)) - min(map(abs, weights)) > 1e-9:
            return None
        last.append(tuple((i, 1 if weight > 0 else -1) for (i, _), weight in zip(terms, weights, strict=True)))
        scale.append(abs(weights[0]))
    order = tuple(int(subgroup[i]) for i in inner.order) + tuple(int(coset[i]) for i in inner.order)
    return FourierPlan(order, (*doubled, tuple(last)), _snapped_scales(scale))


def _snapped_scales(scale: list[float]) -> tuple[float, ...]:
    """The scales are powers of sqrt(1/2); the products above carry rounding errors that this removes."""
    return tuple(float(np.sqrt(0.5 ** round(-2.0 * float(np.log2(value))))) for value in scale)
