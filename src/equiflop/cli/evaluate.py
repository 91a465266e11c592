"""``equiflop eval``."""

from __future__ import annotations

import json

import click

from equiflop.cli.completion import complete_data, complete_files, complete_models
from equiflop.cli.options import device_option, json_option, workers_option


@click.command(name="eval")
@click.argument("checkpoint", required=False, shell_complete=complete_files)
@click.option(
    "--data",
    shell_complete=complete_data,
    help="Data set to measure on: its test images.  [default: the one it was trained on]",
)
@click.option(
    "--model",
    shell_complete=complete_models,
    help="In place of CHECKPOINT, with --pretrained: timm's name of a model.",
)
@click.option(
    "--pretrained", is_flag=True, help="Use timm's weights of --model (downloads them), ours from $EQUIFLOP_WEIGHTS."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images at once.")
@click.option("--per-class", is_flag=True, help="Also print the accuracy of every class.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and say how many.")
@click.option(
    "--neighbours", type=click.IntRange(min=1), help="Also classify by this many nearest training images (k-NN)."
)
@device_option
@workers_option
@json_option
def command(
    checkpoint: str | None,
    data: str | None,
    model: str | None,
    pretrained: bool,
    batch_size: int,
    per_class: bool,
    skip_unreadable: bool,
    neighbours: int | None,
    device: str,
    workers: int,
    as_json: bool,
) -> None:
    """Measure a trained model: accuracy, calibration, and how often its answer changes when the image is mirrored.

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

    from equiflop.classify import evaluate, load_model
    from equiflop.classify.neighbours import nearest_neighbour_accuracy
    from equiflop.classify.prediction import Classifier
    from equiflop.data import open_data
    from equiflop.runtime.device import pick_device
    from equiflop.runtime.progress import Progress

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
    if not classifier.classes and neighbours is None:
        raise click.UsageError(f"{classifier.name} has no classifier; give --neighbours to measure its features")
    images = open_data(data, preprocessing=classifier.preprocessing)
    progress = Progress(classifier.name)
    network = classifier.model.to(chosen)
    result = None
    if classifier.classes:
        classifier.check_classes(images.classes)
        result = evaluate(
            network,
            images.test,
            batch_size,
            chosen,
            workers=workers,
            progress=progress,
            skip_unreadable=skip_unreadable,
            classes=len(images.classes),
        )
    knn = None
    if neighbours is not None:
        knn = nearest_neighbour_accuracy(
            network,
            images.train,
            images.test,
            neighbours,
            chosen,
            batch_size,
            workers,
            progress=progress,
            skip_unreadable=skip_unreadable,
        )
    progress.clear()
    if result is None:  # features alone
        measured = {"model": classifier.name, "data": images.name, "neighbours": neighbours, "neighbours_top1": knn}
        text = f"{classifier.name} on {images.name}: accuracy of {neighbours} neighbours {100 * (knn or 0):.2f} %"
        click.echo(json.dumps(measured, indent=2) if as_json else text)
        return
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
            "unreadable": result.unreadable,
            "calibration_error": result.calibration_error,
            "per_class": {
                name: {"images": count, "correct": right}
                for name, (count, right) in zip(images.classes, result.per_class or (), strict=True)
            },
            "neighbours": neighbours,
            "neighbours_top1": knn,
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
    click.echo(f"  expected calibration error       {100 * (result.calibration_error or 0):6.2f} %")
    if knn is not None:
        click.echo(f"  accuracy of {neighbours} neighbours".ljust(35) + f"{100 * knn:6.2f} %")
    if result.unreadable:
        click.echo(f"  left out: {result.unreadable:,} images that cannot be read")
    if per_class:
        for name, (count, right) in zip(images.classes, result.per_class or (), strict=True):
            share = f"{100 * right / count:6.2f} %" if count else "no images"
            click.echo(f"  {name:<32} {share}  ({right:,} of {count:,})")
