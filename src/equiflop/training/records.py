"""What a run notes down: a record per epoch, as CSV, JSON lines and for TensorBoard, and images it could not read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from equiflop.extras import check_installed
from equiflop.files import write_text

#: Name of the list of images that could not be read, in a run's folder.
UNREADABLE_FILE = "unreadable.txt"
#: Names of the logs.
LOG_FILES = ("log.csv", "log.jsonl")


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its last step.
        train_loss: mean over its steps, label smoothing included.
        train_accuracy: share of training images classified rightly as they came by (mixed ones by their own label).
        test_accuracy: share of test images classified rightly after it.
        test_top5: share of test images whose class is among the best five.
        ema_accuracy: the same as test_accuracy for the averaged weights; None if there are none.
        unreadable: training images that could not be read and were left out.
        seconds: training time, measuring not included.
        images_per_second: training images per second.
        test_unreadable: test images that could not be read and were left out.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    test_top5: float
    ema_accuracy: float | None
    unreadable: int
    seconds: float
    images_per_second: float
    test_unreadable: int = 0

    @property
    def best_accuracy(self) -> float:
        """Of the averaged weights where there are any."""
        return self.test_accuracy if self.ema_accuracy is None else self.ema_accuracy

    def summary(self, epochs: int) -> str:
        """One line for people; ``epochs`` is how many there will be."""
        average = "" if self.ema_accuracy is None else f" (average {100 * self.ema_accuracy:.2f} %)"
        left_out = f"  {self.unreadable:,} unreadable images left out" if self.unreadable else ""
        left_out += f"  {self.test_unreadable:,} unreadable test images left out" if self.test_unreadable else ""
        return (
            f"epoch {self.epoch}/{epochs}  loss {self.train_loss:.3f}  train {100 * self.train_accuracy:.2f} %  "
            f"test {100 * self.test_accuracy:.2f} %{average}  {self.images_per_second:,.0f} images/s{left_out}"
        )


def write_logs(folder: Path, history: Sequence[EpochRecord]) -> None:
    """Write ``log.csv`` and ``log.jsonl``, one line an epoch.

    Raises:
        OSError: if they cannot be written; what was there before is then intact.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(EpochRecord)])
    writer.writeheader()
    records = [asdict(record) for record in history]
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
        for name, value in asdict(record).items():
            if name != "epoch" and value is not None:
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
