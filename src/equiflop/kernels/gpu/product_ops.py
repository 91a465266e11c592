"""Products and the gradients of their parameters on tensors: strides read off, outputs made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from equiflop.kernels.gpu import tiles as sizes
from equiflop.kernels.gpu.launch import (
    SUM_WARPS,
    aligned,
    as_rows,
    ceil_div,
    descriptors_wanted,
    is_interpreted,
    power_of_two,
    run_tuned,
    wrapped,
)
from equiflop.kernels.gpu.products import Product
from equiflop.kernels.gpu.source import kernel
from equiflop.kernels.gpu.sums import WeightSums
from equiflop.kernels.gpu.weight_gradients import WeightGradient
from equiflop.kernels.lanes import decode

#: Rows of weights per program that finishes their gradients, and columns at a time.
SUM_ROWS = 8
SUM_COLUMNS = 128


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
    x = as_rows(x)
    count, dim_in = x.shape
    n_in = dim_in // (sections_in * order)
    n_out = weights[0].shape[1 if transposed else 0] // sections_out  # the trivial irrep has one lane
    dim_out = sections_out * order * n_out
    device = sizes.capability(x.device)
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
    if descriptors_wanted(device) and sizes.may_have_descriptors(what) and aligned(x, n_in, weights):
        what = replace(what, descriptors=True, transposed=transposed)
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
        tiles = ceil_div(count, meta["BM"]) * ceil_div(n_out, meta["BN"]) * sections_out
        return (meta["PROGRAMS"] or tiles,)

    if count:
        run_tuned(what, sizes.candidates(what, device), grid, arguments, x.device)
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
    dy, x = as_rows(dy), as_rows(x)
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
    tiles = ceil_div(n_out, step.columns) * sections * ceil_div(n_in, step.depth)
    parts = sizes.parts_of(count, tiles, sizes.multiprocessors(x.device))
    out = x.new_empty((parts, size + (0 if bias is None else bias.numel())), dtype=torch.float32)
    arguments: dict[str, Any] = {"dy": dy, "x": x, "out": out, "M": count, "SCALE_OF_M": count // 8192}
    arguments |= {"LENGTH": ceil_div(count, parts), "dy_row": dy.stride(0), "x_row": x.stride(0)}
    arguments |= {"N_IN": n_in, "N_OUT": n_out}

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        return (ceil_div(n_out, meta["BN"]) * sections * ceil_div(n_in, meta["BK"]) * parts,)

    run_tuned(what, tried, grid, arguments, x.device)
    finish: dict[str, Any] = {"sums": out, "PARTS": parts, "N_IN": n_in, "N_OUT": n_out, "BM": SUM_ROWS}
    if scale is not None:
        finish["scale"] = scale
        if bias is not None:
            finish["bias"] = bias
        for i, weight in enumerate(weights):
            weight = as_rows(weight)
            finish |= {f"w{i}": weight, f"w{i}_row": weight.stride(0)}
    rows = sum(ceil_div(width * sections * n_out, SUM_ROWS) for _, width in known.spans)
    function = kernel(WeightSums(known, sections, bias is not None, scale is not None))
    wrapped(function)[(rows,)](**finish, **outputs, BN=min(SUM_COLUMNS, power_of_two(n_in)), num_warps=SUM_WARPS)
    return list(outputs.values())
