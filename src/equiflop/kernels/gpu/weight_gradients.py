"""The source of the gradients of a product's weights: sums over rows, read on both sides in any order."""

from __future__ import annotations

from dataclasses import dataclass

from equiflop.kernels.gpu.operands import Axis, as_wide, loads_of, offsets_of, operands_of
from equiflop.kernels.gpu.source import Lines, function
from equiflop.kernels.lanes import Lanes


@dataclass(frozen=True)
class WeightGradient:
    """The gradients of a product's weights, in kernels that read rows of irreps on both sides.

    Attributes:
        lanes: of both sides.
        reads: order of the product's input.
        writes: order of the gradient of its output.
        sections: parts of the output.
        heads: as in :class:`Product`.
        bias: whether the gradient's trivial irrep is summed over rows too.
        interpreted: as in :class:`Product`.
    """

    lanes: Lanes
    reads: Axis
    writes: Axis
    sections: int = 1
    heads: int = 1
    bias: bool = False
    interpreted: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of ``N_OUT x N_IN`` numbers that a part of the sums has, before those of the bias."""
        return self.lanes.weights * self.sections

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _weight_gradient(self)


def _weight_gradient(what: WeightGradient) -> str:
    """The source of the gradients of all weights.

    ``dy`` and ``x`` are rows of lanes; ``out`` holds, for every part of the rows, the irreps' weights one behind the
    other, then the bias's, in float32.
    """
    lanes = what.lanes
    lines = emit = Lines()
    emit("per_section = tl.cdiv(N_OUT, BN)")
    emit("across = tl.cdiv(N_IN, BK)")
    emit(f"tiles = per_section * {what.sections} * across")
    emit("tile = tl.program_id(0) % tiles")
    emit("part = tl.program_id(0) // tiles")
    emit("column = tile // across")
    emit("section = column // per_section")
    emit("n = column % per_section * BN + tl.arange(0, BN)")
    emit("k = tile % across * BK + tl.arange(0, BK)")
    emit("inside_n = n < N_OUT")
    emit("inside_k = k < N_IN")
    blocks = [(i, a, b) for i, (_, width) in enumerate(lanes.spans) for a in range(width) for b in range(width)]
    for i, a, b in blocks:
        emit(f"acc{i}_{a}_{b} = tl.zeros((BN, BK), dtype=tl.float32)")
    if what.bias:
        emit("total = tl.zeros((BN,), dtype=tl.float32)")
    emit("for start in range(part * LENGTH, tl.minimum((part + 1) * LENGTH, M), BM):")
    lines.depth = 2
    emit("m = start + tl.arange(0, BM)")
    emit("inside_m = (m < tl.minimum((part + 1) * LENGTH, M))[:, None]")
    emit("row = m.to(tl.int64)[:, None]")
    section = "section" if what.sections > 1 else "0"
    offsets = offsets_of(lanes, what.writes, "n", "N_OUT", what.heads, section)
    ys = operands_of(lines, lanes, what.writes, "dy", loads_of("dy", offsets, "inside_m & inside_n[None, :]"))
    offsets = offsets_of(lanes, what.reads, "k", "N_IN", what.heads, "0")
    xs = operands_of(lines, lanes, what.reads, "x", loads_of("x", offsets, "inside_m & inside_k[None, :]"))
    for i, a, b in blocks:
        dim, width = lanes.spans[i]
        lead = lanes.before(i)
        for r in range(dim):
            first = as_wide(f"tl.trans({ys[lead + r * width + a]})", what.interpreted)
            second = as_wide(xs[lead + r * width + b], what.interpreted)
            emit(f"acc{i}_{a}_{b} = tl.dot({first}, {second}, acc{i}_{a}_{b})")
    if what.bias:
        emit(f"total += tl.sum({ys[0]}.to(tl.float32), 0)")
    lines.depth = 1
    of_bias = f" + {what.sections} * N_OUT" if what.bias else ""
    emit(f"base = out + part.to(tl.int64) * ({what.blocks} * N_OUT * N_IN{of_bias})")
    emit("inside = inside_n[:, None] & inside_k[None, :]")
    before = 0
    for i, a, b in blocks:
        width = lanes.spans[i][1]
        down = f"({section} * ({width} * N_OUT) + {a} * N_OUT + n)[:, None]"
        at = f"{before} * N_OUT * N_IN + {down} * ({width} * N_IN) + ({b} * N_IN + k)[None, :]"
        emit(f"tl.store(base + {at}, acc{i}_{a}_{b}, mask=inside)")
        if a == b == width - 1:
            before += width * width * what.sections
    if what.bias:
        emit(f"at = {what.blocks} * N_OUT * N_IN + {section} * N_OUT + n")
        emit("tl.store(base + at, total, mask=inside_n & (tile % across == 0))")
    arguments = ["dy", "x", "out", "M", "SCALE_OF_M", "LENGTH", "dy_row", "x_row"]
    return function("weight_gradient", arguments, ["N_IN", "N_OUT", "BM", "BN", "BK"], lines)
