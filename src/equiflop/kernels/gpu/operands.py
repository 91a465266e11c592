"""How kernels read the rows of features: where lane after lane lies on an axis in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from equiflop.kernels.gpu.source import Lines, transformed
from equiflop.kernels.lanes import Lanes

#: The order of an axis: by irreps, the group's own basis, or heads that share every irrep.
Axis = Literal["irreps", "group", "heads"]


def offsets_of(lanes: Lanes, axis: Axis, index: str, copies: str, heads: int, section: str) -> list[str]:
    """Where lane after lane lies on an axis, for the channels ``index`` of a lane of ``copies`` channels."""
    before = f"{section} * ({lanes.count} * {copies}) + " if section != "0" else ""
    if axis != "heads":
        return [f"{before}{place} * {copies} + {index}" for place in range(lanes.count)]
    found = []
    for i, row, j in lanes.places():
        lead = lanes.before(i)
        width = f"({lanes.spans[i][1]} * {copies} // {heads})"
        within = f"({j} * {copies} + {index})"
        head = f"{within} // {width} * ({lanes.count} * {copies} // {heads})"
        found.append(f"{before}{head} + {lead} * {copies} // {heads} + {row} * {width} + {within} % {width}")
    return found


def loads_of(pointer: str, at: Sequence[str], mask: str) -> list[str]:
    """Lane after lane of rows, by pointers."""
    places = [f"{pointer} + row * {pointer}_row + ({offset})[None, :]" for offset in at]
    return [f"tl.load({place}, mask={mask}, other=0.0)" for place in places]


def operands_of(lines: Lines, lanes: Lanes, axis: Axis, pointer: str, loads: Sequence[str]) -> list[str]:
    """The rows of all irreps, from what loads lane after lane of an axis."""
    names = [lines.new(load) for load in loads]
    if axis != "group":
        return names
    wide = [lines.new(f"{name}.to(tl.float32)") for name in names]
    sums = transformed(wide, lanes.plan, lines, to_group=False)
    return [lines.new(f"{name}.to({pointer}.dtype.element_ty)") for name in sums]


def as_wide(name: str, interpreted: bool) -> str:
    return f"{name}.to(tl.float32)" if interpreted else name
