"""Layer norms and their gradients on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from equiflop.kernels.gpu import tiles as sizes
from equiflop.kernels.gpu.launch import SUM_WARPS, as_rows, ceil_div, power_of_two, wrapped
from equiflop.kernels.gpu.norms import Norm, NormBackward
from equiflop.kernels.gpu.source import kernel
from equiflop.kernels.gpu.sums import RowSums
from equiflop.kernels.lanes import decode

#: Rows of a norm per program, its warps, and programs per multiprocessor of its gradients.
NORM_ROWS = 4
NORM_WARPS = 8
NORM_PROGRAMS = 4
#: Rows at a time, and columns of a program that sums a norm's gradients.
ROW_SUM_TILE = (64, 32)


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
    x = as_rows(x)
    count, dim = x.shape
    n = dim // known.count
    y = x.new_empty((count, dim), dtype=dtype)
    inverse = x.new_empty(count, dtype=torch.float32)
    arguments: dict[str, Any] = {"x": x, "y": y, "inverse": inverse, "M": count, "x_row": x.stride(0), "y_row": dim}
    arguments |= {"eps": eps, "N": n, "WIDTH": power_of_two(n), "BM": NORM_ROWS}
    if weight is not None:
        arguments["weight"] = weight
    if bias is not None:
        arguments["bias"] = bias
    if count:
        function = kernel(Norm(known, tuple(entries), weight is not None, bias is not None))
        wrapped(function)[(ceil_div(count, NORM_ROWS),)](**arguments, num_warps=NORM_WARPS)
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
    x, dy = as_rows(x), as_rows(dy)
    count, dim = x.shape
    n = dim // known.count
    dx = x.new_empty((count, dim))
    size = ((known.parameters if weight is not None else 0) + (bias is not None)) * n
    programs = min(ceil_div(count, NORM_ROWS), NORM_PROGRAMS * sizes.multiprocessors(x.device))
    sums = x.new_empty((programs, size), dtype=torch.float32)
    arguments: dict[str, Any] = {"x": x, "dy": dy, "inverse": inverse, "dx": dx, "M": count, "dx_row": dim}
    arguments |= {"x_row": x.stride(0), "dy_row": dy.stride(0), "N": n, "WIDTH": power_of_two(n), "BM": NORM_ROWS}
    if size:
        arguments["sums"] = sums
    if weight is not None:
        arguments["weight"] = weight
    if dx_before is not None:
        dx_before = as_rows(dx_before)
        arguments |= {"dx_before": dx_before, "dx_before_row": dx_before.stride(0)}
    parameter = weight if weight is not None else bias
    total = sums.new_empty(size, dtype=None if parameter is None else parameter.dtype)
    if not count:
        return [dx, total.zero_()]
    what = NormBackward(known, tuple(entries), weight is not None, bias is not None, dx_before is not None)
    wrapped(kernel(what))[(programs,)](**arguments, num_warps=NORM_WARPS)
    if size:
        kept = {"x": sums, "y": total, "M": programs, "size": size, "BM": ROW_SUM_TILE[0], "BN": ROW_SUM_TILE[1]}
        wrapped(kernel(RowSums()))[(ceil_div(size, ROW_SUM_TILE[1]),)](**kept, num_warps=SUM_WARPS)
    return [dx, total]
