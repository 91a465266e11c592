"""Dropout that keeps or drops whole vectors of an irrep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.nn.blocks import join, split


class Dropout(nn.Module):
    """Dropout per (irrep, multiplicity): all rows of a copy are kept or dropped together.

    With rows dropped one by one the expected output would still be equivariant, but no single mask would commute with
    the group.

    Args:
        rep: type of the feature axis.
        p: probability to drop.

    Raises:
        ValueError: if ``p`` is not in [0, 1].

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(self, rep: Rep, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p={p} is not a probability; dropout needs 0 <= p <= 1")
        self.rep = rep
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if all(irrep.dim == 1 for irrep in self.rep.group.irreps):
            return F.dropout(x, self.p)
        return join([block * F.dropout(torch.ones_like(block[..., :1, :]), self.p) for block in split(x, self.rep)])

    def extra_repr(self) -> str:
        return f"{self.rep}, p={self.p}"
