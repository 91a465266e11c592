"""Equivariant transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.kernels import layout_of
from equiflop.nn.attention import Attention, Heads
from equiflop.nn.mlp import Mlp
from equiflop.nn.norm import LayerNorm, LayerScale, Weighting
from equiflop.nn.residual import Branch, residual_branches


class Block(nn.Module):
    """Pre-norm transformer block, the equivariant twin of timm's ``Block``.

    Args:
        rep: type of the feature axis.
        num_heads: heads of the attention.
        heads: ``"coupled"`` or ``"regular"``; see :class:`equiflop.nn.Attention`.
        mlp_ratio: width of the MLP over ``rep.dim``; the hidden width must be a multiple of the group's order.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether the projections of attention and MLP have a bias.
        proj_drop: dropout after the projections.
        attn_drop: dropout of attention weights.
        init_values: initial layer scale; None or 0 for no layer scale.
        drop_path: probability to drop a branch, per sample.
        act: the pointwise function of the MLP; GELU by default.
        norm_eps: ``eps`` of the layer norms.
        norm_weighting: ``weighting`` of the layer norms.

    Raises:
        ValueError: if heads or hidden width do not fit the Rep.

    Shape: ``(B, N, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        num_heads: int,
        *,
        heads: Heads = "coupled",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act: Callable[[Tensor], Tensor] | None = None,
        norm_eps: float = 1e-6,
        norm_weighting: Weighting = "entries",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_rep = Rep.regular_of_dim(rep.group, int(rep.dim * mlp_ratio), f"int({rep.dim} * mlp_ratio)")

        def scale() -> nn.Module:
            return LayerScale(rep, init_values, **dd) if init_values else nn.Identity()

        def path() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.rep = rep
        self._layout = layout_of(rep)
        self.norm1 = LayerNorm(rep, norm_eps, weighting=norm_weighting, **dd)
        self.attn = Attention(
            rep,
            num_heads,
            heads=heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.ls1 = scale()
        self.drop_path1 = path()
        self.norm2 = LayerNorm(rep, norm_eps, weighting=norm_weighting, **dd)
        self.mlp = Mlp(rep, hidden_rep, act=act, bias=proj_bias, drop=proj_drop, **dd)
        self.ls2 = scale()
        self.drop_path2 = path()

    @classmethod
    def of(cls, plain: Any, rep: Rep) -> Block:
        """timm's ``Block`` itself as this one, its parts being equivariant already."""
        plain.__class__ = cls
        plain.rep, plain._layout = rep, layout_of(rep)
        return plain

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal}
        return residual_branches(
            x,
            self._layout,
            Branch(self.norm1, self.attn, self.ls1, self.drop_path1, options),
            Branch(self.norm2, self.mlp, self.ls2, self.drop_path2),
        )
