"""FourierActivation: a pointwise function in the spatial domain, by additions or by matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiflop import Rep
from equiflop.groups import flop, fourier_plan
from equiflop.nn import FourierActivation
from oracles import LAYER_GROUPS, group, tensor_action, to_spatial

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.GELU(),
    "relu": torch.relu,
    "square": torch.square,
    "tanh": torch.tanh,
}


@given(
    name=st.sampled_from([*LAYER_GROUPS, "C6", "D6", "S4", "D4xC2"]),
    copies=st.integers(1, 4),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 9),
)
@settings(max_examples=150)
def test_equals_the_dense_transform_and_commutes(name: str, copies: int, act: str, seed: int) -> None:
    g = group(name)
    rep = Rep.regular(g, copies)
    torch.manual_seed(seed)
    layer = FourierActivation(rep, ACTIVATIONS[act], dtype=torch.float64)
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    spatial = torch.from_numpy(to_spatial(rep))
    expected = ACTIVATIONS[act](x @ spatial.T) @ spatial
    found = layer(x)
    assert (found - expected).abs().max() < 1e-12
    for a in range(0, g.order, max(1, g.order // 6)):
        assert (layer(x @ tensor_action(rep, a).T) - found @ tensor_action(rep, a).T).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["C2", "C2xC2", "C4", "D4", "Q8"])
def test_path_by_additions_equals_path_by_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rep = Rep.regular(group(name), 3)
    fast = FourierActivation(rep, dtype=torch.float64)
    monkeypatch.setattr("equiflop.nn.activation.fourier_plan", lambda _: None)
    general = FourierActivation(rep, dtype=torch.float64)
    assert "additions" in repr(fast) and "matrix products" in repr(general)
    assert fast.macs_per_vector == 0 and general.macs_per_vector == 2 * group(name).order * rep.dim
    x = torch.randn(5, rep.dim, dtype=torch.float64)
    assert (fast(x) - general(x)).abs().max() < 1e-12


def test_published_mirror_gelu() -> None:
    """u = GELU((s + a)/sqrt 2), v = GELU((s - a)/sqrt 2); s' = (u + v)/sqrt 2, a' = (u - v)/sqrt 2."""
    x = torch.randn(4, 10, dtype=torch.float64)
    s, a = x[:, :5], x[:, 5:]
    h = math.sqrt(0.5)

    def gelu(t: torch.Tensor) -> torch.Tensor:
        return t * 0.5 * (1.0 + torch.erf(t / math.sqrt(2.0)))

    u, v = gelu(h * (s + a)), gelu(h * (s - a))
    expected = torch.cat([h * (u + v), h * (u - v)], -1)
    assert (FourierActivation(Rep.regular(flop(), 5), dtype=torch.float64)(x) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_identity_activation_is_the_identity(name: str) -> None:
    rep = Rep.regular(group(name), 2)
    x = torch.randn(3, rep.dim, dtype=torch.float64)
    assert (FourierActivation(rep, lambda t: t, dtype=torch.float64)(x) - x).abs().max() < 1e-13


def test_the_spatial_domain_is_permuted() -> None:
    """A one-hot function on the group stays one, so any pointwise function with f(0) = 0, f(1) = 1 leaves it alone."""
    rep = Rep.regular(group("D4"), 1)
    one_hot = torch.from_numpy(to_spatial(rep)).T  # column h: the feature that is 1 at h and 0 elsewhere
    found = FourierActivation(rep, lambda t: t**3, dtype=torch.float64)(one_hot.T)
    assert (found - one_hot.T).abs().max() < 1e-12


def test_needs_a_multiple_of_the_regular_representation() -> None:
    for counts in ((3, 2), (0, 0), (0, 4)):
        with pytest.raises(ValueError, match="not a multiple of the regular representation"):
            FourierActivation(Rep(flop(), counts))
    with pytest.raises(ValueError, match="D4"):
        FourierActivation(Rep(group("D4"), (2, 2, 2, 2, 2)))


@pytest.mark.parametrize("name", ["C1", "C2", "C2xC2", "C4", "D4", "Q8"])
def test_overwriting_transforms_give_the_same(name: str) -> None:
    plan = fourier_plan(group(name))
    assert plan is not None
    values = list(torch.randn(group(name).order, 5, 3, dtype=torch.float64).unbind())
    for transform, overwriting in ((plan.analyse, plan.analyse_), (plan.synthesise, plan.synthesise_)):
        expected = transform(values)
        given = [value.clone() for value in values]
        found = overwriting(given)
        assert not given  # emptied, so that nothing keeps the tensors alive
        assert all((a - b).abs().max() < 1e-13 for a, b in zip(found, expected, strict=True))
