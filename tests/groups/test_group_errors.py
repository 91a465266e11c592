"""What a user can get wrong about groups, and that no default of torch's gets into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equiflop.groups import (
    FiniteGroup,
    Irrep,
    Rep,
    alternating,
    cyclic,
    dihedral,
    flop,
    fourier_matrix,
    quaternion,
    symmetric,
)
from oracles import GROUPS

# A quasigroup with identity (a loop of order 5) that is not associative.
LOOP = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [1, 0], [0, 1]], "square"),
        ([], "square"),
        ([[0.0, 1.0], [1.0, 0.0]], "integers"),
        ([[1, 0], [0, 1]], "element 0 is not the identity"),
        ([[0, 1, 2], [1, 1, 0], [2, 0, 1]], "every element once"),
        ([[0, 1, 5], [1, 2, 0], [5, 0, 1]], "identity"),
        (LOOP, "not associative"),
    ],
)
def test_bad_tables(table: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiniteGroup(table)


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ([], "empty"),
        ([[0, 1], [0, 1, 2]], r"different lengths \[2, 3\]"),
        ([[0, 0, 1]], r"\[0, 0, 1\] is not a permutation of 0..2"),
        ([[1, 2, 3]], r"is not a permutation of 0..2"),
        ([[1, 2, 3, 4, 5, 6, 7, 0], [1, 0, 2, 3, 4, 5, 6, 7]], "more than 5040"),
    ],
)
def test_bad_generators(generators: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiniteGroup.from_permutations(generators)


def test_bad_sizes_of_named_groups() -> None:
    for call in (lambda: cyclic(0), lambda: dihedral(0), lambda: cyclic(-3)):
        with pytest.raises(ValueError, match="n="):
            call()
    for call in (lambda: symmetric(0), lambda: symmetric(9), lambda: alternating(2), lambda: alternating(7)):
        with pytest.raises(ValueError, match="n="):
            call()


@pytest.mark.parametrize("a", [-1, 2, 100])
def test_elements_out_of_range(a: int) -> None:
    with pytest.raises(ValueError, match=f"{a} is not an element of C2; elements are 0..1"):
        flop().multiply(a, 0)
    with pytest.raises(ValueError, match=f"b={a}"):
        flop().multiply(0, a)
    with pytest.raises(ValueError, match=f"a={a}"):
        flop().inverse(a)


def test_incomplete_or_misordered_irreps_are_refused() -> None:
    sign = Irrep("B", 1, "real", np.array([1.0, -1.0]).reshape(2, 1, 1))
    trivial = Irrep("A", 1, "real", np.ones((2, 1, 1)))
    table = [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="incomplete"):
        _ = FiniteGroup(table, [trivial]).irreps
    with pytest.raises(ValueError, match="trivial"):
        _ = FiniteGroup(table, [sign, trivial]).irreps


def test_the_one_point_permutation_group() -> None:
    g = FiniteGroup.from_permutations([[0]])
    assert g.order == 1 and len(g.irreps) == 1


def test_irrep_matrices_cannot_be_changed() -> None:
    irrep = dihedral(4).irreps[4]
    with pytest.raises(ValueError, match="read-only"):
        irrep.matrices[0, 0, 0] = 2.0
    irrep.matrix(1).zero_()  # the caller's copy
    assert irrep.matrix(1).abs().sum() == 2


def snapshot(name: str) -> list[np.ndarray]:
    g = GROUPS[name]()
    numerical = FiniteGroup(g.table)
    rep = Rep.regular(g, 2)
    arrays = [irrep.matrices for irrep in (*g.irreps, *numerical.irreps)]
    tensors = [rep.matrix(g.order - 1), g.irreps[-1].matrix(g.order - 1), g.regular_matrix(g.order - 1)]
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in tensors)
    return [*arrays, *(t.numpy() for t in tensors), fourier_matrix(g)]


@pytest.mark.parametrize("name", ["C2", "C3", "D4", "A4", "O", "Q8", "C3xC4"])
def test_independent_of_default_dtype_and_device(name: str) -> None:
    expected = snapshot(name)
    old = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert all(np.array_equal(a, b) for a, b in zip(snapshot(name), expected, strict=True))
    finally:
        torch.set_default_dtype(old)
    with torch.device("meta"):
        assert all(np.array_equal(a, b) for a, b in zip(snapshot(name), expected, strict=True))


def test_quaternion_units_multiply_as_hamilton_says() -> None:
    q = quaternion()  # 1, i, j, k, -1, -i, -j, -k
    assert q.multiply(1, 2) == 3 and q.multiply(2, 1) == 7
    assert q.multiply(1, 1) == q.multiply(2, 2) == q.multiply(3, 3) == 4
