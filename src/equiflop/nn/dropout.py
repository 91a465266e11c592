"""Dropout that keeps or drops whole vectors of an irrep."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.kernels import join, layout_of, split


class Dropout(nn.Module):
    """Dropout per (irrep, multiplicity): all rows of a copy are kept or dropped together.

    With rows dropped one by one the expected output would still be equivariant, but no single mask would commute with
    the group.

    Args:
        rep: type of the feature axis.
        p: probability to drop.
        order: ``"irreps"``, or ``"group"`` where the axis is in the group's own basis; there a channel is kept or
            dropped at all group elements together.

    Raises:
        ValueError: if ``p`` is not in [0, 1].

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(self, rep: Rep, p: float = 0.0, *, order: Literal["irreps", "group"] = "irreps") -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p={p} is not a probability; dropout needs 0 <= p <= 1")
        self.rep = rep
        self.p = p
        self.order = order
        self._layout = layout_of(rep)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.order == "group":
            copies = x.unflatten(-1, (self.rep.group.order, -1))
            return (copies * F.dropout(torch.ones_like(copies[..., :1, :]), self.p)).flatten(-2)
        if all(irrep.dim == 1 for irrep in self.rep.group.irreps):
            return F.dropout(x, self.p)
        blocks = split(x, self._layout)
        return join([block * F.dropout(torch.ones_like(block[..., :1, :]), self.p) for block in blocks])

    def extra_repr(self) -> str:
        return f"{self.rep}, p={self.p}"
