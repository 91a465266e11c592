"""The paper's figures from measurements: MACs against parameters, speedup against size, accuracy against MACs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equiflop.benchmark.compare import Entry
from equiflop.extras import check_installed
from equiflop.files import check_writable, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EQUIVARIANT, _PLAIN = "#0b6e4f", "#c8553d"


def read_accuracies(path: Path) -> dict[str, float]:
    """Accuracies in per cent by model name, from a JSON file.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--accuracy={path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, (int, float)) for v in content.values()):
        raise ValueError(f"--accuracy={path}: must hold numbers by model name, such as {{'deit3_small_...': 81.4}}")
    return {str(name): float(value) for name, value in content.items()}


def check_figures(folder: Path) -> None:
    """See, before anything is measured, that figures can be drawn there.

    Raises:
        ImportError: if matplotlib is not installed.
        OSError: if the folder cannot be written.
    """
    check_installed("matplotlib", "demo", "a figure")
    check_writable(folder / "macs.png")


def write_figures(folder: Path, entries: Sequence[Entry], accuracies: Mapping[str, float]) -> list[Path]:
    """Draw what the entries allow.

    Args:
        folder: where to; made if it is not there.
        entries: measurements.
        accuracies: accuracies in per cent by model name, for the third figure; it is left out without any.

    Returns:
        the files written.

    Raises:
        ImportError: if matplotlib is not installed.
        OSError: if a file cannot be written.
    """
    check_figures(folder)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawings = {"macs.png": _draw_macs, "speedup.png": _draw_speedup}
    figures: dict[str, Figure] = {}
    for name, draw in drawings.items():
        figures[name] = Figure(figsize=(6.5, 4.5), facecolor="white")
        draw(figures[name].add_subplot(), entries)
    if accuracies:
        figures["accuracy.png"] = Figure(figsize=(6.5, 4.5), facecolor="white")
        _draw_accuracy(figures["accuracy.png"].add_subplot(), entries, accuracies)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        content = buffer.getvalue()
        write_atomically(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return [folder / name for name in figures]


def _tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _name(axes: Axes, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, fontsize=6, xytext=(4, -7), textcoords="offset points")


def _colour(entry: Entry) -> str:
    return _EQUIVARIANT if entry.name == entry.model else _PLAIN


def _draw_macs(axes: Axes, entries: Sequence[Entry]) -> None:
    """MACs against parameters, E and plain joined by a line."""
    by_name = {entry.name: entry for entry in entries if "both views" not in entry.name}
    for entry in by_name.values():
        axes.scatter(entry.parameters / 1e6, entry.macs / 1e9, color=_colour(entry), zorder=3)
        _name(axes, entry.name, (entry.parameters / 1e6, entry.macs / 1e9))
    for entry in by_name.values():
        twins = [e for e in entries if e.model == entry.model and e.name != entry.name and "both views" not in e.name]
        if entry.name == entry.model and twins:
            axes.plot(
                [entry.parameters / 1e6, twins[0].parameters / 1e6],
                [entry.macs / 1e9, twins[0].macs / 1e9],
                color="#bbbbbb",
                linewidth=1,
                zorder=1,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _tidy(axes, "parameters (M)", "MACs of one image (G)")


def _draw_speedup(axes: Axes, entries: Sequence[Entry]) -> None:
    """Speedup of E against the plain twin's MACs, and the ratio of MACs, which is the ceiling."""
    pairs = [(e, p) for e in entries if e.name == e.model for p in entries if _is_twin(e, p)]
    settings = sorted({(e.step, e.mode, e.batch_size) for e, _ in pairs})
    for step, mode, batch in settings:
        here = sorted(
            ((p.macs / 1e9, e.speedup) for e, p in pairs if (e.step, e.mode, e.batch_size) == (step, mode, batch)),
            key=lambda point: (point[0], point[1].median),
        )
        medians = [speedup.median for _, speedup in here]
        ranges = [[s.median - s.lowest for _, s in here], [s.highest - s.median for _, s in here]]
        label = f"{step}, {mode}, batch {batch}"
        axes.errorbar([macs for macs, _ in here], medians, ranges, marker="o", capsize=2, linestyle="none", label=label)
    ceiling = sorted({(p.macs / 1e9, p.macs / e.macs) for e, p in pairs})
    if ceiling:
        axes.plot([x for x, _ in ceiling], [y for _, y in ceiling], "k_", markersize=10, label="ratio of MACs")
    axes.axhline(1.0, color="#bbbbbb", linewidth=1)
    axes.set_xscale("log")
    _tidy(axes, "MACs of the plain network (G)", "times as fast as plain")


def _is_twin(entry: Entry, other: Entry) -> bool:
    same = (entry.model, entry.step, entry.mode, entry.batch_size) == (
        other.model,
        other.step,
        other.mode,
        other.batch_size,
    )
    return same and other.name != entry.name and "both views" not in other.name


def _draw_accuracy(axes: Axes, entries: Sequence[Entry], accuracies: Mapping[str, float]) -> None:
    """Accuracy against MACs, for the networks that have one."""
    for entry in {entry.name: entry for entry in entries}.values():
        if entry.name in accuracies:
            place = (entry.macs / 1e9, accuracies[entry.name])
            axes.scatter(*place, color=_colour(entry), zorder=3)
            _name(axes, entry.name, place)
    axes.set_xscale("log")
    _tidy(axes, "MACs of one image (G)", "accuracy (%)")
