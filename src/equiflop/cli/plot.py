"""``equiflop plot``."""

from __future__ import annotations

from pathlib import Path

import click

from equiflop.cli.completion import complete_files


@click.command(name="plot")
@click.argument("runs", nargs=-1, required=True, shell_complete=complete_files)
@click.option("--output", default="runs.png", show_default=True, help="Image file: .png, .svg or .pdf.")
def command(runs: tuple[str, ...], output: str) -> None:
    """Compare RUNS: loss and accuracy by epoch, accuracy by training time, and the best accuracy of each.

    RUNS are folders that equiflop train wrote; what is not finished is drawn as far as it went, and what
    is no run, or has no epoch yet, is left out and named.

    \b
    Example:
      equiflop plot runs/flop_deit3_tiny_patch16_224 runs/deit3_tiny_patch16_224 --output compare.png
    """
    from equiflop.classify.run_figure import RunLog, draw_runs, read_run

    records: list[RunLog] = []
    problems: list[str] = []
    for folder in runs:
        try:
            records.append(read_run(Path(folder)))
        except ValueError as error:
            problems.append(str(error))
    if not records:
        raise ValueError(problems[0])
    for problem in problems:
        click.echo(f"equiflop: left out {problem}", err=True)
    draw_runs(records, Path(output))
    width = max(len(run.name) for run in records)
    for run in records:
        best = max(run.accuracy)
        click.echo(
            f"{run.name:<{width}}  best {100 * best:6.2f} % after epoch {run.epochs[run.accuracy.index(best)]}, "
            f"last {100 * run.accuracy[-1]:6.2f} %, {run.seconds[-1]:,.0f} s of training"
        )
    click.echo(f"drawn in {output}")
