"""The sources of products.

A product by Schur's lemma reads and writes ``|G|`` lanes of equal length (``Layout``). A program keeps one accumulator
per lane, walks the length of a lane, and has all irreps of its tile in registers at the end. The change of basis is
then a few additions between accumulators in float32, and activation, bias, residual and the order of heads cost no
trip to memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from equiflop.kernels.gpu.operands import Axis, as_wide, loads_of, offsets_of, operands_of
from equiflop.kernels.gpu.source import Lines, function, transformed
from equiflop.kernels.lanes import Lanes

#: What comes behind a product is done for so many parts of its tile, one after the other: that takes fewer registers.
PIECES = 4
#: What a pointwise function and its derivative are, of ``z`` in float32.
ACTIVATIONS: dict[str, tuple[str, str]] = {
    "gelu": (
        "0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))",
        "0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)",
    ),
    "quick_gelu": (
        "z * tl.sigmoid(1.702 * z)",
        "tl.sigmoid(1.702 * z) * (1.0 + 1.702 * z * (1.0 - tl.sigmoid(1.702 * z)))",
    ),
    "silu": ("z * tl.sigmoid(z)", "tl.sigmoid(z) * (1.0 + z * (1.0 - tl.sigmoid(z)))"),
    "relu": ("tl.maximum(z, 0.0)", "tl.where(z > 0.0, 1.0, 0.0)"),
}


@dataclass(frozen=True)
class Product:
    """Which product a kernel computes.

    Attributes:
        lanes: of both sides.
        reads: order of the input's axis.
        writes: order of the output's axis.
        sections_in: parts of equal type behind each other in the input; the products of all are summed.
        sections_out: the same of the output.
        heads: that share every irrep, where an order is ``"heads"``.
        activation: applied in the group's basis, in between the two changes of basis; for ``writes="irreps"``.
        keeps: whether the values before the activation are written too, in the group's basis.
        slopes: the product is the gradient behind the activation: in the group's basis it is multiplied by the
            derivative at the kept values, taken back, and written beside what the activation had given.
        bias: whether there is one, on the trivial irrep.
        scale: whether there are factors per (irrep, multiplicity) behind the bias (layer scale); for
            ``writes="irreps"``.
        residual: whether something is added.
        path: whether what is added to the residual has a factor per sample (stochastic depth).
        interpreted: whether the interpreter runs it: its products of bfloat16 are wrong, so operands are cast up.
        descriptors: whether tiles are loaded by tensor descriptors, as Hopper's copying unit (TMA) does it, not by
            pointers; for ``reads`` other than ``"heads"``. Rows have to begin at multiples of 16 bytes.
        transposed: with descriptors, whether weights lie as ``(in, out)``.
    """

    lanes: Lanes
    reads: Axis
    writes: Axis
    sections_in: int = 1
    sections_out: int = 1
    heads: int = 1
    activation: str | None = None
    keeps: bool = False
    slopes: bool = False
    bias: bool = False
    scale: bool = False
    residual: bool = False
    path: bool = False
    interpreted: bool = False
    descriptors: bool = False
    transposed: bool = False

    def source(self) -> str:
        """See :class:`equiflop.kernels.gpu.source.Kernel`."""
        return _product(self)


def _product(what: Product) -> str:
    """The source of a product.

    Tensors: ``x`` of rows ``x_row`` apart, ``w0, w1, ...`` of every irrep with the steps ``w0_out, w0_in``, ``bias``,
    ``scale``, ``residual``, ``path``, ``kept``, and the outputs ``out`` (and ``out_kept`` or ``out_active``).
    """
    lanes, count = what.lanes, len(what.lanes.spans)
    pointers = ["x", *(f"w{i}" for i in range(count))]
    pointers += ["bias"] if what.bias else []
    pointers += ["scale"] if what.scale else []
    pointers += ["residual"] if what.residual else []
    pointers += ["path"] if what.path else []
    pointers += ["kept"] if what.slopes else []
    pointers += ["out"]
    pointers += ["out_kept"] if what.keeps else []
    pointers += ["out_active"] if what.slopes else []
    numbers = ["M", "SCALE_OF_M", "TOKENS", "x_row", "out_row"]
    numbers += [f"w{i}_{side}" for i in range(count) for side in ("out", "in")]
    lines = emit = Lines()
    emit("rows_of_tiles = tl.cdiv(M, BM)")
    emit("per_section = tl.cdiv(N_OUT, BN)")
    emit(f"columns_of_tiles = per_section * {what.sections_out}")
    if what.descriptors:
        _describe(lines, what)
    emit("for tile in range(tl.program_id(0), rows_of_tiles * columns_of_tiles, tl.num_programs(0)):")
    lines.depth = 2
    emit("first = tile // (BAND * columns_of_tiles) * BAND")
    emit("band = tl.minimum(rows_of_tiles - first, BAND)")
    emit("place = tile % (BAND * columns_of_tiles)")
    emit("first_m = (first + place % band) * BM")
    emit("m = first_m + tl.arange(0, BM)")
    emit("column = place // band")
    emit("section = column // per_section")
    emit("first_n = column % per_section * BN")
    emit("n = first_n + tl.arange(0, BN)")
    emit("inside_m = (m < M)[:, None]")
    emit("inside_n = (n < N_OUT)[None, :]")
    emit("row = m.to(tl.int64)[:, None]")
    for lane in range(lanes.count):
        emit(f"acc{lane} = tl.zeros((BM, BN), dtype=tl.float32)")
    loops = [("part", f"range({what.sections_in})")] if what.sections_in > 1 else []
    for name, values in [*loops, ("start", "range(0, N_IN, BK)")]:
        emit(f"for {name} in {values}:")
        lines.depth += 1
    part = "part" if what.sections_in > 1 else "0"
    if what.descriptors:
        loads = [f"x_tiles.load([first_m, {part} * {lanes.count} + {lane}, start])" for lane in range(lanes.count)]
        loads = [f"tl.reshape({load}, (BM, BK))" for load in loads]
    else:
        emit("k = start + tl.arange(0, BK)")
        emit("inside_k = k < N_IN")
        at = offsets_of(lanes, what.reads, "k", "N_IN", what.heads, part)
        loads = loads_of("x", at, "inside_m & inside_k[None, :]")
    operands = operands_of(lines, lanes, what.reads, "x", loads)
    operands = [as_wide(name, what.interpreted) for name in operands]
    for i, (dim, width) in enumerate(lanes.spans):
        lead = lanes.before(i)
        for j_out in range(width):
            for j_in in range(width):
                emit(f"w = {_weights(what, i, width, j_out, j_in, part)}")
                for r in range(dim):
                    acc, operand = lead + r * width + j_out, operands[lead + r * width + j_in]
                    emit(f"acc{acc} = tl.dot({operand}, {as_wide('w', what.interpreted)}, acc{acc})")
    lines.depth = 2
    if what.bias:
        emit("added = tl.load(bias + section * N_OUT + n, mask=n < N_OUT, other=0.0).to(tl.float32)")
        emit("acc0 += added[None, :]")
    if what.path:
        emit("factor = tl.load(path + m // TOKENS, mask=m < M, other=0.0).to(tl.float32)[:, None]")
    parts = [[f"acc{lane}"] for lane in range(lanes.count)]
    for step in range(PIECES.bit_length() - 1):
        half = f"(BM, 2, BN // {2 ** (step + 1)})"
        for lane, names in enumerate(parts):
            parts[lane] = []
            for name in names:
                emit(f"{name}_0, {name}_1 = tl.split(tl.permute(tl.reshape({name}, {half}), (0, 2, 1)))")
                parts[lane] += [f"{name}_0", f"{name}_1"]
    for piece in range(PIECES):
        length = f"BN // {PIECES}"
        emit(f"n = first_n + {piece} * ({length}) + tl.arange(0, {length})")
        _finish(lines, what, [names[piece] for names in parts])
    arguments = [*pointers, *numbers]
    constants = ["N_IN", "N_OUT", "BM", "BN", "BK", "BAND", "PROGRAMS"]
    name = f"product_{what.reads}_to_{what.writes}" + (f"_{what.activation}" if what.activation else "")
    return function(name + ("_backward" if what.slopes else ""), arguments, constants, lines)


def _describe(lines: Lines, what: Product) -> None:
    """Descriptors: of the input as rows of lanes, so that what lies behind the end of a lane is 0, and of weights."""
    lanes = what.lanes
    assert what.reads != "heads", "a lane's channels must lie side by side"
    shape = f"[M, {what.sections_in * lanes.count}, N_IN]"
    lines(f"x_tiles = tl.make_tensor_descriptor(x, shape={shape}, strides=[x_row, N_IN, 1], block_shape=[BM, 1, BK])")
    for i, (_, width) in enumerate(lanes.spans):
        sides = [(f"{what.sections_out * width} * N_OUT", "BN"), (f"{what.sections_in * width} * N_IN", "BK")]
        (rows, down), (columns, along) = reversed(sides) if what.transposed else sides
        shape, block = f"[{rows}, {columns}]", f"[{down}, {along}]"
        step = f"w{i}_{'in' if what.transposed else 'out'}"
        lines(f"w{i}_tiles = tl.make_tensor_descriptor(w{i}, shape={shape}, strides=[{step}, 1], block_shape={block})")


def _weights(what: Product, i: int, width: int, j_out: int, j_in: int, part: str) -> str:
    """A tile of the weights of the irrep ``i``, ``(BK, BN)``; behind the end of a lane anything but NaN may stand."""
    down, along = f"section * ({width} * N_OUT) + {j_out} * N_OUT", f"{part} * ({width} * N_IN) + {j_in} * N_IN"
    if not what.descriptors:
        place = f"w{i} + ({down} + n)[None, :] * w{i}_out + ({along} + k)[:, None] * w{i}_in"
        return f"tl.load({place}, mask=inside_n & inside_k[:, None], other=0.0)"
    first_n, first_k = f"{down} + first_n", f"{along} + start"
    if what.transposed:
        return f"w{i}_tiles.load([{first_k}, {first_n}])"
    return f"tl.trans(w{i}_tiles.load([{first_n}, {first_k}]))"


def _finish(lines: Lines, what: Product, results: list[str]) -> None:
    """What comes behind a product, for channels ``n`` of every lane: all in registers, then written once."""
    lanes, emit = what.lanes, lines
    emit("inside = inside_m & (n < N_OUT)[None, :]")
    places = offsets_of(lanes, what.writes, "n", "N_OUT", what.heads, "section" if what.sections_out > 1 else "0")
    places = [lines.new(f"row * out_row + ({place})[None, :]") for place in places]
    if what.writes == "group" or what.activation:
        results = transformed(results, lanes.plan, lines, to_group=True)
    if what.activation:
        value, slope = ACTIVATIONS[what.activation]
        active = []
        for result, place in zip(results, places, strict=True):  # lanes lie alike by irreps and in the group's basis
            if what.keeps:
                emit(f"tl.store(out_kept + {place}, {result}.to(out_kept.dtype.element_ty), mask=inside)")
            if what.slopes:
                emit(f"z = tl.load(kept + {place}, mask=inside, other=0.0).to(tl.float32)")
            else:
                emit(f"z = {result}")
            active.append(lines.new(value))
            if what.slopes:
                emit(f"{result} = {result} * ({slope})")
        active = transformed(active, lanes.plan, lines, to_group=False)
        if what.slopes:
            results = transformed(results, lanes.plan, lines, to_group=False)
            for place, name in zip(places, active, strict=True):
                emit(f"tl.store(out_active + {place}, {name}.to(out_active.dtype.element_ty), mask=inside)")
        else:
            results = active
    for lane, (place, name) in enumerate(zip(places, results, strict=True)):
        if what.scale:
            at = f"scale + {lanes.parameter_places()[lane]} * N_OUT + n"
            name = lines.new(f"{name} * tl.load({at}, mask=n < N_OUT, other=0.0).to(tl.float32)[None, :]")
        if what.path:
            name = lines.new(f"{name} * factor")
        if what.residual:
            name = lines.new(f"tl.load(residual + {place}, mask=inside, other=0.0).to(tl.float32) + {name}")
        emit(f"tl.store(out + {place}, {name}.to(out.dtype.element_ty), mask=inside)")
