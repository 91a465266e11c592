"""What the shell offers for a word that is not finished: names of models, recipes, data sets and groups."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files

import click
from click.shell_completion import CompletionItem

from equiflop.data.names import BUILT_IN, PREFIXES
from equiflop.files import cache_folder, write_text

#: Groups of image symmetries, by name; equiflop.image_group makes them.
GROUPS = ("flop", "updown", "flips", "rot4", "octic")
_TWIN = "twin:"


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of our models, and of timm's once a letter is there; with ``twin:`` in front timm's alone."""
    ours, theirs = _model_names()
    if incomplete.startswith(_TWIN):
        return _items([_TWIN + name for name in theirs], incomplete)
    return _items(ours + theirs if incomplete else [*ours, _TWIN], incomplete)


def complete_models_or_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The same, else files: a run or its weights."""
    return complete_models(ctx, param, incomplete) or complete_files(ctx, param, incomplete)


def complete_equivariant_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of our models."""
    return _items(_model_names()[0], incomplete)


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes, else files."""
    from equiflop.classify.recipe import recipe_names

    return _items(recipe_names(), incomplete) or complete_files(ctx, param, incomplete)


def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of data sets and what stands before others, else folders."""
    named = {**BUILT_IN, **PREFIXES}
    found = [CompletionItem(name, help=text) for name, text in named.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]


def complete_groups(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of groups."""
    return _items(GROUPS, incomplete)


def complete_devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of devices."""
    return _items(("auto", "cpu", "cuda", "mps"), incomplete)


def complete_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders."""
    return [CompletionItem(incomplete, type="file")]


def _items(names: list[str] | tuple[str, ...], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _model_names() -> tuple[list[str], list[str]]:
    """Names of our models and of all others that timm knows: from the cache, as long as neither has changed."""
    entry_points = (files("equiflop") / "models" / "entry_points.py").read_bytes()
    key = hashlib.sha256(entry_points + version("timm").encode()).hexdigest()[:16]
    place = cache_folder() / f"models-{key}.txt"
    with suppress(OSError, ValueError):
        ours, theirs = place.read_text(encoding="utf-8").split("\n\n")
        return ours.split(), theirs.split()
    import timm

    from equiflop.models import equivariant_models

    known = equivariant_models()
    others = sorted(set(timm.list_models()) - set(known))
    with suppress(OSError):  # a cache that cannot be written costs seconds
        write_text(place, "\n".join(known) + "\n\n" + "\n".join(others) + "\n")
    return known, others
