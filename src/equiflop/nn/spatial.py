"""From irreps to the spatial domain, where the group only permutes, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equiflop.groups import Rep, fourier_matrix, fourier_plan
from equiflop.nn.fixed import FixedTensors


class ToSpatial(FixedTensors):
    """Inverse group Fourier transform of a feature: for every copy of the regular representation a function on G.

    Made of additions for groups whose transform factorises (all the named image groups), else a matrix product.

    Args:
        rep: type of the feature axis; a multiple of the regular representation.

    Raises:
        ValueError: if ``rep`` is not a multiple of the regular representation.

    Shape: ``(..., rep.dim)`` to ``(..., |G|, copies)``; element ``g`` moves the value at ``h`` to ``g h``.
    """

    fourier: Tensor

    def __init__(self, rep: Rep, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not rep.regular_copies:
            raise ValueError(
                f"rep={rep!r} is not a multiple of the regular representation, as the spatial domain needs"
            )
        self.rep = rep
        self.plan = fourier_plan(rep.group)
        if self.plan is None:
            self.fix("fourier", fourier_matrix(rep.group), device, dtype)

    @property
    def macs_per_vector(self) -> int:
        """MACs for one vector: 0 where the transform is made of additions, else ``|G|`` per channel."""
        return 0 if self.plan is not None else self.rep.group.order * self.rep.dim

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(..., rep.dim)``."""
        return math.prod(shapes[0][:-1]) * self.macs_per_vector

    def forward(self, x: Tensor) -> Tensor:
        order, n = self.rep.group.order, self.rep.dim // self.rep.group.order
        if self.plan is None:
            return self.fourier.mT.to(x.dtype) @ x.unflatten(-1, (order, n))
        scaled = [x[..., k * n : (k + 1) * n] * scale for k, scale in enumerate(self.plan.scale)]
        return torch.stack(self.plan.synthesise(scaled), dim=-2)

    def extra_repr(self) -> str:
        return f"{self.rep}, by {'matrix product' if self.plan is None else 'additions'}"


class FromSpatial(ToSpatial):
    """The group Fourier transform: the inverse of :class:`ToSpatial`, at the same cost.

    Shape: ``(..., |G|, copies)`` to ``(..., rep.dim)``.
    """

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(..., |G|, copies)``."""
        return math.prod(shapes[0][:-2]) * self.macs_per_vector

    def forward(self, x: Tensor) -> Tensor:
        if self.plan is None:
            return (self.fourier.to(x.dtype) @ x).flatten(-2)
        rows = self.plan.analyse([x[..., g, :] for g in range(self.rep.group.order)])
        return torch.cat([row * scale for row, scale in zip(rows, self.plan.scale, strict=True)], dim=-1)
