"""Options that several commands share."""

from __future__ import annotations

import json
from typing import Any

import click

from equiflop.cli.completion import complete_devices

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=complete_devices,
    help="auto, cpu, cuda or mps, or one of several such as cuda:1.",
)
resume_option = click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="auto goes on from the newest checkpoint in --out, if there is one; never starts anew and removes them as "
    "soon as a step has succeeded.",
)
amp_option = click.option("--amp", is_flag=True, help="Short for --precision bfloat16.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode image files."
)


class KeyValue(click.ParamType):
    """``KEY=VALUE``, the value read as JSON where it is JSON and as text where it is not."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Split at the first ``=``."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not KEY=VALUE, such as embed_dim=192", param, ctx)
        try:
            return key, json.loads(text)
        except json.JSONDecodeError:
            return key, {"True": True, "False": False, "None": None}.get(text, text)


class ImageSize(click.ParamType):
    """``224`` or ``256x192`` (height x width)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """One number stands for a square."""
        if isinstance(value, tuple):
            return value
        numbers = str(value).lower().split("x")
        if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() and int(number) for number in numbers):
            self.fail(f"{value!r} is not a size, such as 224 or 256x192 (height x width)", param, ctx)
        return int(numbers[0]), int(numbers[-1])
