"""``equiflop distill``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.completion import complete_groups, complete_models, complete_recipes
from equiflop.cli.options import amp_option, json_option, resume_option
from equiflop.cli.train import TrainCommand, carry_out, network_of, options_of

if TYPE_CHECKING:
    from equiflop.distill.config import DistillConfig


class DistillCommand(TrainCommand):
    """A command whose options are the fields of :class:`equiflop.distill.DistillConfig`."""

    place = "runs/distilled-MODEL"

    def fields(self) -> dict[str, tuple[Any, str]]:
        """Default and help of every field of the configuration."""
        from equiflop.distill.config import DistillConfig

        return DistillConfig.describe()


@click.command(name="distill", cls=DistillCommand)
@click.argument("name", required=False, shell_complete=complete_models)
@click.option(
    "--group",
    shell_complete=complete_groups,
    help="Symmetry of the student: flop, updown, flips, rot4 or octic.  [default: flop]",
)
@click.option(
    "--width",
    type=click.IntRange(1),
    help="Channels of the student; of ConvNeXt --set dims=[...].  [default: the teacher's]",
)
@click.option("--recipe", shell_complete=complete_recipes, help="Start from a recipe's options: its name, or a file.")
@resume_option
@amp_option
@click.option(
    "--report",
    is_flag=True,
    help="Train nothing: print how equivariant the teacher already is, layer by layer (groups flop and updown).",
)
@click.option("--plot", type=click.Path(), help="With --report: draw it too, as .png, .pdf or .svg (needs matplotlib).")
@json_option
def command(
    name: str | None,
    group: str | None,
    width: int | None,
    recipe: str | None,
    resume: str,
    amp: bool,
    report: bool,
    plot: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train the equivariant twin of NAME, a plain network that is already trained.

    The teacher is NAME, a vision transformer, ResMLP or ConvNeXt, with timm's weights, with those of
    --teacher-checkpoint FILE, or the plain network of a run, --teacher RUN. Its twin learns to give the teacher's
    features and answers, averaged over the views of an image: itself and its mirror image for the group flop. Labels
    are not needed; images without any lie in one folder, as photos/train/all/* and photos/test/all/*. Other options
    are those of "equiflop train", and the same command again goes on where it stopped.

    \b
    Examples: equiflop distill deit3_small_patch16_224.fb_in22k_ft_in1k --data photos --epochs 50 --amp
              equiflop train deit3_tiny_patch16_224 --recipe demo    (a teacher)
              equiflop distill --teacher runs/deit3_tiny_patch16_224 --data fashion-mnist-part --init steer
              equiflop distill --teacher runs/deit3_tiny_patch16_224 --data fashion-mnist-part --report
    """
    from equiflop.distill.config import DistillConfig

    given["model_kwargs"] = [
        *(given.get("model_kwargs") or ()),
        *([("group", group)] if group else []),
        *([("embed_dim", width)] if width else []),
    ]
    name = name or (network_of(given["teacher"])[0] if given["teacher"] else None)
    if name is None:
        raise click.UsageError("give the NAME of a trained network of timm, or --teacher RUN")
    options = options_of(name, recipe, amp, given, DistillConfig, DistillCommand.place)
    config = DistillConfig.from_dict(options)
    if plot is not None and not report:
        raise click.UsageError("--plot draws a report; give --report too")
    if report:
        _report(config, plot, as_json)
        return
    from equiflop.distill import DistillTrainer

    trainer = DistillTrainer(config)
    if trainer.steering is not None:
        trainer.progress.print(str(trainer.steering))
    carry_out(trainer, resume, as_json)


def _report(config: DistillConfig, plot: str | None, as_json: bool) -> None:
    from equiflop.data import open_data
    from equiflop.distill.loading import load_teacher
    from equiflop.distill.report import draw_report, mirror_report
    from equiflop.distill.teacher import numerical_device, sample_images
    from equiflop.figure_files import check_figure_file
    from equiflop.grids import as_image_group
    from equiflop.runtime.device import pick_device

    if plot is not None:
        check_figure_file(Path(plot), "plot")
    teacher = load_teacher(config)
    asked = config.image_size is not None or config.channels is not None
    own = None if asked else teacher.spec.preprocessing
    data = open_data(config.data, config.image_size, config.channels, own)
    teacher.take(data.preprocessing, config.image_size is not None)
    device = numerical_device(pick_device(config.device))
    images = sample_images(data.train, config, device)
    found = mirror_report(teacher.to(device), images, as_image_group(config.model_kwargs.get("group", "flop")))
    if plot is not None:
        draw_report(found, Path(plot))
    click.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))
