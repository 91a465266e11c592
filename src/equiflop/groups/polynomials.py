"""Polynomials that do not change under a group: generators of the invariants of the regular representation.

A real function ``y`` on the group is moved by ``(g y)(h) = y(g^-1 h)``. Averaging the monomial ``y(h_1) ... y(h_k)``
over the group gives the invariant ``P = 1/|G| sum_g y(g h_1) ... y(g h_k)``, and these span all of degree k. Generators
of this algebra separate orbits: two functions agree on them exactly if the group moves one into the other.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np

from equiflop.groups.group import FiniteGroup

#: Largest order for which generators are computed.
MAX_ORDER = 8
_PRIME = 2**31 - 1

Monomial = tuple[int, ...]


@lru_cache(maxsize=32)
def invariant_generators(group: FiniteGroup) -> tuple[Monomial, ...]:
    """Monomials whose averages generate all invariant polynomials of one copy of the regular representation.

    The set is minimal in every degree: a monomial is kept if its average is no combination of products of averages of
    lower degree and of those already kept. Degrees go up to Noether's bound ``|G|`` for cyclic groups and to
    ``3/4 |G|`` for others (Domokos and Hegedűs, Arch. Math. 74, 2000).

    Args:
        group: a group of order at most 8.

    Returns:
        every monomial as the elements ``h_1 <= ... <= h_k`` that it multiplies, by degree.

    Raises:
        ValueError: if the group is too large.

    >>> from equiflop.groups import flop
    >>> invariant_generators(flop())
    ((0,), (0, 1))
    """
    if group.order > MAX_ORDER:
        raise ValueError(
            f"group {group.name} has order {group.order}; polynomial invariants are computed up to order {MAX_ORDER}"
        )
    is_cyclic = any(_element_order(group.table, a) == group.order for a in range(group.order))
    bound = group.order if is_cyclic else 3 * group.order // 4
    orbits = {degree: _Orbits(group.table, degree) for degree in range(1, bound + 1)}
    generators: list[Monomial] = []
    for degree, here in orbits.items():
        products = [
            here.average_of_products(np.array(generator), orbits[degree - len(generator)].monomials, group.table)
            for generator in generators
            if len(generator) < degree
        ]
        new = range(len(here.monomials)) if not products else _outside_of_span(np.concatenate(products))
        generators += [tuple(here.monomials[i].tolist()) for i in new]
    return tuple(generators)


class _Orbits:
    """Orbits of the group on monomials of one degree, each named by its smallest monomial.

    Args:
        table: the Cayley table.
        degree: the degree.
    """

    def __init__(self, table: np.ndarray, degree: int) -> None:
        self._powers = len(table) ** np.arange(degree, dtype=np.int64)[::-1]
        every = np.array(list(combinations_with_replacement(range(len(table)), degree)))
        smallest = self._names(every, table)
        self._sorted, first = np.unique(smallest, return_index=True)
        #: One monomial per orbit, shape ``(orbits, degree)``.
        self.monomials = every[first]

    def _names(self, monomials: np.ndarray, table: np.ndarray) -> np.ndarray:
        moved = np.sort(table[:, monomials], axis=-1)  # elements, monomials, degree
        return (moved @ self._powers).min(axis=0)

    def average_of_products(self, left: np.ndarray, right: np.ndarray, table: np.ndarray) -> np.ndarray:
        """``P_left P_r`` for every row ``r`` of ``right`` as a combination of this degree's averages, times ``|G|``.

        ``P_a P_b = 1/|G| sum_h P_(a, h b)``.
        """
        rows = np.zeros((len(right), len(self._sorted)), dtype=np.int64)
        for h in range(len(table)):
            joined = np.concatenate([np.broadcast_to(left, (len(right), len(left))), table[h][right]], axis=1)
            places = np.searchsorted(self._sorted, self._names(joined, table))
            rows[np.arange(len(right)), places] += 1
        return rows


def _outside_of_span(rows: np.ndarray) -> list[int]:
    """Coordinates whose unit vectors complete the span of integer rows to the whole space.

    The rows are mixed into few by random coefficients and eliminated modulo a prime. Bad luck could only find too small
    a span, and then keep a generator that is not needed.
    """
    columns = rows.shape[1]
    if len(rows) > columns + 16:
        coefficients = np.random.default_rng(0).integers(0, 2**20, (columns + 16, len(rows)))
        rows = (coefficients.astype(np.float64) @ rows.astype(np.float64)).astype(np.int64)  # exact below 2^53
    rows = rows % _PRIME
    free = []
    start = 0
    for column in range(columns):
        candidates = np.flatnonzero(rows[start:, column])
        if not candidates.size:
            free.append(column)
            continue
        pivot = start + int(candidates[0])
        rows[[start, pivot]] = rows[[pivot, start]]
        rows[start] = rows[start] * pow(int(rows[start, column]), -1, _PRIME) % _PRIME
        below = rows[start + 1 :]
        below -= below[:, column : column + 1] * rows[start] % _PRIME
        below %= _PRIME
        start += 1
    return free


def _element_order(table: np.ndarray, a: int) -> int:
    order, power = 1, a
    while power != 0:
        power, order = int(table[power, a]), order + 1
    return order
