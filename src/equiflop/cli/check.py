"""``equiflop check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from equiflop.cli.completion import complete_groups, complete_models_or_files
from equiflop.cli.options import ImageSize, KeyValue, json_option


@click.command(name="check")
@click.argument("model", metavar="MODEL_OR_RUN", shell_complete=complete_models_or_files)
@click.option(
    "--group",
    shell_complete=complete_groups,
    help="Group to try: flop, updown, flips, rot4 or octic. Default: the model's own, else flop.",
)
@click.option("--checkpoint", type=click.Path(), help="Weights of MODEL, as what equiflop train wrote.")
@click.option("--img-size", type=ImageSize(), help="Image size, such as 224 or 256x192. Default: the model's own.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Number format of the comparison.",
)
@click.option("--tolerance", type=float, help="Largest relative error that passes. Default: by number format.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the images and random weights.")
@click.option("--set", "settings", type=KeyValue(), multiple=True, help="A keyword of the model, such as depth=2.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    group: str | None,
    checkpoint: str | None,
    img_size: tuple[int, int] | None,
    dtype: str,
    tolerance: float | None,
    seed: int,
    settings: tuple[tuple[str, Any], ...],
    as_json: bool,
) -> None:
    """Test that MODEL_OR_RUN gives the same answer for transformed images.

    What equiflop train wrote (a run's folder, its model.safetensors or a checkpoint) is checked as it is, and so is
    MODEL with --checkpoint. A name alone gets random weights (freshly made ones are zero in places where mistakes
    hide). Then the outputs, and the features after every block, are compared for every element of the group. Ends with
    exit code 0 if all errors are within the tolerance, 1 if not, or if that says nothing: "inconclusive", as for an
    output that is nearly the same for all images.

    \b
    Examples: equiflop check flop_deit3_small_patch16_224
              equiflop check runs/flop_deit3_tiny_patch16_224 --dtype float64
              equiflop check deit3_small_patch16_224          (a plain network: fails)
              equiflop check flop_deit3_small_patch16_224 --set group=octic --dtype float64
    """
    import torch

    import equiflop
    from equiflop.classify.model_spec import create_model, input_keywords
    from equiflop.classify.weights import load_model

    keywords = dict(settings)
    file = checkpoint if checkpoint is not None or not Path(model).exists() else model
    if file is not None:
        if keywords:
            raise ValueError(f"--set does not apply to {file!r}: the file says how its model is made")
        loaded = load_model(file)
        if checkpoint is not None and loaded.spec.name != model:
            raise ValueError(f"{checkpoint}: holds weights of {loaded.spec.name}, not of {model}")
        model = loaded.spec.name
        network: Any = loaded.model
        if img_size is not None and hasattr(network, "set_input_size"):
            network.set_input_size(img_size)
    else:
        if img_size is not None and "img_size" in input_keywords(model, (3, *img_size)):
            keywords.setdefault("img_size", img_size)
        network = create_model(model, keywords)
    report = equiflop.check(
        network.to(getattr(torch, dtype)),
        group=group,
        input_size=img_size,
        randomize=file is None,
        tolerance=tolerance,
        seed=seed,
    )
    click.echo(json.dumps({"model": model, **report.as_dict()}, indent=2) if as_json else str(report))
    ctx.exit(0 if report.passed else 1)
