"""``equiflop models``."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import click

from equiflop.cli.completion import complete_models
from equiflop.cli.options import ImageSize, json_option


@click.command(name="models")
@click.argument("pattern", default="*", shell_complete=complete_models)
@click.option("--img-size", type=ImageSize(), default="224", show_default=True, help="Image size for the MACs.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table, as in docs/models.md.")
@json_option
def command(pattern: str, img_size: tuple[int, int], markdown: bool, as_json: bool) -> None:
    """List the equivariant models with their size and cost beside those of the plain network.

    PATTERN chooses some of them, for example "*base*"; with "twin:" in front, names of timm, whose twins are listed.
    MACs are multiply-adds of one image.

    \b
    Examples: equiflop models "flop_deit3*"
              equiflop models "twin:vit_small_patch16_*"
    """
    import timm

    import equiflop
    from equiflop.models.entry_points import TWIN

    if pattern.startswith(TWIN):
        plain = pattern.removeprefix(TWIN)
        names = [TWIN + name for name in timm.list_models(plain)] if plain else []
    else:
        names = [name for name in equiflop.equivariant_models() if fnmatch.fnmatch(name, pattern)]
    if not names:
        raise ValueError(f"PATTERN={pattern!r} matches none of the models; 'equiflop models' lists them all")
    columns = ("model", "params M", "MACs G", "plain twin", "params M", "MACs G", "MAC ratio")
    row_format = "{:<40} {:>9} {:>8}   {:<34} {:>9} {:>8} {:>9}"
    if markdown:
        row_format = "| {} | {} | {} | {} | {} | {} | {} |"
    if not as_json:
        click.echo(row_format.format(*columns))
    if markdown and not as_json:
        click.echo(row_format.format("---", "---:", "---:", "---", "---:", "---:", "---:"))
    rows = []
    for name in names:
        try:
            row = _describe(name, img_size)
        except ValueError as error:
            if len(names) == 1 or not name.startswith(TWIN):
                raise
            click.echo(str(error), err=True)
            continue
        rows.append(row)
        if not as_json:
            click.echo(row_format.format(*_cells(row)))
    if as_json:
        click.echo(json.dumps(rows, indent=2))


def _describe(name: str, img_size: tuple[int, int]) -> dict[str, Any]:
    """Sizes and costs of a model and its plain twin, made on the meta device."""
    import torch

    import equiflop
    from equiflop.classify.model_spec import create_model, input_keywords

    twin, overrides = equiflop.plain_twin(name)

    def made(model: str, keywords: dict[str, Any]) -> torch.nn.Module:
        size = {key: value for key, value in input_keywords(model, (3, *img_size)).items() if key == "img_size"}
        with torch.device("meta"):
            return create_model(model, {**size, **keywords})

    model, plain = made(name, {}), made(twin, overrides)
    return {
        "name": name,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": equiflop.macs(model, img_size),
        "plain_twin": twin,
        "plain_overrides": overrides,
        "plain_params": sum(p.numel() for p in plain.parameters()),
        "plain_macs": equiflop.macs(plain, img_size),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    twin = row["plain_twin"] + "".join(f" {key}={value}" for key, value in row["plain_overrides"].items())
    return (
        row["name"],
        f"{row['params'] / 1e6:.3f}",
        f"{row['macs'] / 1e9:.3f}",
        twin,
        f"{row['plain_params'] / 1e6:.3f}",
        f"{row['plain_macs'] / 1e9:.3f}",
        f"{row['plain_macs'] / row['macs']:.3f}",
    )
