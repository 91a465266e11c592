"""PositionEmbedding: all equivariant fields and no others, whatever the parameters are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiflop import Rep
from equiflop.nn import PositionEmbedding, act_on_channels
from oracles import IMAGE_GROUPS, action, image_group, move_image, move_tokens, scramble, tensor_action

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (3, 4), (4, 3), (4, 4), (5, 5), (7, 7)]


def reynolds(name: str, rep: Rep, field: Tensor, grid: tuple[int, int]) -> Tensor:
    """The average of a field ``(N, C)`` over the group: the orthogonal projection onto the equivariant fields."""
    moved = [move_tokens(name, rep, a, field[None], grid)[0] for a in range(rep.group.order)]
    return torch.stack(moved).mean(0)


def fixed_dimension(name: str, rep: Rep, grid: tuple[int, int]) -> int:
    """Dimension of the space of equivariant fields: the average over the group of (fixed points) * (character)."""
    total = 0.0
    points = np.arange(grid[0] * grid[1]).reshape(grid)
    for a in range(rep.group.order):
        fixed = int((move_image(name, a, points) == points).sum())
        total += fixed * float(np.trace(action(rep, a)))
    value = total / rep.group.order
    assert abs(value - round(value)) < 1e-9
    return round(value)


def draw(data: st.DataObject) -> tuple[str, Rep, tuple[int, int]]:
    name = data.draw(st.sampled_from(IMAGE_GROUPS), label="group")
    g = image_group(name)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(g.irreps), max_size=len(g.irreps)), label="counts")
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), label="grid")
    return name, Rep(g, [counts[0] + 1, *counts[1:]]), (grid[0], grid[0]) if g.swaps_axes else grid


@given(data=st.data())
@settings(max_examples=120)
def test_field_is_equivariant_and_has_every_freedom(data: st.DataObject) -> None:
    name, rep, grid = draw(data)
    layer = scramble(PositionEmbedding(rep, image_group(name), grid, dtype=torch.float64))
    field = layer().detach()
    assert field.shape == (1, grid[0] * grid[1], rep.dim)
    for a in range(rep.group.order):
        assert (move_tokens(name, rep, a, field, grid) - field).abs().max() < 1e-12
    count = sum(parameter.numel() for parameter in layer.parameters())
    assert count == fixed_dimension(name, rep, grid)


@pytest.mark.parametrize(
    ("name", "grid"),
    [(name, grid) for name in IMAGE_GROUPS for grid in GRIDS if grid[0] == grid[1] or name not in ("rot4", "octic")],
)
def test_parameters_are_independent(name: str, grid: tuple[int, int]) -> None:
    layer = PositionEmbedding(Rep.regular(image_group(name), 1), image_group(name), grid, dtype=torch.float64)
    fields = []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for parameter in layer.parameters():
            for i in range(parameter.numel()):
                parameter.view(-1)[i] = 1.0
                fields.append(layer().flatten())
                parameter.view(-1)[i] = 0.0
    assert torch.linalg.matrix_rank(torch.stack(fields)) == len(fields)


@given(data=st.data())
@settings(max_examples=100)
def test_set_field_is_the_orthogonal_projection(data: st.DataObject) -> None:
    name, rep, grid = draw(data)
    layer = PositionEmbedding(rep, image_group(name), grid, dtype=torch.float64)
    field = torch.randn(grid[0] * grid[1], rep.dim, dtype=torch.float64)
    layer.set_field(field)
    projected = layer()[0].detach()
    assert (projected - reynolds(name, rep, field, grid)).abs().max() < 1e-12
    layer.set_field(projected)
    assert (layer()[0] - projected).abs().max() < 1e-14


@given(data=st.data(), new=st.tuples(st.integers(2, 7), st.integers(2, 7)))
@settings(max_examples=100)
def test_resampled_field_is_equivariant(data: st.DataObject, new: tuple[int, int]) -> None:
    name, rep, grid = draw(data)
    g = image_group(name)
    layer = scramble(PositionEmbedding(rep, g, grid, dtype=torch.float64))
    field = layer(new).detach()
    assert field.shape == (1, new[0] * new[1], rep.dim) and field.dtype == torch.float64
    for a in range(g.order):
        there = (new[1], new[0]) if g.swaps_axes_by(a) else new
        assert (move_tokens(name, rep, a, field, new) - layer(there)).abs().max() < 1e-12
    if not g.swaps_axes or new[0] == new[1]:
        other = layer.resized(new)
        assert other.grid_size == new
        assert (other() - field).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["rot4", "octic"])
@pytest.mark.parametrize("new", [(4, 1), (1, 2), (1, 6)])
def test_field_resampled_to_a_single_row_is_equivariant(name: str, new: tuple[int, int]) -> None:
    g = image_group(name)
    rep = Rep.regular(g, 2)
    layer = scramble(PositionEmbedding(rep, g, (3, 3), dtype=torch.float64))
    field = layer(new).detach()
    for a in range(g.order):
        there = (new[1], new[0]) if g.swaps_axes_by(a) else new
        assert (move_tokens(name, rep, a, field, new) - layer(there)).abs().max() < 1e-12


def test_a_constant_stays_constant_under_resampling() -> None:
    rep = Rep(image_group("octic"), (3, 0, 0, 0, 0))
    layer = PositionEmbedding(rep, image_group("octic"), (4, 4), dtype=torch.float64)
    layer.set_field(torch.full((16, 3), 0.7, dtype=torch.float64))
    for grid in ((5, 5), (3, 3), (4, 6), (7, 2)):
        assert (layer(grid) - 0.7).abs().max() < 1e-12


def test_resampling_is_bicubic_inside() -> None:
    """With the trivial group it is torch's antialiased bicubic interpolation and nothing else."""
    from equiflop import ImageGroup
    from equiflop.groups import cyclic

    g = ImageGroup(cyclic(1), np.eye(2, dtype=int)[None], "none")
    layer = scramble(PositionEmbedding(Rep(g, (2,)), g, (6, 5), dtype=torch.float64))
    image = layer().detach().unflatten(1, (6, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=(8, 4), mode="bicubic", antialias=True)
    assert (layer((8, 4)) - expected.flatten(2).mT).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["rot4", "octic"])
