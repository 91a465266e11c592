"""Maps from a feature to quantities that the group does not change."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.nn.blocks import split

InvariantKind = Literal["trivial", "norm"]


class Invariants(nn.Module):
    """Invariants of a feature vector.

    Args:
        rep: type of the feature axis.
        kind: ``"trivial"``, the trivial irrep alone; ``"norm"``, also the norms of the other irreps, one per
            multiplicity: ``|x|`` where ``d = 1``, the 2-norm over the rows otherwise.

    Raises:
        ValueError: if ``kind`` is unknown.

    Shape: ``(..., rep.dim)`` to ``(..., out_features)``.
    """

    def __init__(self, rep: Rep, kind: InvariantKind = "trivial") -> None:
        super().__init__()
        if kind not in get_args(InvariantKind):
            raise ValueError(f"invariants={kind!r} is unknown; choose from {', '.join(get_args(InvariantKind))}")
        self.rep = rep
        self.kind = kind
        self.out_features = rep.multiplicities[0] if kind == "trivial" else sum(rep.multiplicities)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "trivial":
            return x[..., : self.out_features]
        trivial, *others = split(x, self.rep)
        norms = [
            block.squeeze(-2).abs() if block.shape[-2] == 1 else torch.linalg.vector_norm(block, dim=-2)
            for block in others
        ]
        return torch.cat([trivial.squeeze(-2), *norms], dim=-1)

    def extra_repr(self) -> str:
        return f"{self.rep}, {self.kind!r} -> {self.out_features}"
