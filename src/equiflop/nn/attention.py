"""Equivariant self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equiflop.groups import Rep
from equiflop.nn.blocks import join, split
from equiflop.nn.dropout import Dropout
from equiflop.nn.linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention whose attention map is invariant, so that it moves with the tokens.

    Every head gets the share ``multiplicity / num_heads`` of every irrep. Then the group acts on queries and keys of a
    head by the same orthogonal matrix, and ``q . k`` does not change.

    Args:
        rep: type of the feature axis.
        num_heads: number of heads; must divide every multiplicity.
        qkv_bias: whether queries, keys and values have a bias (on the trivial irrep).
        proj_bias: whether the output projection has a bias (on the trivial irrep).
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``num_heads`` does not divide every multiplicity.

    Shape: ``(B, N, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or any(m % num_heads for m in rep.multiplicities):
            raise ValueError(
                f"num_heads={num_heads} does not divide every multiplicity of {rep!r}; "
                f"use a divisor of {math.gcd(*rep.multiplicities)}"
            )
        self.rep = rep
        self.num_heads = num_heads
        self.qkv = Linear(rep, 3 * rep, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(rep, rep, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = Dropout(rep, proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self._to_heads(self.qkv.forward_blocks(split(x, self.rep)))
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        # Backward, heads are taken apart once more instead of being kept in both forms. That takes the product along,
        # which costs 2 % of a training step; without it a step holds 5 % more memory, more than the plain one.
        if torch.is_grad_enabled() and x.requires_grad and not _traced_otherwise():
            x = checkpoint(self._project, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self._project(x)
        return self.proj_drop(x)

    def _project(self, x: Tensor) -> Tensor:
        return join(self.proj.forward_blocks(self._from_heads(x)))

    def _to_heads(self, blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Per irrep ``(B, N, d, 3 m)`` to queries, keys and values, each ``(B, heads, N, rep.dim / heads)``."""
        parts = [block.unflatten(-1, (3, self.num_heads, -1)).permute(0, 1, 3, 4, 2, 5).flatten(-2) for block in blocks]
        return torch.cat(parts, dim=-1).permute(2, 0, 3, 1, 4).unbind(0)

    def _from_heads(self, x: Tensor) -> list[Tensor]:
        """``(B, heads, N, rep.dim / heads)`` to one ``(B, N, d, m)`` per irrep."""
        sizes = [(block.stop - block.start) // self.num_heads for block in self.rep.blocks()]
        return [
            part.unflatten(-1, (irrep.dim, -1)).permute(0, 2, 3, 1, 4).flatten(-2)
            for part, irrep in zip(x.split(sizes, dim=-1), self.rep.group.irreps, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{self.rep}, num_heads={self.num_heads}"


def _traced_otherwise() -> bool:
    """Whether an export or a transform of torch.func is at work, which know nothing of recomputing."""
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()
