"""``equiflop train``."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.completion import (
    complete_data,
    complete_devices,
    complete_files,
    complete_models,
    complete_models_or_files,
    complete_recipes,
)
from equiflop.cli.options import ImageSize, KeyValue, json_option

if TYPE_CHECKING:
    from equiflop.classify import ClassifierTrainer
    from equiflop.training import EpochRecord

#: Options that are not simply named after a field of the configuration.
_NAMES = {"image_size": "--img-size", "model_kwargs": "--set"}
#: What the shell offers for the others.
_COMPLETE = {
    "data": complete_data,
    "device": complete_devices,
    "out": complete_files,
    "start_from": complete_files,
    "teacher": complete_models_or_files,
}


class TrainCommand(click.Command):
    """A command whose options are the fields of :class:`equiflop.classify.TrainConfig`, made when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options written below, and one per field."""
        if not any(parameter.name == "lr" for parameter in self.params):
            from equiflop.classify.config import TrainConfig

            for name, (default, text) in TrainConfig.describe().items():
                if name != "model":
                    self.params.append(_option(name, default, text))
        return super().get_params(ctx)


def _option(name: str, default: Any, text: str) -> click.Option:
    flag = _NAMES.get(name, "--" + name.replace("_", "-"))
    if name == "model_kwargs":
        return click.Option([flag, name], type=KeyValue(), multiple=True, help=f"{text} KEY=VALUE; repeatable.")
    if name == "image_size":
        return click.Option([flag, name], type=ImageSize(), help=text)
    if isinstance(default, bool):
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    shown = name == "out" or (default not in ("", None, MISSING) and not isinstance(default, dict))
    note = f"  [default: {'runs/MODEL' if name == 'out' else default}]" if shown else ""
    kind = int if name == "channels" else str if default is MISSING else type(default)
    return click.Option([flag, name], type=kind, help=text + note, shell_complete=_COMPLETE.get(name))


@click.command(name="train", cls=TrainCommand)
@click.argument("model", required=False, shell_complete=complete_models)
@click.option(
    "--recipe",
    shell_complete=complete_recipes,
    help="Start from a recipe's options: its name (--list-recipes), or a YAML file.",
)
@click.option("--list-recipes", is_flag=True, help="List the recipes and stop.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto goes on from the newest checkpoint in --out, if there is one; never starts anew and removes them as "
    "soon as a step has succeeded.",
)
@click.option("--amp", is_flag=True, help="Short for --precision bfloat16.")
@json_option
def command(
    model: str | None,
    recipe: str | None,
    list_recipes: bool,
    resume: str,
    amp: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train MODEL on labelled images.

    MODEL is any name that timm knows, ours ("equiflop models" lists them) or its own; a recipe has one already. The
    same command, run again after Ctrl-C, a crash or a power cut, goes on where it stopped and ends with the same
    weights. Options on the command line go before those of the recipe.

    \b
    A first try, two minutes on a laptop:
      equiflop train flop_deit3_tiny_patch16_224 --data fashion-mnist \\
        --set patch_size=7 --set embed_dim=128 --set depth=4 --set num_heads=4 --epochs 2
    Your own pictures in photos/train/CLASS/* and photos/test/CLASS/*:
      equiflop train flop_deit3_small_patch16_224 --data photos --epochs 50 --workers 2
    As published, with 8 processes on 8 GPUs:
      torchrun --nproc-per-node 8 -m equiflop train --recipe deit3-base --data imagenet
    """
    if list_recipes:
        _list_recipes()
        return
    config = _configuration(model, recipe, amp, given)
    from equiflop.classify import ClassifierTrainer
    from equiflop.runtime.processes import leave
    from equiflop.training import TrainingInterrupted

    trainer = ClassifierTrainer(config)
    start = trainer.resume() if resume == "auto" else None
    if resume == "never":
        trainer.start_anew()
    _introduce(trainer, start)
    try:
        history = trainer.run()
    except TrainingInterrupted as stopped:
        if trainer.processes.first:
            click.echo(f"equiflop: {stopped}; run the same command again to go on", err=True)
        leave(128 + stopped.signal_number)
        raise SystemExit(128 + stopped.signal_number) from stopped
    if trainer.processes.first:
        _conclude(trainer, history, as_json)
    leave()


def _configuration(model: str | None, recipe: str | None, amp: bool, given: dict[str, Any]) -> Any:
    from equiflop.classify import TrainConfig
    from equiflop.classify.recipe import load_recipe
    from equiflop.data.names import BUILT_IN

    options: dict[str, Any] = load_recipe(recipe) if recipe else {}
    keywords = dict(given.pop("model_kwargs") or ())
    given = {name: value for name, value in given.items() if value is not None}
    if amp and given.setdefault("precision", "bfloat16") != "bfloat16":
        raise click.UsageError(f"--amp is --precision bfloat16, and --precision is {given['precision']}; give one")
    options |= given
    options["model"] = model or options.get("model")
    if keywords:
        options["model_kwargs"] = {**dict(options.get("model_kwargs") or {}), **keywords}
    if options["model"] is None:
        raise click.UsageError("give MODEL, or --recipe NAME with one")
    if "data" not in options:
        raise click.UsageError(f"give --data: {', '.join(BUILT_IN)}, a folder, or timm's name of a data set")
    options.setdefault("out", str(Path("runs") / str(options["model"])))
    return TrainConfig.from_dict(options)


def _list_recipes() -> None:
    from equiflop.classify.recipe import load_recipe, recipe_names

    for name in recipe_names():
        options = load_recipe(name)
        optimizer = options.get("optimizer", "adamw")
        click.echo(f"{name:<20} {options['model']}, {options['epochs']} epochs, {optimizer}")


def _introduce(trainer: ClassifierTrainer, start: Path | None) -> None:
    data, say = trainer.data, trainer.progress.print
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    size = "x".join(map(str, data.preprocessing.input_size))
    count = trainer.processes.count
    where = f"{trainer.device}" + (f" in {count} processes" if count > 1 else "")
    say(f"{trainer.config.model}: {parameters / 1e6:.2f} M parameters, input {size}, on {where}")
    say(f"{data.name} from {data.origin}: {len(data.train):,} images to train on, {len(data.test):,} to test on")
    if trainer.finished:
        say(f"{start}: all epochs are done; give another --out, or --resume never to start anew")
    elif start is not None:
        say(f"going on from {start} (epoch {trainer.epoch + 1}, {trainer.step} steps done)")


def _conclude(trainer: ClassifierTrainer, history: list[EpochRecord], as_json: bool) -> None:
    last = history[-1]
    if as_json:
        click.echo(json.dumps({"weights": str(trainer.folder.weights), **last.to_dict()}, indent=2))
        return
    best = max(history, key=trainer.measurement.score)
    metrics = last.metrics
    seconds = sum(record.seconds for record in history)
    click.echo(f"test accuracy {100 * metrics['test_accuracy']:.2f} % (top-5 {100 * metrics['test_top5']:.2f} %)")
    if "ema_accuracy" in metrics:
        click.echo(f"test accuracy of the averaged weights {100 * metrics['ema_accuracy']:.2f} %")
    score = trainer.measurement.score(best)
    click.echo(f"best {100 * score:.2f} % after epoch {best.epoch}, in {trainer.folder.best}")
    click.echo(f"{seconds:,.0f} s of training")
    if any(record.unreadable for record in history):
        click.echo(f"images that could not be read are listed in {trainer.folder.unreadable}")
    click.echo(f"weights in {trainer.folder.weights}, log in {trainer.out / 'log.csv'}")
    click.echo(f"next: equiflop eval {shlex.quote(str(trainer.out))}")
