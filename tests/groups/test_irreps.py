"""Every group's irreps: homomorphism, orthogonality, completeness, type, endomorphism algebra, Fourier transform."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from equiflop.groups import FiniteGroup, Rep, fourier_matrix, symmetric
from equiflop.groups.group import Irrep
from oracles import GROUPS, fourier, group, left_translation

TOLERANCE = 1e-12
ALGEBRA = {"real": 1, "complex": 2, "quaternionic": 4}

ORDERS = {
    "C1": 1, "C2": 2, "C2xC2": 4, "C3": 3, "C4": 4, "C6": 6, "C8": 8, "D1": 2, "D2": 4, "D3": 6, "D4": 8, "D6": 12,
    "A4": 12, "S4": 24, "O": 24, "Oh": 48, "Q8": 8, "S5": 120, "C3xC4": 12, "Q8xC3": 24, "Q8xQ8": 64, "D4xC2": 16,
}  # fmt: skip

# (dimension, type) of the real irreps, from the character tables in the literature.
IRREPS = {
    "C1": {(1, "real"): 1},
    "C2": {(1, "real"): 2},
    "C2xC2": {(1, "real"): 4},
    "C3": {(1, "real"): 1, (2, "complex"): 1},
    "C4": {(1, "real"): 2, (2, "complex"): 1},
    "C6": {(1, "real"): 2, (2, "complex"): 2},
    "C8": {(1, "real"): 2, (2, "complex"): 3},
    "D1": {(1, "real"): 2},
    "D2": {(1, "real"): 4},
    "D3": {(1, "real"): 2, (2, "real"): 1},
    "D4": {(1, "real"): 4, (2, "real"): 1},
    "D6": {(1, "real"): 4, (2, "real"): 2},
    "A4": {(1, "real"): 1, (2, "complex"): 1, (3, "real"): 1},
    "S4": {(1, "real"): 2, (2, "real"): 1, (3, "real"): 2},
    "O": {(1, "real"): 2, (2, "real"): 1, (3, "real"): 2},
    "Oh": {(1, "real"): 4, (2, "real"): 2, (3, "real"): 4},
    "Q8": {(1, "real"): 4, (4, "quaternionic"): 1},
    "S5": {(1, "real"): 2, (4, "real"): 2, (5, "real"): 2, (6, "real"): 1},
    "C3xC4": {(1, "real"): 2, (2, "complex"): 5},
    # 4 real and 4 complex (real (x) complex) of dimension 1, H (x) 1, and H (x)_C of dimension 4 as complex type
    "Q8xC3": {(1, "real"): 4, (2, "complex"): 4, (4, "quaternionic"): 1, (4, "complex"): 1},
    "Q8xQ8": {(1, "real"): 16, (4, "quaternionic"): 8, (4, "real"): 1},
    "D4xC2": {(1, "real"): 8, (2, "real"): 2},
}


def squares(g: FiniteGroup) -> np.ndarray:
    return np.array([g.table[a][a] for a in range(g.order)])


def independent_type(irrep: Irrep, g: FiniteGroup) -> str:
    """Frobenius and Schur: ``1/|G| sum chi(g^2)`` is 1, 0, -2 for real, complex, quaternionic type."""
    character = np.trace(irrep.matrices, axis1=1, axis2=2)
    return {1: "real", 0: "complex", -2: "quaternionic"}[round(float(character[squares(g)].mean()))]


def assert_sound(g: FiniteGroup) -> None:
    """Everything that irreps and Fourier transform promise, over all elements and pairs."""
    n = g.order
    identity, table = np.arange(n), g.table
    assert (table[0] == identity).all() and (table[:, 0] == identity).all()
    assert all(g.multiply(a, g.inverse(a)) == 0 == g.multiply(g.inverse(a), a) for a in range(n))
    assert sum(irrep.dim**2 // ALGEBRA[irrep.type] for irrep in g.irreps) == n
    assert len({irrep.name for irrep in g.irreps}) == len(g.irreps)
    assert all(irrep.name.isidentifier() or irrep.name[0].isdigit() for irrep in g.irreps)
    assert (g.irreps[0].matrices == 1).all() and g.irreps[0].dim == 1
    characters = []
    for irrep in g.irreps:
        rho, d = irrep.matrices, irrep.dim
        assert rho.shape == (n, d, d) and rho.dtype == np.float64
        assert np.abs(rho[0] - np.eye(d)).max() < TOLERANCE
        assert np.abs(rho @ rho.transpose(0, 2, 1) - np.eye(d)).max() < TOLERANCE
        for a in range(n):
            assert np.abs(rho[a] @ rho - rho[table[a]]).max() < TOLERANCE, (irrep.name, a)
        assert independent_type(irrep, g) == irrep.type, irrep.name
        assert irrep.endomorphism_dim == ALGEBRA[irrep.type]
        assert irrep.regular_multiplicity * irrep.endomorphism_dim == d
        characters.append(np.trace(rho, axis1=1, axis2=2))
        assert_endomorphisms(irrep)
    gram = np.array(characters) @ np.array(characters).T / n
    assert np.abs(gram - np.diag([irrep.endomorphism_dim for irrep in g.irreps])).max() < 1e-11
    assert_fourier(g)


def assert_endomorphisms(irrep: Irrep) -> None:
    units = irrep.endomorphisms
    e, d = irrep.endomorphism_dim, irrep.dim
    assert units.shape == (e, d, d)
    assert np.array_equal(units[0], np.eye(d))
    for k in range(1, e):
        assert np.array_equal(units[k].T, -units[k])
        assert np.array_equal(units[k] @ units[k], -np.eye(d))
    for unit in units:
        assert np.abs(irrep.matrices @ unit - unit @ irrep.matrices).max() < TOLERANCE, irrep.name
    if e == 4:
        assert np.array_equal(units[1] @ units[2], units[3])
        assert np.array_equal(units[2] @ units[3], units[1])
        assert np.array_equal(units[3] @ units[1], units[2])
        assert np.array_equal(units[2] @ units[1], -units[3])


def assert_fourier(g: FiniteGroup) -> None:
    matrix = fourier_matrix(g)
    assert matrix.shape == (g.order, g.order) and matrix.dtype == np.float64
    assert np.abs(matrix @ matrix.T - np.eye(g.order)).max() < TOLERANCE
    assert np.abs(matrix - fourier(g)).max() < TOLERANCE
    rep = Rep.regular(g, 1)
    assert rep.dim == g.order
    for a in range(g.order):
        moved = matrix @ left_translation(g.table, a)
        assert np.abs(moved - rep.matrix(a).numpy() @ matrix).max() < TOLERANCE, a
        assert np.array_equal(g.regular_matrix(a).numpy(), left_translation(g.table, a))


@pytest.mark.parametrize("name", GROUPS)
def test_named_group_is_sound(name: str) -> None:
    g = group(name)
    assert g.order == ORDERS[name]
    assert_sound(g)


@pytest.mark.parametrize("name", GROUPS)
def test_irreps_are_those_of_the_literature(name: str) -> None:
    assert Counter((irrep.dim, irrep.type) for irrep in group(name).irreps) == Counter(IRREPS[name])


@pytest.mark.parametrize("name", GROUPS)
def test_numerical_decomposition_agrees_with_the_constructor(name: str) -> None:
    exact = group(name)
    found = FiniteGroup.from_permutations([exact.table[a].tolist() for a in range(exact.order)])
    assert found.order == exact.order
    assert_sound(found)
    kinds = Counter((irrep.dim, irrep.type) for irrep in found.irreps)
    assert kinds == Counter((irrep.dim, irrep.type) for irrep in exact.irreps)


@pytest.mark.parametrize("name", GROUPS)
def test_decomposition_of_the_table_has_the_same_characters(name: str) -> None:
    exact = group(name)
    found = FiniteGroup(exact.table)  # the same elements in the same order

    def characters(g: FiniteGroup) -> list[tuple[float, ...]]:
        return sorted(tuple(np.round(np.trace(irrep.matrices, axis1=1, axis2=2), 8) + 0.0) for irrep in g.irreps)

    assert characters(found) == characters(exact)


def test_a_group_of_order_120_decomposes_in_seconds() -> None:
    start = time.perf_counter()
    g = FiniteGroup.from_permutations([[1, 2, 3, 4, 0], [1, 0, 2, 3, 4]])
    kinds = Counter((irrep.dim, irrep.type) for irrep in g.irreps)
    assert time.perf_counter() - start < 10.0
    assert g.order == 120
    assert kinds == Counter(IRREPS["S5"])


def test_binary_icosahedral_group_has_quaternionic_irreps() -> None:
    """SL(2, 5), order 120, as permutations of the non-zero vectors of F_5^2."""
    vectors = [(x, y) for x in range(5) for y in range(5) if (x, y) != (0, 0)]

    def permutation(a: int, b: int, c: int, d: int) -> list[int]:
        return [vectors.index(((a * x + b * y) % 5, (c * x + d * y) % 5)) for x, y in vectors]

    g = FiniteGroup.from_permutations([permutation(1, 1, 0, 1), permutation(1, 0, 1, 1)])
    assert g.order == 120
    # Complex irreps of SL(2, 5): 1, 3, 3, 4, 5 of real type and 2, 2, 4, 6 of quaternionic type, twice as large over R.
    expected = {(1, "real"): 1, (3, "real"): 2, (4, "real"): 1, (5, "real"): 1}
    expected |= {(4, "quaternionic"): 2, (8, "quaternionic"): 1, (12, "quaternionic"): 1}
    assert Counter((irrep.dim, irrep.type) for irrep in g.irreps) == Counter(expected)
    assert_sound(g)


@given(data=st.data())
@settings(max_examples=25)
def test_random_permutation_groups_are_sound(data: st.DataObject) -> None:
    points = data.draw(st.sampled_from([4, 5, 6]))
    count = data.draw(st.integers(1, 2))
    generators = [list(data.draw(st.permutations(range(points)))) for _ in range(count)]
    g = FiniteGroup.from_permutations(generators)
    assume(g.order <= 120)
    assert_sound(g)
    assert g.order == closure_size(generators)


def closure_size(generators: list[list[int]]) -> int:
    """Order of the generated group, by closing a set under composition."""
    elements = {tuple(range(len(generators[0])))}
    while True:
        more = {tuple(g[i] for i in element) for element in elements for g in generators} | elements
        if len(more) == len(elements):
            return len(elements)
        elements = more


def test_cyclic_convention() -> None:
    """Element k is k steps of 360/n degrees, counter-clockwise."""
    for n in (3, 4, 5, 8):
        g = group(f"C{n}") if f"C{n}" in GROUPS else FiniteGroup((np.arange(n)[:, None] + np.arange(n)) % n)
        assert all(g.multiply(a, b) == (a + b) % n for a in range(n) for b in range(n))
    quarter = group("C4").irreps[-1].matrices[1]
    assert np.array_equal(quarter, [[0, -1], [1, 0]])


def test_dihedral_convention() -> None:
    """Irreps of the square as printed in the octic paper: values at the quarter turn r (1) and the mirror m (4)."""
    d4 = group("D4")
    assert [irrep.name for irrep in d4.irreps] == ["A1", "A2", "B1", "B2", "E"]
    values = [(irrep.matrices[1, 0, 0], irrep.matrices[4, 0, 0]) for irrep in d4.irreps[:4]]
    assert values == [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    assert np.array_equal(d4.irreps[4].matrices[1], [[0, -1], [1, 0]])
    assert np.array_equal(d4.irreps[4].matrices[4], np.diag([-1, 1]))
    assert d4.multiply(4, 1) == 5  # element 5 is m r: first r, then m
    assert d4.multiply(1, 4) == 7  # r m = m r^-1


def test_octahedral_vector_irrep_is_the_rotation() -> None:
    from equiflop.groups import octahedral_rotations

    rotations = octahedral_rotations()
    assert np.allclose(np.linalg.det(rotations), 1.0)
    assert np.array_equal(group("O").irreps[3].matrices, rotations)
    assert [irrep.name for irrep in group("O").irreps] == ["A1", "A2", "E", "T1", "T2"]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_symmetric_group_contains_the_permutation_character(n: int) -> None:
    """The permutations of n points are the trivial irrep and one of dimension n - 1; elements compose as functions."""
    from itertools import permutations

    g = symmetric(n)
    elements = list(permutations(range(n)))
    for a in range(0, g.order, 7):
        for b in range(0, g.order, 5):
            assert elements[g.multiply(a, b)] == tuple(elements[a][i] for i in elements[b])
    fixed = np.array([sum(i == image for i, image in enumerate(images)) for images in elements], dtype=float)
    counts = [round(float(np.mean(fixed * np.trace(r.matrices, axis1=1, axis2=2)))) for r in g.irreps]
    present = [(count, irrep.dim) for count, irrep in zip(counts, g.irreps, strict=True) if count]
    assert present == [(1, 1), (1, n - 1)] or (n == 2 and present == [(1, 1), (1, 1)])


def test_products_of_complex_and_quaternionic_irreps_split() -> None:
    assert len(group("C3xC4").irreps) == 7  # E1 (x) E1 splits in two
    assert Counter(i.type for i in group("Q8xQ8").irreps)["real"] == 17  # H (x) H is four times one real irrep
    names = [irrep.name for irrep in group("D4xC2").irreps]
    assert names[0] == "A1_A" and len(set(names)) == 10
    product = group("C3xC4")
    assert product.multiply(1 * 4 + 3, 2 * 4 + 2) == 0 * 4 + 1  # (1, 3)(2, 2) = (0, 1)
