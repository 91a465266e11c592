"""What a run notes down: a record per epoch, as CSV, JSON lines and for TensorBoard, and samples it could not read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from equiflop.extras import check_installed
from equiflop.files import write_text

#: Name of the list of samples that could not be read, in a run's folder.
UNREADABLE_FILE = "unreadable.txt"
#: Names of the logs.
LOG_FILES = ("log.csv", "log.jsonl")


@dataclass
class Sums:
    """Sums over steps.

    Attributes:
        loss: mean loss of every step.
        samples: that were seen, in all processes.
        unreadable: that could not be read.
        metrics: of the objective, over all samples.
        seconds: how long it took.
    """

    loss: float = 0.0
    samples: int = 0
    unreadable: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: Sums) -> None:
        """Add those of other steps."""
        self.loss += other.loss
        self.samples += other.samples
        self.unreadable += other.unreadable
        self.seconds += other.seconds
        for name, value in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def to_dict(self) -> dict[str, Any]:
        """As a state keeps them."""
        return asdict(self)


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its last step.
        train_loss: mean over its steps.
        metrics: the objective's metrics, ``train_`` before their names, then those of the measurement after the epoch:
            ``test_``, and for the averaged weights ``ema_``.
        unreadable: training samples that could not be read and were left out.
        seconds: training time, measuring not included.
        samples_per_second: training samples per second.
    """

    epoch: int
    lr: float
    train_loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    seconds: float = 0.0
    samples_per_second: float = 0.0

    @classmethod
    def of(cls, epoch: int, lr: float, sums: Sums, steps: int, measured: dict[str, float]) -> EpochRecord:
        """The record of an epoch of so many steps, from what they summed up and what was measured after them."""
        return cls(
            epoch=epoch + 1,
            lr=lr,
            train_loss=sums.loss / steps,
            metrics={f"train_{name}": value / sums.samples for name, value in sums.metrics.items()} | measured,
            unreadable=sums.unreadable,
            seconds=sums.seconds,
            samples_per_second=sums.samples / max(sums.seconds, 1e-9),
        )

    def summary(self, epochs: int, unit: str) -> str:
        """One line for people; ``epochs`` is how many there will be, and a sample is called ``unit``."""
        metrics = "".join(f"  {name} {value:.4g}" for name, value in self.metrics.items())
        left_out = f"  {self.unreadable:,} unreadable {unit} left out" if self.unreadable else ""
        return (
            f"epoch {self.epoch}/{epochs}  loss {self.train_loss:.3f}{metrics}  "
            f"{self.samples_per_second:,.0f} {unit}/s{left_out}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, the metrics among them."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        before = {name: values.pop(name) for name in ("epoch", "lr", "train_loss")}
        return {**before, **values.pop("metrics"), **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochRecord:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: if a number is missing.
        """
        own = {item.name for item in fields(cls)}
        metrics = {name: value for name, value in values.items() if name not in own}
        return cls(**{name: value for name, value in values.items() if name in own}, metrics=metrics)


def write_logs(folder: Path, history: Sequence[EpochRecord]) -> None:
    """Write ``log.csv`` and ``log.jsonl``, one line an epoch.

    Raises:
        OSError: if they cannot be written; what was there before is then intact.
    """
    records = [record.to_dict() for record in history]
    names = dict.fromkeys(name for record in records for name in record) or EpochRecord(0, 0.0, 0.0).to_dict()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(records)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_text(folder / "log.csv", text.getvalue())
    write_text(folder / "log.jsonl", lines)


def check_tensorboard() -> None:
    """See that TensorBoard's package is there.

    Raises:
        ImportError: if not.
    """
    check_installed("tensorboard", "tensorboard", "--tensorboard")


def write_tensorboard(folder: Path, record: EpochRecord) -> None:
    """Add a record to the log of TensorBoard in ``folder/tensorboard``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=record.epoch) as writer:
        for name, value in record.to_dict().items():
            if name != "epoch":
                writer.add_scalar(name, value, record.epoch)


def add_lines(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a sorted text file, each once.

    Raises:
        OSError: if it cannot be written; what was there before is then intact.
    """
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    printable = (" ".join(line.split()).encode(errors="backslashreplace").decode() for line in lines)
    merged = sorted({*known, *printable})
    write_text(path, "".join(f"{line}\n" for line in merged))
