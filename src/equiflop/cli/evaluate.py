"""``equiflop eval``."""

from __future__ import annotations

import json

import click

from equiflop.cli.options import device_option, json_option, workers_option


@click.command(name="eval")
@click.argument("checkpoint", required=False)
@click.option("--data", help="Data set to measure on: its test images.  [default: the one it was trained on]")
@click.option("--model", help="In place of CHECKPOINT, with --pretrained: timm's name of a model.")
@click.option("--pretrained", is_flag=True, help="Use the weights that timm publishes for --model (downloads them).")
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images at once.")
@device_option
@workers_option
@json_option
def command(
    checkpoint: str | None,
    data: str | None,
    model: str | None,
    pretrained: bool,
    batch_size: int,
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    """Measure a trained model: accuracy, and how often it changes its answer when the image is mirrored.

    CHECKPOINT is what equiflop train wrote: a run's folder, its model.safetensors or one of its checkpoints.

    \b
    Examples:
      equiflop eval runs/flop_deit3_tiny_patch16_224
      equiflop eval runs/mine/model.safetensors --data photos --json
    """
    if (checkpoint is None) == (model is None):
        raise click.UsageError("give either CHECKPOINT, or --model with --pretrained")
    if model is not None and not pretrained:
        raise click.UsageError(f"--model {model} has random weights without --pretrained; add it, or give CHECKPOINT")

    from equiflop.data import open_data
    from equiflop.training import evaluate, load_model
    from equiflop.training.device import pick_device
    from equiflop.training.prediction import Classifier
    from equiflop.training.progress import Progress

    chosen = pick_device(device)
    if checkpoint is not None:
        trained = load_model(checkpoint)
        classifier = Classifier.from_trained(trained)
        if data is None and trained.config is not None:
            data = trained.config.data
    else:
        classifier = Classifier.from_timm(str(model))
    if data is None:
        raise click.UsageError("give --data: the file does not say what the model was trained on")
    images = open_data(data, preprocessing=classifier.preprocessing)
    classifier.check_classes(images.classes)
    progress = Progress(classifier.name)
    result = evaluate(classifier.model.to(chosen), images.test, batch_size, chosen, workers=workers, progress=progress)
    progress.clear()
    if as_json:
        values = {
            "model": classifier.name,
            "data": images.name,
            "images": result.images,
            "top1": result.top1,
            "top5": result.top5,
            "changed": result.changed,
            "changed_with_ties": result.changed_with_ties,
            "changed_share": result.changed_share,
        }
        click.echo(json.dumps(values, indent=2))
        return
    click.echo(f"{classifier.name} on the {result.images:,} test images of {images.name}")
    click.echo(f"  top-1 accuracy                   {100 * result.top1:6.2f} %")
    click.echo(f"  top-5 accuracy                   {100 * result.top5:6.2f} %")
    click.echo(
        f"  answers that change if mirrored  {100 * (result.changed_share or 0):6.2f} %  "
        f"({result.changed:,} images; {result.changed_with_ties:,} with ties below 1e-5 counted)"
    )
