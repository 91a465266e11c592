"""The sources of layer norms and of their gradients: a row of all lanes is read once and written once."""

from __future__ import annotations

from dataclasses import dataclass

from equiflop.kernels.gpu.source import Lines, function
from equiflop.kernels.lanes import Lanes


@dataclass(frozen=True)
class Norm:
    """Which layer norm a kernel computes.

    Attributes:
        lanes: of the feature.
        entries: weight of an entry's square in the variance, by irrep.
        weight: whether there are factors per (irrep, multiplicity).
        bias: whether there is one, on the trivial irrep.
    """

    lanes: Lanes
    entries: tuple[float, ...]
    weight: bool
    bias: bool

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _norm(self)


@dataclass(frozen=True)
class NormBackward(Norm):
    """The gradients of a layer norm.

    Attributes:
        residual: whether a gradient comes along the residual stream, to which the norm's is added.
    """

    residual: bool = False

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _norm_backward(self)


def _norm(what: Norm) -> str:
    """The source of a layer norm: ``x`` to ``y``, rows ``x_row`` and ``y_row`` apart; ``inverse`` per row is kept."""
    lanes = what.lanes
    lines = emit = Lines()
    emit("n = tl.arange(0, WIDTH)")
    emit("m = tl.program_id(0) * BM + tl.arange(0, BM)")
    emit("inside = (m < M)[:, None] & (n < N)[None, :]")
    emit("row = m.to(tl.int64)[:, None]")
    _load_lanes(lines, lanes, "x", "x")
    _centre(lines, lanes, "x")
    places = lanes.places()
    squares = " + ".join(f"tl.sum(x{lane} * x{lane}, 1) * {what.entries[i]!r}" for lane, (i, _, _) in enumerate(places))
    emit(f"scale = tl.rsqrt({squares} + eps)")
    emit("tl.store(inverse + m, scale, mask=m < M)")
    for lane, place in enumerate(lanes.parameter_places()):
        value = f"x{lane} * scale[:, None]"
        if what.weight:
            emit(f"w = tl.load(weight + {place} * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]")
            value += " * w"
        if what.bias and lane == 0:
            emit("b = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]")
            value += " + b"
        emit(f"tl.store(y + row * y_row + ({lane} * N + n)[None, :], ({value}).to(y.dtype.element_ty), mask=inside)")
    arguments = ["x", *(["weight"] if what.weight else []), *(["bias"] if what.bias else []), "y", "inverse"]
    arguments += ["M", "x_row", "y_row", "eps"]
    return function("norm", arguments, ["N", "WIDTH", "BM"], lines)


def _norm_backward(what: NormBackward) -> str:
    """The source of a layer norm's gradients.

    ``dy`` and, along the residual stream, ``dx_before`` to ``dx``; per program one row of ``sums``: the gradients of
    the factors and of the bias, in float32.
    """
    lanes = what.lanes
    places, parameters = lanes.places(), lanes.parameter_places()
    lines = emit = Lines()
    emit("n = tl.arange(0, WIDTH)")
    used = sorted(set(parameters))
    if what.weight:
        for place in used:
            emit(f"w{place} = tl.load(weight + {place} * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]")
            emit(f"dw{place} = tl.zeros((WIDTH,), dtype=tl.float32)")
    if what.bias:
        emit("db = tl.zeros((WIDTH,), dtype=tl.float32)")
    emit("for tile in range(tl.program_id(0), tl.cdiv(M, BM), tl.num_programs(0)):")
    lines.depth = 2
    emit("m = tile * BM + tl.arange(0, BM)")
    emit("inside = (m < M)[:, None] & (n < N)[None, :]")
    emit("row = m.to(tl.int64)[:, None]")
    _load_lanes(lines, lanes, "x", "x")
    _load_lanes(lines, lanes, "dy", "d")
    _centre(lines, lanes, "x")
    emit("scale = tl.load(inverse + m, mask=m < M, other=0.0)[:, None]")
    if what.bias:
        emit("db += tl.sum(d0, 0)")
    for lane, place in enumerate(parameters):
        if what.weight:
            emit(f"dw{place} += tl.sum(d{lane} * x{lane} * scale, 0)")
            emit(f"d{lane} = d{lane} * w{place}")
    products = " + ".join(f"tl.sum(d{lane} * x{lane}, 1)" for lane in range(lanes.count))
    emit(f"common = ({products})[:, None] * scale * scale * scale")
    for lane, (i, _, _) in enumerate(places):
        emit(f"d{lane} = d{lane} * scale - x{lane} * common * {what.entries[i]!r}")
    _centre(lines, lanes, "d")
    for lane in range(lanes.count):
        value = f"d{lane}"
        if what.residual:
            value += (
                f" + tl.load(dx_before + row * dx_before_row + ({lane} * N + n)[None, :], mask=inside, other=0.0)"
                ".to(tl.float32)"
            )
        emit(f"tl.store(dx + row * dx_row + ({lane} * N + n)[None, :], ({value}).to(dx.dtype.element_ty), mask=inside)")
    lines.depth = 1
    count = (len(used) if what.weight else 0) + what.bias
    if count:
        emit(f"at = sums + tl.program_id(0) * ({count} * N) + n")
    if what.weight:
        for place in used:
            emit(f"tl.store(at + {place} * N, dw{place}, mask=n < N)")
    if what.bias:
        emit(f"tl.store(at + {count - 1} * N, db, mask=n < N)")
    arguments = ["x", "dy", *(["dx_before"] if what.residual else []), *(["weight"] if what.weight else [])]
    arguments += ["inverse", "dx", *(["sums"] if count else []), "M", "x_row", "dy_row"]
    arguments += [*(["dx_before_row"] if what.residual else []), "dx_row"]
    return function("norm_backward", arguments, ["N", "WIDTH", "BM"], lines)


def _load_lanes(lines: Lines, lanes: Lanes, pointer: str, name: str) -> None:
    for lane in range(lanes.count):
        lines(
            f"{name}{lane} = tl.load({pointer} + row * {pointer}_row + ({lane} * N + n)[None, :], mask=inside, "
            "other=0.0).to(tl.float32)"
        )


def _rows(lanes: Lanes) -> list[list[int]]:
    """The lanes of every row of an irrep."""
    found: dict[tuple[int, int], list[int]] = {}
    for lane, (i, row, _) in enumerate(lanes.places()):
        found.setdefault((i, row), []).append(lane)
    return list(found.values())


def _centre(lines: Lines, lanes: Lanes, name: str) -> None:
    """Rows without their means, zero behind their ends."""
    for members in _rows(lanes):
        total = " + ".join(f"tl.sum({name}{lane}, 1)" for lane in members)
        lines(f"mean = ({total}) / ({len(members)} * N)")
        for lane in members:
            lines(f"{name}{lane} = tl.where(inside, {name}{lane} - mean[:, None], 0.0)")
