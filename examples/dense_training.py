"""What the examples of dense prediction share: one training loop, timing in turns, the record of a run."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from equiflop.benchmark.machine import describe_machine
from equiflop.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all networks of an example share; an example adds its numbers of pictures."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    width: int = 128
    depth: int
    heads: int = 4
    seed: int = 0

    def vit_options(self, img_size: int | tuple[int, int], patch_size: int) -> dict[str, Any]:
        """Keywords of the vision transformer, without a classifier."""
        return {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "num_classes": 0,
            "init_values": None,
            "no_embed_class": True,
        }


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


def read_options(description: str | None, things: str) -> argparse.Namespace:
    """The options of an example that draws its ``things``, trains networks on them and compares them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of {things}, weights and batches")
    parser.add_argument("--epochs", type=int, help=f"passes over the training {things}")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write; needs matplotlib")
    return parser.parse_args()


def write_panels(figure: Figure, axes: Any, columns: Sequence[str], path: Path) -> None:
    """Write a figure of panels: titles above the first row, no ticks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def record(recipe: Recipe, seconds: float, rows: dict[str, dict[str, Any]], **others: Any) -> dict[str, Any]:
    """A run for JSON: command, versions, machine, recipe and what was measured."""
    return {
        **describe_machine(),
        "seconds": seconds,
        "recipe": asdict(recipe),
        **others,
        "networks": rows,
    }
