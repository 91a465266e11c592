"""Heads that the group permutes: plain heads on the group's own axis, equivariant, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equiflop import Rep, kernels
from equiflop.nn import Attention, Block
from oracles import (
    IMAGE_GROUPS,
    LAYER_GROUPS,
    dense_attention,
    group,
    image_group,
    move_tokens,
    relative_error,
    scramble,
    tensor_action,
)
from small_vits import DESIGNS, images_for, scrambled, small_vit, worst_error


@pytest.mark.parametrize("name", ["C1", *LAYER_GROUPS])
@pytest.mark.parametrize(("copies", "per_copy"), [(4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_each_head_is_a_plain_one(name: str, copies: int, per_copy: int, bias: bool) -> None:
    g = group(name)
    rep = Rep.regular(g, copies)
    layer = scramble(Attention(rep, per_copy * g.order, heads="regular", qkv_bias=bias, dtype=torch.float64))
    x = torch.randn(2, 5, rep.dim, dtype=torch.float64)
    found = layer(x).detach()
    assert relative_error(found, dense_attention(layer, x)) < 1e-12
    for a in range(g.order):
        assert relative_error(layer(x @ tensor_action(rep, a).T), found @ tensor_action(rep, a).T) < 1e-12


@pytest.mark.parametrize("name", IMAGE_GROUPS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (5, 2)])
@pytest.mark.parametrize("plain", [False, True])
def test_block_is_equivariant_on_the_grid(name: str, grid: tuple[int, int], plain: bool) -> None:
    g = image_group(name)
    if g.swaps_axes and grid[0] != grid[1]:
        grid = (5, 5)
    rep = Rep.regular(g, 4)
    block = scramble(Block(rep, 2 * g.order, heads="regular", init_values=0.5, dtype=torch.float64)).eval()
    x = torch.randn(2, 1 + grid[0] * grid[1], rep.dim, dtype=torch.float64)

    def run(tokens: Tensor) -> Tensor:
        if plain:
            with kernels.reference():
                return block(tokens).detach()
        return block(tokens).detach()

    found = run(x)
    for a in range(g.order):
        moved = run(move_tokens(name, rep, a, x, grid, prefix=1))
        assert relative_error(moved, move_tokens(name, rep, a, found, grid, prefix=1)) < 1e-12


def regular_vit(name: str, **options: Any) -> Any:
    g = image_group(name)
    width = 4 * g.order if g.order > 4 else 32
    sizes = {"embed_dim": width, "num_heads": g.order, "heads": "regular", "dtype": torch.float64}
    return scrambled(small_vit(group=name, **{**sizes, **options}))


@pytest.mark.parametrize("name", IMAGE_GROUPS)
@pytest.mark.parametrize("size", [(32, 32), (24, 24)])
def test_network_is_equivariant(name: str, size: tuple[int, int]) -> None:
    assert worst_error(regular_vit(name, img_size=size), name, size) < 1e-12


@pytest.mark.parametrize("design", ["hybrid", "invariant"])
def test_half_equivariant_networks(design: str) -> None:
    model = scrambled(small_vit(DESIGNS[design], heads="regular", dtype=torch.float64))
    assert all(block.attn.heads == "regular" for block in model.blocks[:2])
    images = images_for(model)
    if design == "invariant":
        assert worst_error(model, "flop") < 1e-12
    assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize("name", IMAGE_GROUPS)
def test_network_is_equivariant_after_training(name: str) -> None:
    model = regular_vit(name, img_size=(24, 24), drop_path_rate=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(images_for(model, (24, 24))).square().mean().backward()
        optimizer.step()
    assert worst_error(model.eval(), name, (24, 24)) < 1e-12


def test_parameters_and_macs_are_those_of_coupled_heads() -> None:
    import equiflop

    regular, coupled = (small_vit(heads=heads) for heads in ("regular", "coupled"))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (regular, coupled)]
    assert shapes[0] == shapes[1]
    assert equiflop.macs(regular, (32, 32)) == equiflop.macs(coupled, (32, 32))


def test_heads_see_the_image_through_the_group() -> None:
    """The attention map of a head on the moved image is the moved map of the head that the element takes to it."""
    rep = Rep.regular(image_group("flop"), 4)
    layer = scramble(Attention(rep, 4, heads="regular", dtype=torch.float64))
    layer.fused_attn = False
    maps: list[Tensor] = []
    layer.attn_drop.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0].detach()))
    grid = (2, 4)
    x = torch.randn(1, 8, rep.dim, dtype=torch.float64)
    layer(x)
    layer(move_tokens("flop", rep, 1, x, grid))
    mirror = torch.arange(8).view(grid).flip(1).flatten()
    here, there = maps
    assert relative_error(there, here[:, [2, 3, 0, 1]][..., mirror, :][..., mirror]) < 1e-12
    assert (here[:, :2] - here[:, 2:]).abs().max() > 1e-3


def test_refusals_name_the_divisor() -> None:
    with pytest.raises(ValueError, match=r"num_heads=3 is not divisible by \|G\|=2 .*use heads='coupled'"):
        Attention(Rep.regular(group("C2"), 6), 3, heads="regular")
    with pytest.raises(ValueError, match=r"num_heads=0 is not divisible by \|G\|=2"):
        Attention(Rep.regular(group("C2"), 6), 0, heads="regular")
    with pytest.raises(ValueError, match=r"num_heads=8 does not divide 12 channels.*use 2 times a divisor of 6"):
        Attention(Rep.regular(group("C2"), 6), 8, heads="regular")
    with pytest.raises(ValueError, match=r"num_heads=6 is not divisible by \|G\|=8 \(group D4"):
        Attention(Rep.regular(group("D4"), 6), 6, heads="regular")
    with pytest.raises(ValueError, match="heads='regular' needs a multiple of the regular representation"):
        Attention(Rep(group("C2"), (4, 2)), 2, heads="regular")
    with pytest.raises(ValueError, match="heads='other' is unknown; choose 'coupled' or 'regular'"):
        Attention(Rep.regular(group("C2"), 6), 2, heads="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_heads=3 is not divisible by \|G\|=2"):
        small_vit(heads="regular", embed_dim=48, num_heads=3)
