"""Several computations timed in turns, so that they share the machine's moods."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from equiflop.runtime.progress import Progress


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one or more values."""
        return cls(statistics.median(values), min(values), max(values))


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    device: torch.device,
    progress: Progress | None = None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Time computations in turns.

    Args:
        calls: what to compute, by name.
        rounds: turns of each.
        seconds: a turn repeats the computation for at least this long.
        device: where it happens; a CUDA device is waited for.
        progress: the line that shows what happens.
        warm_up: how often each is computed before the first turn; compilation happens then.

    Returns:
        seconds per computation of every turn, in order, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        if progress is not None:
            progress.note(f"warming up {name}")
        for _ in range(warm_up):
            call()
    for turn in range(rounds):
        for name, call in calls.items():
            if progress is not None:
                progress.note(f"round {turn + 1} of {rounds}: {name}")
            times[name].append(_one_turn(call, seconds, device))
    return times


def throughput_in_turns(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, seconds: float, progress: Progress | None = None
) -> dict[str, Spread]:
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
    with torch.no_grad():
        calls = {name: partial(model, images) for name, model in models.items()}
        times = time_in_turns(calls, rounds, seconds, images.device, progress)
    return {name: Spread.of([len(images) / value for value in values]) for name, values in times.items()}


def _one_turn(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds per computation. On a CUDA device computations queue up, as in any loop over batches, and the last one
    is waited for; the first one tells how many fill the turn."""
    _wait(device)
    start = time.perf_counter()
    count, queued = 0, 1
    while True:
        for _ in range(queued):
            call()
        _wait(device)
        count += queued
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / count
        if device.type == "cuda":
            queued = math.ceil((seconds - elapsed) * count / elapsed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