def test_non_square_grids_of_groups_with_quarter_turns(name: str) -> None:
    """The field lives on a square grid of about as many tokens, and is resampled."""
    g = image_group(name)
    layer = scramble(PositionEmbedding(Rep.regular(g, 2), g, (8, 6), dtype=torch.float64))
    assert layer.grid_size == (7, 7)
    assert layer((8, 6)).shape == (1, 48, 2 * g.order)


def test_mirror_layout_is_the_left_half_in_raster_order() -> None:
    g = image_group("flop")
    layer = scramble(PositionEmbedding(Rep.regular(g, 1), g, (2, 4), dtype=torch.float64))
    a, b = layer.get_parameter("weight_A"), layer.get_parameter("weight_B")
    field = layer()[0].unflatten(0, (2, 4)).detach()
    assert torch.equal(field[:, :2, 0].flatten(), a.flatten()) and torch.equal(
        field[:, 2:, 0].flip(1).flatten(), a.flatten()
    )
    assert torch.equal(field[:, :2, 1].flatten(), b.flatten()) and torch.equal(
        field[:, 2:, 1].flip(1).flatten(), -b.flatten()
    )
    odd = scramble(PositionEmbedding(Rep.regular(g, 1), g, (2, 3), dtype=torch.float64))
    assert (odd()[0].unflatten(0, (2, 3))[:, 1, 1] == 0).all()  # the sign channel vanishes in the middle column


def test_prefix_tokens_have_trivial_embeddings() -> None:
    g = image_group("octic")
    rep = Rep.regular(g, 2)
    layer = scramble(PositionEmbedding(rep, g, (3, 3), prefix_tokens=2, dtype=torch.float64))
    field = layer().detach()
    assert field.shape == (1, 11, 16)
    assert (field[:, :2, :2] != 0).all() and (field[:, :2, 2:] == 0).all()
    assert torch.equal(layer.resized((4, 4))()[:, :2], field[:, :2])
    assert torch.equal(layer((5, 5))[:, :2], field[:, :2])


@pytest.mark.parametrize("name", IMAGE_GROUPS)
def test_act_on_channels(name: str) -> None:
    g = image_group(name)
    rep = Rep(g, [i + 1 for i in range(len(g.irreps))])
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    for a in range(g.order):
        assert (act_on_channels(rep, a, x) - x @ tensor_action(rep, a).T).abs().max() < 1e-12


def test_frozen_embedding_stays_frozen_when_resized() -> None:
    g = image_group("flop")
    layer = PositionEmbedding(Rep.regular(g, 1), g, (2, 2)).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.resized((3, 3)).parameters())
