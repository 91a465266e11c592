"""Linear: the dense equivariant matrix, all of them, and nothing else."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equiflop import Rep
from equiflop.groups import FiniteGroup, flop
from equiflop.nn import Linear
from oracles import LAYER_GROUPS, dense_linear, group, hom_dimension, scramble, tensor_action

# MACs over those of the dense map: sum over irreps of d^3 / (e |G|^2).
MAC_SHARES = {
    "C1": Fraction(1), "C2": Fraction(1, 2), "C2xC2": Fraction(1, 4), "C3": Fraction(5, 9), "C4": Fraction(3, 8),
    "D3": Fraction(10, 36), "D4": Fraction(3, 16), "O": Fraction(1, 9), "A4": Fraction(1 + 4 + 27, 144),
    "Q8": Fraction(4 + 16, 64),
}  # fmt: skip


def random_rep(g: FiniteGroup, data: st.DataObject, label: str, largest: int = 4) -> Rep:
    counts = st.lists(st.integers(0, largest), min_size=len(g.irreps), max_size=len(g.irreps))
    return Rep(g, data.draw(counts, label=label))


@given(name=st.sampled_from(LAYER_GROUPS), bias=st.booleans(), data=st.data())
@settings(max_examples=300)
def test_equals_the_dense_matrix_and_commutes(name: str, bias: bool, data: st.DataObject) -> None:
    g = group(name)
    a, b = random_rep(g, data, "in"), random_rep(g, data, "out")
    layer = scramble(Linear(a, b, bias=bias, dtype=torch.float64))
    x = torch.randn(3, 2, a.dim, dtype=torch.float64)
    matrix, shift = dense_linear(layer)
    found = layer(x)
    assert found.shape == (3, 2, b.dim)
    if found.numel() == 0:
        return
    assert (found - (x @ matrix.T + shift)).abs().max() < 1e-12
    for element in range(g.order):
        moved = layer(x @ tensor_action(a, element).T) - found @ tensor_action(b, element).T
        assert moved.abs().max() < 1e-12


@given(name=st.sampled_from(LAYER_GROUPS), data=st.data())
@settings(max_examples=60)
def test_parameters_are_a_basis_of_all_equivariant_maps(name: str, data: st.DataObject) -> None:
    """As many weights as the space of equivariant maps has dimensions (by characters), and they are independent."""
    g = group(name)
    a, b = random_rep(g, data, "in", 2), random_rep(g, data, "out", 2)
    layer = Linear(a, b, dtype=torch.float64)
    weights = [parameter for key, parameter in layer.named_parameters() if not key.endswith("bias")]
    assert sum(weight.numel() for weight in weights) == hom_dimension(a, b)
    bias = sum(parameter.numel() for key, parameter in layer.named_parameters() if key.endswith("bias"))
    assert bias == b.multiplicities[0]  # the invariant vectors
    maps = []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for weight in weights:
            for i in range(weight.numel()):
                weight.view(-1)[i] = 1.0
                maps.append(layer(torch.eye(a.dim, dtype=torch.float64)).flatten())
                weight.view(-1)[i] = 0.0
    if maps:
        assert torch.linalg.matrix_rank(torch.stack(maps)) == len(maps)


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_bias_is_added_even_where_the_input_has_no_trivial_channels(name: str) -> None:
    g = group(name)
    counts = len(g.irreps)
    layer = Linear(Rep(g, [0] + [2] * (counts - 1)), Rep(g, [3] + [1] * (counts - 1)), dtype=torch.float64)
    if layer.bias is None:
        pytest.fail("the layer has trivial output channels and bias=True, but no bias")
    scramble(layer)
    found = layer(torch.zeros(1, layer.in_rep.dim, dtype=torch.float64))
    assert torch.equal(found[0, :3], layer.bias)


def test_no_bias_without_trivial_output() -> None:
    layer = Linear(Rep(flop(), (2, 2)), Rep(flop(), (0, 2)))
    assert layer.bias is None
    assert Linear(Rep(flop(), (2, 2)), Rep(flop(), (2, 2)), bias=False).bias is None


@pytest.mark.parametrize("name", MAC_SHARES)
def test_macs_and_parameters_of_regular_widths(name: str) -> None:
    g = group(name)
    a, b = Rep.regular(g, 3), Rep.regular(g, 5)
    layer = Linear(a, b, bias=False)
    assert layer.macs_per_vector == MAC_SHARES[name] * a.dim * b.dim
    assert sum(parameter.numel() for parameter in layer.parameters()) * g.order == a.dim * b.dim
    by_hand = sum(i.dim**3 / {"real": 1, "complex": 2, "quaternionic": 4}[i.type] for i in g.irreps) / g.order**2
    assert float(MAC_SHARES[name]) == pytest.approx(by_hand, rel=1e-12)


@given(name=st.sampled_from(LAYER_GROUPS), data=st.data())
@settings(max_examples=80)
def test_macs_of_any_multiplicities(name: str, data: st.DataObject) -> None:
    g = group(name)
    a, b = random_rep(g, data, "in", 9), random_rep(g, data, "out", 9)
    ends = {"real": 1, "complex": 2, "quaternionic": 4}
    terms = zip(g.irreps, a.multiplicities, b.multiplicities, strict=True)
    expected = sum(irrep.dim * ends[irrep.type] * m * n for irrep, m, n in terms)
    assert Linear(a, b).macs_per_vector == expected


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_unit_variance_at_initialisation(name: str) -> None:
    """White input of variance 1 gives variance 1 in every irrep."""
    g = group(name)
    layer = Linear(Rep.regular(g, 96), Rep.regular(g, 128), dtype=torch.float64)
    found = layer(torch.randn(512, 96 * g.order, dtype=torch.float64))
    assert layer.bias is not None and (layer.bias == 0).all()
    for block in layer.out_rep.blocks():
        assert found[:, block.start : block.stop].var().item() == pytest.approx(1.0, rel=0.05), block.irrep.name


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_one_2d_weight_per_irrep(name: str) -> None:
    g = group(name)
    layer = Linear(Rep.regular(g, 2), Rep.regular(g, 3))
    expected = {
        f"{i.name}.weight": (i.endomorphism_dim * 3 * i.regular_multiplicity, 2 * i.regular_multiplicity)
        for i in g.irreps
    }
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == expected | {
        f"{g.irreps[0].name}.bias": (3,)
    }


def test_repr_shows_reps_and_parameters() -> None:
    text = repr(Linear(Rep(flop(), (4, 4)), Rep(flop(), (2, 2))))
    assert "C2: 4 A + 4 B -> C2: 2 A + 2 B" in text and "18 parameters" in text


def test_errors() -> None:
    with pytest.raises(ValueError, match="belong to different groups"):
        Linear(Rep(flop(), (1, 1)), Rep(group("C3"), (1, 1)))
    with pytest.raises(ValueError, match=r"length 5.*needs 4"):
        Linear(Rep(flop(), (2, 2)), Rep(flop(), (2, 2)))(torch.zeros(1, 5))
