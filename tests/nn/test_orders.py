"""Linear's orders of input and output against dense matrices, and the state dicts of version 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from equiflop import Rep
from equiflop.groups import flop
from equiflop.nn import Block, Linear, Mlp
from oracles import (
    LAYER_GROUPS,
    bias_gain,
    dense_linear,
    gain,
    group,
    head_places,
    left_translation,
    relative_error,
    scramble,
    section_places,
    tensor_action,
    to_spatial,
)
from small_vits import DESIGNS, images_for, scrambled, small_vit


def order_matrix(rep: Rep, order: str, heads: int) -> Tensor:
    """From the axis in the order of the irreps to the axis in another order; orthogonal."""
    if order == "group":
        return torch.from_numpy(to_spatial(rep))
    identity = torch.eye(rep.dim, dtype=torch.float64)
    return identity[[place for places in head_places(rep, heads) for place in places]] if order == "heads" else identity


def order_action(rep: Rep, order: str, heads: int, a: int) -> Tensor:
    """How a group element moves an axis in some order; in the group's own it permutes copies."""
    if order == "group":
        copies = torch.eye(rep.dim // rep.group.order, dtype=torch.float64)
        return torch.kron(torch.from_numpy(left_translation(rep.group.table, a)), copies)
    change = order_matrix(rep, order, heads)
    return change @ tensor_action(rep, a) @ change.T


ORDERS = ("irreps", "group", "heads")


@given(
    name=st.sampled_from(["C1", *LAYER_GROUPS]),
    orders=st.tuples(st.sampled_from(ORDERS), st.sampled_from(ORDERS)),
    copies=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sections=st.integers(1, 3),
    heads=st.integers(1, 3),
    bias=st.booleans(),
)
@settings(max_examples=250)
def test_orders_are_dense_changes_of_basis_and_commute(
    name: str, orders: tuple[Any, Any], copies: tuple[int, int], sections: int, heads: int, bias: bool
) -> None:
    g = group(name)
    in_rep, out_rep = (Rep.regular(g, heads * n) for n in copies)
    options: dict[str, Any] = {"in_order": orders[0], "out_order": orders[1], "sections": sections, "num_heads": heads}
    layer = scramble(Linear(in_rep, out_rep, bias, **options, dtype=torch.float64))
    x = torch.randn(2, 3, in_rep.dim, dtype=torch.float64)
    found = layer(x).detach()
    assert found.shape == (2, 3, sections * out_rep.dim)
    matrix, shift = dense_linear(layer)
    joint = x @ order_matrix(in_rep, orders[0], heads) @ matrix.T + shift
    write = order_matrix(out_rep, orders[1], heads)
    if orders[1] == "irreps":
        expected = joint  # within each row of an irrep the sections lie behind each other
    else:
        expected = torch.cat([joint[..., places] @ write.T for places in section_places(out_rep, sections)], dim=-1)
    assert relative_error(found, expected) < 1e-12
    for a in range(g.order):
        moved = layer(x @ order_action(in_rep, orders[0], heads, a).T)
        if orders[1] == "irreps":
            action = tensor_action(Rep(g, [m * sections for m in out_rep.multiplicities]), a)
        else:
            one = order_action(out_rep, orders[1], heads, a)
            action = torch.block_diag(*[one] * sections)
        assert relative_error(moved, found @ action.T) < 1e-12


@pytest.mark.parametrize("name", ["C1", *LAYER_GROUPS])
@pytest.mark.parametrize("order", ORDERS)
def test_round_trip(name: str, order: Any) -> None:
    """A map that is the identity between orthonormal bases, into an order and back from it."""
    rep = Rep.regular(group(name), 4)
    into = Linear(rep, rep, out_order=order, num_heads=2, dtype=torch.float64)
    back = Linear(rep, rep, in_order=order, num_heads=2, dtype=torch.float64)
    for layer in (into, back):
        layer.init_weights(set_identity)
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    assert relative_error(back(into(x)), x) < 1e-12
    assert (into(x).norm() - x.norm()).abs() < 1e-12 * x.norm()


def set_identity(weight: Tensor, algebra: int) -> None:
    weight.zero_()
    weight[: weight.shape[1]].fill_diagonal_(1.0)


@pytest.mark.parametrize("name", ["C1", *LAYER_GROUPS])
@pytest.mark.parametrize("orders", [("irreps", "group"), ("group", "irreps"), ("group", "group")])
def test_gains_and_variance_at_initialisation(name: str, orders: tuple[Any, Any]) -> None:
    rep = Rep.regular(group(name), 96)
    layer = Linear(rep, rep, in_order=orders[0], out_order=orders[1], dtype=torch.float64)
    for irrep in rep.group.irreps:
        assert layer.gain(irrep) == pytest.approx(gain(layer, irrep), rel=1e-14)
    found = layer(torch.randn(512, rep.dim, dtype=torch.float64))
    assert found.var().item() == pytest.approx(1.0, rel=0.05)


def test_errors_of_orders() -> None:
    odd, regular = Rep(flop(), (4, 2)), Rep.regular(flop(), 2)
    with pytest.raises(ValueError, match=r"in_rep=.*multiple of the regular representation, which in_order='group'"):
        Linear(odd, regular, in_order="group")
    with pytest.raises(ValueError, match=r"out_rep=.*multiple of the regular representation, which out_order='group'"):
        Linear(regular, odd, out_order="group")


def version_1(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that version 1 had for the same function: other names, weights between orthonormal bases."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if not isinstance(layer, Linear):
            continue
        prefix = f"{name}." if name else ""
        for irrep in layer.in_rep.group.irreps:
            if f"{prefix}{irrep.name}.weight" in state:
                weight = state.pop(f"{prefix}{irrep.name}.weight")
                state[f"{prefix}weight_{irrep.name}"] = weight / gain(layer, irrep)
            if f"{prefix}{irrep.name}.bias" in state:
                state[f"{prefix}bias"] = state.pop(f"{prefix}{irrep.name}.bias") / bias_gain(layer)
    return state


@pytest.mark.parametrize("name", LAYER_GROUPS)
def test_layers_load_version_1(name: str) -> None:
    rep = Rep.regular(group(name), 4)
    for make in (
        lambda: Linear(rep, 2 * rep, dtype=torch.float64),
        lambda: Mlp(rep, 2 * rep, dtype=torch.float64),
        lambda: Block(rep, 2, init_values=0.5, dtype=torch.float64),
    ):
        old, new = scramble(make()), scramble(make(), 1)
        state = version_1(old)
        assert not any(f".{irrep.name}." in key for key in state for irrep in rep.group.irreps)
        kept = dict(state)
        new.load_state_dict(state, strict=True)
        assert state.keys() == kept.keys()  # the caller's dict stays as it is
        x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
        assert relative_error(new(x), old(x)) < 1e-13


def test_version_1_mlp_is_the_published_one() -> None:
    """Written out for the mirror group from the old names alone, so that no gain of the new code enters."""
    rep = Rep.regular(flop(), 3)
    mlp = Mlp(rep, 2 * rep, dtype=torch.float64)
    state = {f"fc1.weight_{i}": torch.randn(6, 3, dtype=torch.float64) for i in "AB"}
    state |= {f"fc2.weight_{i}": torch.randn(3, 6, dtype=torch.float64) for i in "AB"}
    state |= {"fc1.bias": torch.randn(6, dtype=torch.float64), "fc2.bias": torch.randn(3, dtype=torch.float64)}
    mlp.load_state_dict(state, strict=True)
    x = torch.randn(4, 6, dtype=torch.float64)
    a, b = x[:, :3] @ state["fc1.weight_A"].T + state["fc1.bias"], x[:, 3:] @ state["fc1.weight_B"].T
    h = 0.5**0.5
    u, v = nn.functional.gelu(h * (a + b)), nn.functional.gelu(h * (a - b))
    a, b = h * (u + v) @ state["fc2.weight_A"].T + state["fc2.bias"], h * (u - v) @ state["fc2.weight_B"].T
    assert relative_error(mlp(x), torch.cat([a, b], -1)) < 1e-13


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", ["flop", "octic"])
def test_networks_load_version_1(design: str, name: str) -> None:
    old = scrambled(small_vit(DESIGNS[design], group=name, dtype=torch.float64))
    new = small_vit(DESIGNS[design], group=name, dtype=torch.float64)
    new.load_state_dict(version_1(old), strict=True)
    images = images_for(old)
    assert relative_error(new(images), old(images)) < 1e-13


def test_missing_weights_are_named_as_they_are_now() -> None:
    layer = Linear(Rep.regular(flop(), 2), Rep.regular(flop(), 2))
    state = version_1(layer)
    del state["weight_B"]
    with pytest.raises(RuntimeError, match=r"Missing key.*B\.weight"):
        layer.load_state_dict(state)
