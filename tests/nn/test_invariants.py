"""Invariants against formulas, invariant under every element, and different where orbits differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equiflop.groups import Rep, dihedral, flop, octahedral
from equiflop.nn import FromSpatial, Invariants, ToSpatial
from equiflop.nn.invariants import has_magnitudes
from oracles import LAYER_GROUPS, group, left_translation, tensor_action

KINDS = ("trivial", "norm", "magnitudes", "power_spectrum", "polynomial")


def small_enough(name: str) -> bool:
    return group(name).order <= 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*LAYER_GROUPS, "Q8xC3"])
def test_no_element_changes_them(name: str, kind: str) -> None:
    if kind == "polynomial" and not small_enough(name):
        with pytest.raises(ValueError, match="up to order 8"):
            Invariants(Rep.regular(group(name), 2), "polynomial")
        return
    if kind == "magnitudes" and not has_magnitudes(group(name)):
        with pytest.raises(ValueError, match=r"needs irreps of signed permutations; group .* has others; use 'norm'"):
            Invariants(Rep.regular(group(name), 2), "magnitudes")
        return
    rep = Rep.regular(group(name), 3)
    layer = Invariants(rep, kind, dtype=torch.float64)  # type: ignore[arg-type]
    x = torch.randn(4, 2, rep.dim, dtype=torch.float64)
    found = layer(x)
    assert found.shape == (4, 2, layer.out_features)
    for a in range(rep.group.order):
        moved = layer(x @ tensor_action(rep, a).T)
        assert (moved - found).abs().max() <= 1e-12 * found.abs().max()
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*LAYER_GROUPS, "O"])
def test_power_spectrum_spans_all_invariants_of_degree_two(name: str) -> None:
    """Of one copy in the spatial domain these are ``sum_h y(h) y(h a)``, one for every pair a, a^-1."""
    g = group(name)
    rep = Rep.regular(g, 1)
    x = torch.randn(200, rep.dim, dtype=torch.float64)
    y = ToSpatial(rep, dtype=torch.float64)(x)[..., 0]
    table = torch.from_numpy(np.array(g.table))
    correlations = torch.stack([(y * y[:, table[:, a]]).sum(-1) for a in range(g.order)], dim=1)
    found = Invariants(rep, "power_spectrum", dtype=torch.float64)(x)
    found = torch.cat([found[:, :1] ** 2, found[:, 1:]], dim=1)
    count = sum(1 for a in range(g.order) if a <= g.inverse(a))
    assert found.shape[1] == count
    solution = torch.linalg.lstsq(found, correlations).solution
    assert (found @ solution - correlations).abs().max() < 1e-10
    assert torch.linalg.matrix_rank(correlations) == count


def test_published_polynomials_of_the_octic_group() -> None:
    """Every polynomial of the published list is a combination of products of ours: same copy, same algebra.

    Tried by degree: products of ours up to degree 3 span the published ones of degree 1 to 3.
    """
    rep = Rep.regular(dihedral(4), 1)
    x = torch.randn(400, 8, dtype=torch.float64)
    x0, x1, x2, x3, x4, x6, x5, x7 = x.T  # E is [row, (left, right)]
    published = [
        x0, x6**2 + x7**2, x4 * x6 + x5 * x7, x4**2 + x5**2, x3**2, x2**2, x1**2, x3 * x6 * x7,
        x3 * (x5 * x6 + x4 * x7), x3 * x4 * x5, x2 * (x6**2 - x7**2), x2 * (x4 * x6 - x5 * x7),
        x2 * (x4**2 - x5**2), x1 * (x5 * x6 - x4 * x7), x1 * x2 * x3,
    ]  # fmt: skip
    ours = Invariants(rep, "polynomial", dtype=torch.float64)(x)
    assert ours.shape[1] == 32
    first, second, third = ours[:, :1], ours[:, 1:7], ours[:, 7:15]
    span = torch.cat([first, first**2, second, first**3, first * second, third], dim=1)
    target = torch.stack(published, dim=1)
    solution = torch.linalg.lstsq(span, target).solution
    assert (span @ solution - target).abs().max() < 1e-9 * target.abs().max()


def test_polynomials_tell_a_signal_from_its_mirror_image_and_spectra_do_not() -> None:
    rep = Rep.regular(group("C4"), 1)
    to_spatial = ToSpatial(rep, dtype=torch.float64)
    basis = to_spatial(torch.eye(4, dtype=torch.float64))[..., 0]  # rows of irreps, columns of positions
    y = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)
    forward, backward = basis @ y, basis @ y.flip(0)
    for kind, differs in (("norm", False), ("power_spectrum", False), ("polynomial", True)):
        layer = Invariants(rep, kind, dtype=torch.float64)  # type: ignore[arg-type]
        assert bool((layer(forward) - layer(backward)).abs().max() > 1e-6) is differs


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_spatial_domain_is_permuted(name: str) -> None:
    g = group(name)
    rep = Rep.regular(g, 2)
    layer = ToSpatial(rep, dtype=torch.float64)
    x = torch.randn(3, rep.dim, dtype=torch.float64)
    for a in range(g.order):
        expected = torch.from_numpy(left_translation(g.table, a)) @ layer(x)
        assert (layer(x @ tensor_action(rep, a).T) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_the_way_back_from_the_spatial_domain(name: str) -> None:
    rep = Rep.regular(group(name), 2)
    there, back = ToSpatial(rep, dtype=torch.float64), FromSpatial(rep, dtype=torch.float64)
    x = torch.randn(3, rep.dim, dtype=torch.float64)
    assert (back(there(x)) - x).abs().max() < 1e-12
    assert back.macs(there(x).shape) == there.macs(x.shape)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("C2", "C3", "D4", "Q8") for kind in KINDS if (name, kind) != ("C3", "magnitudes")],
)
def test_gradients(name: str, kind: str) -> None:
    layer = Invariants(Rep.regular(group(name), 1), kind, dtype=torch.float64)  # type: ignore[arg-type]
    x = torch.randn(2, layer.rep.dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    zero = torch.zeros(1, layer.rep.dim, dtype=torch.float64, requires_grad=True)
    layer(zero).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_copies_and_compilation(kind: str) -> None:
    layer = Invariants(Rep.regular(dihedral(4), 2), kind)  # type: ignore[arg-type]
    x = torch.randn(5, 16, dtype=torch.float64)
    exact = layer.double()(x)
    assert (Invariants(Rep.regular(dihedral(4), 2), kind, dtype=torch.float64)(x) - exact).abs().max() == 0  # type: ignore[arg-type]
    assert (layer.float()(x.float()) - exact).abs().max() < 1e-5
    assert layer.state_dict() == {}
    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x.float()), layer(x.float()))


def rows_and_copies(rep: Rep, x: Tensor) -> Tensor:
    copies = rep.multiplicities[0]
    parts = [x[..., block.start : block.stop] for block in rep.blocks()]
    return torch.cat([part.reshape(*part.shape[:-1], -1, copies) for part in parts], dim=-2)


def test_copies_do_not_mix() -> None:
    """Invariants of one copy are those of a Rep with that copy alone."""
    rep, single = Rep.regular(dihedral(4), 3), Rep.regular(dihedral(4), 1)
    x = torch.randn(4, rep.dim, dtype=torch.float64)
    rows = rows_and_copies(rep, x)
    for kind in ("power_spectrum", "polynomial"):
        together = Invariants(rep, kind, dtype=torch.float64)(x).unflatten(-1, (-1, 3))
        for copy in range(3):
            alone = Invariants(single, kind, dtype=torch.float64)(rows[..., copy])
            assert (together[..., copy] - alone).abs().max() < 1e-12


def test_magnitudes_are_as_many_as_channels() -> None:
    assert [name for name in LAYER_GROUPS if not has_magnitudes(group(name))] == ["C3", "D3", "A4"]
    rep = Rep(dihedral(4), (2, 0, 1, 0, 2))
    x = torch.tensor([[1.0, -2.0, -3.0, 4.0, -5.0, -6.0, 5.0]])
    found = Invariants(rep, "magnitudes")(x)
    assert found.tolist() == [[1.0, -2.0, 3.0, 6.0, 5.0, 4.0, 5.0]]  # rows (4, -5) and (-6, 5) of two copies
    rep = Rep(flop(), (2, 3))
    x = torch.randn(4, 5)
    assert torch.equal(Invariants(rep, "magnitudes")(x), Invariants(rep, "norm")(x))


def test_errors() -> None:
    choices = "trivial, norm, magnitudes, power_spectrum, polynomial"
    with pytest.raises(ValueError, match=f"invariants='max' is unknown; choose from {choices}"):
        Invariants(Rep.regular(flop(), 2), "max")  # type: ignore[arg-type]
    for kind in ("power_spectrum", "polynomial"):
        with pytest.raises(ValueError, match=r"needs a multiple of the regular representation, not .*; use 'norm'"):
            Invariants(Rep(flop(), (2, 3)), kind)
    with pytest.raises(ValueError, match="group O has order 24"):
        Invariants(Rep.regular(octahedral(), 1), "polynomial")
