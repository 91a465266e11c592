"""Tied convolutions, by the definition of an equivariant kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from equiflop.image_group import named_image_group
from equiflop.nn.tied_conv import TiedBatchNorm2d, TiedConv2d, copies_of
from oracles import relative_error

GROUPS = ("flop", "updown", "flips", "rot4", "octic")


def joints(name: str) -> np.ndarray:
    """A pair that mirrorings exchange, and one joint that stays."""
    group = named_image_group(name)
    return np.array([[1, 0, 2] if np.linalg.det(matrix) < 0 else [0, 1, 2] for matrix in group.matrices])


def conv(name: str, kernel_size: int, stride: int = 1, **options: Any) -> TiedConv2d:
    group = named_image_group(name)
    made = TiedConv2d(group, copies_of(group), joints(name), 4, 2, kernel_size, stride=stride, **options).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (5, 1), (4, 2), (2, 2), (3, 3)])
def test_maps_move_and_channels_are_permuted(name: str, kernel_size: int, stride: int) -> None:
    group = named_image_group(name)
    made = conv(name, kernel_size, stride)
    x = torch.randn(2, group.order, 4, 5, 7, dtype=torch.float64)
    y = made(x.flatten(1, 2)).unflatten(1, (3, 2))
    assert y.shape[-2:] == (5 * stride, 7 * stride)
    for a in range(group.order):
        moved = torch.empty_like(group.act_on_image(a, x))
        moved[:, torch.from_numpy(copies_of(group)[a])] = group.act_on_image(a, x)
        expected = torch.empty_like(group.act_on_image(a, y))
        expected[:, torch.from_numpy(joints(name)[a])] = group.act_on_image(a, y)
        assert relative_error(made(moved.flatten(1, 2)).unflatten(1, (3, 2)), expected) < 1e-12


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("kernel_size", [1, 3, 4])
def test_every_equivariant_kernel_is_there(name: str, kernel_size: int) -> None:
    """As many free blocks as the average over the group leaves of all kernels: the mean number of fixed entries."""
    group = named_image_group(name)
    made = conv(name, kernel_size, kernel_size % 2 or 2)
    fixed = 0
    for a in range(group.order):
        moves = (joints(name)[a], copies_of(group)[a], group.act_on_grid(a, kernel_size, kernel_size))
        fixed += int(np.prod([(move == np.arange(len(move))).sum() for move in moves]))
    assert fixed % group.order == 0
    assert len(made.weight) == fixed // group.order


def test_it_is_a_plain_convolution_with_its_kernel() -> None:
    made = conv("octic", 3)
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64)
    assert made.bias is not None
    bias = made.bias[made.bias_index].flatten()
    naive = torch.zeros(1, 6, 6, 6, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1))
    for row in range(3):
        for column in range(3):
            naive += torch.einsum(
                "oi,bihw->bohw", made.kernel()[..., row, column], padded[..., row:, column:][..., :6, :6]
            )
    assert relative_error(made(x), naive + bias[:, None, None]) < 1e-12
    assert made.macs(x.shape) == 36 * 32 * 6 * 9


def test_batch_norm_is_the_same_for_all_copies() -> None:
    norm = TiedBatchNorm2d(3, 2).double()
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    swapped = x.unflatten(1, (2, 3)).flip(1).flatten(1, 2)
    once = norm(x)
    torch.testing.assert_close(norm(swapped), once.unflatten(1, (2, 3)).flip(1).flatten(1, 2))
    assert abs(once.mean().item()) < 1e-12 and len(norm.norm.weight) == 3


def test_refusals() -> None:
    group = named_image_group("flop")
    copies = copies_of(group)
    with pytest.raises(ValueError, match="kernel_size=4 and stride=1: their difference must be even"):
        TiedConv2d(group, copies, copies, 2, 2, 4)
    with pytest.raises(ValueError, match=r"points has shape \(1, 2\); group 'flop' needs \(2, points\)"):
        TiedConv2d(group, copies[:1], copies, 2, 2, 3)
    with pytest.raises(ValueError, match="do not multiply like the elements of group 'flop'"):
        TiedConv2d(group, [[0, 1, 2], [1, 2, 0]], copies, 2, 2, 3)
