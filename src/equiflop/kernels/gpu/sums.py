"""The sources of what finishes gradients: sums over parts, and the share of a layer scale."""

from __future__ import annotations

from dataclasses import dataclass

from equiflop.kernels.gpu.source import Lines, function
from equiflop.kernels.lanes import Lanes


@dataclass(frozen=True)
class WeightSums:
    """All gradients of a product's parameters, of the sums that :class:`WeightGradient` left.

    Attributes:
        lanes: of both sides.
        sections: parts of the output.
        bias: whether there is one.
        scale: whether a layer scale stands behind the product, whose weights the sums are those of: they are
            multiplied by it, and its own gradients are what the sums' products with the weights add up to.
    """

    lanes: Lanes
    sections: int = 1
    bias: bool = False
    scale: bool = False

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _weight_sums(self)


@dataclass(frozen=True)
class RowSums:
    """The sum of rows of float32."""

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _row_sums()


def _weight_sums(what: WeightSums) -> str:
    """The source of the last sums of weights' gradients.

    ``sums`` of ``PARTS`` rows become ``dw``, irrep after irrep, ``db`` and ``dscale``; a program makes ``BM`` rows of
    one irrep's weights.
    """
    lanes = what.lanes
    lines = emit = Lines()
    blocks = lanes.weights * what.sections
    emit(f"size = {blocks} * N_OUT * N_IN" + (f" + {what.sections} * N_OUT" if what.bias else ""))
    first, before, place = "0", 0, 0
    for i, (_, width) in enumerate(lanes.spans):
        rows, columns = f"({width * what.sections} * N_OUT)", f"({width} * N_IN)"
        emit(f"first{i} = {first}")
        emit(f"if (tl.program_id(0) >= first{i}) & (tl.program_id(0) < first{i} + tl.cdiv({rows}, BM)):")
        first = f"first{i} + tl.cdiv({rows}, BM)"
        lines.depth = 2
        emit(f"row = (tl.program_id(0) - first{i}) * BM + tl.arange(0, BM)")
        emit(f"inside = row < {rows}")
        if what.scale:
            emit(f"factor = tl.load(scale + {place} * N_OUT + row, mask=inside, other=0.0).to(tl.float32)")
            emit("dot = tl.zeros((BM,), dtype=tl.float32)")
        emit(f"for start in range(0, {columns}, BN):")
        lines.depth = 3
        emit("column = start + tl.arange(0, BN)")
        emit(f"mask = inside[:, None] & (column < {columns})[None, :]")
        emit(f"at = {before} * N_OUT * N_IN + row[:, None] * {columns} + column[None, :]")
        emit("total = tl.zeros((BM, BN), dtype=tl.float32)")
        emit("here = sums + at")
        emit("for part in range(PARTS):")
        emit("    total += tl.load(here, mask=mask, other=0.0)")
        emit("    here += size")
        if what.scale:
            emit(f"w = tl.load(w{i} + row[:, None] * w{i}_row + column[None, :], mask=mask, other=0.0).to(tl.float32)")
            emit("dot += tl.sum(total * w, 1)")
            emit("total = total * factor[:, None]")
        emit("tl.store(dw + at, total.to(dw.dtype.element_ty), mask=mask)")
        lines.depth = 2
        if what.bias and i == 0:
            emit("total_b = tl.zeros((BM,), dtype=tl.float32)")
            emit(f"here_b = sums + {blocks} * N_OUT * N_IN + row")
            emit("for part in range(PARTS):")
            emit("    total_b += tl.load(here_b, mask=inside, other=0.0)")
            emit("    here_b += size")
            if what.scale:
                emit("dot += total_b * tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)")
                emit("total_b = total_b * factor")
            emit("tl.store(db + row, total_b.to(db.dtype.element_ty), mask=inside)")
        if what.scale:
            emit(f"tl.store(dscale + {place} * N_OUT + row, dot.to(dscale.dtype.element_ty), mask=inside)")
        lines.depth = 1
        before += width * width * what.sections
        place += width
    weights = [f"w{i}" for i in range(len(lanes.spans))] if what.scale else []
    arguments = ["sums", *weights, *(["scale"] if what.scale else [])]
    arguments += ["bias"] if what.scale and what.bias else []
    arguments += ["dw", *(["db"] if what.bias else []), *(["dscale"] if what.scale else [])]
    arguments += ["PARTS", *(f"{weight}_row" for weight in weights)]
    return function("weight_sums", arguments, ["N_IN", "N_OUT", "BM", "BN"], lines)


def _row_sums() -> str:
    """The source of sums over ``M`` rows of ``size`` numbers, ``BN`` columns a program."""
    lines = emit = Lines()
    emit("n = tl.program_id(0) * BN + tl.arange(0, BN)")
    emit("total = tl.zeros((BM, BN), dtype=tl.float32)")
    emit("for start in range(0, M, BM):")
    emit("    m = start + tl.arange(0, BM)")
    emit("    mask = (m < M)[:, None] & (n < size)[None, :]")
    emit("    total += tl.load(x + m[:, None] * size + n[None, :], mask=mask, other=0.0)")
    emit("tl.store(y + n, tl.sum(total, 0).to(y.dtype.element_ty), mask=n < size)")
    return function("row_sums", ["x", "y", "M", "size"], ["BM", "BN"], lines)
