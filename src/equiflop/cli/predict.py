"""``equiflop predict``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from equiflop.cli.completion import complete_files, complete_models
from equiflop.cli.options import device_option, json_option

if TYPE_CHECKING:
    from equiflop.classify.prediction import Answer, Prediction


@click.command(name="predict")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option(
    "--checkpoint",
    shell_complete=complete_files,
    help="What equiflop train wrote: a run's folder, model.safetensors or a checkpoint.",
)
@click.option(
    "--model",
    shell_complete=complete_models,
    help="In place of --checkpoint, with --pretrained: timm's name of a model.",
)
@click.option(
    "--pretrained", is_flag=True, help="Use timm's weights of --model (downloads them), ours from $EQUIFLOP_WEIGHTS."
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes to name.")
@device_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[str, ...],
    checkpoint: str | None,
    model: str | None,
    pretrained: bool,
    top: int,
    device: str,
    as_json: bool,
) -> None:
    """Say what is on IMAGES, and whether the answer is the same for their mirror images.

    An equivariant model gives the same probabilities for both; a plain one does not. An image that cannot be read is
    named, and the exit code is 2, after the others.

    \b
    Examples:
      equiflop predict shoe.png boot.jpg --checkpoint runs/flop_deit3_tiny_patch16_224
      equiflop predict cat.jpg --model deit3_small_patch16_224 --pretrained
    """
    if (checkpoint is None) == (model is None):
        raise click.UsageError("give either --checkpoint, or --model with --pretrained")
    if model is not None and not pretrained:
        raise click.UsageError(f"--model {model} has random weights without --pretrained; add it, or give --checkpoint")

    from equiflop.classify.prediction import Classifier, predict
    from equiflop.runtime.device import pick_device

    chosen = pick_device(device)
    classifier = Classifier.from_file(checkpoint) if checkpoint is not None else Classifier.from_timm(str(model))
    predictions = []
    failed = False
    for image in images:
        try:
            prediction = predict(classifier, image, chosen, top)
        except ValueError as error:
            if not classifier.classes or os.environ.get("EQUIFLOP_DEBUG"):
                raise
            failed = True
            click.echo(f"equiflop: {error}", err=True)
            continue
        predictions.append(prediction)
        if not as_json:
            _show(prediction)
    if as_json:
        click.echo(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
    if failed:
        ctx.exit(2)


def _show(prediction: Prediction) -> None:
    click.echo(prediction.image)
    columns = [_column("as it is", prediction.best), _column("mirrored", prediction.mirrored)]
    width = max(map(len, columns[0])) + 4
    for left, right in zip(*columns, strict=True):
        click.echo(f"  {left:<{width}}{right}")
    verdict = "same answer" if prediction.same_answer else "another answer"
    difference = prediction.largest_logit_difference
    click.echo(f"  {verdict} when mirrored; largest difference of the logits {difference:.1e}\n")


def _column(title: str, answers: tuple[Answer, ...]) -> list[str]:
    width = max(len(answer.name) for answer in answers)
    return [title, *(f"{answer.name:<{width}}  {100 * answer.probability:5.1f} %" for answer in answers)]
