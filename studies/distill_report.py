"""The tables and the figure of the study of distillation."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from distill_runs import EPOCHS, HERE, NAMES, STARTS, Run, all_runs, is_of
from job_queue import put_table, spread

#: What is drawn: kind and note of a run.
COLOURS = {
    ("scratch", ""): "tab:gray",
    ("random", ""): "tab:blue",
    ("steer", ""): "tab:orange",
    ("steer", "coupled-heads"): "tab:red",
    ("steer", "coupled-heads-labels-alone"): "tab:purple",
    ("plain", ""): "black",
}


def report(records: list[dict[str, Any]]) -> None:
    """Put tables and figure into the study's folder.

    Args:
        records: lines of the results.
    """
    by_name = {record["run"]: record for record in records}
    groups: dict[Run, list[dict[str, Any]]] = defaultdict(list)
    for run in all_runs():
        if run.name in by_name and is_of(by_name[run.name], run):
            groups[Run(run.family, run.kind, run.width, run.epochs, note=run.note)].append(by_name[run.name])
    teachers = {run.family: records[0] for run, records in groups.items() if run.kind == "teacher"}
    order = list(STARTS)
    students = {run: records for run, records in groups.items() if run.kind in order}
    families = list(NAMES)
    ordered = sorted(
        students,
        key=lambda run: (families.index(run.family), run.width != "1", run.epochs, order.index(run.kind), run.note),
    )
    put_table(HERE / "README.md", "teachers", _teachers(teachers))
    trained = {run: students[run] for run in ordered if run.epochs}
    put_table(HERE / "README.md", "students", _students(trained, teachers))
    put_table(
        HERE / "README.md",
        "untrained",
        _untrained({run: records for run, records in students.items() if not run.epochs}),
    )
    put_table(HERE / "README.md", "layers", _layers(teachers))
    _draw(trained, teachers)


def _teachers(teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| teacher | MACs M | parameters M | accuracy % | both views % | changes when mirrored % | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, record in teachers.items():
        shares = [100 * record[key] for key in ("accuracy", "accuracy_both_views", "changed_when_mirrored")]
        cells = [NAMES[family], f"{record['macs'] / 1e6:.1f}", f"{record['parameters'] / 1e6:.3f}"]
        cells += [*(f"{share:.2f}" for share in shares), f"{record['train_seconds'] / 60:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _students(groups: dict[Run, list[dict[str, Any]]], teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| student | width | budget | start | MACs M | seeds | accuracy % | below teacher | agreement % | minutes |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, records in groups.items():
        shares = [100 * record["accuracy"] for record in records]
        goal = 100 * teachers[run.family]["accuracy_both_views"]
        cells = [
            NAMES[run.family],
            run.width,
            f"{100 * run.epochs // EPOCHS} %",
            STARTS[run.kind] + (f", {run.note}" if run.note else ""),
            f"{records[0]['macs'] / 1e6:.1f}",
            str(len(records)),
            spread(shares),
            f"{goal - sum(shares) / len(shares):.2f}",
            spread([100 * record["agreement"] for record in records]),
            f"{statistics.median(record['train_seconds'] for record in records) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _untrained(groups: dict[Run, list[dict[str, Any]]]) -> str:
    """What steering gives by itself."""
    lines = [
        "| width | heads | images | seeds | projected: accuracy % | agreement % | fitted: accuracy % | agreement % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, records in groups.items():
        heads, _, images, _ = run.note.split("-")
        cells = [run.width, heads, images, str(len(records))]
        for found in ([record["projected"] for record in records], records):
            cells += [spread([100 * record[key] for record in found]) for key in ("accuracy", "agreement")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _layers(teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| teacher | place | best involution % | one for the width % | none % |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for family, record in teachers.items():
        for layer in record["layers"]:
            shares = (f"{100 * layer[key]:.1f}" for key in ("best", "common", "unchanged"))
            lines.append(f"| {NAMES[family]} | {layer['place']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _draw(groups: dict[Run, list[dict[str, Any]]], teachers: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, family in zip(figure.subplots(1, len(teachers), squeeze=False)[0], teachers, strict=True):
        goal = 100 * teachers[family]["accuracy_both_views"]
        axes.axhline(goal, color="black", linestyle=":", label="teacher, both views")
        for (kind, note), colour in COLOURS.items():
            for width, style in (("1", "-"), ("3/4", "--")):
                runs = sorted(
                    (
                        run
                        for run in groups
                        if (run.family, run.kind, run.width, run.note) == (family, kind, width, note)
                    ),
                    key=lambda run: run.epochs,
                )
                if not runs:
                    continue
                budget = [100 * run.epochs / EPOCHS for run in runs]
                values = [[100 * record["accuracy"] for record in groups[run]] for run in runs]
                means = [sum(each) / len(each) for each in values]
                label = f"{STARTS[kind]}{', ' * bool(note)}{note}, width {width}"
                axes.plot(budget, means, style, color=colour, marker="o" if width == "1" else "^", label=label)
        axes.set(xscale="log", xlabel="budget in % of the teacher's", title=NAMES[family])
        axes.set_xticks([5, 10, 20, 100], ["5", "10", "20", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy in %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(HERE / "accuracy.png", dpi=120)
