"""``equiflop models``."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import click

from equiflop.cli.options import ImageSize, json_option


@click.command(name="models")
@click.argument("pattern", default="*")
@click.option("--img-size", type=ImageSize(), default="224", show_default=True, help="Image size for the MACs.")
@json_option
def command(pattern: str, img_size: tuple[int, int], as_json: bool) -> None:
    """List the equivariant models with their size and cost beside those of the plain network.

    PATTERN chooses some of them, for example "*base*". MACs are multiply-adds of one image.

    \b
    Example: equiflop models "flop_deit3*"
    """
    import equiflop

    names = [name for name in equiflop.equivariant_models() if fnmatch.fnmatch(name, pattern)]
    if not names:
        raise ValueError(f"PATTERN={pattern!r} matches none of the models; 'equiflop models' lists them all")
    header = (
        f"{'model':<40} {'params M':>9} {'MACs G':>8}   {'plain twin':<30} {'params M':>9} {'MACs G':>8} {'ratio':>6}"
    )
    if not as_json:
        click.echo(header)
    rows = []
    for name in names:
        row = _describe(name, img_size)
        rows.append(row)
        if not as_json:
            click.echo(
                f"{name:<40} {row['params'] / 1e6:>9.3f} {row['macs'] / 1e9:>8.3f}   {row['plain_twin']:<30} "
                f"{row['plain_params'] / 1e6:>9.3f} {row['plain_macs'] / 1e9:>8.3f} "
                f"{row['plain_macs'] / row['macs']:>6.3f}"
            )
    if as_json:
        click.echo(json.dumps(rows, indent=2))


def _describe(name: str, img_size: tuple[int, int]) -> dict[str, Any]:
    import timm
    import torch

    import equiflop

    twin, overrides = equiflop.plain_twin(name)
    size = {} if img_size == (224, 224) else {"img_size": img_size}
    with torch.device("meta"):
        model, plain = timm.create_model(name, **size), timm.create_model(twin, **overrides, **size)
    return {
        "name": name,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": equiflop.macs(model, img_size),
        "plain_twin": twin,
        "plain_overrides": overrides,
        "plain_params": sum(p.numel() for p in plain.parameters()),
        "plain_macs": equiflop.macs(plain, img_size),
    }
