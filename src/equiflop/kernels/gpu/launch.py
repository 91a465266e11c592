"""Kernels on tensors: rows and strides read off, outputs made, tiles chosen by trying them once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from equiflop.kernels.gpu import tiles as sizes
from equiflop.kernels.gpu.norms import Norm, NormBackward
from equiflop.kernels.gpu.products import Product, WeightGradient
from equiflop.kernels.gpu.source import kernel
from equiflop.kernels.gpu.sums import RowSums, WeightSums
from equiflop.kernels.gpu.tiles import Tile
from equiflop.kernels.lanes import decode

#: Rows of a norm per program, its warps, and programs per multiprocessor of its gradients.
NORM_ROWS = 4
NORM_WARPS = 8
NORM_PROGRAMS = 4
#: Rows of weights per program that finishes their gradients, and columns at a time.
SUM_ROWS = 8
SUM_COLUMNS = 128
SUM_WARPS = 4
#: Rows at a time, and columns of a program that sums a norm's gradients.
ROW_SUM_TILE = (64, 32)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _wrapped(function: Any) -> Any:
    """A kernel as compilers see it; the interpreter's are called as they are, since torch 2.12 does not wrap them."""
    return function if is_interpreted() else wrap_triton(function)


@lru_cache(maxsize=1024)
def _tuned(what: Any, tiles: tuple[Tile, ...], programs: int, keys: tuple[str, ...]) -> Any:
    import triton

    function = kernel(what)
    names = set(function.arg_names)
    configs = [
        triton.Config(
            {key: value for key, value in tile.constants(programs).items() if key in names},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        for tile in tiles
    ]
    return triton.autotune(configs=configs, key=list(keys))(function)


def _run(
    what: Product | WeightGradient,
    tiles: Sequence[Tile],
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: dict[str, Any],
    device: torch.device,
) -> None:
    if is_interpreted():
        function = kernel(what)
        constants = {k: v for k, v in sizes.INTERPRETED.constants(3).items() if k in function.arg_names}
        function[grid](**arguments, **constants)
        return
    tuned = _tuned(what, tuple(tiles), sizes.multiprocessors(device), ("N_IN", "N_OUT", "SCALE_OF_M"))
    wrap_triton(tuned)[grid](**arguments)


def _rows(x: Tensor) -> Tensor:
    """``(..., dim)`` to rows whose entries lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton_op("equiflop::schur_product", mutates_args={})
def schur_product(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    path: Tensor | None,
    kept: Tensor | None,
    lanes: list[int],
    reads: str,
    writes: str,
    sections_in: int,
    sections_out: int,
    heads: int,
    activation: str,
    keeps: bool,
    transposed: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """A product of all irreps, and what lies around it.

    Args:
        x: rows ``(T, sections_in * |G| * n_in)``, ordered as ``reads`` says.
        weights: of every irrep ``(m_out, m_in)``, in ``x``'s dtype; with ``transposed`` the other way round.
        bias: of the trivial irrep, ``(sections_out * n_out,)``.
        scale: factors per (irrep, multiplicity) of the output, behind the bias.
        residual: what is added, ``(T, dim_out)``.
        path: a factor per sample for what is added to it, ``(B,)``.
        kept: the values before the activation, for the way back.
        lanes: in numbers, ``Layout.code``.
        reads: order of the input, ``"irreps"``, ``"group"`` or ``"heads"``.
        writes: order of the output.
        sections_in: parts of the input.
        sections_out: parts of the output.
        heads: that share every irrep.
        activation: by name; empty for none.
        keeps: whether the values before it are given too.
        transposed: whether the weights are read the other way round.
        dtype: of the output.

    Returns:
        The output ``(T, dim_out)``; with ``keeps`` also the values before the activation; with ``kept`` also what the
        activation had given, by irreps.
    """
    assert writes != "irreps" or sections_out == 1, "parts lie within the blocks of irreps, not behind each other"
    known = decode(lanes)
    order = known.count
    x = _rows(x)
    count, dim_in = x.shape
    n_in = dim_in // (sections_in * order)
    n_out = weights[0].shape[1 if transposed else 0] // sections_out  # the trivial irrep has one lane
    dim_out = sections_out * order * n_out
    what: Any = Product(
        known,
        reads,  # type: ignore[arg-type]
        writes,  # type: ignore[arg-type]
        sections_in,
        sections_out,
        heads,
        activation or None,
        keeps,
        kept is not None,
        bias is not None,
        scale is not None,
        residual is not None,
        path is not None,
        interpreted=is_interpreted(),
    )
    out = x.new_empty((count, dim_out), dtype=dtype)
    outputs = [out]
    arguments: dict[str, Any] = {"x": x, "out": out, "M": count, "SCALE_OF_M": count // 8192, "TOKENS": 1}
    arguments |= {"x_row": x.stride(0), "out_row": dim_out, "N_IN": n_in, "N_OUT": n_out}
    for i, weight in enumerate(weights):
        steps = (weight.stride(1), weight.stride(0)) if transposed else (weight.stride(0), weight.stride(1))
        arguments |= {f"w{i}": weight, f"w{i}_out": steps[0], f"w{i}_in": steps[1]}
    if bias is not None:
        arguments["bias"] = bias
    if scale is not None:
        arguments["scale"] = scale
    if residual is not None:
        arguments["residual"] = residual.reshape(count, dim_out).contiguous()
    if path is not None:
        arguments["path"], arguments["TOKENS"] = path, count // path.shape[0]
    if keeps:
        outputs.append(x.new_empty((count, dim_out)))
        arguments["out_kept"] = outputs[-1]
    if kept is not None:
        outputs.append(torch.empty_like(kept))
        arguments |= {"kept": kept, "out_active": outputs[-1]}

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        tiles = _ceil(count, meta["BM"]) * _ceil(n_out, meta["BN"]) * sections_out
        return (meta["PROGRAMS"] or tiles,)

    if count:
        _run(what, sizes.candidates(what, sizes.capability(x.device)), grid, arguments, x.device)
    return outputs


@triton_op("equiflop::schur_weight_gradient", mutates_args={})
def schur_weight_gradient(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    lanes: list[int],
    reads: str,
    writes: str,
    sections: int,
    heads: int,
) -> list[Tensor]:
    """The gradients of a product's parameters.

    Args:
        dy: gradient of the output, rows ``(T, sections * |G| * n_out)`` in the order ``writes``.
        x: the input, rows ``(T, |G| * n_in)`` in the order ``reads``.
        weights: of every irrep ``(m_out, m_in)``, before the layer scale.
        bias: of the trivial irrep, before the layer scale.
        scale: layer scale per (irrep, multiplicity).
        lanes: in numbers, ``Layout.code``.
        reads: order of the input.
        writes: order of the output.
        sections: parts of the output.
        heads: that share every irrep.

    Returns:
        Those of all weights in one vector, irrep after irrep; of the bias, if there is one; of the layer scale, if
        there is one; each in the dtype of what it is the gradient of.
    """
    known = decode(lanes)
    order = known.count
    dy, x = _rows(dy), _rows(x)
    count = x.shape[0]
    n_in, n_out = x.shape[1] // order, dy.shape[1] // (order * sections)
    size = known.weights * sections * n_in * n_out
    outputs = {"dw": weights[0].new_empty(size)}
    if bias is not None:
        outputs["db"] = torch.empty_like(bias)
    if scale is not None:
        outputs["dscale"] = torch.empty_like(scale)
    if not count:
        return [output.zero_() for output in outputs.values()]
    axes = (reads, writes, sections, heads, bias is not None, is_interpreted())
    what = WeightGradient(known, *axes)  # type: ignore[arg-type]
    tried = sizes.candidates(what, sizes.capability(x.device))
    step = sizes.INTERPRETED if is_interpreted() else sizes.largest(tried)
    tiles = _ceil(n_out, step.columns) * sections * _ceil(n_in, step.depth)
    parts = sizes.parts_of(count, tiles, sizes.multiprocessors(x.device))
    out = x.new_empty((parts, size + (0 if bias is None else bias.numel())), dtype=torch.float32)
    arguments: dict[str, Any] = {"dy": dy, "x": x, "out": out, "M": count, "SCALE_OF_M": count // 8192}
    arguments |= {"LENGTH": _ceil(count, parts), "dy_row": dy.stride(0), "x_row": x.stride(0)}
    arguments |= {"N_IN": n_in, "N_OUT": n_out}

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        return (_ceil(n_out, meta["BN"]) * sections * _ceil(n_in, meta["BK"]) * parts,)

    _run(what, tried, grid, arguments, x.device)
    finish: dict[str, Any] = {"sums": out, "PARTS": parts, "N_IN": n_in, "N_OUT": n_out, "BM": SUM_ROWS}
    if scale is not None:
        finish["scale"] = scale
        if bias is not None:
            finish["bias"] = bias
        for i, weight in enumerate(weights):
            weight = _rows(weight)
            finish |= {f"w{i}": weight, f"w{i}_row": weight.stride(0)}
    rows = sum(_ceil(width * sections * n_out, SUM_ROWS) for _, width in known.spans)
    function = kernel(WeightSums(known, sections, bias is not None, scale is not None))
    _wrapped(function)[(rows,)](**finish, **outputs, BN=min(SUM_COLUMNS, _power_of_two(n_in)), num_warps=SUM_WARPS)
    return list(outputs.values())


@triton_op("equiflop::schur_norm", mutates_args={})
def schur_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lanes: list[int],
    entries: list[float],
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Layer norm of rows ``(T, dim)``: every row of an irrep centred, one standard deviation for all.

    Args:
        x: the rows.
        weight: factors per (irrep, multiplicity).
        bias: of the trivial irrep.
        lanes: in numbers, ``Layout.code``.
        entries: weight of an entry's square in the variance, by irrep.
        eps: added to the variance.
        dtype: of the output.

    Returns:
        The output, and the inverse of the standard deviation per row, float32.
    """
    known = decode(lanes)
    x = _rows(x)
    count, dim = x.shape
    n = dim // known.count
    y = x.new_empty((count, dim), dtype=dtype)
    inverse = x.new_empty(count, dtype=torch.float32)
    arguments: dict[str, Any] = {"x": x, "y": y, "inverse": inverse, "M": count, "x_row": x.stride(0), "y_row": dim}
    arguments |= {"eps": eps, "N": n, "WIDTH": _power_of_two(n), "BM": NORM_ROWS}
    if weight is not None:
        arguments["weight"] = weight
    if bias is not None:
        arguments["bias"] = bias
    if count:
        function = kernel(Norm(known, tuple(entries), weight is not None, bias is not None))
        _wrapped(function)[(_ceil(count, NORM_ROWS),)](**arguments, num_warps=NORM_WARPS)
    return [y, inverse]


@triton_op("equiflop::schur_norm_backward", mutates_args={})
def schur_norm_backward(
    x: Tensor,
    dy: Tensor,
    dx_before: Tensor | None,
    weight: Tensor | None,
    inverse: Tensor,
    lanes: list[int],
    entries: list[float],
    bias: Tensor | None,
) -> list[Tensor]:
    """The gradients of :func:`schur_norm`.

    Args:
        x: its input.
        dy: gradient of its output.
        dx_before: a gradient that comes along the residual stream, added to the input's.
        weight: its factors.
        inverse: of the standard deviation.
        lanes: in numbers, ``Layout.code``.
        entries: as forward.
        bias: its bias.

    Returns:
        The gradient of the input, and those of factors and bias in one vector, in their dtype.
    """
    known = decode(lanes)
    x, dy = _rows(x), _rows(dy)
    count, dim = x.shape
    n = dim // known.count
    dx = x.new_empty((count, dim))
    size = ((known.parameters if weight is not None else 0) + (bias is not None)) * n
    programs = min(_ceil(count, NORM_ROWS), NORM_PROGRAMS * sizes.multiprocessors(x.device))
    sums = x.new_empty((programs, size), dtype=torch.float32)
    arguments: dict[str, Any] = {"x": x, "dy": dy, "inverse": inverse, "dx": dx, "M": count, "dx_row": dim}
    arguments |= {"x_row": x.stride(0), "dy_row": dy.stride(0), "N": n, "WIDTH": _power_of_two(n), "BM": NORM_ROWS}
    if size:
        arguments["sums"] = sums
    if weight is not None:
        arguments["weight"] = weight
    if dx_before is not None:
        dx_before = _rows(dx_before)
        arguments |= {"dx_before": dx_before, "dx_before_row": dx_before.stride(0)}
    parameter = weight if weight is not None else bias
    total = sums.new_empty(size, dtype=None if parameter is None else parameter.dtype)
    if not count:
        return [dx, total.zero_()]
    what = NormBackward(known, tuple(entries), weight is not None, bias is not None, dx_before is not None)
    _wrapped(kernel(what))[(programs,)](**arguments, num_warps=NORM_WARPS)
    if size:
        kept = {"x": sums, "y": total, "M": programs, "size": size, "BM": ROW_SUM_TILE[0], "BN": ROW_SUM_TILE[1]}
        _wrapped(kernel(RowSums()))[(_ceil(size, ROW_SUM_TILE[1]),)](**kept, num_warps=SUM_WARPS)
    return [dx, total]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
