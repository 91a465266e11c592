"""``equiflop plot``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="plot")
@click.argument("runs", nargs=-1, required=True)
@click.option("--output", default="runs.png", show_default=True, help="Image file: .png, .svg or .pdf.")
def command(runs: tuple[str, ...], output: str) -> None:
    """Compare RUNS: loss and accuracy by epoch, accuracy by training time, and the best accuracy of each.

    RUNS are folders that equiflop train wrote; what is not finished is drawn as far as it went.

    \b
    Example:
      equiflop plot runs/flop_deit3_tiny_patch16_224 runs/deit3_tiny_patch16_224 --output compare.png
    """
    from equiflop.training.run_figure import draw_runs, read_run

    records = [read_run(Path(run)) for run in runs]
    draw_runs(records, Path(output))
    width = max(len(run.name) for run in records)
    for run in records:
        best = max(run.accuracy)
        click.echo(
            f"{run.name:<{width}}  best {100 * best:6.2f} % after epoch {run.epochs[run.accuracy.index(best)]}, "
            f"last {100 * run.accuracy[-1]:6.2f} %, {run.seconds[-1]:,.0f} s of training"
        )
    click.echo(f"drawn in {output}")
