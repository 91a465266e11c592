"""The demo's picture: accuracy against MACs and throughput, and answers that change when the image is mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor

from equiflop.demo.results import AVERAGED_NAME, E_NAME, PLAIN_NAME, DemoResults, Row
from equiflop.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR = {E_NAME: "#0b6e4f", PLAIN_NAME: "#c8553d", AVERAGED_NAME: "#8d8d8d"}
_LABEL = {E_NAME: "E(ViT)", PLAIN_NAME: "plain", AVERAGED_NAME: "plain, both\nviews averaged"}
_INK, _FAINT = "#222222", "#d9d9d9"


@dataclass(frozen=True)
class Example:
    """A test image on which the plain network changes its mind.

    Attributes:
        pixels: uint8, ``(H, W)`` or ``(H, W, 3)``.
        label: the right class, which plain finds in the image as it is, and E(ViT) in both views.
        mirrored_label: what plain finds in the mirror image.
    """

    pixels: Tensor
    label: str
    mirrored_label: str


def draw_picture(path: Path, results: DemoResults, examples: Sequence[Example]) -> None:
    """Draw the results and save them as a PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    style: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 8.0 if examples else 5.2), facecolor="white")
        FigureCanvasAgg(figure)
        inch = 1 / figure.get_figheight()
        bottom = 3.4 * inch if examples else 1.15 * inch
        grid = figure.add_gridspec(1, 3, left=0.06, right=0.975, bottom=bottom, top=1 - 1.75 * inch, wspace=0.2)
        left, middle, right = (figure.add_subplot(grid[0, i]) for i in range(3))
        _headline(figure, results, inch)
        costs = [row.macs / 1e6 for row in results.rows]
        speeds = [row.throughput.median for row in results.rows]
        _accuracy_against(left, results, "million MACs per image (fewer is better)", costs)
        _accuracy_against(middle, results, "images per second (more is better)", speeds)
        _changed_bars(right, results)
        if examples:
            _example_strip(figure, examples, inch)
        _footnote(figure, results, inch)
        write_atomically(path, lambda file: figure.savefig(file, dpi=160, format="png"))


def _headline(figure: Figure, results: DemoResults, inch: float) -> None:
    equivariant, plain, _ = results.rows
    ratio = equivariant.macs / plain.macs
    if equivariant.evaluation.changed == 0 and ratio < 0.55:
        title = "A mirror-equivariant ViT: one answer for both views, at half the MACs"
    else:
        title = "A mirror-equivariant ViT, measured against its plain twin"
    figure.text(0.03, 1 - 0.3 * inch, title, fontsize=21, fontweight="bold", va="top")
    speed = equivariant.throughput.median / plain.throughput.median
    difference = 100 * (equivariant.evaluation.top1 - plain.evaluation.top1)
    subtitle = (
        f"Against its plain twin: {ratio:.2f} of the MACs, "
        f"{equivariant.parameters / plain.parameters:.2f} of the parameters, {speed:.2f} times the speed, "
        f"{difference:+.2f} points of accuracy"
    )
    figure.text(0.03, 1 - 0.82 * inch, subtitle, fontsize=13, va="top", color="#555555")


def _accuracy_against(axes: Axes, results: DemoResults, label: str, values: Sequence[float]) -> None:
    accuracies = [100 * row.evaluation.top1 for row in results.rows]
    for row, x, y in zip(results.rows, values, accuracies, strict=True):
        axes.scatter([x], [y], s=200, color=_COLOUR[row.name], zorder=3, edgecolors="white", linewidths=1.5)
        below = row.name == AVERAGED_NAME and y < max(accuracies)
        axes.annotate(
            _LABEL[row.name],
            (x, y),
            xytext=(0, -12 if below else 12),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color=_COLOUR[row.name],
            fontweight="bold",
        )
    middle = (max(accuracies) + min(accuracies)) / 2
    reach = max(1.5, 1.2 * (max(accuracies) - min(accuracies)))
    axes.set_ylim(middle - reach, middle + reach)
    axes.set_xlim(0, 1.25 * max(values))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    axes.set_title("test accuracy (%)", loc="left", fontsize=11)


def _changed_bars(axes: Axes, results: DemoResults) -> None:
    counts = [_changed(row) for row in results.rows]
    largest = max(max(counts), 1)
    for y, (row, count) in enumerate(zip(results.rows, counts, strict=True)):
        colour = _COLOUR[row.name]
        axes.barh(y, count, color=colour, height=0.34)
        share = f"  ({100 * (row.evaluation.changed_share or 0):.1f} %)" if count else ""
        axes.text(count + 0.02 * largest, y, f"{count:,}{share}", va="center", fontweight="bold", color=colour)
        axes.text(0, y - 0.3, _LABEL[row.name].replace("\n", " "), va="center", fontweight="bold", color=colour)
    axes.set_ylim(len(counts) - 0.6, -0.6)
    axes.set_xlim(0, 1.45 * largest)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["left"].set_color(_FAINT)
    axes.spines["bottom"].set_visible(False)
    images = results.rows[0].evaluation.images
    axes.set_title(f"answers that change when mirrored, of {images:,}", loc="left", fontsize=11)


def _example_strip(figure: Figure, examples: Sequence[Example], inch: float) -> None:
    heading = "Test images that plain takes for something else when they are mirrored, and E(ViT) does not"
    figure.text(0.03, 2.4 * inch, heading, fontweight="bold")
    width = 0.945 / max(len(examples), 6)
    for i, example in enumerate(examples):
        left = 0.03 + i * width
        pixels = example.pixels.numpy()
        for view, shown in enumerate((pixels, pixels[:, ::-1])):
            axes = figure.add_axes((left + view * 0.46 * width, 1.3 * inch, 0.43 * width, 0.95 * inch))
            axes.imshow(shown, cmap="gray_r" if pixels.ndim == 2 else None, interpolation="nearest")
            axes.set_axis_off()
        changed = f"{example.label} → {example.mirrored_label}"
        figure.text(left, 1.0 * inch, changed, color=_COLOUR[PLAIN_NAME], fontsize=9.5)
        figure.text(left, 0.78 * inch, f"{example.label}, both ways", color=_COLOUR[E_NAME], fontsize=9.5)


def _footnote(figure: Figure, results: DemoResults, inch: float) -> None:
    images, epochs, seed = results.rows[0].evaluation.images, results.settings["epochs"], results.settings["seed"]
    text = f"{results.data}, {images:,} test images. Same recipe for both networks: {epochs} epochs, seed {seed}. "
    if results.full_size is not None:
        full = results.full_size
        fast, slow = (speed.median for speed in full.throughput)
        text += (
            f"\nFull size, untrained, {full.image_size} px, batch {full.batch_size}: ViT-S/16 classifies "
            f"{fast:.1f} images/s as E(ViT), {slow:.1f} as plain ({fast / slow:.2f} times as fast). "
        )
    figure.text(0.03, 0.48 * inch, text, fontsize=9, va="top", color="#777777")


def _changed(row: Row) -> int:
    return row.evaluation.changed or 0
