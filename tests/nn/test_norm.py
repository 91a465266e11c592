"""LayerNorm and LayerScale against the formulas of the papers and of DESIGN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from equiflop import Rep
from equiflop.groups import flop
from equiflop.nn import LayerNorm, LayerScale
from oracles import LAYER_GROUPS, dense_norm, group, relative_error, scramble, tensor_action


def draw_rep(data: st.DataObject, largest: int = 5) -> Rep:
    g = group(data.draw(st.sampled_from(LAYER_GROUPS), label="group"))
    counts = data.draw(
        st.lists(st.integers(0, largest), min_size=len(g.irreps), max_size=len(g.irreps)), label="counts"
    )
    assume(sum(counts) > 0)
    return Rep(g, counts)


@given(data=st.data(), eps=st.sampled_from([1e-6, 1e-5, 1e-2]), affine=st.booleans(), bias=st.booleans())
@settings(max_examples=150)
def test_norm_is_the_formula_and_commutes(data: st.DataObject, eps: float, affine: bool, bias: bool) -> None:
    rep = draw_rep(data)
    layer = scramble(LayerNorm(rep, eps, affine=affine, bias=bias, dtype=torch.float64))
    x = 0.3 + 2.0 * torch.randn(3, 4, rep.dim, dtype=torch.float64)
    weight = layer.weight if affine else torch.ones(sum(rep.multiplicities), dtype=torch.float64)
    assert (layer.bias is not None) is (affine and bias and rep.multiplicities[0] > 0)
    found = layer(x).detach()
    assert weight is not None
    expected = dense_norm(x, rep, eps, weight, layer.bias).detach()
    assert (found - expected).abs().max() < 1e-12 * max(1.0, float(expected.abs().max()))
    for a in range(rep.group.order):
        moved = layer(x @ tensor_action(rep, a).T) - found @ tensor_action(rep, a).T
        assert moved.abs().max() < 1e-12 * max(1.0, float(found.abs().max()))


@given(data=st.data())
@settings(max_examples=100)
def test_output_of_a_fresh_norm_has_variance_one(data: st.DataObject) -> None:
    rep = draw_rep(data, 7)
    x = 5.0 * torch.randn(6, rep.dim, dtype=torch.float64)
    squares = LayerNorm(rep, 1e-12, dtype=torch.float64)(x).square().mean(-1)
    assert (squares - 1.0).abs().max() < 1e-6


def test_rows_of_multiplicity_one_survive() -> None:
    """Centring a row of one entry would erase it."""
    rep = Rep(flop(), (1, 1))
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    expected = x / math.sqrt(12.5)
    assert (LayerNorm(rep, 0.0, dtype=torch.float64)(x) - expected).abs().max() < 1e-15


@pytest.mark.parametrize("half", [4, 96])
def test_published_mirror_norm(half: int) -> None:
    """sigma = sqrt(1/2) sqrt(V_s + V_a + eps): our eps is half of the published one, which stands in the sum."""
    eps = 1e-2  # large, so that its place matters
    layer = scramble(LayerNorm(Rep.regular(flop(), half), eps / 2, dtype=torch.float64))
    x = torch.randn(2, 5, 2 * half, dtype=torch.float64)
    s, a = x[..., :half], x[..., half:]
    s, a = s - s.mean(-1, keepdim=True), a - a.mean(-1, keepdim=True)
    sigma = math.sqrt(0.5) * torch.sqrt(s.var(-1, False, keepdim=True) + a.var(-1, False, keepdim=True) + eps)
    assert layer.weight is not None and layer.bias is not None
    expected = torch.cat([s / sigma, a / sigma], -1) * layer.weight
    expected[..., :half] += layer.bias
    assert (layer(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("c", [2, 3, 8])
def test_published_octic_norm(c: int) -> None:
    """sigma = sqrt(2)/4 sqrt(V_A1 + V_A2 + V_B1 + V_B2 + (V_E0 + V_E1)/2 + eps): E weighs a quarter of its share."""
    eps = 1e-2
    layer = scramble(LayerNorm(Rep.regular(group("D4"), c), eps / 8, weighting="octic", dtype=torch.float64))
    x = torch.randn(2, 3, 8 * c, dtype=torch.float64)
    ones = [x[..., i * c : (i + 1) * c] for i in range(4)]
    rows = [x[..., 4 * c : 6 * c], x[..., 6 * c :]]
    ones, rows = ([part - part.mean(-1, keepdim=True) for part in parts] for parts in (ones, rows))
    squares = [part.var(-1, False, keepdim=True) for part in ones]
    squares += [0.5 * row.var(-1, False, keepdim=True) for row in rows]
    total = torch.stack(squares).sum(0)
    assert layer.weight is not None and layer.bias is not None
    sigma = math.sqrt(2.0) / 4.0 * torch.sqrt(total + eps)
    scale = torch.cat([layer.weight[: 4 * c], layer.weight[4 * c :], layer.weight[4 * c :]])
    expected = torch.cat([*ones, *rows], -1) / sigma * scale
    expected[..., :c] += layer.bias
    assert (layer(x) - expected).abs().max() < 1e-12


def test_octic_weighting_is_not_of_unit_variance_but_ours_is() -> None:
    rep = Rep.regular(group("D4"), 64)
    x = torch.randn(256, rep.dim, dtype=torch.float64)
    published = LayerNorm(rep, weighting="octic", dtype=torch.float64)(x).square().mean()
    assert published.item() == pytest.approx(8 / 5, rel=0.02)
    assert LayerNorm(rep, dtype=torch.float64)(x).square().mean().item() == pytest.approx(1.0, abs=1e-5)


def test_trivial_group_is_torchs_layer_norm() -> None:
    rep = Rep(group("C1"), (24,))
    layer = scramble(LayerNorm(rep, 1e-5, dtype=torch.float64))
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x, (24,), layer.weight, layer.bias, 1e-5)
    assert (layer(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_normalised_in_float32(dtype: torch.dtype) -> None:
    """A mean square of 300^2 does not fit into float16."""
    rep = Rep.regular(flop(), 8)
    x = 300.0 * torch.randn(4, 16)
    exact = LayerNorm(rep)(x)
    found = LayerNorm(rep, dtype=dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found, exact) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_large_mean_does_not_cancel_in_float32() -> None:
    rep = Rep.regular(flop(), 192)
    x = torch.randn(8, 384) + 1000.0
    exact = LayerNorm(rep, dtype=torch.float64)(x.double())
    assert relative_error(LayerNorm(rep)(x), exact) < 1e-5


def test_norm_errors() -> None:
    with pytest.raises(ValueError, match="weighting='fast' is unknown; choose 'entries' or 'octic'"):
        LayerNorm(Rep(flop(), (2, 2)), weighting="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        LayerNorm(Rep(flop(), (0, 0)))
    with pytest.raises(ValueError, match=r"length 5.*needs 4"):
        LayerNorm(Rep(flop(), (2, 2)))(torch.zeros(1, 5))


@given(data=st.data())
@settings(max_examples=60)
def test_layer_scale(data: st.DataObject) -> None:
    rep = draw_rep(data)
    layer = LayerScale(rep, 0.25, dtype=torch.float64)
    x = torch.randn(2, rep.dim, dtype=torch.float64)
    assert torch.equal(layer(x), 0.25 * x)
    scramble(layer)
    expected, start, place = x.clone(), 0, 0
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        for _ in range(irrep.dim):
            expected[:, start : start + m] *= layer.gamma[place : place + m]
            start += m
        place += m
    assert layer.gamma.numel() == sum(rep.multiplicities)
    assert (layer(x) - expected).abs().max() < 1e-14
    for a in range(rep.group.order):
        moved = layer(x @ tensor_action(rep, a).T) - layer(x) @ tensor_action(rep, a).T
        assert moved.abs().max() < 1e-12
