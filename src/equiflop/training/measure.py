"""Measuring a network after an epoch, and telling by it which epoch was the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from equiflop.training.records import EpochRecord

#: Measures a network in evaluation mode, without gradients: numbers by name.
Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Measurement:
    """What is measured, and what tells the best epoch.

    Attributes:
        measure: gives the numbers; None if there are none.
        best: name of the one whose highest value is the best, or with "-" before it the lowest; "" for the lowest
            training loss.

    Raises:
        ValueError: if a number should tell the best epoch and nothing is measured.
    """

    measure: Measure | None
    best: str

    def __post_init__(self) -> None:
        if self.best and self.measure is None:
            raise ValueError(f"best={self.best!r} names what measure gives, and there is no measure; give one")

    @torch.no_grad()
    def of(self, networks: Sequence[nn.Module]) -> dict[str, float]:
        """Numbers of the network, ``test_`` before their names, and of that of the averaged weights, ``ema_``.

        Raises:
            TypeError: if what is given is no number.
            ValueError: if the number that tells the best is not among them.
        """
        found: dict[str, float] = {}
        if self.measure is None:
            return found
        for prefix, network in zip(("test", "ema"), networks, strict=False):
            values = self.measure(network.eval())
            if not isinstance(values, Mapping):
                raise TypeError(f"measure gave {values!r:.80}; it must give numbers by name")
            if self.best and self.best.removeprefix("-") not in values:
                raise ValueError(f"best={self.best!r} is not what measure gives; choose from {', '.join(values)}")
            for name, value in values.items():
                try:
                    found[f"{prefix}_{name}"] = int(value) if isinstance(value, int) else float(value)
                except (TypeError, ValueError) as error:
                    raise TypeError(f"measure gave {name}={value!r:.80}, which is not a number") from error
        return found

    def score(self, record: EpochRecord) -> float:
        """What tells the best epoch, the higher the better: of the averaged weights where there are any."""
        if not self.best:
            return -record.train_loss
        name = self.best.removeprefix("-")
        value = record.metrics.get(f"ema_{name}", record.metrics[f"test_{name}"])
        return -value if self.best.startswith("-") else value

    def is_best(self, history: Sequence[EpochRecord]) -> bool:
        """Whether the last epoch is better than all before it."""
        scores = [self.score(record) for record in history]
        return bool(scores) and all(score < scores[-1] for score in scores[:-1])
