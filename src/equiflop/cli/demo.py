"""``equiflop demo``."""

from __future__ import annotations

import click

from equiflop.cli.completion import complete_data
from equiflop.cli.options import device_option


@click.command(name="demo")
@click.option("--data", shell_complete=complete_data, help="A data set as in equiflop train.  [default: see below]")
@click.option("--out", default="demo-output", show_default=True, help="Folder for picture, numbers, networks.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Passes over the images.  [default: the recipe's; on a larger set fewer, for as many in all]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides everything random.")
@click.option("--no-compile", is_flag=True, help="Do not use torch.compile, even where it works.")
@click.option("--no-full-size", is_flag=True, help="Leave out the throughput of a full-size pair at 224 px.")
@device_option
def command(
    data: str | None, out: str, epochs: int | None, seed: int, no_compile: bool, no_full_size: bool, device: str
) -> None:
    """Train a small E(ViT) and its plain twin side by side on real images, then compare them.

    Ends with a table and a picture: parameters, MACs, accuracy, answers that change when the image is mirrored, and
    images per second. Beside them, without any more training: the plain network averaged over both mirrored views.

    The data are Fashion-MNIST: the whole set where it is found (Debian's package dataset-fashion-mnist, or an earlier
    download), else the part that comes with equiflop. Nothing is downloaded, unless by --data fashion-mnist.

    Both networks have the recipe demo: "equiflop train --recipe demo" trains the first of them by itself.

    \b
    Example: equiflop demo --out demo-output
    """
    from equiflop.extras import check_installed

    check_installed("matplotlib", "demo", "the demo")
    from equiflop.demo import DemoSettings, run_demo
    from equiflop.training import TrainingInterrupted

    settings = DemoSettings(
        data=data,
        out=out,
        epochs=epochs,
        seed=seed,
        compile=not no_compile,
        full_size=not no_full_size,
        device=device,
    )
    try:
        run_demo(settings, click.echo)
    except TrainingInterrupted as stopped:
        click.echo(f"equiflop: {stopped}; run the same command again to go on", err=True)
        raise SystemExit(128 + stopped.signal_number) from stopped
