"""Is it worth folding a mirror-symmetric depthwise convolution?

A kernel that is symmetric (or antisymmetric) about its middle column needs one product for two pixels: first add (or
subtract) mirrored pixels, then multiply: 28 (or 21) products an output instead of 49. The official E(ConvNeXt) and ours
make all 49. This script measures, side by side and in turns, on the feature maps of ConvNeXt-T at 224 pixels:

* ``conv2d``: torch's depthwise convolution, what the models use;
* ``folded, eager``: three sums of mirrored shifts, then one grouped 7x1 convolution over the four maps;
* ``unrolled, compiled``: 49 shifted products written out and compiled into one loop;
* ``folded, compiled``: the same with 28 products of folded pixels.

    python benchmarks/depthwise_folding.py --output benchmarks/depthwise_folding.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.benchmark.timing import time_in_turns
from equiflop.runtime import describe_machine

SIDE = 7
REACH = SIDE // 2
#: Side of the feature map and channels of the four stages of ConvNeXt-T.
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))


def symmetric_kernel(half: Tensor) -> Tensor:
    """``(C, 7, 4)`` left columns and middle to the whole kernel ``(C, 1, 7, 7)``."""
    return torch.cat([half, half[..., :REACH].flip(-1)], dim=-1).unsqueeze(1)


def conv2d(x: Tensor, half: Tensor) -> Tensor:
    """The reference: ``(B, C, H, W)`` to the same."""
    return F.conv2d(x, symmetric_kernel(half), padding=REACH, groups=x.shape[1])


def folded_maps(x: Tensor) -> list[Tensor]:
    """Sums of mirrored shifts by 3, 2, 1 columns, and the map itself; rows padded."""
    padded = F.pad(x, (REACH, REACH, REACH, REACH))
    width = x.shape[-1]
    shifted = [padded[..., i : i + width] for i in range(SIDE)]
    return [shifted[i] + shifted[SIDE - 1 - i] for i in range(REACH)] + [shifted[REACH]]


def folded_eager(x: Tensor, half: Tensor) -> Tensor:
    """One grouped 7x1 convolution over the folded maps."""
    maps = torch.stack(folded_maps(x), dim=2).flatten(1, 2)
    return F.conv2d(maps, half.transpose(1, 2).unsqueeze(-1), groups=x.shape[1])


def unrolled(x: Tensor, half: Tensor) -> Tensor:
    """49 products, channels last so that a compiler vectorises over channels."""
    kernel = symmetric_kernel(half)[:, 0]
    padded = F.pad(x, (REACH, REACH, REACH, REACH)).permute(0, 2, 3, 1)
    height, width = x.shape[-2:]
    total: Tensor | None = None
    for i in range(SIDE):
        for j in range(SIDE):
            term = padded[:, i : i + height, j : j + width] * kernel[:, i, j]
            total = term if total is None else total + term
    assert total is not None
    return total.permute(0, 3, 1, 2)


def folded_unrolled(x: Tensor, half: Tensor) -> Tensor:
    """28 products of folded pixels, channels last."""
    padded = F.pad(x, (REACH, REACH, REACH, REACH)).permute(0, 2, 3, 1)
    height, width = x.shape[-2:]
    total: Tensor | None = None
    for i in range(SIDE):
        rows = padded[:, i : i + height]
        for j in range(REACH + 1):
            pixels = rows[:, :, j : j + width]
            if j < REACH:
                pixels = pixels + rows[:, :, SIDE - 1 - j : SIDE - 1 - j + width]
            term = pixels * half[:, i, j]
            total = term if total is None else total + term
    assert total is not None
    return total.permute(0, 3, 1, 2)


def median_times(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, measured in turns after two warm-up calls."""
    times = time_in_turns(ways, rounds, 0.0, torch.device("cpu"), warm_up=2)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    compiled = {name: torch.compile(f, dynamic=False) for name, f in (("u", unrolled), ("f", folded_unrolled))}
    rows = []
    columns = ("folded, eager", "unrolled, compiled", "folded, compiled")
    print(f"{'map':<12} {'conv2d ms':>10}" + "".join(f" {name:>19}" for name in columns) + "   (speedup over conv2d)")
    for side, channels in STAGES:
        x = torch.randn(arguments.batch, channels, side, side).to(memory_format=torch.channels_last)
        half = torch.randn(channels, SIDE, REACH + 1)
        ways: dict[str, Callable[[], Tensor]] = {
            "conv2d": partial(conv2d, x, half),
            "folded, eager": partial(folded_eager, x, half),
            "unrolled, compiled": partial(compiled["u"], x, half),
            "folded, compiled": partial(compiled["f"], x, half),
        }
        with torch.inference_mode():
            reference = ways["conv2d"]()
            for name, way in ways.items():
                error = (way() - reference).abs().max() / reference.abs().max()
                if error > 1e-5:
                    raise SystemExit(f"{name} is wrong by {error:.1e}")
            seconds = median_times(ways, arguments.rounds)
        ratios = {name: seconds["conv2d"] / value for name, value in seconds.items()}
        rows.append({"side": side, "channels": channels, "seconds": seconds, "speedup": ratios})
        cells = "".join(f" {ratios[name]:>19.2f}" for name in columns)
        print(f"{f'{side}x{side}x{channels}':<12} {1e3 * seconds['conv2d']:>10.2f}{cells}", flush=True)
    if arguments.output:
        result = {
            **describe_machine(),
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
