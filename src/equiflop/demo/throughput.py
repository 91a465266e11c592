"""How many images per second several networks classify, measured in turns so that they share the machine's moods."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiflop.training.progress import Progress


@dataclass(frozen=True)
class Throughput:
    """Images per second over the rounds of a measurement."""

    median: float
    lowest: float
    highest: float


def measure_throughput(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, seconds: float, progress: Progress
) -> dict[str, Throughput]:
    """Let networks classify the same images in turns.

    Args:
        models: networks in evaluation mode, on the device of the images.
        images: one batch, shape ``(B, C, H, W)``.
        rounds: turns for each network, after one to warm up.
        seconds: length of a turn.
        progress: the line that shows what happens.

    Returns:
        images per second for every network.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for name, model in models.items():
            progress.note(f"warming up {name}")
            _one_turn(model, images, 0.0)
        for turn in range(rounds):
            for name, model in models.items():
                progress.note(f"throughput, round {turn + 1} of {rounds}: {name}")
                rates[name].append(_one_turn(model, images, seconds))
    return {name: Throughput(statistics.median(values), min(values), max(values)) for name, values in rates.items()}


def _one_turn(model: nn.Module, images: Tensor, seconds: float) -> float:
    batches = 0
    start = time.perf_counter()
    while True:
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        batches += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return batches * len(images) / elapsed
