"""Rep: layout, dimension, matrices, arithmetic, and that it is an immutable value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiflop import Rep
from equiflop.groups import FiniteGroup, direct_product, flop
from oracles import GROUPS, action, group, image_group, left_translation


@given(name=st.sampled_from(sorted(set(GROUPS) - {"S5", "Q8xQ8"})), data=st.data())
@settings(max_examples=150)
def test_matrix_is_the_action_in_the_documented_layout(name: str, data: st.DataObject) -> None:
    g = group(name)
    rep = Rep(g, data.draw(st.lists(st.integers(0, 3), min_size=len(g.irreps), max_size=len(g.irreps))))
    a, b = data.draw(st.integers(0, g.order - 1)), data.draw(st.integers(0, g.order - 1))
    assert rep.dim == sum(i.dim * m for i, m in zip(g.irreps, rep.multiplicities, strict=True))
    matrix = rep.matrix(a)
    assert matrix.shape == (rep.dim, rep.dim) and matrix.dtype == torch.float64 and matrix.device.type == "cpu"
    assert (matrix.numpy() == action(rep, a)).all()
    assert rep.dim == 0 or (matrix @ rep.matrix(b) - rep.matrix(g.multiply(a, b))).abs().max() < 1e-12


def test_layout_of_the_square_group() -> None:
    """4 A1, then E as two rows of 3: the quarter turn sends (row 0, row 1) to (-row 1, row 0), copy by copy."""
    rep = Rep(group("D4"), (4, 0, 0, 0, 3))
    x = torch.arange(10.0, dtype=torch.float64)
    expected = torch.tensor([0.0, 1, 2, 3, -7, -8, -9, 4, 5, 6], dtype=torch.float64)
    assert torch.equal(rep.matrix(1) @ x, expected)
    blocks = [(block.irrep.name, block.multiplicity, block.start, block.stop) for block in rep.blocks()]
    assert blocks == [("A1", 4, 0, 4), ("A2", 0, 4, 4), ("B1", 0, 4, 4), ("B2", 0, 4, 4), ("E", 3, 4, 10)]


@pytest.mark.parametrize("name", GROUPS)
def test_regular(name: str) -> None:
    g = group(name)
    rep = Rep.regular(g, 3)
    assert rep.dim == 3 * g.order and rep.regular_copies == 3
    kinds = {"real": 1, "complex": 2, "quaternionic": 4}
    assert rep.multiplicities == tuple(3 * i.dim // kinds[i.type] for i in g.irreps)
    for a in range(0, g.order, max(1, g.order // 8)):  # same character as three copies of the permutations
        assert abs(rep.matrix(a).trace() - 3 * left_translation(g.table, a).trace()) < 1e-10


def test_regular_by_hand() -> None:
    assert Rep.regular(flop(), 4).multiplicities == (4, 4)
    assert Rep.regular(group("D4"), 2).multiplicities == (2, 2, 2, 2, 4)
    assert Rep.regular(group("C4"), 2).multiplicities == (2, 2, 2)
    assert Rep.regular(group("Q8"), 2).multiplicities == (2, 2, 2, 2, 2)
    assert Rep.regular(group("D4"), 0).dim == 0
    assert Rep(flop(), (3, 2)).regular_copies is None


def test_arithmetic() -> None:
    a, b = Rep(flop(), (1, 2)), Rep(flop(), (3, 0))
    assert a + b == Rep(flop(), (4, 2))
    assert 3 * a == a * 3 == Rep(flop(), (3, 6))
    assert Rep.trivial(flop(), 5) == Rep(flop(), (5, 0))
    assert Rep.regular_of_dim(flop(), 12) == Rep.regular(flop(), 6)


def test_is_an_immutable_value() -> None:
    rep = Rep(group("D4"), (1, 2, 3, 4, 5))
    with pytest.raises(AttributeError, match="immutable"):
        rep.multiplicities = (0, 0, 0, 0, 0)
    with pytest.raises(AttributeError):
        rep.other = 1
    same = Rep(group("D4"), [1, 2, 3, 4, 5])
    assert rep == same and hash(rep) == hash(same) and len({rep, same}) == 1
    assert rep != Rep(group("D4"), (1, 2, 3, 4, 6))
    assert rep != "D4" and Rep(flop(), (1, 1)) != Rep(group("D2"), (1, 1, 0, 0))
    assert copy.deepcopy(rep) == rep


@pytest.mark.parametrize("name", [*GROUPS, "numerical", "flop image", "octic image"])
def test_pickles(name: str) -> None:
    if name == "numerical":
        g: FiniteGroup = FiniteGroup.from_permutations([[1, 2, 0]])
    elif name.endswith(" image"):
        g = image_group(name.removesuffix(" image")).group
    else:
        g = group(name)
    rep = Rep.regular(g, 2)
    back = pickle.loads(pickle.dumps(rep))
    assert back == rep and hash(back) == hash(rep)
    assert repr(back) == repr(rep) and type(back.group) is type(g)
    assert torch.equal(back.matrix(g.order - 1), rep.matrix(g.order - 1))


def test_repr_shows_group_and_irreps() -> None:
    assert repr(Rep(group("D4"), (4, 0, 0, 0, 2))) == "Rep(D4: 4 A1 + 2 E)"
    assert repr(Rep(flop(), (0, 0))) == "Rep(C2: 0)"


def test_errors_name_the_value_and_what_is_valid() -> None:
    with pytest.raises(ValueError, match=r"multiplicities=\(1, 2, 3\).*3 entries.*C2 has 2 irreps"):
        Rep(flop(), (1, 2, 3))
    with pytest.raises(ValueError, match=r"multiplicities=\(1, -2\).*negative"):
        Rep(flop(), (1, -2))
    with pytest.raises(ValueError, match="n=-1 is negative"):
        Rep.regular(flop(), -1)
    with pytest.raises(ValueError, match=r"embed_dim=770 is not divisible by \|G\|=8 \(group D4\)"):
        Rep.regular_of_dim(group("D4"), 770, "embed_dim")
    with pytest.raises(ValueError, match="C2 and one of D4"):
        Rep(flop(), (1, 1)) + Rep(group("D4"), (1, 0, 0, 0, 0))
    with pytest.raises(TypeError):
        Rep(flop(), (1, 1)) + 3  # type: ignore[operator]


def test_same_group_made_twice_is_equal() -> None:
    assert flop() == flop() and hash(flop()) == hash(flop())
    assert Rep(flop(), (1, 1)) == Rep(flop(), (1, 1))
    product = direct_product(flop(), flop())
    assert product == direct_product(flop(), flop())


def test_a_rep_is_one_of_the_abstract_group() -> None:
    """However the group acts on images: what a feature axis is made of does not depend on it."""
    flop_images, updown = image_group("flop"), image_group("updown")
    assert flop_images != updown
    rep = Rep.regular(flop_images, 192)
    assert rep == Rep.regular(updown, 192) == Rep.regular(flop(), 192) and rep.group == flop()
    assert type(rep.group) is type(Rep(flop_images, (1, 0)).group) is FiniteGroup
    assert str(rep) == "C2: 192 A + 192 B"
    assert type(Rep.regular_of_dim(updown, 4).group) is type(Rep.trivial(updown, 4).group) is FiniteGroup
    with pytest.raises(TypeError, match="group='flop' is not a group; give a FiniteGroup or an Action"):
        Rep("flop", (1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["C2", "C3", "D4", "A4", "Q8", "O"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_act_is_the_matrix(name: str, dtype: torch.dtype) -> None:
    g = group(name)
    rep = Rep(g, [i % 3 for i in range(len(g.irreps))])
    x = torch.randn(2, rep.dim, 3, dtype=dtype)
    for a in range(g.order):
        expected = torch.einsum("ij,bjk->bik", rep.matrix(a), x.double())
        found = rep.act(a, x, dim=1)
        assert found.dtype == dtype and found.shape == x.shape
        assert (found - expected).abs().max() < (1e-14 if dtype == torch.float64 else 1e-5)
        torch.testing.assert_close(rep.act(a, x.mT, dim=-1), found.mT)
        torch.testing.assert_close(rep.act(a, x[0, :, 0], 0), found[0, :, 0])
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\); Rep\(C2: 1 A\) acts on 1 entries along axis -1"):
        Rep(flop(), (1, 0)).act(0, torch.zeros(2, 5))
    assert Rep(flop(), (0, 0)).act(1, torch.zeros(2, 0)).shape == (2, 0)
