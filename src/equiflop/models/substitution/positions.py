"""Rotary and relative positions, seen by every copy of the heads through its group element."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    init_random_2d_freqs,
)
from timm.models.beit import RelativePositionBias
from torch import nn

from equiflop import nn as enn
from equiflop.models.substitution.checks import no_counterpart
from equiflop.models.substitution.parts import Substitution


def rotary(
    parts: Substitution, rope: nn.Module, path: str, num_heads: int, grid: tuple[int, int] | None
) -> enn.RotaryPositions:
    """Rotary position embedding for heads that are regular."""
    if type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope):
        raise no_counterpart(rope, path)
    per_copy = num_heads // parts.rep.group.order
    if isinstance(rope, RotaryEmbeddingMixed):
        head_dim = rope.dim // rope.num_heads
        like = parts.like(rope.freqs)
        rope.num_heads, rope.dim = per_copy, head_dim * per_copy
        rope.freqs = nn.Parameter(rope.freqs.new_empty(2, rope.depth, per_copy, head_dim // 2))
        parts.kept(rope)
        options: dict[str, Any] = {"temperature": rope.temperature, "rotate": True, **like}
        rope.freqs = nn.Parameter(init_random_2d_freqs(head_dim, rope.depth, per_copy, **options))
    else:
        parts.kept(rope)
    keeps_table = getattr(rope, "feat_shape", None) is not None
    return enn.RotaryPositions(rope, parts.group, per_copy, grid if keeps_table else None)


def position_bias(parts: Substitution, bias: nn.Module, path: str, prefix: int) -> enn.PositionBias:
    """Relative position bias, learned or by a small MLP, for heads that are regular."""
    if isinstance(bias, RelPosMlp):
        last = bias.mlp.fc2
        heads = parts.per_copy(bias.num_heads, path)
        bias.mlp.fc2 = nn.Linear(last.in_features, heads, bias=last.bias is not None, device="meta")
        bias.num_heads, bias.bias_shape = heads, (*bias.bias_shape[:2], heads)
    elif isinstance(bias, RelPosBias | RelativePositionBias):
        rows, columns = bias.relative_position_bias_table.shape
        heads = parts.per_copy(columns, path)
        bias.relative_position_bias_table = nn.Parameter(torch.empty(rows, heads, device="meta"))
        if isinstance(bias, RelPosBias):
            bias.bias_shape = (*bias.bias_shape[:2], heads)
    else:
        raise no_counterpart(bias, path)
    return enn.PositionBias(parts.kept(bias), parts.group, prefix)
