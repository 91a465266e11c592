"""``equiflop train``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.options import ImageSize, KeyValue, device_option, json_option, workers_option

if TYPE_CHECKING:
    from equiflop.training import EpochRecord, Trainer


@click.command(name="train")
@click.argument("model")
@click.option("--data", required=True, help="fashion-mnist, digits, or a folder with train/CLASS/* and test/CLASS/*.")
@click.option("--out", help="Folder for checkpoints, log and final weights.  [default: runs/MODEL]")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto goes on from the newest checkpoint in --out, if there is one; never removes them and starts anew.",
)
@click.option(
    "--set", "settings", type=KeyValue(), multiple=True, help="A keyword of the model, such as depth=2; repeatable."
)
@click.option("--img-size", "image_size", type=ImageSize(), help="224 or 256x192, height first.  [default: the data's]")
@click.option("--channels", type=click.IntRange(1, 3), help="1 (grey) or 3 (colour).  [default: the data's]")
@click.option("--epochs", type=int, default=10, show_default=True, help="Passes over the training images.")
@click.option("--batch-size", type=int, default=128, show_default=True, help="Images a step.")
@click.option("--optimizer", default="adamw", show_default=True, help="timm's name of the optimiser.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--min-lr", type=float, default=1e-6, show_default=True, help="Learning rate at the end of the cosine.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Weight decay.")
@click.option("--warmup-epochs", type=float, default=1.0, show_default=True, help="Epochs of linear warm-up.")
@click.option("--label-smoothing", type=float, default=0.1, show_default=True, help="Label smoothing, 0 to 1.")
@click.option("--drop-path", type=float, default=0.0, show_default=True, help="Stochastic depth of the last block.")
@click.option("--clip-grad", type=float, default=1.0, show_default=True, help="Largest norm of the gradient, 0: any.")
@click.option("--mirror", type=float, default=0.5, show_default=True, help="Probability of mirroring an image.")
@click.option("--shift", type=int, default=2, show_default=True, help="Largest shift in pixels (built-in sets).")
@click.option("--crop-scale", type=float, default=0.35, show_default=True, help="Smallest random crop (folders).")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides everything random.")
@click.option("--amp", is_flag=True, help="Train in bfloat16 where that is safe.")
@click.option("--compile", "compile_", is_flag=True, help="Use torch.compile: a wait first, then faster.")
@device_option
@workers_option
@json_option
def command(
    model: str,
    out: str | None,
    resume: str,
    settings: tuple[tuple[str, Any], ...],
    compile_: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL on labelled images.

    MODEL is any name that timm knows, ours ("equiflop models" lists them) or its own. The same command, run again
    after Ctrl-C, a crash or a power cut, goes on where it stopped and ends with the same weights.

    \b
    A first try, two minutes on a laptop:
      equiflop train flop_deit3_tiny_patch16_224 --data fashion-mnist \\
        --set patch_size=7 --set embed_dim=128 --set depth=4 --set num_heads=4 --epochs 2
    Your own pictures in photos/train/CLASS/* and photos/test/CLASS/*:
      equiflop train flop_deit3_small_patch16_224 --data photos --epochs 50 --workers 2
    """
    from equiflop.training import TrainConfig, Trainer, TrainingInterrupted

    config = TrainConfig(
        model=model, out=out or str(Path("runs") / model), model_kwargs=dict(settings), compile=compile_, **options
    )
    trainer = Trainer(config)
    start = trainer.resume() if resume == "auto" else None
    if resume == "never":
        trainer.start_anew()
    _introduce(trainer, start)
    try:
        history = trainer.run()
    except TrainingInterrupted as stopped:
        click.echo(f"equiflop: {stopped}; run the same command again to go on", err=True)
        raise SystemExit(128 + stopped.signal_number) from stopped
    _conclude(trainer, history, as_json)


def _introduce(trainer: Trainer, start: Path | None) -> None:
    data, say = trainer.data, trainer.progress.print
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    size = "x".join(map(str, data.preprocessing.input_size))
    say(f"{trainer.config.model}: {parameters / 1e6:.2f} M parameters, input {size}, on {trainer.device}")
    say(f"{data.name} from {data.origin}: {len(data.train):,} images to train on, {len(data.test):,} to test on")
    if trainer.finished:
        say(f"{start}: all epochs are done; give another --out, or --resume never to start anew")
    elif start is not None:
        say(f"going on from {start} (epoch {trainer.epoch + 1}, {trainer.step} steps done)")


def _conclude(trainer: Trainer, history: list[EpochRecord], as_json: bool) -> None:
    weights = trainer.out / "model.safetensors"
    last = history[-1]
    if as_json:
        click.echo(json.dumps({"weights": str(weights), **asdict(last)}, indent=2))
        return
    click.echo(f"test accuracy {100 * last.test_accuracy:.2f} % (top-5 {100 * last.test_top5:.2f} %)")
    click.echo(f"weights in {weights}, log in {trainer.out / 'log.csv'}")
    click.echo(f"next: equiflop eval {trainer.out}")
