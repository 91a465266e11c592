"""A residual branch of a transformer in one piece: norm, attention or MLP, layer scale, and the sum with the input.

The reference is the branch's own modules, called one after the other (``equiflop.nn.residual``). The kernels here keep
the irreps side by side, as lanes of one length, from the norm to the sum: a compiler then makes plain loops of them,
and without one no tensor is stacked or joined but for the products. They are taken where nobody watches the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equiflop.kernels import norm as norms
from equiflop.kernels import schur
from equiflop.kernels.activation import activate, activate_
from equiflop.kernels.choose import TABLE, Variant, choose, is_constant, is_eager, is_traced_for_kernels, may_overwrite
from equiflop.kernels.layout import Layout, per_channel, per_lane, to_lanes

#: Without gradients a CPU computes hidden features beyond so many bytes in parts of the batch: the C library gives
#: large tensors back to the system after every layer, and gets them again page by page.
LARGE_BYTES = 25_000_000
#: Size of the parts, which stay in the processor's caches.
PART_BYTES = 5_000_000
#: Up to so many tokens a compiled training step on a CPU writes its attention out: its maps take ``4 N`` bytes for
#: every token and head.
WRITTEN_OUT_TOKENS = 256


class Mlp(NamedTuple):
    """Linear map into the group's basis, pointwise function, linear map back.

    ``bias1`` and ``bias2`` are biases that depend on the token: what is added behind ``fc1``, in the group's basis, by
    lanes ``(N, copies)``, and behind ``fc2``, ``(N, dim)``.
    """

    fc1: schur.Maps
    act: nn.Module
    fc2: schur.Maps
    hidden: Layout
    bias1: Sequence[Tensor] | None = None
    bias2: Tensor | None = None


class Attention(NamedTuple):
    """Self-attention with heads that share every irrep ("coupled") or that the group permutes ("regular")."""

    qkv: schur.Maps
    proj: schur.Maps
    num_heads: int
    heads: Literal["coupled", "regular"]
    fused: bool
    attn_mask: Tensor | None = None
    is_causal: bool = False


class Parts(NamedTuple):
    """What a residual branch consists of.

    Attributes:
        norm: what comes first; None for nothing.
        body: attention or MLP.
        scale: layer scale per (irrep, multiplicity); None for none.
        keep: stochastic depth: a factor per sample that broadcasts; None for none.
        residual: whether the input is added.
    """

    norm: norms.Norm | norms.Affine | None
    body: Mlp | Attention
    scale: Tensor | None
    keep: Tensor | None
    residual: bool


def branches(x: Tensor, layout: Layout, parts: Sequence[Parts | None]) -> Tensor | None:
    """``x + keep * scale * body(norm(x))``, branch after branch, or None where no kernel applies to all of them.

    Args:
        x: shape ``(B, N, dim)``.
        layout: of the axis.
        parts: one per branch; None for a branch that has to be called.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    kernel = choose("branches", x, layout, known)
    return None if kernel is None else kernel(x, layout, known)


