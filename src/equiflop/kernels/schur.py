"""The linear map that Schur's lemma allows, irrep by irrep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.groups import algebra_table
from equiflop.kernels.layout import Layout

#: Weight and bias of every irrep's block; None where the map has no block.
Maps = tuple[tuple[Tensor | None, Tensor | None], ...]

# Plain numbers, so that compilers can trace them.
_ALGEBRA_TABLES = {e: algebra_table(e) for e in (2, 4)}


def algebra_weight(weight: Tensor, e: int) -> Tensor:
    """``sum_k U_k (x) W_k`` for the algebra's units ``U_k``: ``(e * m_out, m_in)`` to ``(e * m_out, e * m_in)``."""
    weights = weight.unflatten(0, (e, -1))
    rows = [
        torch.cat([weights[k] if sign > 0 else -weights[k] for k, sign in row], dim=1) for row in _ALGEBRA_TABLES[e]
    ]
    return torch.cat(rows)


def algebra_product(x: Tensor, weight: Tensor, e: int) -> Tensor:
    """A block of complex (``e = 2``) or quaternionic (4) type: ``(..., d, m_in)`` to ``(..., d, m_out)``.

    Rows come as (algebra element, copy); the algebra's elements join the multiplicities in one larger product.
    """
    rows = x.unflatten(-2, (e, -1)).transpose(-3, -2).flatten(-2)  # (..., d / e, e * m_in)
    out = F.linear(rows, algebra_weight(weight, e))
    return out.unflatten(-1, (e, -1)).transpose(-3, -2).flatten(-3, -2)


def block_product(x: Tensor, weight: Tensor, bias: Tensor | None, algebra: int) -> Tensor:
    """One irrep's block, ``(..., d, m_in)`` to ``(..., d, m_out)``."""
    if algebra != 1:
        return algebra_product(x, weight, algebra)
    # A matrix, so that a block within a longer axis is read in place and the bias is added by the product.
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def on_lanes(lanes: Sequence[Tensor], layout: Layout, maps: Maps) -> list[Tensor]:
    """The map from lanes ``(..., copies)`` to one output per row of every irrep, ``(..., m_out)``.

    Rows of one irrep share a product. Nothing is joined but what a product has to read as one.
    """
    n = layout.copies or 1
    outputs = []
    place = 0
    for span, (weight, bias) in zip(layout.spans, maps, strict=True):
        assert weight is not None
        width = span.multiplicity // n
        rows = [list(lanes[place + i * width : place + (i + 1) * width]) for i in range(span.dim)]
        place += span.dim * width
        if span.dim == 1:
            row = rows[0][0] if width == 1 else torch.cat(rows[0], dim=-1)
            outputs.append(block_product(row, weight, bias, 1))
            continue
        block = torch.cat([lane.unsqueeze(-2) for row in rows for lane in row], dim=-2)
        out = block_product(block.unflatten(-2, (span.dim, width)).flatten(-2), weight, bias, span.algebra)
        outputs += [out[..., i, :] for i in range(span.dim)]
    return outputs


def cut(row: Tensor, copies: int) -> list[Tensor]:
    """A row ``(..., m)`` of the output cut into lanes ``(..., copies)``."""
    if row.shape[-1] == copies:
        return [row]
    return [row[..., k : k + copies] for k in range(0, row.shape[-1], copies)]


def cut_all(rows: Sequence[Tensor], copies: int) -> list[Tensor]:
    """All rows cut into lanes."""
    return [lane for row in rows for lane in cut(row, copies)]


def mix_rows(x: Tensor, layout: Layout, maps: Maps) -> Tensor:
    """The map along the first axis: ``(dim, columns)`` to the same; one product per irrep reads its rows in place."""
    parts = []
    for span, (weight, _) in zip(layout.spans, maps, strict=True):
        if weight is None:
            continue
        rows = x[span.start : span.stop].unflatten(0, (span.dim, -1))  # d, m, columns
        if span.algebra == 1:
            parts += [weight @ rows[i] for i in range(span.dim)]
            continue
        wide = algebra_weight(weight, span.algebra)
        joined = rows.unflatten(0, (span.algebra, -1)).transpose(0, 1).flatten(1, 2)  # d / e, e * m, columns
        out = torch.stack([wide @ joined[i] for i in range(span.dim // span.algebra)])
        parts.append(out.unflatten(1, (span.algebra, -1)).transpose(0, 1).flatten(0, 2))
    return torch.cat(parts)
