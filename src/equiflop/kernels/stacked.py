"""The form made for runtimes that join and cut tensors along their first axis without copying, such as OpenVINO.

All lanes of a feature (:class:`equiflop.kernels.layout.Layout`) come from products of their own, of one shape, and lie
behind each other along a new first axis. So heads are made of them by one transposition, and sums of lanes have one
reader, the stack, which lets a runtime make few loops of them. Weights are cut when the graph is made; a runtime folds
that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.kernels import branch, runtime, schur
from equiflop.kernels.choose import TABLE, Variant, is_made_for_runtimes
from equiflop.kernels.layout import Layout


def branches(x: Tensor, layout: Layout, parts: Sequence[branch.Parts]) -> Tensor:
    """Residual branches, see :func:`equiflop.kernels.branch.branches`."""
    for part in parts:
        x = runtime.residual(x, layout, part, _mlp if isinstance(part.body, branch.Mlp) else _attention)
    return x


def _mlp(x: Tensor, layout: Layout, mlp: branch.Mlp) -> Tensor:
    hidden = mlp.hidden
    assert hidden.plan is not None
    values = hidden.plan.synthesise(_to_lanes(x, layout, mlp.fc1, hidden))
    if mlp.bias1 is not None:
        values = [value + bias for value, bias in zip(values, mlp.bias1, strict=True)]
    stack = torch.cat(hidden.plan.analyse([mlp.act(value) for value in values]))
    return _from_lanes(stack, hidden, mlp.fc2)


def _attention(x: Tensor, layout: Layout, attention: branch.Attention) -> Tensor:
    coupled = attention.heads == "coupled"
    heads = attention.num_heads if coupled else 1
    lanes = _to_lanes(x, layout, attention.qkv, layout, sections=3, heads=heads)
    if coupled:  # a head has channels of every lane
        qkv = torch.cat(lanes).unflatten(-1, (3, heads, -1)).permute(3, 1, 4, 2, 0, 5).flatten(-2)
    else:  # every lane has heads of its own
        assert layout.plan is not None
        per_copy = attention.num_heads // layout.order
        qkv = (
            torch.cat(layout.plan.synthesise(lanes))
            .unflatten(-1, (3, per_copy, -1))
            .permute(3, 1, 0, 4, 2, 5)
            .flatten(2, 3)
        )
    q, k, v = qkv.unbind(0)  # B, heads, N, channels
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention.attn_mask, is_causal=attention.is_causal)
    if coupled:
        stack = y.unflatten(-1, (layout.order, -1)).permute(3, 0, 2, 1, 4).flatten(-2)
    else:
        assert layout.plan is not None
        values = y.unflatten(1, (layout.order, -1)).permute(1, 0, 3, 2, 4).flatten(-2)
        stack = torch.cat(layout.plan.analyse(values.split(1)))
    return _from_lanes(stack, layout, attention.proj, heads)


def _to_lanes(
    x: Tensor, layout: Layout, maps: schur.Maps, out_layout: Layout, sections: int = 1, heads: int = 1
) -> list[Tensor]:
    """The Schur linear map to lanes ``(1, ..., sections * copies)``; a lane has a share of every head's channels."""
    sizes = [span.multiplicity for span in layout.spans for _ in range(span.dim)]
    rows = iter(x.unsqueeze(0).split(sizes, dim=-1))
    lanes = []
    for span, (weight, bias) in zip(layout.spans, maps, strict=True):
        assert weight is not None
        parts = _cut(weight, 0, sections, heads, span.dim)
        biases = [None] * span.dim if bias is None else _cut(bias, 0, sections, heads, span.dim)
        for row in [next(rows) for _ in range(span.dim)]:
            lanes += [F.linear(row, part, b) for part, b in zip(parts, biases, strict=True)]
    return lanes


def _from_lanes(stack: Tensor, layout: Layout, maps: schur.Maps, heads: int = 1) -> Tensor:
    """The Schur linear map from stacked lanes ``(|G|, ..., copies)`` to the axis ``(..., dim)``."""
    lanes = iter(stack.split(1))
    rows = []
    for span, (weight, bias) in zip(layout.spans, maps, strict=True):
        assert weight is not None
        whole = torch.cat(_cut(weight, 1, 1, heads, span.dim), dim=1) if span.dim > 1 else weight
        for _ in range(span.dim):
            row = [next(lanes) for _ in range(span.dim)]
            rows.append(F.linear(row[0] if len(row) == 1 else torch.cat(row, dim=-1), whole, bias))
    return torch.cat(rows, dim=-1).squeeze(0)


def _cut(weight: Tensor, axis: int, sections: int, heads: int, count: int) -> list[Tensor]:
    """An axis of multiplicities ``(sections, heads, count, rest)`` cut into ``count`` parts, each without that axis."""
    if count == 1:
        return [weight]
    apart = weight.unflatten(axis, (sections, heads, count, -1))
    return [part.flatten(axis, axis + 2) for part in apart.unbind(axis + 2)]


def _fits(x: Tensor, layout: Layout, parts: Sequence[branch.Parts]) -> bool:
    if not is_made_for_runtimes("stacked") or any(part.keep is not None for part in parts):
        return False
    layouts = [layout, *(part.body.hidden for part in parts if isinstance(part.body, branch.Mlp))]
    return branch.fits(x, layout, parts) and all(span.algebra == 1 for some in layouts for span in some.spans)


TABLE["branches"] = (
    Variant("stacked", _fits, branches, "an export to OpenVINO, irreps of real type"),
    *TABLE["branches"],
)
