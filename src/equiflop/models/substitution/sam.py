"""SAM's image encoder: attention in windows with relative positions, and the neck."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import Block as SamBlock
from torch import nn

from equiflop import nn as enn
from equiflop.models import twin_layers
from equiflop.models.substitution.checks import check_conv, check_norm, exactly, no_counterpart, only
from equiflop.models.substitution.parts import Substitution, rule
from equiflop.models.substitution.stream import dropout, inner_norm, per_head_norm
from equiflop.models.tied import become
from equiflop.nn.tied_conv import copies_of


@rule(SamBlock)
def sam_block(parts: Substitution, block: SamBlock, path: str) -> nn.Module:
    """A block of SAM's image encoder."""
    for name, part in list(block.named_children()):
        where = f"{path}.{name}"
        if name == "attn":
            block.attn = _attention_of_copies(parts, exactly(part, SamAttention, where), where, block.window_size)
        else:
            setattr(block, name, parts.residual(part, where))
    only(block, path)
    become(block, twin_layers.TwinSamBlock)
    return block


def _attention_of_copies(parts: Substitution, attn: Any, path: str, window_size: int) -> nn.Module:
    positions = ("rel_pos_h", "rel_pos_w")
    only(attn, path, positions, ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rope"))
    parts.choose_heads(attn.num_heads, path, per_head=True)
    if attn.rope is not None and type(attn.rope) is not RotaryEmbeddingCat:
        raise no_counterpart(attn.rope, f"{path}.rope")
    qkv = parts.inward(attn.qkv, f"{path}.qkv", "group", sections=3)
    proj = parts.outward(attn.proj, f"{path}.proj", "group")
    proj_drop = dropout(parts, exactly(attn.proj_drop, nn.Dropout, f"{path}.proj_drop"), f"{path}.proj_drop")
    for name in ("q_norm", "k_norm"):
        setattr(attn, name, per_head_norm(parts, getattr(attn, name), f"{path}.{name}"))
    attn.qkv = attn.proj = attn.proj_drop = nn.Identity()
    attn.num_heads = parts.per_copy(attn.num_heads, path)
    for name in positions:
        table = getattr(attn, name, None)
        if table is not None:
            setattr(attn, name, nn.Parameter(torch.zeros(table.shape, **parts.like(table))))
    return twin_layers.AttentionOfCopies(attn, qkv, proj, proj_drop, parts.group, window_size)


def sam_neck(parts: Substitution, neck: Any, path: str) -> nn.Module:
    """The neck of SAM's encoder, or the norm of a map in its place."""
    if type(neck) is LayerNorm2d:
        check_norm(neck, path, parts.rep.dim)
        affine, bias = neck.weight is not None, neck.bias is not None
        options: dict[str, Any] = {"affine": affine, "bias": bias, "weighting": parts.weighting, **parts.dd}
        return twin_layers.NormOfMap(parts.rep, neck.eps, **options)
    only(exactly(neck, nn.Sequential, path), path, modules=("0", "1", "2", "3"))
    proj, norm, conv, last_norm = neck
    for i, kernel in ((0, 1), (2, 3)):
        where = f"{path}.{i}"
        wanted = {"kernel_size": (kernel, kernel), "stride": (1, 1), "padding": (kernel // 2, kernel // 2)}
        check_conv(neck[i], where, {**wanted, "dilation": (1, 1), "groups": 1, "out_channels": proj.out_channels})
    rep, copies = parts.regular(proj.out_channels, path), copies_of(parts.group)
    n = rep.dim // parts.group.order
    return twin_layers.SamNeck(
        enn.Linear(parts.rep, rep, proj.bias is not None, out_order="group", **parts.dd),
        inner_norm(parts, norm, f"{path}.1", rep.dim),
        enn.TiedConv2d(parts.group, copies, copies, n, n, 3, bias=conv.bias is not None, **parts.dd),
        inner_norm(parts, last_norm, f"{path}.3", rep.dim),
        rep,
        **parts.dd,
    )
