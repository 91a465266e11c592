"""Groups on images and grids: flips and turns as numpy makes them, and the decomposition of a grid into irreps."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiflop import ImageGroup, Rep
from equiflop.grids import GridDecomposition, as_image_group, grid_decomposition, grid_orbits
from equiflop.groups import cyclic, dihedral, direct_product, flop
from oracles import IMAGE_GROUPS, action, image_group, move_image

SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (2, 2),
    (3, 3),
    (3, 4),
    (4, 3),
    (4, 4),
    (1, 5),
    (5, 5),
    (6, 6),
    (7, 7),
    (6, 9),
    (14, 14),
]
CASES = [(name, size) for name in IMAGE_GROUPS for size in SIZES if name not in ("rot4", "octic") or size[0] == size[1]]
ORDERS = {"flop": 2, "updown": 2, "flips": 4, "rot4": 4, "octic": 8}
ELEMENTS = {
    "flop": ["identity", "mirror left-right"],
    "updown": ["identity", "mirror up-down"],
    "flips": ["identity", "mirror up-down", "mirror left-right", "half turn"],
    "rot4": ["identity", "quarter turn left", "half turn", "quarter turn right"],
}


@pytest.mark.parametrize("name", IMAGE_GROUPS)
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (6, 2)])
def test_image_action_is_numpys(name: str, size: tuple[int, int]) -> None:
    g = image_group(name)
    assert g.order == ORDERS[name]
    image = torch.arange(2.0 * size[0] * size[1]).view(2, *size)
    for a in range(g.order):
        expected = move_image(name, a, image.numpy())
        assert np.array_equal(g.act_on_image(a, image).numpy(), expected), g.element_name(a)


@pytest.mark.parametrize("name", IMAGE_GROUPS)
@pytest.mark.parametrize("size", SIZES)
def test_grid_action_is_the_image_action(name: str, size: tuple[int, int]) -> None:
    """The value at point p lands at raster index ``act_on_grid[p]`` of the moved grid, also where axes are swapped."""
    g = image_group(name)
    points = np.arange(size[0] * size[1])
    for a in range(g.order):
        moved = move_image(name, a, points.reshape(size)).ravel()
        where = g.act_on_grid(a, *size)
        assert sorted(where) == points.tolist()
        assert np.array_equal(moved[where], points)


@pytest.mark.parametrize("name", IMAGE_GROUPS)
def test_actions_compose_like_the_group(name: str) -> None:
    g = image_group(name)
    image = torch.randn(3, 5)
    for a in range(g.order):
        for b in range(g.order):
            both = g.act_on_image(a, g.act_on_image(b, image))
            assert torch.equal(both, g.act_on_image(g.multiply(a, b), image))
            assert np.array_equal(g.matrices[a] @ g.matrices[b], g.matrices[g.multiply(a, b)])


@pytest.mark.parametrize("name", ELEMENTS)
def test_element_names(name: str) -> None:
    g = image_group(name)
    assert [g.element_name(a) for a in range(g.order)] == ELEMENTS[name]


def test_octic_has_eight_different_elements() -> None:
    g = image_group("octic")
    assert len({g.element_name(a) for a in range(8)}) == 8
    assert g.element_name(4) == "mirror left-right" and g.element_name(1) == "quarter turn left"


@pytest.mark.parametrize(
    ("name", "swaps"), [("flop", False), ("updown", False), ("flips", False), ("rot4", True), ("octic", True)]
)
def test_swaps_axes(name: str, swaps: bool) -> None:
    assert image_group(name).swaps_axes is swaps
    assert image_group(name).swaps_axes_by(0) is False


def grid_permutation(name: str, a: int, size: tuple[int, int]) -> np.ndarray:
    """The permutation matrix of the grid, from numpy's flips and turns."""
    n = size[0] * size[1]
    return np.stack([move_image(name, a, row.reshape(size)).ravel() for row in np.eye(n)], axis=1)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_decomposition_is_orthogonal_and_intertwines(name: str, size: tuple[int, int]) -> None:
    found = GridDecomposition(image_group(name), *size)
    n = size[0] * size[1]
    assert found.rep.dim == n and found.matrix.shape == (n, n)
    assert np.abs(found.matrix @ found.matrix.T - np.eye(n)).max() < 1e-12
    for a in range(found.group.order):
        left = found.matrix @ grid_permutation(name, a, size)
        assert np.abs(left - action(found.rep, a) @ found.matrix).max() < 1e-12


@pytest.mark.parametrize(("name", "size"), CASES)
def test_multiplicities_are_those_of_the_fixed_points(name: str, size: tuple[int, int]) -> None:
    """The character of the grid counts fixed points; its inner products with the irreps' are ``e * multiplicity``."""
    rep = grid_decomposition(image_group(name), *size).rep
    fixed = np.array([np.trace(grid_permutation(name, a, size)) for a in range(rep.group.order)])
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        inner = np.mean(fixed * np.trace(irrep.matrices, axis1=1, axis2=2))
        assert inner == pytest.approx(m * {"real": 1, "complex": 2, "quaternionic": 4}[irrep.type], abs=1e-9)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_fast_plan_equals_the_matrix(name: str, size: tuple[int, int]) -> None:
    found = grid_decomposition(image_group(name), *size)
    plan = found.fast_plan
    assert plan is not None, "every named image group has a transform by additions"
    x = torch.randn(size[0] * size[1], 3, dtype=torch.float64)
    values = x[torch.from_numpy(plan.gather)]  # (order, orbits, 3)
    rows = torch.stack(plan.fourier.analyse(values.unbind(0))).flatten(0, 1)[torch.from_numpy(plan.pick)]
    result = rows * torch.from_numpy(plan.scale)[:, None]
    assert (result - torch.from_numpy(found.matrix) @ x).abs().max() < 1e-12


