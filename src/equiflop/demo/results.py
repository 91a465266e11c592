"""What the demo measured, as numbers, as a table and as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equiflop.benchmark.timing import Spread
from equiflop.classify import Evaluation
from equiflop.files import write_text
from equiflop.runtime.machine import describe_machine

#: The three classifiers that the demo compares.
E_NAME, PLAIN_NAME, AVERAGED_NAME = "E(ViT)", "plain ViT", "plain, both views averaged"


@dataclass(frozen=True)
class Row:
    """One classifier.

    Attributes:
        name: what it is called in the table.
        parameters: their number.
        macs: multiply-adds for one image.
        evaluation: on the test images.
        throughput: images per second, in evaluation.
    """

    name: str
    parameters: int
    macs: int
    evaluation: Evaluation
    throughput: Spread


@dataclass(frozen=True)
class FullSize:
    """The throughput of a full-size pair that nobody trained here.

    Attributes:
        equivariant: its name in timm.
        plain: its twin's.
        macs: multiply-adds for one image, of both.
        throughput: images per second, of both.
        batch_size: images at once.
        image_size: height and width in pixels.
    """

    equivariant: str
    plain: str
    macs: tuple[int, int]
    throughput: tuple[Spread, Spread]
    batch_size: int
    image_size: int


@dataclass(frozen=True)
class DemoResults:
    """Everything that the demo measured.

    Attributes:
        data: name of the data set.
        settings: those of the demo, and the training's.
        compiled: whether ``torch.compile`` was used.
        seconds: what the whole demo took.
        rows: E(ViT), plain, plain averaged over both views.
        training_images_per_second: of E(ViT) and plain, the median over the epochs.
        full_size: the pair at 224 pixels, unless it was left out.
    """

    data: str
    settings: dict[str, Any]
    compiled: bool
    seconds: float
    rows: tuple[Row, Row, Row]
    training_images_per_second: tuple[float, float]
    full_size: FullSize | None


def format_table(results: DemoResults) -> str:
    """The results as text."""
    equivariant, plain, _ = results.rows
    lines = [
        f"{results.data}: {plain.evaluation.images:,} test images",
        "",
        f"{'':<28}{'parameters':>12}{'MACs':>10}{'accuracy':>10}{'changed if mirrored':>22}{'images/s':>10}",
    ]
    for row in results.rows:
        measured = row.evaluation
        changed = f"{measured.changed:,} ({100 * (measured.changed_share or 0):.2f} %)"
        lines.append(
            f"{row.name:<28}{row.parameters / 1e6:>10.2f} M{row.macs / 1e6:>8.1f} M{100 * measured.top1:>8.2f} %"
            f"{changed:>22}{row.throughput.median:>10,.0f}"
        )
    training = results.training_images_per_second
    lines += [
        "",
        f"E(ViT) needs {equivariant.macs / plain.macs:.2f} of the MACs and "
        f"{equivariant.parameters / plain.parameters:.2f} of the parameters. It classifies "
        f"{equivariant.throughput.median / plain.throughput.median:.2f} times as fast as plain, and trains "
        f"{training[0] / training[1]:.2f} times as fast.",
        f"Changes with ties (gap below 1e-5) counted: {', '.join(_ties(row) for row in results.rows)}.",
    ]
    if results.full_size is not None:
        full = results.full_size
        lines += [
            "",
            f"Full size, untrained: {full.image_size}x{full.image_size} px, batch {full.batch_size}",
        ]
        for name, count, speed in zip((full.equivariant, full.plain), full.macs, full.throughput, strict=True):
            lines.append(f"  {name:<34}{count / 1e9:>7.3f} G MACs{speed.median:>9.1f} images/s")
        ratio = full.throughput[0].median / full.throughput[1].median
        lines.append(f"  {ratio:.2f} times as fast, at {full.macs[0] / full.macs[1]:.2f} of the MACs")
    return "\n".join(lines)


def write_results(path: Path, results: DemoResults) -> None:
    """Write the results with the hardware, versions and command behind them as JSON.

    Raises:
        OSError: if the file cannot be written.
    """
    content = {**describe_machine(), **asdict(results)}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _ties(row: Row) -> str:
    return f"{row.name} {row.evaluation.changed_with_ties:,}"
