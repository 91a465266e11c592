"""Where a network stops being equivariant: from features with a Rep to the plain channels of the blocks behind."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm as PlainLayerNorm
from timm.models.vision_transformer import Block as PlainBlock
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.kernels import layout_of, split
from equiflop.nn import Invariants, ToSpatial
from equiflop.nn.invariants import InvariantKind


class ToRegular(ToSpatial):
    """To the spatial domain: ``|G|`` chunks that the group permutes, behind each other.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(-2)


class ToIrrepOrder(nn.Module):
    """From an irrep's rows with all copies side by side to its copies with all rows side by side.

    The order in which the published octic networks hand their channels to plain blocks (arXiv 2505.15441): behind the
    one-dimensional irreps, both rows of the first copy of E, then both rows of the second.

    Args:
        rep: a multiple of the regular representation.

    Raises:
        ValueError: if it is not one.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(self, rep: Rep) -> None:
        super().__init__()
        if not rep.regular_copies:
            raise ValueError(f"rep={rep!r} is not a multiple of the regular representation")
        self.rep = rep
        self._layout = layout_of(rep)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            block.unflatten(-1, (irrep.regular_multiplicity, -1)).transpose(-3, -2).flatten(-3)
            for block, irrep in zip(split(x, self._layout), self.rep.group.irreps, strict=True)
        ]
        return torch.cat(parts, dim=-1)


class ToInvariants(nn.Module):
    """Invariants, brought to ``rep.dim`` channels by a linear map where their number differs.

    Args:
        rep: type of the features.
        kind: which invariants.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        kind: InvariantKind,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.invariants = Invariants(rep, kind, device=device, dtype=dtype)
        count = self.invariants.out_features
        self.proj = nn.Identity() if count == rep.dim else nn.Linear(count, rep.dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.invariants(x))


class FirstPlainBlock(PlainBlock):
    """timm's transformer block behind the transition from equivariant to plain features.

    A subclass, not a wrapper, so that parameter names are those of timm's block.
    """

    enter: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(self.enter(x), attn_mask=attn_mask, is_causal=is_causal)


class FinalPlainNorm(PlainLayerNorm):
    """Final norm behind the transition, where no plain block follows; its parameter names are those of the norm."""

    enter: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.enter(x))
