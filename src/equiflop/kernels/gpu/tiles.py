"""The sizes of tiles that are tried for a kernel, and what they take of a multiprocessor.

A program keeps one accumulator per lane of a product, so a tile of ``BM x BN`` channels of every lane holds what a
plain product of ``BM x (|G| BN)`` does: 128 x 128 for two lanes, 64 x 64 for eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from equiflop.kernels.gpu.products import Product
from equiflop.kernels.gpu.weight_gradients import WeightGradient
from equiflop.kernels.lanes import Lanes

#: Numbers of float32 that a thread's accumulators may take; 255 registers are all it has.
ACCUMULATORS_PER_THREAD = 128
#: Shared memory of one multiprocessor that a program may take, in bytes, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Tile:
    """One way to cut a product.

    Attributes:
        rows: tokens of a tile.
        columns: output channels of a lane.
        depth: input channels of a lane at a time.
        warps: of 32 threads.
        stages: tiles that are loaded ahead.
        persistent: whether as many programs as multiprocessors share the tiles.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    persistent: bool = False

    def fits(self, lanes: Lanes, shared_bytes: int, bytes_per_number: int = 2) -> bool:
        """Whether registers and shared memory hold it."""
        accumulators = self.rows * self.columns * lanes.count / (32 * self.warps)
        stage = (self.rows * lanes.count + self.columns * lanes.weights) * self.depth * bytes_per_number
        return accumulators <= ACCUMULATORS_PER_THREAD and stage * self.stages <= shared_bytes

    def constants(self, programs: int) -> dict[str, int]:
        """What the kernel is given."""
        sizes = {"BM": self.rows, "BN": self.columns, "BK": self.depth}
        return sizes | {"BAND": 8, "PROGRAMS": programs if self.persistent else 0}


#: Tiles to try for a product, by ``|G|``. From Hopper on products read shared memory and leave registers to the sums;
#: before, their operands take registers too. None of these spills (``benchmarks/gpu_registers.py``).
HOPPER: dict[int, tuple[Tile, ...]] = {
    2: (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 3, persistent=True),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    4: (
        Tile(128, 64, 32, 8, 4),
        Tile(128, 64, 32, 8, 4, persistent=True),
        Tile(128, 32, 64, 4, 3),
        Tile(64, 64, 32, 4, 4),
    ),
    8: (
        Tile(128, 32, 32, 8, 3),
        Tile(128, 32, 32, 8, 3, persistent=True),
        Tile(64, 32, 32, 8, 4),
        Tile(64, 32, 64, 8, 2),
    ),
}
AMPERE: dict[int, tuple[Tile, ...]] = {
    2: (Tile(128, 64, 32, 8, 4), Tile(64, 128, 32, 8, 3), Tile(64, 64, 64, 8, 3)),
    4: (Tile(64, 64, 16, 8, 4), Tile(64, 32, 32, 4, 4), Tile(64, 32, 64, 8, 3)),
    8: (Tile(64, 16, 32, 8, 3), Tile(32, 16, 32, 4, 4), Tile(64, 16, 16, 4, 4)),
}
#: Changing the basis of eight lanes in front of a product takes registers as well.
FROM_THE_GROUP: dict[int, tuple[Tile, ...]] = {8: (Tile(64, 16, 16, 8, 4), Tile(32, 16, 16, 4, 4))}
#: Tiles to try for weight gradients: ``rows`` is what is summed over.
WEIGHT_GRADIENTS: dict[int, tuple[Tile, ...]] = {
    2: (Tile(64, 128, 128, 8, 3), Tile(32, 128, 128, 8, 4), Tile(64, 64, 128, 8, 3), Tile(64, 64, 64, 8, 4)),
    4: (Tile(64, 64, 128, 8, 3), Tile(32, 64, 64, 8, 4), Tile(64, 64, 64, 8, 3)),
    8: (Tile(32, 32, 64, 8, 3),),
}
#: What the interpreter runs: several tiles in every direction, with ends that do not fit.
INTERPRETED = Tile(16, 16, 16, 1, 1)


def candidates(what: Product | WeightGradient, capability: int) -> list[Tile]:
    """The tiles to try for a kernel, on a device of a compute capability such as 90."""
    order = what.lanes.count
    if isinstance(what, WeightGradient):
        table = WEIGHT_GRADIENTS
    elif what.reads == "group" and order in FROM_THE_GROUP:
        table = FROM_THE_GROUP
    else:
        table = HOPPER if capability >= 90 else AMPERE
    room = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    found = [tile for tile in table.get(order, ()) if tile.fits(what.lanes, room)]
    return found or [Tile(32, max(16, 128 // order), 16, 8, 2)]


def may_have_descriptors(what: Product) -> bool:
    """Whether tiles can be loaded by descriptors: not in the order of heads; of four lanes, values kept would spill."""
    return what.reads != "heads" and not (what.keeps and what.lanes.count == 4)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many a device has; 132, those of an H100, where there is no device to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 132


@lru_cache(maxsize=16)
def capability(device: torch.device) -> int:
    """Such as 90; that where there is no device to ask."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def parts_of(tokens: int, tiles: int, programs: int) -> int:
    """Into how many parts the tokens of a weight gradient are cut, so that all multiprocessors have work."""
    return max(1, min(-(-2 * programs // tiles), 16, -(-tokens // 256)))


def largest(tiles: Sequence[Tile]) -> Tile:
    """The one with the most output."""
    return max(tiles, key=lambda tile: tile.columns * tile.depth)
