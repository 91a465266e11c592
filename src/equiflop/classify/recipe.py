"""Recipes: named sets of options for :class:`equiflop.classify.TrainConfig`, as YAML files."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from equiflop.classify.config import TrainConfig

_FOLDER = files("equiflop.classify") / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with equiflop."""
    return sorted(item.name.removesuffix(".yaml") for item in _FOLDER.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str, kind: type[TrainConfig] | None = None) -> dict[str, Any]:
    """Options of a recipe.

    Args:
        name: one of :func:`recipe_names`, or the path of a YAML file.
        kind: the configuration that it is for; by default :class:`TrainConfig`.

    Raises:
        ValueError: if there is no such recipe, it is not a YAML mapping, or it has an unknown option.
    """
    kind = kind or TrainConfig
    if name in recipe_names():
        text, origin = (_FOLDER / f"{name}.yaml").read_text(), name
    else:
        path = Path(name)
        if not path.is_file():
            close = get_close_matches(name, recipe_names(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(recipe_names())}"
            raise ValueError(f"recipe={name!r} is neither a recipe nor a file; {hint}")
        try:
            text, origin = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as text ({error})") from error
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place is not None else ""
        raise ValueError(f"{origin}: not YAML{line} ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{origin}: a recipe is a mapping such as 'lr: 1.0e-3', not {type(options).__name__}")
    try:
        kind.check_names(options)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    for name in ("model_kwargs", "teacher_kwargs"):
        if not isinstance(options.get(name) or {}, dict):
            raise ValueError(f"{origin}: {name}={options[name]!r} is not a mapping such as 'depth: 4'")
    numbers = kind.number_names()
    return {name: _number(value) if name in numbers else value for name, value in options.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
