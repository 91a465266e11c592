"""The demo's picture: accuracy against MACs and throughput, and answers that change when the image is mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from equiflop.demo.results import AVERAGED_NAME, E_NAME, PLAIN_NAME, DemoResults, Row
from equiflop.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
        figure = Figure(figsize=(13, 8.2 if examples else 5.6), facecolor="white")
        FigureCanvasAgg(figure)
        bottom = 0.44 if examples else 0.13
        top = 0.76 if examples else 0.70
        grid = figure.add_gridspec(1, 3, left=0.065, right=0.975, bottom=bottom, top=top, wspace=0.28)
        _headline(figure, results)
        left, middle, right = (figure.add_subplot(grid[0, i]) for i in range(3))
        costs = [row.macs / 1e6 for row in results.rows]
        speeds = [row.throughput.median for row in results.rows]
        _accuracy_against(left, results, "million MACs per image, fewer is better", costs)
        _accuracy_against(middle, results, "images per second, more is better", speeds)
        _changed_bars(right, results)
        if examples:
            _example_strip(figure, examples)
        _footnote(figure, results)
        write_atomically(path, lambda file: figure.savefig(file, dpi=160, format="png"))


def _headline(figure: Figure, results: DemoResults) -> None:
    equivariant, plain, _ = results.rows
    speed = equivariant.throughput.median / plain.throughput.median
    high = 0.965
    figure.text(0.035, high, _title(results), fontsize=20, fontweight="bold", va="top")
    difference = 100 * (equivariant.evaluation.top1 - plain.evaluation.top1)
    figure.text(
        0.035,
        high - (0.058 if figure.get_figheight() > 7 else 0.085),
        f"{results.data}, {plain.evaluation.images:,} test images, same recipe and epochs. Against the plain twin: "
        f"{equivariant.macs / plain.macs:.2f} of the MACs, {equivariant.parameters / plain.parameters:.2f} of the "
        f"parameters, {speed:.2f} times the speed, {difference:+.1f} points of accuracy.",
        fontsize=12,
        va="top",
        color="#555555",
    )


def _title(results: DemoResults) -> str:
    changed = results.rows[0].evaluation.changed
    if changed == 0:
        return "A mirror-equivariant ViT: the same answer for both views, at half the cost"
    return f"A mirror-equivariant ViT at half the cost ({changed} answers changed by mirroring)"


def _accuracy_against(axes: Axes, results: DemoResults, label: str, values: Sequence[float]) -> None:
    accuracies = [100 * row.evaluation.top1 for row in results.rows]
    for row, x, y in zip(results.rows, values, accuracies, strict=True):
        axes.scatter([x], [y], s=170, color=_COLOUR[row.name], zorder=3, edgecolors="white", linewidths=1.5)
        on_right = x > 0.72 * max(values)
        axes.annotate(
            _LABEL[row.name],
            (x, y),
            xytext=(-12 if on_right else 12, 0),
            textcoords="offset points",
            ha="right" if on_right else "left",
            va="center",
            color=_COLOUR[row.name],
            fontweight="bold",
        )
    middle = (max(accuracies) + min(accuracies)) / 2
    reach = max(1.5, 0.75 * (max(accuracies) - min(accuracies)))
    axes.set_ylim(middle - reach, middle + reach)
    axes.set_xlim(0, 1.12 * max(values))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(_with_thousands())
    axes.set_xlabel(label)
    axes.set_title("test accuracy (%)", loc="left", fontsize=11, color=_INK)


def _changed_bars(axes: Axes, results: DemoResults) -> None:
    rows = list(reversed(results.rows))
    counts = [_changed(row) for row in rows]
    axes.barh(range(len(rows)), counts, color=[_COLOUR[row.name] for row in rows], height=0.55)
    largest = max(max(counts), 1)
    for y, (row, count) in enumerate(zip(rows, counts, strict=True)):
        text = f"{count:,}" if count == 0 else f"{count:,}  ({100 * (row.evaluation.changed_share or 0):.1f} %)"
        axes.text(count + 0.03 * largest, y, text, va="center", fontweight="bold", color=_COLOUR[row.name])
    axes.set_yticks(range(len(rows)), [_LABEL[row.name] for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_COLOUR[row.name])
        tick.set_fontweight("bold")
    axes.set_xlim(0, 1.55 * largest)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"answers of {rows[0].evaluation.images:,} that change if mirrored", loc="left", fontsize=11)


def _example_strip(figure: Figure, examples: Sequence[Example]) -> None:
    heading = "Test images that plain takes for something else when they are mirrored, and E(ViT) does not"
    figure.text(0.035, 0.315, heading, fontweight="bold")
    width = 0.955 / max(len(examples), 6)
    for i, example in enumerate(examples):
        left = 0.035 + i * width
        for view in range(2):
            axes = figure.add_axes((left + view * 0.46 * width, 0.165, 0.42 * width, 0.125))
            pixels = example.pixels.numpy()
            axes.imshow(pixels if view == 0 else pixels[:, ::-1], cmap="gray_r" if pixels.ndim == 2 else None)
            axes.set_axis_off()
        changed, same = f"{example.label} → {example.mirrored_label}", f"{example.label}, both ways"
        figure.text(left, 0.125, changed, color=_COLOUR[PLAIN_NAME], fontsize=9.5, va="bottom")
        figure.text(left, 0.093, same, color=_COLOUR[E_NAME], fontsize=9.5, va="bottom")


def _footnote(figure: Figure, results: DemoResults) -> None:
    text = "MACs: multiply-adds. E(ViT) and plain: one network each. "
    if results.full_size is not None:
        full = results.full_size
        text += (
            f"Full size, untrained, {full.image_size} px, batch {full.batch_size}: ViT-S/16 "
            f"{full.throughput[0].median:.1f} images/s as E(ViT), {full.throughput[1].median:.1f} as plain "
            f"({full.throughput[0].median / full.throughput[1].median:.2f} times as fast). "
        )
    if not results.symmetric:
        text += "Digits are not mirror-symmetric: a smoke run, no accuracy claim."
    figure.text(0.035, 0.025, text, fontsize=9, color="#777777")


def _changed(row: Row) -> int:
    return row.evaluation.changed or 0


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def _with_thousands() -> Any:
    from matplotlib.ticker import StrMethodFormatter

    return StrMethodFormatter("{x:,.0f}")
