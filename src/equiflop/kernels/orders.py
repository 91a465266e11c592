"""The orders in which a linear map reads or writes the feature axis: irreps, the group's own basis, or heads.

The residual stream is ordered by irreps, where Schur's lemma makes products cheap. In the group's basis the axis is
``|G|`` copies of ``n`` channels, which the group permutes: pointwise functions and heads are plain there. In the order
of heads every head holds its share of every irrep ("coupled" heads, as published).

The change of basis by additions leaves out the transform's factors: parameters carry them (``Layout.gains``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equiflop.kernels.layout import Layout, blocks_to_lanes, join, lanes_to_blocks, split


@dataclass(frozen=True)
class Order:
    """The order of an axis.

    Attributes:
        kind: ``"irreps"``, ``"group"`` or ``"heads"``.
        sections: parts of equal type that lie behind each other, such as queries, keys and values: each is in this
            order by itself. Within an irrep's block ``(d, sections * m)`` they lie behind each other too.
        num_heads: heads that share every irrep, for ``"heads"``.
    """

    kind: Literal["irreps", "group", "heads"] = "irreps"
    sections: int = 1
    num_heads: int = 1


def write(blocks: Sequence[Tensor], layout: Layout, order: Order, fourier: Tensor | None) -> Tensor:
    """Blocks ``(..., d, sections * m)`` to an axis ``(..., sections * dim)`` in the given order.

    Args:
        blocks: one per irrep.
        layout: of one section.
        order: the order to write.
        fourier: the Fourier matrix, where the group has no transform by additions.
    """
    if order.kind == "irreps":
        return join(blocks)
    if order.kind == "heads":
        shape = (order.sections, order.num_heads, -1)
        parts = [block.unflatten(-1, shape).movedim(-4, -2).flatten(-2) for block in blocks]
        return torch.cat(parts, dim=-1).flatten(-3)
    # Sections are one more axis in front of the rows: (..., sections, d, m).
    apart = [block.unflatten(-1, (order.sections, -1)).transpose(-3, -2) for block in blocks]
    lanes = blocks_to_lanes(apart, layout)
    if layout.plan is not None:
        return torch.cat(layout.plan.synthesise(lanes), dim=-1).flatten(-2)
    rows = torch.stack(lanes, dim=-2)
    return (_matrix(fourier, rows).mT @ rows).flatten(-3)


def read(x: Tensor, layout: Layout, order: Order, fourier: Tensor | None) -> list[Tensor]:
    """The inverse of :func:`write` for one section; blocks of the axis ``(..., dim)``."""
    if order.kind == "irreps":
        return split(x, layout)
    if order.kind == "group":
        return _from_group(x, layout, fourier)
    return _from_heads(x, layout, order)


def _from_group(x: Tensor, layout: Layout, fourier: Tensor | None) -> list[Tensor]:
    n = layout.copies or 1
    if layout.plan is None:
        rows = x.unflatten(-1, (layout.order, n))
        return split((_matrix(fourier, rows) @ rows).flatten(-2), layout)
    values = [x[..., k * n : (k + 1) * n] for k in range(layout.order)]
    return lanes_to_blocks(layout.plan.analyse(values), layout)


def _from_heads(x: Tensor, layout: Layout, order: Order) -> list[Tensor]:
    heads = x.unflatten(-1, (order.num_heads, -1))
    blocks = []
    for span in layout.spans:
        start, stop = span.start // order.num_heads, span.stop // order.num_heads
        rows = heads[..., start:stop].unflatten(-1, (span.dim, span.multiplicity // order.num_heads))
        blocks.append(rows.transpose(-3, -2).flatten(-2))
    return blocks


def _matrix(fourier: Tensor | None, like: Tensor) -> Tensor:
    assert fourier is not None
    return fourier.to(like.dtype)
