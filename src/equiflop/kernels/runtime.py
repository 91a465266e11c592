"""The form made for runtimes, which an export traces: few, large, standard operators that their optimisers know.

A branch is one layer norm, one split, one product per irrep, one concatenation. No row is cut out by itself, and
nothing is computed that a constant could hold. Transforms of up to four elements are additions; of more, products with
a small constant matrix, which is one operator in place of a butterfly of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.kernels import branch, schur
from equiflop.kernels import norm as norms
from equiflop.kernels.choose import TABLE, Variant, is_made_for_runtimes, subtracts_means
from equiflop.kernels.layout import Layout, per_channel
from equiflop.kernels.orders import Order

#: Up to so many elements a transform is made of additions.
FEW = 4


def rows_of(x: Tensor, layout: Layout) -> list[Tensor]:
    """The blocks of a feature: ``(..., m)`` where the irrep has one row, else ``(..., d, m)``."""
    blocks = x.split([span.stop - span.start for span in layout.spans], dim=-1)
    return [
        block if span.dim == 1 else block.unflatten(-1, (span.dim, span.multiplicity))
        for block, span in zip(blocks, layout.spans, strict=True)
    ]


def joined(rows: Sequence[Tensor], layout: Layout) -> Tensor:
    """The inverse of :func:`rows_of`."""
    flat = [row if span.dim == 1 else row.flatten(-2) for row, span in zip(rows, layout.spans, strict=True)]
    return torch.cat(flat, dim=-1)


def products(rows: Sequence[Tensor], layout: Layout, maps: schur.Maps) -> list[Tensor]:
    """The Schur linear map, irrep by irrep."""
    out = []
    for row, span, (weight, bias) in zip(rows, layout.spans, maps, strict=True):
        assert weight is not None
        out.append(
            F.linear(row, weight, bias) if span.algebra == 1 else schur.algebra_product(row, weight, span.algebra)
        )
    return out


def norm(x: Tensor, layout: Layout, parts: norms.Norm) -> Tensor:
    """The norm of a whole feature as a plain layer norm, since of centred rows the mean is 0, or without that mean."""
    if not parts.centred:
        x = _centred(x, layout)
    weight = None if parts.weight is None else per_channel(parts.weight, layout)
    bias = None if parts.bias is None else F.pad(parts.bias, (0, layout.dim - len(parts.bias)))
    if not subtracts_means():
        x = F.rms_norm(x, (layout.dim,), weight, parts.eps)
        return x if bias is None else x + bias
    return F.layer_norm(x, (layout.dim,), weight, bias, parts.eps)


def _centred(x: Tensor, layout: Layout) -> Tensor:
    lengths = {span.multiplicity for span in layout.spans}
    if len(lengths) == 1:
        rows = x.unflatten(-1, (-1, lengths.pop()))
        return (rows - rows.mean(dim=-1, keepdim=True)).flatten(-2)
    return joined([row - row.mean(dim=-1, keepdim=True) for row in rows_of(x, layout)], layout)


def branches(x: Tensor, layout: Layout, parts: Sequence[branch.Parts]) -> Tensor:
    """Residual branches, see :func:`equiflop.kernels.branch.branches`."""
    for part in parts:
        x = residual(x, layout, part, _mlp if isinstance(part.body, branch.Mlp) else _attention)
    return x


def residual(x: Tensor, layout: Layout, part: branch.Parts, body: Callable[[Tensor, Layout, Any], Tensor]) -> Tensor:
    """One residual branch, given what computes its body."""
    if isinstance(part.norm, norms.Norm):
        normal = norms.layer_norm(x, layout, part.norm)
    else:
        normal = x if part.norm is None else norms.affine(x, layout, part.norm)
    out = body(normal, layout, part.body)
    if isinstance(part.body, branch.Mlp) and part.body.bias2 is not None:
        out = out + part.body.bias2
    if part.scale is not None:
        out = out * per_channel(part.scale, layout)
    return x + out if part.residual else out


def _mlp(x: Tensor, layout: Layout, mlp: branch.Mlp) -> Tensor:
    hidden = to_group(products(rows_of(x, layout), layout, mlp.fc1), mlp.hidden)
    if mlp.bias1 is not None:
        biases = mlp.bias1 if mlp.hidden.order <= FEW else [torch.stack(list(mlp.bias1), dim=-2)]
        hidden = [value + bias for value, bias in zip(hidden, biases, strict=True)]
    rows = from_group([mlp.act(value) for value in hidden], mlp.hidden)
    return joined(products(rows, mlp.hidden, mlp.fc2), layout)


def to_group(rows: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Rows of irreps to the group's basis: ``|G|`` lanes ``(..., n)``, or for many elements one ``(..., |G|, n)``."""
    assert layout.plan is not None and layout.copies is not None
    if layout.order <= FEW:
        return layout.plan.synthesise(_lanes(rows, layout))
    lanes = joined(rows, layout).unflatten(-1, (layout.order, layout.copies))
    return [torch.matmul(_matrix(layout, lanes), lanes)]