@given(
    name=st.sampled_from(IMAGE_GROUPS),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
@settings(max_examples=150)
def test_random_grids_decompose(name: str, height: int, width: int) -> None:
    g = image_group(name)
    width = height if g.swaps_axes else width
    found = GridDecomposition(g, height, width)
    assert np.abs(found.matrix @ found.matrix.T - np.eye(height * width)).max() < 1e-12
    a = g.order - 1
    left = found.matrix @ grid_permutation(name, a, (height, width))
    assert np.abs(left - action(found.rep, a) @ found.matrix).max() < 1e-12
    orbits = grid_orbits(g, height, width)
    assert sorted(p for orbit in orbits for p in orbit.points) == list(range(height * width))
    assert all(len(orbit.points) * len(orbit.stabiliser) == g.order for orbit in orbits)


def mac_share(name: str, p: int, copies: int = 16) -> Fraction:
    """MACs of an equivariant map from a ``p x p`` patch to a regular Rep, over those of a dense map."""
    pixels = grid_decomposition(image_group(name), p, p).rep
    out = Rep.regular(pixels.group, copies)
    ends = {"real": 1, "complex": 2, "quaternionic": 4}
    terms = zip(pixels.group.irreps, pixels.multiplicities, out.multiplicities, strict=True)
    return Fraction(sum(i.dim * ends[i.type] * m * n for i, m, n in terms), pixels.dim * out.dim)


@pytest.mark.parametrize("p", range(1, 18))
def test_mac_share_of_patch_embedding(p: int) -> None:
    assert mac_share("flop", p) == mac_share("updown", p) == Fraction(1, 2)
    exact = Fraction(3, 16) if p % 2 == 0 else Fraction(3, 16) - Fraction(1, 16 * p * p)
    assert mac_share("octic", p) == exact
    if p % 2 == 0:
        assert mac_share("flips", p) == Fraction(1, 4)
        assert mac_share("rot4", p) == Fraction(3, 8)


def test_mirror_coordinates_are_sums_and_differences() -> None:
    """On a 1 x 3 row [l, c, r]: (l + r)/sqrt 2 and c are invariant, (l - r)/sqrt 2 changes its sign."""
    found = grid_decomposition(image_group("flop"), 1, 3)
    h = np.sqrt(0.5)
    assert found.rep.multiplicities == (2, 1)
    assert np.allclose(found.matrix, [[h, 0, h], [0, 1, 0], [h, 0, -h]], atol=1e-15)


def test_groups_that_swap_axes_need_a_square_grid() -> None:
    for name in ("rot4", "octic"):
        with pytest.raises(ValueError, match=r"swaps height and width.*3x4"):
            GridDecomposition(image_group(name), 3, 4)


def test_as_image_group() -> None:
    g = image_group("flop")
    assert as_image_group(g) is g
    assert as_image_group("flips") == image_group("flips")
    with pytest.raises(ValueError, match="group='D4' is unknown; choose from flop, updown, flips, rot4, octic"):
        as_image_group("D4")
    with pytest.raises(TypeError, match="not an ImageGroup"):
        as_image_group(flop())  # type: ignore[arg-type]


def test_a_group_of_ones_own() -> None:
    """The mirrors at both diagonals and the half turn; D2 as an abstract group."""
    identity, turn = np.eye(2, dtype=int), -np.eye(2, dtype=int)
    slash, backslash = np.array([[0, 1], [1, 0]]), np.array([[0, -1], [-1, 0]])
    g = ImageGroup(direct_product(flop(), flop()), np.stack([identity, slash, backslash, turn]), "diagonals")
    assert g.swaps_axes and not g.swaps_axes_by(3)
    image = torch.arange(6.0).view(2, 3)
    assert torch.equal(g.act_on_image(2, image), image.T)  # the diagonal \ exchanges rows and columns
    assert torch.equal(g.act_on_image(3, image), image.flip(0, 1))
    found = GridDecomposition(g, 4, 4)
    assert np.abs(found.matrix @ found.matrix.T - np.eye(16)).max() < 1e-12
    assert sum(found.rep.multiplicities) == 16 and found.rep.multiplicities[0] == (16 + 4 + 4 + 0) // 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageGroup(flop(), np.zeros((3, 2, 2), int)), r"shape \(3, 2, 2\).*needs \(2, 2, 2\)"),
        (lambda: ImageGroup(flop(), np.stack([np.eye(2), np.zeros((2, 2))])), "signed permutations"),
        (lambda: ImageGroup(flop(), np.stack([np.eye(2), 2 * np.eye(2)])), "signed permutations"),
        (lambda: ImageGroup(flop(), np.stack([np.eye(2), 0.5 * np.ones((2, 2))])), "signed permutations"),
        (lambda: ImageGroup(flop(), np.stack([np.eye(2), [[1, 0], [1, 0]]])), "signed permutations"),
        (lambda: ImageGroup(flop(), np.stack([np.diag([-1, 1]), np.eye(2)])), "multiply"),
        (lambda: ImageGroup(cyclic(3), np.stack([np.eye(2), -np.eye(2), np.eye(2)])), "multiply"),
        (lambda: ImageGroup(dihedral(4), np.stack([np.eye(2)] * 7 + [-np.eye(2)])), "multiply"),
    ],
)
def test_bad_matrices(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
