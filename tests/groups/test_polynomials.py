"""Generators of invariant polynomials: how many there are, and that they separate orbits."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, combinations_with_replacement, product

import numpy as np
import pytest

from equiflop.groups import dihedral, flop, octahedral
from equiflop.groups.polynomials import invariant_generators
from oracles import group


def minimal_zero_sums(orders: tuple[int, ...]) -> Counter[int]:
    """Minimal zero-sum multisets of an abelian group, by length.

    In a basis of characters an abelian group multiplies every monomial by a root of unity. So invariants are monomials
    whose characters sum to zero, and generators those of which no proper part does.
    """
    elements = list(product(*(range(n) for n in orders)))

    def is_zero(part: tuple[tuple[int, ...], ...]) -> bool:
        return all(sum(entry) % n == 0 for entry, n in zip(zip(*part, strict=True), orders, strict=True))

    return Counter(
        length
        for length in range(1, len(elements) + 1)
        for found in combinations_with_replacement(elements, length)
        if is_zero(found) and not any(is_zero(part) for size in range(1, length) for part in combinations(found, size))
    )


@pytest.mark.parametrize(
    ("name", "orders"), [("C2", (2,)), ("C3", (3,)), ("C4", (4,)), ("C2xC2", (2, 2)), ("C6", (6,))]
)
def test_abelian_groups_have_as_many_generators_as_minimal_zero_sums(name: str, orders: tuple[int, ...]) -> None:
    assert Counter(map(len, invariant_generators(group(name)))) == minimal_zero_sums(orders)


def test_octic_group_has_the_published_number() -> None:
    """Degrees of the 32 polynomials listed in the code of arXiv 2505.15441."""
    found = Counter(map(len, invariant_generators(dihedral(4))))
    assert found == {1: 1, 2: 6, 3: 8, 4: 12, 5: 5}


def values(name: str, y: np.ndarray) -> np.ndarray:
    g = group(name)
    return np.array([np.mean(np.prod(y[g.table[:, list(m)]], axis=1)) for m in invariant_generators(g)])


@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C2xC2", "D3", "D4", "Q8"])
def test_they_are_invariant_and_separate_orbits(name: str) -> None:
    g = group(name)
    rng = np.random.default_rng(0)
    functions = [rng.integers(-2, 3, g.order).astype(float) for _ in range(60)]  # small integers: many near misses
    functions += [y[rng.permutation(g.order)] for y in functions[:30]]  # same values in another order
    functions += [y[g.table[g.order - 1]] for y in functions[:10]]
    for y in functions:
        for a in range(g.order):
            assert np.allclose(values(name, y[g.table[a]]), values(name, y), atol=1e-12)
    orbits = [{tuple(y[g.table[a]]) for a in range(g.order)} for y in functions]
    found = [values(name, y) for y in functions]
    pairs = list(combinations(range(len(functions)), 2))
    same_orbit = [tuple(functions[j]) in orbits[i] for i, j in pairs]
    same_values = [bool(np.allclose(found[i], found[j], atol=1e-9)) for i, j in pairs]
    assert same_orbit == same_values
    assert any(same_orbit) and not all(same_orbit)


def test_groups_that_are_too_large() -> None:
    with pytest.raises(ValueError, match="group O has order 24; polynomial invariants are computed up to order 8"):
        invariant_generators(octahedral())


def test_the_mirror_group_in_full() -> None:
    """``y_0 + y_1`` and ``y_0 y_1``."""
    assert invariant_generators(flop()) == ((0,), (0, 1))
