"""Equivariant self-attention."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from timm.layers import Attention as PlainAttention
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.kernels.branch import Attention as AttentionParts
from equiflop.kernels.watched import is_bare
from equiflop.nn.dropout import Dropout
from equiflop.nn.linear import Linear

#: ``coupled``: every head holds its share of every irrep, as published; the attention map is invariant.
#: ``regular``: heads come as ``|G|`` copies that the group permutes.
Heads = Literal["coupled", "regular"]


class Attention(PlainAttention):
    """timm's ``Attention`` whose linear maps lead from irreps to heads and back.

    *Coupled* heads hold ``multiplicity / num_heads`` of every irrep: the group acts on queries and keys of a head by
    the same orthogonal matrix, ``q . k`` does not change, and the attention map moves with the tokens. *Regular* heads
    live in the group's basis: ``|G|`` copies of ``num_heads / |G|`` heads, which the group permutes, each a plain head.

    Args:
        rep: type of the feature axis.
        num_heads: number of heads; for coupled heads a divisor of every multiplicity, for regular ones a multiple of
            ``|G|`` that divides ``rep.dim``.
        heads: ``"coupled"`` or ``"regular"``.
        qkv_bias: whether queries, keys and values have a bias (on the trivial irrep).
        proj_bias: whether the output projection has a bias (on the trivial irrep).
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.

    Raises:
        ValueError: if the heads do not fit the Rep.

    Shape: ``(B, N, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        num_heads: int,
        *,
        heads: Heads = "coupled",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_heads(rep, num_heads, heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_heads, num_heads, qkv_bias=False, proj_bias=False, attn_drop=attn_drop, device="meta")
        self.rep = rep
        self.heads = heads
        self.head_dim = rep.dim // num_heads
        self.attn_dim = rep.dim
        self.scale = self.head_dim**-0.5
        order: Any = "heads" if heads == "coupled" else "group"
        shared: dict[str, Any] = {"num_heads": num_heads, **dd}
        self.qkv = Linear(rep, rep, bias=qkv_bias, out_order=order, sections=3, **shared)
        self.proj = Linear(rep, rep, bias=proj_bias, in_order=order, **shared)
        self.proj_drop = Dropout(rep, proj_drop)

    @classmethod
    def of(cls, plain: PlainAttention, rep: Rep, heads: Heads) -> Attention:
        """timm's module itself as this one, its linear maps and the dropout behind them being equivariant already."""
        plain.__class__ = cls
        plain.rep, plain.heads = rep, heads
        return plain

    def parts(self, attn_mask: Tensor | None = None, is_causal: bool = False) -> AttentionParts | None:
        """What a kernel needs, or None where the modules have to be called."""
        identities = (self.q_norm, self.k_norm, self.norm)
        if not is_bare(self, Attention) or not all(is_bare(module, nn.Identity) for module in identities):
            return None
        if not is_bare(self.attn_drop, nn.Dropout) or not is_bare(self.proj_drop, Dropout):
            return None
        if self.scale != self.head_dim**-0.5:
            return None
        if self.gate is not None or (self.training and (self.attn_drop.p or self.proj_drop.p)):
            return None
        qkv, proj = (linear.maps() if isinstance(linear, Linear) else None for linear in (self.qkv, self.proj))
        if qkv is None or proj is None:
            return None
        return AttentionParts(qkv, proj, self.num_heads, self.heads, self.fused_attn, attn_mask, is_causal)


def check_heads(rep: Rep, num_heads: int, heads: str) -> None:
    """See that the heads fit the type of the features.

    Raises:
        ValueError: if not; it names the divisor.
    """
    order = rep.group.order
    if heads == "coupled":
        if num_heads < 1 or any(m % num_heads for m in rep.multiplicities):
            raise ValueError(
                f"num_heads={num_heads} does not divide every multiplicity of {rep!r}; "
                f"use a divisor of {math.gcd(*rep.multiplicities)}"
            )
    elif heads == "regular":
        if not rep.regular_copies:
            raise ValueError(f"heads='regular' needs a multiple of the regular representation, not {rep!r}")
        if num_heads < 1 or num_heads % order:
            raise ValueError(
                f"num_heads={num_heads} is not divisible by |G|={order} (group {rep.group.name}), "
                "which heads='regular' needs; use heads='coupled'"
            )
        if rep.regular_copies % (num_heads // order):
            raise ValueError(
                f"num_heads={num_heads} does not divide {rep.dim} channels into equal heads for each of the {order} "
                f"elements of {rep.group.name}; use {order} times a divisor of {rep.regular_copies}"
            )
    else:
        raise ValueError(f"heads={heads!r} is unknown; choose 'coupled' or 'regular'")