def _by_lanes(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> Tensor:
    """All irreps side by side, from the first norm to the last sum."""
    lanes = to_lanes(x, layout)
    for part in parts:
        out = _body(_norm_on_lanes(lanes, layout, part.norm), layout, part.body, overwrite=False)
        if part.scale is not None:
            out = [lane * factor for lane, factor in zip(out, per_lane(part.scale, layout), strict=True)]
        if part.keep is not None:
            keep = part.keep
            out = [lane * keep for lane in out]
        lanes = [a + b for a, b in zip(lanes, out, strict=True)] if part.residual else out
    return torch.cat(lanes, dim=-1)


def _eager(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> Tensor:
    for part in parts:
        x = _eager_branch(x, layout, part)
    return x


def _eager_branch(x: Tensor, layout: Layout, parts: Parts) -> Tensor:
    """Norm and sum on the whole axis, in few passes; the lanes of the body overwritten where nothing needs them."""
    normal = _norm(x, layout, parts.norm)
    out = torch.cat(_body(to_lanes(normal, layout), layout, parts.body, may_overwrite(x)), dim=-1)
    scale = None if parts.scale is None else per_channel(parts.scale, layout)
    if parts.residual and parts.keep is None and scale is not None and x.dtype == out.dtype == scale.dtype:
        return torch.addcmul(x, out, scale)
    if scale is not None:
        out = out * scale
    if parts.keep is not None:
        out = out * parts.keep
    return x + out if parts.residual else out


def _in_parts(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> Tensor:
    """Branches one by one, those with a large MLP for a part of the batch after the other."""
    run = _by_lanes if torch.compiler.is_compiling() else _eager
    for part in parts:
        count = _count(x, layout, part)
        x = (
            torch.cat([run(images, layout, [part]) for images in x.tensor_split(count)])
            if count > 1
            else run(x, layout, [part])
        )
    return x


def _count(x: Tensor, layout: Layout, parts: Parts) -> int:
    """Into how many parts the batch is cut; 1 where its size is a symbol."""
    body = parts.body
    if not isinstance(body, Mlp) or x.device.type != "cpu" or not may_overwrite(x) or parts.keep is not None:
        return 1
    if torch.compiler.is_compiling() and not is_constant(x.shape[0]):
        return 1
    hidden_bytes = x.numel() // layout.dim * body.hidden.dim * x.element_size()
    return min(x.shape[0], -(-hidden_bytes // PART_BYTES)) if hidden_bytes > LARGE_BYTES else 1


def _body(lanes: list[Tensor], layout: Layout, body: Mlp | Attention, overwrite: bool) -> list[Tensor]:
    if isinstance(body, Mlp):
        return _mlp(lanes, layout, body, overwrite)
    return _attention(lanes, layout, body)


def _norm(x: Tensor, layout: Layout, norm: norms.Norm | norms.Affine | None) -> Tensor:
    if isinstance(norm, norms.Norm):
        return norms.layer_norm(x, layout, norm)
    return x if norm is None else norms.affine(x, layout, norm)


def _norm_on_lanes(lanes: Sequence[Tensor], layout: Layout, norm: norms.Norm | norms.Affine | None) -> list[Tensor]:
    if isinstance(norm, norms.Norm):
        return norms.on_lanes(lanes, layout, norm)
    return list(lanes) if norm is None else norms.affine_on_lanes(lanes, layout, norm.weight, norm.bias)


def _mlp(lanes: Sequence[Tensor], layout: Layout, mlp: Mlp, overwrite: bool) -> list[Tensor]:
    plan, copies = mlp.hidden.plan, mlp.hidden.copies
    assert plan is not None and copies is not None and layout.copies is not None
    rows = schur.cut_all(schur.on_lanes(lanes, layout, mlp.fc1), copies)
    values = plan.synthesise_(rows) if overwrite else plan.synthesise(rows)
    values = _plus(values, mlp.bias1, overwrite)
    if overwrite:
        for i, value in enumerate(values):
            values[i] = activate_(mlp.act, value)
        hidden = plan.analyse_(values)
    else:
        hidden = plan.analyse([activate(mlp.act, value) for value in values])
    out = schur.cut_all(schur.on_lanes(hidden, mlp.hidden, mlp.fc2), layout.copies)
    return _plus(out, None if mlp.bias2 is None else to_lanes(mlp.bias2, layout), overwrite)


def _plus(lanes: list[Tensor], biases: Sequence[Tensor] | None, overwrite: bool) -> list[Tensor]:
    if biases is None:
        return lanes
    narrow = [bias.to(lanes[0].dtype) for bias in biases]
    return [lane.add_(b) if overwrite else lane + b for lane, b in zip(lanes, narrow, strict=True)]


def _attention(lanes: Sequence[Tensor], layout: Layout, attention: Attention) -> list[Tensor]:
    assert layout.copies is not None
    q, k, v = _to_heads(schur.on_lanes(lanes, layout, attention.qkv), layout, attention)
    x = attend(q, k, v, attention)
    # Backward, heads are taken apart once more instead of being kept in both forms, and the product comes along. That
    # costs 2 % of a training step; without it a step holds 5 % more memory, more than the plain one.
    if torch.is_grad_enabled() and x.requires_grad and not torch._C._are_functorch_transforms_active():
        return checkpoint(_project, x, layout, attention, use_reentrant=False, preserve_rng_state=False)
    return _project(x, layout, attention)


def _project(x: Tensor, layout: Layout, attention: Attention) -> list[Tensor]:
    assert layout.copies is not None
    lanes = _from_heads(x, layout, attention)
    return schur.cut_all(schur.on_lanes(lanes, layout, attention.proj), layout.copies)


def _to_heads(rows: Sequence[Tensor], layout: Layout, attention: Attention) -> tuple[Tensor, ...]:
    """Rows ``(B, N, 3 m)`` to queries, keys and values, each ``(B, heads, N, dim / heads)``."""
    batch, tokens = rows[0].shape[:2]
    if attention.heads == "coupled":
        parts = [row.view(batch, tokens, 3, attention.num_heads, -1) for row in rows]
        qkv = torch.cat(parts, dim=-1)
    else:
        plan = layout.plan
        assert plan is not None
        assert layout.copies is not None
        lanes = schur.cut_all([row.view(batch, tokens, 3, -1) for row in rows], layout.copies)
        per_copy = attention.num_heads // layout.order
        copies = [lane.unflatten(-1, (per_copy, -1)) for lane in plan.synthesise(lanes)]
        qkv = torch.cat(copies, dim=3)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    kernel = choose("attention", q, k, v, attention)
    if kernel is not None:
        return kernel(q, k, v, attention)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention.attn_mask, is_causal=attention.is_causal)


def _written_out(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def _fits_written_out(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> bool:
    """Asked for, or faster: torch's fused attention on CPUs is slow backward at a few hundred tokens."""
    if attention.attn_mask is not None or attention.is_causal:
        return False
    if not attention.fused:
        return True
    trains = is_traced_for_kernels() and torch.is_grad_enabled() and q.device.type == "cpu"
    narrow = q.dtype in (torch.bfloat16, torch.float16)  # in float32 it is the slower one, by 2 %
    return trains and narrow and is_constant(q.shape[-2]) and q.shape[-2] <= WRITTEN_OUT_TOKENS


def _from_heads(x: Tensor, layout: Layout, attention: Attention) -> list[Tensor]:
    """``(B, heads, N, dim / heads)`` to lanes ``(B, N, copies)``."""
    x = x.transpose(1, 2)  # B, N, heads, channels
    if attention.heads == "coupled":
        assert layout.copies is not None
        lanes: list[Tensor] = []
        for span in layout.spans:
            width = span.multiplicity // attention.num_heads
            start = span.start // attention.num_heads
            for i in range(span.dim):
                row = x[..., start + i * width : start + (i + 1) * width].flatten(2)
                lanes += schur.cut(row, layout.copies)
        return lanes
    assert layout.plan is not None
    per_copy = attention.num_heads // layout.order
    return layout.plan.analyse([x[:, :, k * per_copy : (k + 1) * per_copy].flatten(2) for k in range(layout.order)])


def fits(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> bool:
    """Whether everything is made of lanes: regular types, transforms by additions, no irrep missing."""
    if layout.copies is None:
        return False
    plans = [part.body.hidden.plan if isinstance(part.body, Mlp) else layout.plan for part in parts]
    return all(
        plan is not None or (isinstance(part.body, Attention) and part.body.heads == "coupled")
        for plan, part in zip(plans, parts, strict=True)
    )


def _is_large(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> bool:
    return any(_count(x, layout, part) > 1 for part in parts)


TABLE["attention"] = (
    Variant(
        "written out",
        _fits_written_out,
        _written_out,
        "fused attention switched off, or training compiled for a CPU in half precision with at most 256 tokens",
    ),
)
TABLE["branches"] = (
    Variant(
        "parts",
        lambda *args: fits(*args) and (is_traced_for_kernels() or is_eager(args[0])) and _is_large(*args),
        _in_parts,
        "MLP with more than 25 MB of hidden features, CPU, no gradients, batch of known size",
    ),
    Variant("lanes", lambda *args: fits(*args) and is_traced_for_kernels(), _by_lanes, "torch.compile"),
    Variant("eager", lambda *args: fits(*args) and is_eager(args[0]), _eager, "eager, on tensors with numbers"),
)
