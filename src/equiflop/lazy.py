"""Imports that wait until a name is used, so that the command line starts without PyTorch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazily(package: str, names: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562), which imports a name's module when the name is first used.

    Args:
        package: its name.
        names: names by the module they come from; under the package itself stand its sub-modules.
    """
    homes = {name: module for module, inside in names.items() for name in inside}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find


def is_command_line() -> bool:
    """Whether this process is the command ``equiflop``, or ``python -m equiflop`` on its way to it."""
    if "equiflop_command" in sys.modules:
        return True
    if sys.argv[:1] != ["-m"]:  # what stands there while Python looks for the module of its option -m
        return False
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "equiflop"
