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
    values = hidden.plan.synthesise(_to_lanes(x, layout, mlp.fc1))
    if mlp.bias1 is not None:
        values = [value + bias for value, bias in zip(values, mlp.bias1, strict=True)]
    stack = torch.cat(hidden.plan.analyse([mlp.act(value) for value in values]))
    return _from_lanes(stack, hidden, mlp.fc2)


def _attention(x: Tensor, layout: Layout, attention: branch.Attention) -> Tensor:
    return (_coupled if attention.heads == "coupled" else _regular)(x, layout, attention)


def _coupled(x: Tensor, layout: Layout, attention: branch.Attention) -> Tensor:
    """Heads with channels of every irrep."""
    heads, bundles = attention.num_heads, _bundles(layout)
    assert bundles is not None
    widths = [sum(layout.spans[i].multiplicity for i in bundle) for bundle in bundles]
    counts = [layout.spans[bundle[0]].dim for bundle in bundles]
    rows = iter(x.unsqueeze(0).split([w for w, count in zip(widths, counts, strict=True) for _ in range(count)], -1))
    lanes = []
    for bundle, count in zip(bundles, counts, strict=True):
        weight, bias = _bundled(attention.qkv, bundle)
        weight = _by_head(weight, 0, len(bundle), 3, heads)
        bias = None if bias is None else _by_head(bias, 0, len(bundle), 3, heads)
        lanes += [F.linear(next(rows), weight, bias) for _ in range(count)]
    qkv = torch.cat(lanes).unflatten(-1, (3, heads, -1)).permute(3, 1, 4, 2, 0, 5).flatten(-2)
    y = _attend(qkv, attention).unflatten(-1, (len(lanes), -1)).permute(3, 0, 2, 1, 4).flatten(-2)
    back = iter(y.split(1))
    out = []
    for bundle, count in zip(bundles, counts, strict=True):
        weight, bias = _bundled(attention.proj, bundle)
        weight = _by_head(weight, 1, len(bundle), 1, heads)
        out += [F.linear(next(back), weight, bias) for _ in range(count)]
    return torch.cat(out, dim=-1).squeeze(0)


def _bundles(layout: Layout) -> list[tuple[int, ...]] | None:
    """Irreps that share a product, such that all products have one width: one-dimensional ones in pairs where another
    has two rows of twice their length. None where that does not come out even.

    The product of several has zeros where Schur's lemma has no block. With heads of few channels per irrep those cost
    less than to bring the pieces of heads together one by one.
    """
    size = max(span.dim for span in layout.spans)
    bundles: list[tuple[int, ...]] = []
    for i, span in enumerate(layout.spans):
        if span.dim == 1 and bundles and len(bundles[-1]) < size and layout.spans[bundles[-1][0]].dim == 1:
            bundles[-1] += (i,)
        else:
            bundles.append((i,))
    even = all(len(bundle) * layout.spans[bundle[0]].dim == size for bundle in bundles)
    return bundles if even else None


def _bundled(maps: schur.Maps, bundle: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a bundle's product, irrep by irrep."""
    weights, biases = zip(*(maps[i] for i in bundle), strict=True)
    bias = biases[0]
    if len(bundle) > 1 and any(b is not None for b in biases):
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([weight.new_zeros(len(weight)) if b is None else b for weight, b in pairs])
    return torch.block_diag(*weights) if len(bundle) > 1 else weights[0], bias


def _by_head(values: Tensor, axis: int, irreps: int, sections: int, heads: int) -> Tensor:
    """An axis ``(irreps, sections, heads, rest)`` in the order of sections, heads, irreps, rest."""
    apart = values.unflatten(axis, (irreps, sections, heads, -1))
    return apart.movedim(axis, axis + 2).flatten(axis, axis + 3)


def _regular(x: Tensor, layout: Layout, attention: branch.Attention) -> Tensor:
    """Lanes with heads of their own."""
    assert layout.plan is not None
    values = layout.plan.synthesise(_to_lanes(x, layout, attention.qkv, sections=3))
    per_copy = attention.num_heads // layout.order
    qkv = torch.cat(values).unflatten(-1, (3, per_copy, -1)).permute(3, 1, 0, 4, 2, 5).flatten(2, 3)
    y = _attend(qkv, attention).unflatten(1, (layout.order, -1)).permute(1, 0, 3, 2, 4).flatten(-2)
    return _from_lanes(torch.cat(layout.plan.analyse(y.split(1))), layout, attention.proj)


def _attend(qkv: Tensor, attention: branch.Attention) -> Tensor:
    q, k, v = qkv.unbind(0)  # B, heads, N, channels
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention.attn_mask, is_causal=attention.is_causal)


def _to_lanes(x: Tensor, layout: Layout, maps: schur.Maps, sections: int = 1) -> list[Tensor]:
    """The Schur linear map to lanes ``(1, ..., sections * copies)``."""
    sizes = [span.multiplicity for span in layout.spans for _ in range(span.dim)]
    rows = iter(x.unsqueeze(0).split(sizes, dim=-1))
    lanes = []
    for span, (weight, bias) in zip(layout.spans, maps, strict=True):
        assert weight is not None
        parts = _cut(weight, sections, span.dim)
        biases = [None] * span.dim if bias is None else _cut(bias, sections, span.dim)
        for row in [next(rows) for _ in range(span.dim)]:
            lanes += [F.linear(row, part, b) for part, b in zip(parts, biases, strict=True)]
    return lanes


def _from_lanes(stack: Tensor, layout: Layout, maps: schur.Maps) -> Tensor:
    """The Schur linear map from stacked lanes ``(|G|, ..., copies)`` to the axis ``(..., dim)``."""
    lanes = iter(stack.split(1))
    rows = []
    for span, (weight, bias) in zip(layout.spans, maps, strict=True):
        assert weight is not None
        for _ in range(span.dim):
            row = [next(lanes) for _ in range(span.dim)]
            rows.append(F.linear(row[0] if len(row) == 1 else torch.cat(row, dim=-1), weight, bias))
    return torch.cat(rows, dim=-1).squeeze(0)


def _cut(weight: Tensor, sections: int, count: int) -> list[Tensor]:
    """Rows ``(sections, count, rest)`` of a weight or bias cut into ``count`` parts, each without that axis."""
    if count == 1:
        return [weight]
    return [part.flatten(0, 1) for part in weight.unflatten(0, (sections, count, -1)).unbind(1)]


def _fits(x: Tensor, layout: Layout, parts: Sequence[branch.Parts]) -> bool:
    if not is_made_for_runtimes("stacked") or any(part.keep is not None for part in parts):
        return False
    layouts = [layout, *(part.body.hidden for part in parts if isinstance(part.body, branch.Mlp))]
    if not branch.fits(x, layout, parts) or any(span.algebra > 1 for some in layouts for span in some.spans):
        return False
    coupled = any(isinstance(part.body, branch.Attention) and part.body.heads == "coupled" for part in parts)
    return not coupled or _bundles(layout) is not None


TABLE["branches"] = (
    Variant("stacked", _fits, branches, "an export to OpenVINO, irreps of real type"),
    *TABLE["branches"],
)
