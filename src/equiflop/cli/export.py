"""``equiflop export``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.completion import complete_data, complete_models_or_files
from equiflop.cli.options import ImageSize, KeyValue, json_option

if TYPE_CHECKING:
    from equiflop.deploy import Exported


@click.command(name="export")
@click.argument("model", metavar="MODEL_OR_RUN", shell_complete=complete_models_or_files)
@click.option(
    "--to",
    type=click.Choice(["onnx", "openvino", "torch-export", "aoti", "executorch"]),
    default="onnx",
    show_default=True,
    help="The runtime: ONNX Runtime, OpenVINO, torch.export, AOTInductor, or ExecuTorch.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Of weights and products; int8 needs --data.",
)
@click.option("-o", "--output", type=click.Path(), required=True, help="The file, ending in .onnx, .xml, .pt2 or .pte.")
@click.option("--img-size", type=ImageSize(), help="Image size, such as 224 or 256x192. Default: the model's own.")
@click.option(
    "--data",
    shell_complete=complete_data,
    help="Data set: its test images are compared, training images give int8 its ranges.",
)
@click.option("--dynamic-batch", is_flag=True, help="Take batches of any size.")
@click.option("--dynamic-size", is_flag=True, help="Take images of any size, where the model does.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Without --dynamic-batch.")
@click.option("--images", type=click.IntRange(min=1), default=64, show_default=True, help="How many are compared.")
@click.option("--compare", is_flag=True, help="Export the plain twin too, and time both in turns.")
@click.option("--set", "settings", type=KeyValue(), multiple=True, help="A keyword of the model, such as depth=2.")
@json_option
def command(
    model: str,
    to: str,
    precision: str,
    output: str,
    img_size: tuple[int, int] | None,
    data: str | None,
    dynamic_batch: bool,
    dynamic_size: bool,
    batch_size: int,
    images: int,
    compare: bool,
    settings: tuple[tuple[str, Any], ...],
    as_json: bool,
) -> None:
    """Write MODEL_OR_RUN for a runtime, and prove there that the file does what the network does.

    MODEL_OR_RUN is what equiflop train wrote (a run's folder, its model.safetensors or a checkpoint), or a name of
    timm, of ours or twin:NAME, with random weights. The file is run in its runtime before it gets its name: a file
    that differs from the network, or answers differently to moved images, is not kept, and the exit code is 2.

    \b
    Examples:
      equiflop export runs/flop_deit3_tiny_patch16_224 --to onnx --dynamic-batch -o shoes.onnx
      equiflop export flop_deit3_base_patch16_224 --to openvino --precision bfloat16 --compare -o vit.xml
      equiflop export runs/mine --to openvino --precision int8 --data photos -o mine.xml
    """
    from equiflop.deploy import export

    made = export(
        model,
        output,
        to,
        precision,
        settings=dict(settings),
        img_size=img_size,
        data=data,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        batch=batch_size,
        images=images,
        compare=compare,
    )
    if as_json:
        described = {"file": str(made.path), "to": to, "precision": precision, "batch": made.batch}
        click.echo(json.dumps({**described, "metadata": made.metadata, "proof": made.proof.as_dict()}, indent=2))
    else:
        _show(made)


def _show(made: Exported) -> None:
    proof = made.proof
    click.echo(f"{made.name} for {made.to} in {made.precision}: {made.path} ({proof.size / 1e6:.1f} MB)\n")
    rows = [("difference to PyTorch", f"{proof.difference:.1e} of the largest output")]
    if proof.agreement is not None:
        rows.append(("same likeliest class", f"{100 * proof.agreement:.1f} % of {proof.images} {proof.source}"))
    if proof.accuracy is not None and proof.network_accuracy is not None:
        before, after = (f"{100 * value:.2f} %" for value in (proof.network_accuracy, proof.accuracy))
        rows.append(("accuracy", f"{after}, of the network in PyTorch {before}"))
    if proof.share is not None:
        rows.append((f"products in {made.precision}", f"{100 * proof.share:.0f} %"))
    if proof.equivariance is not None:
        report = proof.equivariance
        for a, error in enumerate(report.errors):
            rows.append((f"error under {report.group.element_name(a)}", f"{error:.1e}"))
        if report.verdict == "inconclusive":
            rows.append(("moved images", f"inconclusive: {report.problems[0].partition(',')[0]}"))
    for name, speed in (("", proof.speed), ("plain: ", proof.plain)):
        if speed is not None and speed.latency_ms is not None:
            rows.append((f"{name}one image", f"{speed.latency_ms:.1f} ms"))
        if speed is not None:
            rows.append((f"{name}batches of {speed.batch}", f"{speed.images_per_second:.1f} images/s"))
    for batch, spread in proof.speedup.items():
        text = f"{spread.median:.2f} ({spread.lowest:.2f} to {spread.highest:.2f})"
        rows.append((f"times as fast as plain, batch {batch}", text))
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        click.echo(f"  {name:<{width}}{value}")
