"""Layer norm of a feature: rows centred by themselves, one standard deviation for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.kernels.choose import TABLE, Variant, choose, is_eager, is_traced_for_kernels
from equiflop.kernels.layout import Layout, join, per_channel, per_lane, split, to_lanes

#: How squares are weighed: every entry the same, or the rows of a d-dimensional irrep as 1/d of one row, whatever
#: their length (the published octic code).
Weighting = Literal["entries", "octic"]


class Norm(NamedTuple):
    """What a layer norm computes; weight per (irrep, multiplicity), bias on the trivial irrep.

    ``centred`` says that every row of the input has mean 0 already.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weighting: Weighting
    centred: bool = False


class Affine(NamedTuple):
    """A factor per (irrep, multiplicity) and a bias on the trivial irrep."""

    weight: Tensor
    bias: Tensor | None


def layer_norm(x: Tensor, layout: Layout, norm: Norm) -> Tensor:
    """``(..., dim)`` to the same; half precision is normed in float32."""
    return (choose("layer_norm", x, layout, norm) or _reference)(x, layout, norm)


def _reference(x: Tensor, layout: Layout, norm: Norm) -> Tensor:
    wide = _wide(x)
    centred = [
        block - block.mean(dim=-1, keepdim=True) if span.multiplicity > 1 else block
        for block, span in zip(split(wide, layout), layout.spans, strict=True)
    ]
    weights = entry_weights(layout, norm)
    parts = [
        weight * block.square().sum(dim=(-2, -1))
        for block, weight, span in zip(centred, weights, layout.spans, strict=True)
        if span.multiplicity
    ]
    variance = parts[0]
    for part in parts[1:]:
        variance = variance + part
    normal = join(centred) * torch.rsqrt(variance + norm.eps).unsqueeze(-1)
    return affine(normal, layout, Affine(_ones(norm, layout, normal), norm.bias)).to(x.dtype)


def _fused(x: Tensor, layout: Layout, norm: Norm) -> Tensor:
    """Rows centred, then torch's layer norm: the centred vector has mean 0, and its variance is ``sigma^2``."""
    wide = _wide(x)
    if len({span.multiplicity for span in layout.spans}) == 1:
        rows = wide.unflatten(-1, (-1, layout.spans[0].multiplicity))
        centred = (rows - rows.mean(dim=-1, keepdim=True)).flatten(-2)
    else:
        centred = join([block - block.mean(dim=-1, keepdim=True) for block in split(wide, layout)])
    weight = None if norm.weight is None else per_channel(norm.weight, layout).to(wide.dtype)
    bias = None if norm.bias is None else F.pad(norm.bias, (0, layout.dim - len(norm.bias))).to(wide.dtype)
    return F.layer_norm(centred, (layout.dim,), weight, bias, norm.eps).to(x.dtype)


def _fits_fused(x: Tensor, layout: Layout, norm: Norm) -> bool:
    return is_eager(x) and norm.weighting == "entries" and all(span.multiplicity > 1 for span in layout.spans)


def _by_lanes(x: Tensor, layout: Layout, norm: Norm) -> Tensor:
    return torch.cat(on_lanes(to_lanes(x, layout), layout, norm), dim=-1)


def on_lanes(lanes: Sequence[Tensor], layout: Layout, norm: Norm) -> list[Tensor]:
    """The norm of a regular feature, lane by lane: sums and outputs of all lanes over one range, side by side."""
    dtype = lanes[0].dtype
    wide = [_wide(lane) for lane in lanes]
    sums = [lane.sum(dim=-1, keepdim=True) for lane in wide]
    centred, squares = [], []
    weights = entry_weights(layout, norm)
    copies = layout.copies or 1
    place = 0
    for span, entry in zip(layout.spans, weights, strict=True):
        width = span.multiplicity // copies
        for _ in range(span.dim):
            total = sums[place]
            for other in sums[place + 1 : place + width]:
                total = total + other
            for lane in wide[place : place + width]:
                part = lane - total * (1.0 / span.multiplicity) if span.multiplicity > 1 else lane
                centred.append(part)
                squares.append((part * part).sum(dim=-1, keepdim=True) * entry)
            place += width
    variance = squares[0]
    for square in squares[1:]:
        variance = variance + square
    inverse = torch.rsqrt(variance + norm.eps)
    normal = [part * inverse for part in centred]
    return [lane.to(dtype) for lane in affine_on_lanes(normal, layout, norm.weight, norm.bias)]


def affine_on_lanes(
    lanes: Sequence[Tensor], layout: Layout, weight: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """Factors and bias, in the lanes' dtype."""
    out = list(lanes)
    if weight is not None:
        factors = per_lane(weight.to(out[0].dtype), layout)
        out = [lane * factor for lane, factor in zip(out, factors, strict=True)]
    if bias is not None:
        out[0] = out[0] + bias.to(out[0].dtype)
    return out


def affine(x: Tensor, layout: Layout, parts: Affine) -> Tensor:
    """Factors and bias on a whole feature ``(..., dim)``."""
    y = x * per_channel(parts.weight, layout)
    return y if parts.bias is None else y + F.pad(parts.bias, (0, layout.dim - parts.bias.shape[0]))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _ones(norm: Norm, layout: Layout, like: Tensor) -> Tensor:
    count = sum(span.multiplicity for span in layout.spans)
    return like.new_ones(count) if norm.weight is None else norm.weight.to(like.dtype)


def entry_weights(layout: Layout, norm: Norm) -> list[float]:
    """Weight of an entry's square in ``sigma^2``, for every irrep."""
    if norm.weighting == "entries":
        return [1.0 / layout.dim] * len(layout.spans)
    return [1.0 / (layout.order * span.dim * max(span.multiplicity, 1)) for span in layout.spans]


TABLE["layer_norm"] = (
    Variant("torch", _fits_fused, _fused, "eager, all rows centred, all entries weighing the same"),
    Variant(
        "lanes",
        lambda x, layout, norm: is_traced_for_kernels() and layout.copies is not None,
        _by_lanes,
        "torch.compile, a multiple of the regular representation",
    ),
)
