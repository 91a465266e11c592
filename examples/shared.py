"""What the examples share: training in a folder, throughput in turns, the record of a run."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from equiflop.benchmark.timing import time_in_turns
from equiflop.runtime import Progress, describe_machine
from equiflop.training import RunConfig, Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the networks of one comparison share."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    width: int = 128
    depth: int
    heads: int = 4
    seed: int = 0

    def vit(self, img_size: int | tuple[int, int], patch_size: int) -> dict[str, Any]:
        """Keywords of a ViT without classifier."""
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

    def training(self, warmup: float) -> dict[str, Any]:
        """Settings of :func:`train`; the learning rate rises for a share of the epochs."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_epochs": warmup * self.epochs,
            "seed": self.seed,
        }


@contextmanager
def folder_for(out: Path, quick: bool) -> Iterator[Path]:
    """Where the runs go: ``out``, so that what was stopped goes on, or for a smoke test a folder that goes away."""
    if not quick:
        yield out
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def train(
    name: str,
    model: nn.Module,
    objective: Callable[..., Any],
    data: tuple[Tensor, ...],
    folder: Path,
    **settings: Any,
) -> Trainer:
    """Train a network in place on the CPU, or go on where the same run stopped: AdamW, a warm-up, then a cosine.

    Args:
        name: of the network.
        model: the network.
        objective: see :class:`equiflop.training.Trainer`.
        data: tensors with one row per sample.
        folder: of all runs; this one has its own in it, called after the network.
        settings: fields of :class:`equiflop.training.RunConfig`.
    """
    out = folder / re.sub(r"\W+", "-", name).strip("-")
    config = RunConfig(out=str(out), device="cpu", min_lr=0.0, warmup_lr=0.0, **settings)
    trainer = Trainer(model, objective, TensorDataset(*data), config, progress=Progress(name))
    trainer.resume()
    trainer.run()
    model.eval()
    return trainer


def training_rate(trainer: Trainer) -> float:
    """Samples per second in training, the median over the epochs."""
    return statistics.median(record.samples_per_second for record in trainer.history)


def training_seconds(trainer: Trainer) -> float:
    """How long training took."""
    return sum(record.seconds for record in trainer.history)


@torch.no_grad()
def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of computations on the CPU, measured in turns after one turn to warm up."""
    return {name: statistics.median(times) for name, times in time_in_turns(calls, rounds, 0.0, CPU).items()}


def throughput(models: Mapping[str, Callable[[Tensor], Tensor]], batch: Tensor, rounds: int) -> dict[str, float]:
    """Median samples per second of networks in evaluation, measured in turns after one turn to warm up."""
    calls = {name: lambda model=model: model(batch) for name, model in models.items()}
    return {name: len(batch) / seconds for name, seconds in median_seconds(calls, rounds).items()}


def record(**results: Any) -> dict[str, Any]:
    """A run for JSON: machine, versions, command, and what was found."""
    return {**describe_machine(CPU), **results}
