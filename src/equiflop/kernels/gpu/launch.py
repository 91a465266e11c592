"""How kernels are started: rows of tensors, tiles chosen by trying them once, Triton's interpreter without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from equiflop.kernels.gpu import tiles as sizes
from equiflop.kernels.gpu.products import Product
from equiflop.kernels.gpu.source import kernel
from equiflop.kernels.gpu.tiles import Tile
from equiflop.kernels.gpu.weight_gradients import WeightGradient

#: Warps of what finishes gradients.
SUM_WARPS = 4


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def descriptors_wanted(capability: int) -> bool:
    """Whether products load their tiles by tensor descriptors (TMA): on request, until a card has said that it pays."""
    return os.environ.get("EQUIFLOP_TMA") == "1" and (capability >= 90 or is_interpreted())


def aligned(x: Tensor, n_in: int, weights: Sequence[Tensor]) -> bool:
    """Whether descriptors can be made: every row of a lane and of the weights begins at a multiple of 16 bytes.

    Args:
        x: rows of lanes.
        n_in: channels of a lane.
        weights: of every irrep.
    """
    steps = [(x, x.stride(0)), (x, n_in), (x, x.storage_offset())]
    for weight in weights:
        if weight.stride(1) != 1:
            return False
        steps += [(weight, weight.stride(0)), (weight, weight.storage_offset())]
    return all(step * part.element_size() % 16 == 0 for part, step in steps)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which a kernel writes its descriptors."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def wrapped(function: Any) -> Any:
    """A kernel as compilers see it; the interpreter's are called as they are, since torch 2.12 does not wrap them."""
    return function if is_interpreted() else wrap_triton(function)


@lru_cache(maxsize=1024)
def _tuned(what: Any, tiles: tuple[Tile, ...], programs: int, keys: tuple[str, ...]) -> Any:
    import triton

    function = kernel(what)
    names = set(function.arg_names)
    configs = [
        triton.Config(
            {key: value for key, value in tile.constants(programs).items() if key in names},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        for tile in tiles
    ]
    return triton.autotune(configs=configs, key=list(keys))(function)


def run_tuned(
    what: Product | WeightGradient,
    tiles: Sequence[Tile],
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    device: torch.device,
) -> None:
    """Start a product's kernel with the fastest of its tiles."""
    if is_interpreted():
        function = kernel(what)
        constants = {k: v for k, v in sizes.INTERPRETED.constants(3).items() if k in function.arg_names}
        function[grid](**arguments, **constants)
        return
    if getattr(what, "descriptors", False):
        import triton

        triton.set_allocator(_scratch)
    tuned = _tuned(what, tuple(tiles), sizes.multiprocessors(device), ("N_IN", "N_OUT", "SCALE_OF_M"))
    wrap_triton(tuned)[grid](**arguments)


def as_rows(x: Tensor) -> Tensor:
    """``(..., dim)`` to rows whose entries lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()
