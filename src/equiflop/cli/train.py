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
from equiflop.cli.options import ImageSize, KeyValue, amp_option, json_option, resume_option

if TYPE_CHECKING:
    from equiflop.classify import ClassifierTrainer, TrainConfig
    from equiflop.training import EpochRecord

#: Options that are not simply named after a field of the configuration.
_NAMES = {"image_size": "--img-size", "model_kwargs": "--set", "teacher_kwargs": "--teacher-set"}
#: Keywords of a network that follow from the images and their classes.
_OF_THE_DATA = ("in_chans", "img_size", "num_classes")
#: What the shell offers for the others.
_COMPLETE = {
    "data": complete_data,
    "device": complete_devices,
    "out": complete_files,
    "start_from": complete_files,
    "teacher": complete_models_or_files,
    "teacher_checkpoint": complete_files,
}


class TrainCommand(click.Command):
    """A command whose options are the fields of :class:`equiflop.classify.TrainConfig`, made when they are needed."""

    #: Where a run is kept by default.
    place = "runs/MODEL"

    def fields(self) -> dict[str, tuple[Any, str]]:
        """Default and help of every field of the configuration."""
        from equiflop.classify.config import TrainConfig

        return TrainConfig.describe()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options written below, and one per field."""
        if not any(parameter.name == "lr" for parameter in self.params):
            for name, (default, text) in self.fields().items():
                if name != "model":
                    self.params.append(_option(name, default, text, self.place))
        return super().get_params(ctx)


def _option(name: str, default: Any, text: str, place: str) -> click.Option:
    flag = _NAMES.get(name, "--" + name.replace("_", "-"))
    if isinstance(default, dict):
        return click.Option([flag, name], type=KeyValue(), multiple=True, help=f"{text} KEY=VALUE; repeatable.")
    if name == "image_size":
        return click.Option([flag, name], type=ImageSize(), help=text)
    if isinstance(default, bool):
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
    shown = name == "out" or default not in ("", None, MISSING)
    note = f"  [default: {place if name == 'out' else default}]" if shown else ""
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
@resume_option
@amp_option
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

    MODEL is any name that timm knows, ours ("equiflop models" lists them) or its own; a recipe has one already, and
    --start-from RUN goes on with the network of that run. The same command, run again after Ctrl-C, a crash or a power
    cut, goes on where it stopped and ends with the same weights. Options on the command line go before those of the
    recipe.

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
    from equiflop.classify.config import TrainConfig

    config = TrainConfig.from_dict(options_of(model, recipe, amp, given))
    from equiflop.classify import ClassifierTrainer

    carry_out(ClassifierTrainer(config), resume, as_json)


def carry_out(trainer: ClassifierTrainer, resume: str, as_json: bool) -> None:
    """Train to the end, and say what came out; a signal ends the process with its exit code."""
    from equiflop.runtime.processes import leave
    from equiflop.training import TrainingInterrupted

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
    metrics = history[-1].metrics if history else _measured(trainer)
    if trainer.processes.first:
        _conclude(trainer, history, metrics, as_json)
    leave()


def _measured(trainer: ClassifierTrainer) -> dict[str, float]:
    try:
        return trainer.measure()
    except ValueError as error:
        raise ValueError(f"{error}; that was in measuring, the weights are in {trainer.folder.weights}") from error


def options_of(
    model: str | None,
    recipe: str | None,
    amp: bool,
    given: dict[str, Any],
    kind: type[TrainConfig] | None = None,
    place: str = TrainCommand.place,
) -> dict[str, Any]:
    """The fields of a configuration: a recipe's, and on top what the command line gives.

    Args:
        model: its name, where the command line gives it.
        recipe: name of a recipe.
        amp: whether that option was given.
        given: the other options, None where one was not.
        kind: the configuration, if it is not the usual one.
        place: the run's folder where none is given, with MODEL in place of the name.
    """
    from equiflop.classify.recipe import load_recipe
    from equiflop.data.names import BUILT_IN

    options: dict[str, Any] = load_recipe(recipe, kind) if recipe else {}
    keywords = {name: dict(given.pop(name, None) or ()) for name in ("model_kwargs", "teacher_kwargs")}
    given = {name: value for name, value in given.items() if value is not None}
    if amp and given.setdefault("precision", "bfloat16") != "bfloat16":
        raise click.UsageError(f"--amp is --precision bfloat16, and --precision is {given['precision']}; give one")
    options |= given
    options["model"] = model or options.get("model")
    for name, values in keywords.items():
        if values or name in options:
            options[name] = {**dict(options.get(name) or {}), **values}
    if options["model"] is None and options.get("start_from"):
        name, own = network_of(options["start_from"])
        options |= {"model": name, "model_kwargs": {**own, **dict(options.get("model_kwargs") or {})}}
    if options["model"] is None:
        raise click.UsageError("give MODEL, or --recipe NAME or --start-from RUN with one")
    if "data" not in options:
        raise click.UsageError(f"give --data: {', '.join(BUILT_IN)}, a folder, or timm's name of a data set")
    options.setdefault("out", str(Path(place.replace("MODEL", str(options["model"])))))
    return options


def network_of(run: str) -> tuple[str, dict[str, Any]]:
    """Name of the network that a run trained, and its keywords but for those that the data decide."""
    from equiflop.classify.weights import load_model

    spec = load_model(run).spec
    return spec.name, {key: value for key, value in spec.kwargs.items() if key not in _OF_THE_DATA}


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
    say(f"{trainer.spec.name}: {parameters / 1e6:.2f} M parameters, input {size}, on {where}")
    say(f"{data.name} from {data.origin}: {len(data.train):,} images to train on, {len(data.test):,} to test on")
    if trainer.finished and start is not None:
        say(f"{start}: all epochs are done; give another --out, or --resume never to start anew")
    elif start is not None:
        say(f"going on from {start} (epoch {trainer.epoch + 1}, {trainer.step} steps done)")


def _conclude(trainer: ClassifierTrainer, history: list[EpochRecord], metrics: dict[str, float], as_json: bool) -> None:
    if as_json:
        last = history[-1].to_dict() if history else metrics
        click.echo(json.dumps({"weights": str(trainer.folder.weights), **last}, indent=2))
        return
    for line in trainer.results(metrics):
        click.echo(line)
    if history:
        _tell_of_training(trainer, history)
    else:
        click.echo(f"weights in {trainer.folder.weights}")
    if "test_accuracy" in metrics:
        click.echo(f"next: equiflop eval {shlex.quote(str(trainer.out))}")


def _tell_of_training(trainer: ClassifierTrainer, history: list[EpochRecord]) -> None:
    best = max(history, key=trainer.measurement.score)
    seconds = sum(record.seconds for record in history)
    score = abs(trainer.measurement.score(best))
    shown = f"{100 * score:.2f} %" if trainer.best == "accuracy" else f"{trainer.best.lstrip('-')} {score:.4f}"
    click.echo(f"best {shown} after epoch {best.epoch}, in {trainer.folder.best}")
    click.echo(f"{seconds:,.0f} s of training")
    if any(record.unreadable for record in history):
        click.echo(f"images that could not be read are listed in {trainer.folder.unreadable}")
    click.echo(f"weights in {trainer.folder.weights}, log in {trainer.out / 'log.csv'}")
