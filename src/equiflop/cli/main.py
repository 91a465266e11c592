"""The command ``equiflop``: finds the sub-command, and turns a user's mistakes into one line."""

from __future__ import annotations

import importlib
import os
from difflib import get_close_matches
from typing import Any, NoReturn

import click

#: Sub-command -> (module with a function ``command``, what it does). Modules are imported when they are used.
COMMANDS = {
    "models": ("equiflop.cli.models", "List the models that equiflop registers in timm."),
    "check": ("equiflop.cli.check", "Test that a model is equivariant."),
    "bench": ("equiflop.cli.bench", "Time models beside their plain twins."),
    "train": ("equiflop.cli.train", "Train a model on images."),
    "distill": ("equiflop.cli.distill", "Train the equivariant twin of a network that is already trained."),
    "eval": (
        "equiflop.cli.evaluate",
        "Measure a trained model: accuracy, calibration, and answers that change with mirroring.",
    ),
    "plot": ("equiflop.cli.plot", "Compare training runs in a figure."),
    "predict": ("equiflop.cli.predict", "Classify image files."),
    "convert": ("equiflop.cli.convert", "Convert official weights, recognised by their keys."),
    "publish": ("equiflop.cli.publish", "Write a trained model as a folder for the hub, with a model card."),
    "export": ("equiflop.cli.export", "Write a model for a runtime, and prove the file there."),
    "demo": ("equiflop.cli.demo", "Train a small E(ViT) and its plain twin side by side, in minutes."),
}
_USER_ERROR = 2
_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose sub-commands are imported only when one is called, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the sub-command's module."""
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = importlib.import_module(module).command
        if not isinstance(command, click.Command):
            raise RuntimeError(f"{module}.command is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest sub-command where there is none of the given name."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the sub-commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command; a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("EQUIFLOP_DEBUG"):
                raise
            _fail(ctx, _one_line(error), _USER_ERROR)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted", _INTERRUPTED)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(ctx: click.Context, message: str, code: int) -> NoReturn:
    click.echo(f"equiflop: {message}", err=True)
    ctx.exit(code)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A mistake in the arguments ends with one line and exit code 2; EQUIFLOP_DEBUG=1 shows where it was found.",
)
@click.version_option(package_name="equiflop")
def main() -> None:
    """Vision networks that give the same answer for an image and its mirror image, with half the multiply-adds.

    \b
    See it happen:          equiflop demo
    List the models:        equiflop models
    Train one of them:      equiflop train flop_deit3_tiny_patch16_224 --data photos/
    Ask it about a picture: equiflop predict cat.jpg --checkpoint runs/flop_deit3_tiny_patch16_224
    """
