"""``equiflop convert``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.completion import complete_equivariant_models
from equiflop.cli.options import KeyValue

if TYPE_CHECKING:
    from equiflop.convert.files import OfficialFile


@click.command(name="convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "name",
    shell_complete=complete_equivariant_models,
    help="Which of our models it is.  [default: recognised by keys and shapes]",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--set", "settings", type=KeyValue(), multiple=True, help="A keyword of the model, such as num_heads=8.")
def command(source: Path, name: str | None, output: Path, settings: tuple[tuple[str, Any], ...]) -> None:
    """Turn official weights into a file that the other commands and timm can read.

    IN is a .pth or .safetensors file of the official repositories (docs/pretrained.md). The new model computes the
    same function. Nothing in the file is run, and nothing is written unless everything fits. A checksum is written
    beside the output.

    \b
    Example: equiflop convert d2_deit_base_patch16_LS.pth -o flop_deit3_base_patch16_224.safetensors
    """
    from equiflop.checksums import write_checksum
    from equiflop.classify.model_spec import ModelSpec, create_model, preprocessing_of
    from equiflop.classify.prediction import published_classes
    from equiflop.classify.weights import save_weights
    from equiflop.convert import convert_with_report
    from equiflop.convert.files import read_official
    from equiflop.convert.recognise import recognise

    if output.suffix != ".safetensors":
        raise ValueError(f"--output={output} must end in .safetensors")
    file = read_official(source)
    official = file.state_dict
    keywords = dict(settings)
    told, hint = "", ""
    if name is None:
        try:
            found = recognise(official, keywords, file.trained_as)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        name, keywords = found.name, dict(found.keywords)
        told = f"{source}: {found}\n  {found.description}\n"
    else:
        hint = f"; the file {_what_it_is(file, {k: v for k, v in settings if k == 'num_heads'})}"
        if "num_classes" not in keywords and "head.weight" in official:
            keywords["num_classes"] = len(official["head.weight"])
        if "mask_token.0" in official:  # DINOv2: no classifier, perhaps register tokens
            keywords.setdefault("num_classes", 0)
            if "register_tokens.0" in official:
                keywords.setdefault("reg_tokens", official["register_tokens.0"].shape[1])
    model = create_model(name, keywords)
    try:
        conversion = convert_with_report(official, model)
        model.load_state_dict(conversion.state_dict)
    except ValueError as error:
        raise ValueError(f"{source}: does not fit {name}: {error}{hint}") from error
    classes = published_classes(model) if model.num_classes else ()
    keywords.pop("num_classes", None)
    preprocessing = preprocessing_of(model)
    if "convnext" not in name:  # DeiT's evaluation, which the others were published with, crops nothing
        preprocessing = replace(preprocessing, crop_pct=1.0)
    spec = ModelSpec(name, keywords, classes, preprocessing)
    save_weights(output, model.state_dict(), spec)
    write_checksum(output)
    click.echo(
        f"{told}{output}: {conversion.used} of {len(official)} official entries became {len(conversion.state_dict)}"
    )
    reasons: dict[str, list[str]] = {}
    for entry, reason in conversion.left_out.items():
        reasons.setdefault(reason, []).append(entry)
    for reason, entries in reasons.items():
        click.echo(f"left out, {reason}: {entries[0]}" + (f" and {len(entries) - 1} more" if entries[1:] else ""))
    if classes:
        click.echo(f"measure it: equiflop eval {output} --data FOLDER")


def _what_it_is(file: OfficialFile, known: dict[str, Any]) -> str:
    from equiflop.convert.recognise import recognise

    try:
        return f"is {recognise(file.state_dict, known, file.trained_as)}"
    except ValueError as error:
        return str(error)
