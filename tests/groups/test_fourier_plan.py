"""The Fourier transform by additions equals the matrix, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equiflop.groups import FiniteGroup, fourier_plan
from oracles import GROUPS, fourier, group


@pytest.mark.parametrize("name", GROUPS)
def test_plan_equals_matrix_both_ways(name: str) -> None:
    g = group(name)
    plan = fourier_plan(g)
    if name in ("C1", "C2", "C2xC2", "C4", "D1", "D2", "D4", "Q8"):
        assert plan is not None
    if plan is None:
        return
    matrix = torch.from_numpy(fourier(g))
    x = torch.randn(g.order, 5, dtype=torch.float64)
    scale = torch.tensor(plan.scale, dtype=torch.float64)[:, None]
    forward = torch.stack(plan.analyse(x.unbind(0))) * scale
    assert (forward - matrix @ x).abs().max() < 1e-12
    backward = torch.stack(plan.synthesise((x * scale).unbind(0)))
    assert (backward - matrix.T @ x).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["C2", "C2xC2", "C4", "D4", "Q8"])
def test_plan_is_fast(name: str) -> None:
    """No more additions than a radix-2 transform, |G| log2 |G|, and fewer than the matrix has off-diagonal entries."""
    g = group(name)
    plan = fourier_plan(g)
    assert plan is not None
    additions = sum(len(terms) - 1 for stage in plan.stages for terms in stage)
    assert additions <= g.order * np.log2(g.order)
    assert sorted(plan.order) == list(range(g.order))
    assert all(len(terms) <= 2 for stage in plan.stages for terms in stage)


@pytest.mark.parametrize("name", ["C3", "C6", "D3", "A4", "S4", "S5"])
def test_no_plan_where_the_order_is_no_power_of_two(name: str) -> None:
    assert fourier_plan(group(name)) is None


def test_scales_belong_to_irreps() -> None:
    plan = fourier_plan(group("C2"))
    assert plan is not None
    assert plan.irrep_scales(group("C2")) == pytest.approx((np.sqrt(0.5), np.sqrt(0.5)), abs=1e-16)
    octic = fourier_plan(group("D4"))
    assert octic is not None
    assert octic.irrep_scales(group("D4")) == pytest.approx((*[np.sqrt(1 / 8)] * 4, 0.5), abs=1e-16)


def test_numerical_groups_have_a_plan_or_none_but_never_a_wrong_one() -> None:
    g = FiniteGroup.from_permutations([[1, 2, 3, 0], [3, 2, 1, 0]])
    plan = fourier_plan(g)
    if plan is not None:
        x = torch.randn(g.order, 2, dtype=torch.float64)
        scale = torch.tensor(plan.scale, dtype=torch.float64)[:, None]
        expected = torch.from_numpy(fourier(g)) @ x
        assert (torch.stack(plan.analyse(x.unbind(0))) * scale - expected).abs().max() < 1e-12
