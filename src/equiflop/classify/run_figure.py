"""A figure that compares training runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from equiflop.figure_files import check_figure_file, save_figure


@dataclass(frozen=True)
class RunLog:
    """What a run noted after every epoch.

    Attributes:
        name: of its folder.
        epochs: numbers of the epochs.
        loss: mean training loss.
        accuracy: on the test images, between 0 and 1; of the averaged weights where there are any.
        seconds: training time until then.
    """

    name: str
    epochs: list[int]
    loss: list[float]
    accuracy: list[float]
    seconds: list[float]


class NoAccuracyError(ValueError):
    """A run that was measured in another way."""


def read_run(folder: Path) -> RunLog:
    """Read the log of a run.

    Raises:
        ValueError: if there is none, it is damaged, or no epoch is complete.
    """
    path = folder / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any("test_error" in record and "test_accuracy" not in record for record in records):
            raise NoAccuracyError(f"{folder}: no accuracy was measured, since the data have other labels")
        accuracy = [
            float(record["test_accuracy"] if record.get("ema_accuracy") is None else record["ema_accuracy"])
            for record in records
        ]
        log = RunLog(
            folder.resolve().name,
            [int(record["epoch"]) for record in records],
            [float(record["train_loss"]) for record in records],
            accuracy,
            list(accumulate(float(record["seconds"]) for record in records)),
        )
    except NoAccuracyError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: not a run of equiflop train (no log.jsonl)") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a damaged log ({error})") from error
    if not log.epochs:
        raise ValueError(f"{path}: no epoch is complete yet")
    return log


def draw_runs(runs: Sequence[RunLog], output: Path) -> None:
    """Loss and accuracy by epoch, and accuracy by time.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the file is not an image of a known kind.
        OSError: if it cannot be written; what was there before is then intact.
    """
    check_figure_file(output, "output")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, by_epoch, by_time = figure.subplots(1, 3)
    for run in runs:
        label = _label(run.name)
        percent = [100 * value for value in run.accuracy]
        loss.plot(run.epochs, run.loss, marker=".", label=label)
        by_epoch.plot(run.epochs, percent, marker=".", label=label)
        by_time.plot([seconds / 60 for seconds in run.seconds], percent, marker=".", label=label)
    for axes, x, y in (
        (loss, "epoch", "training loss"),
        (by_epoch, "epoch", "test accuracy in %"),
        (by_time, "training time in minutes", "test accuracy in %"),
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    loss.legend()
    save_figure(figure, output)


def _label(name: str) -> str:
    """A name as matplotlib shows it: it leaves out labels that begin with "_", and reads "$" as mathematics."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")
