"""What the examples of dense prediction share: one training loop, timing in turns, the record of a run."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

import equiflop


class Recipe(Protocol):
    """What the loop needs of an example's recipe."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def seed(self) -> int: ...


def train(
    name: str,
    model: nn.Module,
    count: int,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    recipe: Recipe,
    warmup: float,
) -> float:
    """Train a network in place: AdamW, a linear warm-up, then a cosine.

    Args:
        name: of the network, for the progress lines.
        model: the network.
        count: training images.
        loss_of: the loss of a batch, given the indices of its images and the generator that drew them.
        recipe: of the example.
        warmup: share of the steps.

    Returns:
        images per second.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    per_epoch = count // recipe.batch_size
    steps = recipe.epochs * per_epoch
    rising = max(1, int(steps * warmup))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / rising, 0.5 * (1 + math.cos(math.pi * max(0, i - rising) / max(1, steps - rising)))),
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    model.train()
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        losses = []
        order = torch.randperm(count, generator=generator)[: per_epoch * recipe.batch_size]
        for index in order.split(recipe.batch_size):
            loss = loss_of(index, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        speed = (epoch + 1) * len(order) / (time.perf_counter() - start)
        loss_now = statistics.mean(losses)
        print(f"{name}: epoch {epoch + 1}/{recipe.epochs}, loss {loss_now:.3f}, {speed:.0f} im/s", flush=True)
    return speed


def throughput(models: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> dict[str, float]:
    """Median images per second of networks in evaluation, measured in turns after one turn to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if turn:
                    rates[name].append(len(images) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def record(recipe: Any, seconds: float, rows: dict[str, dict[str, Any]], **others: Any) -> dict[str, Any]:
    """A run for JSON: command, versions, machine, recipe and what was measured."""
    return {
        "command": "python " + " ".join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "equiflop": equiflop.__version__,
        },
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seconds": seconds,
        "recipe": asdict(recipe),
        **others,
        "networks": rows,
    }
