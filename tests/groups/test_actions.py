"""Actions: what they refuse, how they move tensors, and that they are values of their own, not groups."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from equiflop import Action, FiniteGroup, ImageGroup
from equiflop.groups import (
    cyclic,
    dihedral,
    direct_product,
    flop,
    fourier_plan,
    full_octahedral,
    full_octahedral_matrices,
    octahedral,
    octahedral_rotations,
)
from oracles import IMAGE_GROUPS, image_group


def turns(n: int) -> Action:
    """C_n as rotations of the plane, which for most n are no permutations."""
    angles = 2 * np.pi * np.arange(n) / n
    cos, sin = np.cos(angles), np.sin(angles)
    return Action(cyclic(n), np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2), f"turns by 1/{n}")


ACTIONS: dict[str, Callable[[], Action | ImageGroup]] = {
    "rotations of a cube": lambda: Action(octahedral(), octahedral_rotations()),
    "symmetries of a cube": lambda: Action(full_octahedral(), full_octahedral_matrices()),
    "turns by thirds": lambda: turns(3),
    "turns by quarters": lambda: turns(4),
    "irrep E of D3": lambda: Action(dihedral(3), dihedral(3).irreps[-1].matrices),
    "left and right eye": lambda: Action.permuting(flop(), [(0, 1, 2), (0, 2, 1)]),
    "mirrored vectors": lambda: Action.permuting(flop(), [(0, 1), (0, 1)], [(1, 1), (-1, 1)]),
    **{name: partial(image_group, name) for name in IMAGE_GROUPS},
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_act_applies_the_matrix_along_an_axis(name: str, dtype: torch.dtype) -> None:
    action = ACTIONS[name]()
    x = torch.randn(2, action.dim, 3).to(dtype)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for a in range(action.order):
        assert torch.equal(action.matrix(a), torch.from_numpy(action.matrices[a].copy()).double())
        expected = torch.einsum("ij,bjk->bik", action.matrix(a), x.double())
        found = action.act(a, x, dim=1)
        assert found.dtype == dtype and found.shape == x.shape
        assert (found - expected).abs().max() < tolerance
        assert torch.equal(action.act(a, x, -2), found)
        assert (action.act(a, x.mT) - expected.mT).abs().max() < tolerance
        assert (action.act(action.inverse(a), found, 1) - x).abs().max() < 4 * tolerance
    for a, b in product(range(min(action.order, 8)), repeat=2):
        both = action.act(a, action.act(b, x.double(), 1), 1)
        assert (both - action.act(action.multiply(a, b), x.double(), 1)).abs().max() < 1e-14


def test_permutations_are_exact_in_every_dtype() -> None:
    eyes = Action.permuting(flop(), [(0, 1, 2), (0, 2, 1)])
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64):
        x = torch.tensor([[0, 1, 0], [1, 0, 1]]).to(dtype)
        assert torch.equal(eyes.act(1, x), x[:, [0, 2, 1]]) and eyes.act(1, x).dtype == dtype
    large = torch.tensor([3.0, float("inf"), float("nan")])
    assert torch.equal(eyes.act(1, large).nan_to_num(7.0), torch.tensor([3.0, 7.0, float("inf")]).nan_to_num(7.0))
    signed = Action.permuting(flop(), [(0, 1), (0, 1)], [(1, 1), (-1, 1)])
    assert torch.equal(signed.act(1, torch.tensor([2, 3])), torch.tensor([-2, 3]))
    for dtype in (torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=rf"x has dtype {dtype}, which has no negative numbers; Action\(C2"):
            signed.act(1, torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"x has dtype torch.int64; Action\(turns by 1/3, order=3, dim=2\) is no perm"):
        turns(3).act(1, torch.tensor([2, 3]))
    assert turns(4).act(1, torch.tensor([2, 3])).tolist() == [-3, 2]  # cos(90 degrees) is made exact


def test_permuting_moves_entry_i_to_its_image() -> None:
    shift = Action.permuting(cyclic(3), [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
    assert shift.act(1, torch.tensor([10, 20, 30])).tolist() == [30, 10, 20]


@pytest.mark.parametrize("shape", [(2, 5), (4,), ()])
def test_axes_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*Action\(O, order=24, dim=3\) acts on 3 entries along axis -1"):
        ACTIONS["rotations of a cube"]().act(0, torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Action(flop(), np.ones((3, 1, 1))), r"matrices has shape \(3, 1, 1\); group C2 needs \(2, n, n\)"),
        (lambda: Action(flop(), np.ones((2, 1, 2))), r"matrices has shape \(2, 1, 2\)"),
        (lambda: Action(flop(), 3.0), r"matrices has shape \(\)"),
        (lambda: Action(flop(), [[[1.0]], [[1.0, 2.0]]]), "matrices is no array of numbers"),
        (lambda: Action(flop(), [[["a"]], [["b"]]]), "matrices is no array of numbers"),
        (
            lambda: Action(flop(), [[[1.0]], [[2.0]]]),
            r"the matrices of C2 are not orthogonal: matrices\[1\]=\[\[2.0\]\]",
        ),
        (lambda: Action(flop(), [[[1.0]], [[np.nan]]]), r"not orthogonal: matrices\[1\]=\[\[nan\]\]"),
        (lambda: Action(flop(), [[[-1.0]], [[1.0]]]), r"do not multiply like the elements of C2: matrices\[0\] @"),
        (
            lambda: Action(cyclic(3), turns(3).matrices[[0, 1, 1]]),
            r"matrices\[1\] @ matrices\[1\] is not matrices\[2\]",
        ),
        (lambda: Action.permuting(flop(), [(0, 1)]), r"images has shape \(1, 2\).*each of the 2 elements"),
        (lambda: Action.permuting(flop(), np.eye(2)), "one sequence of integers"),
        (lambda: Action.permuting(flop(), [(0, 1), (1, 1)]), r"images\[1\]=\[1, 1\] is not a permutation of 0..1"),
        (
            lambda: Action.permuting(flop(), [(0, 1), (1, 0)], np.array([(1, 1), (1, 0.5)])),
            "signs=.* must hold 1 or -1",
        ),
        (lambda: Action.permuting(flop(), [(0, 1), (1, 0)], [(1, 1)]), r"have the shape \(2, 2\) of images"),
        (lambda: Action.permuting(cyclic(3), [(0, 1), (1, 0), (0, 1)]), "do not multiply"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(TypeError, match="group='flop' is not a group; give a FiniteGroup or an Action"):
        Action("flop", np.ones((2, 1, 1)))  # type: ignore[arg-type]


def test_equality_is_an_equivalence() -> None:
    flop_images, updown = image_group("flop"), image_group("updown")
    values: list[Any] = [
        flop(),
        cyclic(2),
        flop_images,
        ImageGroup(flop(), flop_images.matrices, "another name"),
        ImageGroup(FiniteGroup(flop().table, flop().irreps), flop_images.matrices),
        Action(flop(), flop_images.matrices.astype(np.float64)),
        updown,
        ImageGroup(updown, updown.matrices),
        Action(flop(), np.ones((2, 1, 1))),
        Action(flop(), [[[1.0]], [[-1.0]]]),
        Action(flop(), [[[1.0]], [[-1.0 + 1e-16]]]),
        image_group("octic"),
        "flop",
    ]
    for x, y, z in product(values, repeat=3):
        assert (x == y) == (y == x)
        assert not (x == y and y == z) or x == z
        assert x != y or hash(x) == hash(y)
    groups = [x for x in values if isinstance(x, FiniteGroup)]
    actions = [x for x in values if isinstance(x, Action)]
    assert len(groups) == 2 and len(actions) == 10
    assert not any(x == y for x in groups for y in actions)
    assert len(set(values)) == 7 and flop_images != updown
    # C2xC2 with other irreps' names is another group, also under the same matrices
    named = image_group("flips")
    assert ImageGroup(FiniteGroup(named.table), named.matrices) != named


@pytest.mark.parametrize("name", ACTIONS)
def test_copies_and_pickles_are_equal_and_read_only(name: str) -> None:
    action = ACTIONS[name]()
    for other in (copy.deepcopy(action), pickle.loads(pickle.dumps(action))):
        assert other == action and hash(other) == hash(action) and type(other) is type(action)
        assert repr(other) == repr(action)
        with pytest.raises(ValueError, match="read-only"):
            other.matrices[0, 0, 0] = 2


def test_an_action_is_composed_with_its_group() -> None:
    g = image_group("octic")
    assert not isinstance(g, FiniteGroup) and isinstance(g, Action)
    assert type(g.group) is FiniteGroup and g.group == dihedral(4) and (g.name, g.group.name) == ("octic", "D4")
    assert g.order == 8 and g.irreps is g.group.irreps and g.table is g.group.table and g.inverses is g.group.inverses
    assert all(g.multiply(a, b) == g.group.multiply(a, b) for a in range(8) for b in range(8))
    assert Action(g, np.ones((8, 1, 1))).group is g.group
    assert g.group.name == "D4" and flop().name == "C2" and repr(flop()) == "FiniteGroup(C2, order=2)"
    assert fourier_plan(g.group) is fourier_plan(dihedral(4))
    corner = torch.tensor([1.0, 0.0])  # x to the right, y up
    assert torch.equal(g.act(1, corner), torch.tensor([0.0, 1.0]))


def test_element_names() -> None:
    eyes = Action.permuting(direct_product(flop(), flop()), [(0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (1, 0, 3, 2)])
    assert [eyes.element_name(a) for a in range(4)] == ["identity", "(2 3)", "(0 1)", "(0 1)(2 3)"]
    assert [turns(3).element_name(a) for a in range(3)] == ["identity", "element 1", "element 2"]
    cycle = Action.permuting(cyclic(3), [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
    assert [cycle.element_name(a) for a in range(3)] == ["identity", "(0 1 2)", "(0 2 1)"]
    assert Action(flop(), np.ones((2, 1, 1))).element_name(1) == "element 1"
    with pytest.raises(ValueError, match="a=3 is not an element of C3"):
        turns(3).element_name(3)
