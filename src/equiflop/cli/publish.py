"""``equiflop publish``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from equiflop.cli.completion import complete_data
from equiflop.cli.options import device_option, workers_option

if TYPE_CHECKING:
    from equiflop.classify.weights import TrainedModel
    from equiflop.hub import Measured


@click.command(name="publish")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--licence", "--license", help="Of the weights, by its identifier on the hub, such as apache-2.0.")
@click.option(
    "--data",
    shell_complete=complete_data,
    help="Measure accuracy on its test images.  [default: what training noted in its log]",
)
@click.option("--push", "repository", metavar="OWNER/NAME", help="Also upload the folder, into this repository.")
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images at once.")
@device_option
@workers_option
def command(
    source: Path,
    output: Path,
    licence: str | None,
    data: str | None,
    repository: str | None,
    batch_size: int,
    device: str,
    workers: int,
) -> None:
    """Write a trained model as a folder for the Hugging Face hub.

    RUN_OR_CHECKPOINT is what equiflop train or convert wrote: a run's folder, its model.safetensors or a checkpoint.
    The folder holds config.json, model.safetensors with its SHA-256, and a model card with accuracy, multiply-adds
    beside the plain twin, group and licence. Before it gets its name, timm makes the model from it, and both compute
    the same. With EQUIFLOP_WEIGHTS set to the folder above it, pretrained=True finds a folder of the model's name.

    \b
    Examples:
      equiflop publish runs/mine -o weights/flop_deit3_small_patch16_224 --licence apache-2.0 --data photos
      equiflop publish base.safetensors -o weights/flop_deit3_base_patch16_224 --push me/flop_deit3_base_patch16_224
    """
    from huggingface_hub.utils import validate_repo_id

    from equiflop.classify import evaluate
    from equiflop.classify.prediction import Classifier
    from equiflop.data import open_data
    from equiflop.hub import Measured, publish, push
    from equiflop.runtime.device import pick_device
    from equiflop.runtime.progress import Progress

    if repository is not None:
        validate_repo_id(repository)
    chosen = pick_device(device)

    def measure(trained: TrainedModel) -> Measured:
        classifier = Classifier.from_trained(trained)
        images = open_data(str(data), preprocessing=classifier.preprocessing)
        classifier.check_classes(images.classes)
        progress = Progress(classifier.name)
        network = classifier.model.to(chosen)
        result = evaluate(network, images.test, batch_size, chosen, workers=workers, progress=progress)
        progress.clear()
        network.cpu()
        return Measured(images.name, result.images, result.top1, result.top5, 1 - (result.changed_share or 0))

    made = publish(
        source, output, licence=licence, repository=repository, measure=measure if data is not None else None
    )
    click.echo(f"{made.path}: {', '.join(sorted(path.name for path in made.path.iterdir()))}")
    rows = made.facts.rows()
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        click.echo(f"  {name:<{width}}{value.replace('`', '')}")
    if repository is not None:
        click.echo(f"uploaded: {push(made.path, repository)}")
    click.echo(f'after import equiflop: timm.create_model("local-dir:{made.path}", pretrained=True)')