def from_group(values: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The inverse of :func:`to_group`, the transform's factors left out."""
    assert layout.plan is not None
    if layout.order > FEW:
        lanes = torch.matmul(_matrix(layout, values[0]).mT, values[0])
        return rows_of(lanes.flatten(-2), layout)
    lanes_of = iter(layout.plan.analyse(values))
    rows = []
    for span in layout.spans:
        lanes_of_rows = [next(lanes_of) for _ in range(span.dim * span.multiplicity // (layout.copies or 1))]
        row = lanes_of_rows[0] if len(lanes_of_rows) == 1 else torch.cat(lanes_of_rows, dim=-1)
        rows.append(row if span.dim == 1 else row.unflatten(-1, (span.dim, -1)))
    return rows


def _lanes(rows: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    lanes: list[Tensor] = []
    for row, span in zip(rows, layout.spans, strict=True):
        flat = row if span.dim == 1 else row.flatten(-2)
        count = span.dim * span.multiplicity // (layout.copies or 1)
        lanes += [flat] if count == 1 else flat.chunk(count, dim=-1)
    return lanes


def _matrix(layout: Layout, like: Tensor) -> Tensor:
    """The transform from irreps to the group's basis without its factors, ``(|G|, |G|)``; entries 0, 1 and -1."""
    return torch.tensor(layout.additions, dtype=like.dtype, device=like.device)


def _attention(x: Tensor, layout: Layout, attention: branch.Attention) -> Tensor:
    kind: Literal["heads", "group"] = "heads" if attention.heads == "coupled" else "group"
    rows = products(rows_of(x, layout), layout, attention.qkv)
    out = written(rows, layout, Order(kind, 3, attention.num_heads))
    qkv = out.unflatten(-1, (3 * attention.num_heads, -1)).transpose(1, 2)
    q, k, v = qkv.split(attention.num_heads, dim=1)  # B, heads, N, channels
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention.attn_mask, is_causal=attention.is_causal)
    rows = read(y.transpose(1, 2).flatten(2), layout, Order(kind, 1, attention.num_heads))
    return joined(products(rows, layout, attention.proj), layout)


def linear(
    x: Tensor, maps: schur.Maps, in_layout: Layout, out_layout: Layout, in_order: Order, out_order: Order
) -> Tensor:
    """A Schur linear map by itself, see :class:`equiflop.nn.Linear`."""
    return written(products(read(x, in_layout, in_order), in_layout, maps), out_layout, out_order)


def read(x: Tensor, layout: Layout, order: Order) -> list[Tensor]:
    """Rows of irreps of an axis in any order; see :func:`equiflop.kernels.orders.read`."""
    if order.kind == "irreps":
        return rows_of(x, layout)
    if order.kind == "group":
        copies = layout.copies or 1
        few = layout.order <= FEW
        return from_group(x.split(copies, dim=-1) if few else [x.unflatten(-1, (layout.order, copies))], layout)
    heads = x.unflatten(-1, (order.num_heads, -1))
    rows = []
    sizes = [(span.stop - span.start) // order.num_heads for span in layout.spans]
    for share, span in zip(heads.split(sizes, dim=-1), layout.spans, strict=True):
        if span.dim > 1:
            share = share.unflatten(-1, (span.dim, -1)).transpose(-3, -2)
        rows.append(share.flatten(-2))
    return rows


def written(rows: Sequence[Tensor], layout: Layout, order: Order) -> Tensor:
    """The axis in any order of rows ``(..., [d,] sections * m)``; see :func:`equiflop.kernels.orders.write`."""
    if order.kind == "irreps":
        return joined(rows, layout)
    if order.kind == "group":
        if order.sections > 1:
            apart = [row.unflatten(-1, (order.sections, -1)) for row in rows]
            rows = [
                row if span.dim == 1 else row.transpose(-3, -2) for row, span in zip(apart, layout.spans, strict=True)
            ]
        values = to_group(rows, layout)
        axis = torch.cat(values, dim=-1) if layout.order <= FEW else values[0].flatten(-2)
        return axis.flatten(-2) if order.sections > 1 else axis
    parts = []
    for row, span in zip(rows, layout.spans, strict=True):
        apart_by_head = row.unflatten(-1, (order.sections, order.num_heads, -1))
        if span.dim > 1:
            apart_by_head = apart_by_head.movedim(-4, -2).flatten(-2)
        parts.append(apart_by_head)
    return torch.cat(parts, dim=-1).flatten(-3)


def _fits_linear(
    x: Tensor, maps: schur.Maps | None, in_layout: Layout, out_layout: Layout, in_order: Order, out_order: Order
) -> bool:
    groups = [layout for layout, order in ((in_layout, in_order), (out_layout, out_order)) if order.kind == "group"]
    return is_made_for_runtimes() and maps is not None and all(layout.plan is not None for layout in groups)


def _fits(x: Tensor, layout: Layout, parts: Sequence[branch.Parts]) -> bool:
    return is_made_for_runtimes() and all(part.keep is None for part in parts) and branch.fits(x, layout, parts)


def _fits_norm(x: Tensor, layout: Layout, parts: norms.Norm) -> bool:
    every_row_is_centred = all(span.multiplicity > 1 for span in layout.spans)
    return is_made_for_runtimes() and parts.weighting == "entries" and every_row_is_centred


TABLE["layer_norm"] = (
    Variant("runtime", _fits_norm, norm, "an export, all rows centred, all entries weighing the same"),
    *TABLE["layer_norm"],
)
TABLE["linear"] = (Variant("runtime", _fits_linear, linear, "an export, transforms by additions"),)
TABLE["branches"] = (Variant("runtime", _fits, branches, "an export"), *TABLE["branches"])
