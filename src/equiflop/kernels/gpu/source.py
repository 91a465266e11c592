"""Sources of Triton kernels that are written line by line for a group.

Which additions change the basis, the group's transform says (``FourierPlan``): the kernels are written for any group
that has one and whose irreps are all of real type.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from equiflop.groups import FourierPlan


class Kernel(Protocol):
    """What a kernel computes; hashable."""

    def source(self) -> str:
        """The kernel's source: one function."""
        ...


class Lines:
    """Source that grows line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 1
        self.names = 0

    def __call__(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def new(self, expression: str) -> str:
        """A variable that holds an expression."""
        self.names += 1
        name = f"v{self.names}"
        self(f"{name} = {expression}")
        return name


class _Value:
    """A tensor of the kernel, so that a transform by additions can be asked for its source."""

    def __init__(self, name: str, lines: Lines) -> None:
        self.name, self.lines = name, lines

    def __add__(self, other: _Value) -> _Value:
        return _Value(self.lines.new(f"{self.name} + {other.name}"), self.lines)

    def __sub__(self, other: _Value) -> _Value:
        return _Value(self.lines.new(f"{self.name} - {other.name}"), self.lines)

    def __neg__(self) -> _Value:
        return _Value(self.lines.new(f"-{self.name}"), self.lines)


def transformed(names: Sequence[str], plan: FourierPlan, lines: Lines, to_group: bool) -> list[str]:
    """One variable per lane to the group's basis, or back to irreps."""
    values: Any = [_Value(name, lines) for name in names]
    results: list[Any] = plan.synthesise(values) if to_group else plan.analyse(values)
    return [value.name for value in results]


def function(name: str, arguments: Sequence[str], constants: Sequence[str], lines: Lines) -> str:
    """The source of a Triton function."""
    head = ", ".join([*arguments, *(f"{constant}: tl.constexpr" for constant in constants)])
    return "\n".join([f"def {name}({head}):", *lines.lines, ""])


@lru_cache(maxsize=1024)
def kernel(what: Kernel) -> Any:
    """The Triton function."""
    import triton
    import triton.language as tl

    source = what.source()
    name = f"<equiflop {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return triton.jit(space[source[4 : source.index("(")]])
