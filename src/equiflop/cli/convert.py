"""``equiflop convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from equiflop.cli.options import KeyValue


@click.command(name="convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option("--model", "name", required=True, help="Which of our models it is, such as flop_deit3_base_patch16_224.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option(
    "--set", "settings", type=KeyValue(), multiple=True, help="A keyword of the model, such as invariants=norm."
)
def command(source: Path, name: str, output: Path, settings: tuple[tuple[str, Any], ...]) -> None:
    """Turn official weights into a file that the other commands and timm can read.

    IN is a .pth or .safetensors file of the official repositories. The new model computes the same function. Nothing in
    the file is run, and nothing is written unless everything fits.

    \b
    Example: equiflop convert d2_deit_base.pth --model flop_deit3_base_patch16_224 -o base.safetensors
    """
    from equiflop.convert import convert_with_report
    from equiflop.convert.files import read_official
    from equiflop.data import Preprocessing
    from equiflop.training.checkpoint import save_weights
    from equiflop.training.model_spec import ModelSpec, create_model, published_preprocessing

    if output.suffix != ".safetensors":
        raise ValueError(f"--output={output} must end in .safetensors")
    official = read_official(source)
    keywords = dict(settings)
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
        raise ValueError(f"{source}: does not fit {name}: {error}") from error
    preprocessing = published_preprocessing(name)
    assert isinstance(preprocessing, Preprocessing)
    classes = tuple(str(i) for i in range(keywords.pop("num_classes", 0)))
    save_weights(output, model.state_dict(), ModelSpec(name, keywords, classes, preprocessing))
    click.echo(f"{output}: {conversion.used} of {len(official)} official entries became {len(conversion.state_dict)}")
    reasons: dict[str, list[str]] = {}
    for entry, reason in conversion.left_out.items():
        reasons.setdefault(reason, []).append(entry)
    for reason, entries in reasons.items():
        click.echo(f"left out, {reason}: {entries[0]}" + (f" and {len(entries) - 1} more" if entries[1:] else ""))
