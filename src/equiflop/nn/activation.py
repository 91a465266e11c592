"""Pointwise nonlinearities in the spatial domain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from equiflop.groups import Rep, fourier_matrix, fourier_plan
from equiflop.kernels import layout_of
from equiflop.nn.checks import check_axis
from equiflop.nn.fixed import FixedTensors


class FourierActivation(FixedTensors):
    """A pointwise function in the spatial domain, where the group only permutes, between two Fourier transforms.

    For groups whose transform factorises into additions (all the named image groups) no matrix product is made. The
    transforms are orthogonal. Between two linear maps they cost nothing: see :class:`equiflop.nn.Mlp`. Bökman et al.,
    arXiv 2502.05169, section 3.

    Args:
        rep: type of the feature axis; a multiple of the regular representation.
        act: the function, a module or any elementwise callable.

    Raises:
        ValueError: if ``rep`` is not a multiple of the regular representation.

    Shape: ``(..., rep.dim)`` to the same.
    """

    fourier: Tensor

    def __init__(
        self,
        rep: Rep,
        act: Callable[[Tensor], Tensor] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        copies = rep.regular_copies
        if not copies:
            raise ValueError(
                f"rep={rep!r} is not a multiple of the regular representation, which FourierActivation needs"
            )
        self.rep = rep
        self.copies = copies
        self._layout = layout_of(rep)
        self.act = nn.GELU() if act is None else act
        self.plan = fourier_plan(rep.group)
        if self.plan is None:
            self.fix("fourier", fourier_matrix(rep.group), device, dtype)

    @property
    def macs_per_vector(self) -> int:
        """MACs of the transforms for one vector: 0 where they are additions, else ``2 |G|`` per channel."""
        return 0 if self.plan is not None else 2 * self.rep.group.order * self.rep.dim

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(..., rep.dim)``."""
        return math.prod(shapes[0][:-1]) * self.macs_per_vector

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.rep.dim, self._layout.text)
        if self.plan is None:
            rows = x.unflatten(-1, (self.rep.group.order, self.copies))
            return (self.fourier.to(x.dtype) @ self.act(self.fourier.mT.to(x.dtype) @ rows)).flatten(-2)
        n = self.copies
        rows = [x[..., k * n : (k + 1) * n] * scale for k, scale in enumerate(self.plan.scale)]
        values = [self.act(value) for value in self.plan.synthesise(rows)]
        activated = zip(self.plan.analyse(values), self.plan.scale, strict=True)
        return torch.cat([row * scale for row, scale in activated], dim=-1)

    def extra_repr(self) -> str:
        path = "additions" if self.plan is not None else "matrix products"
        return f"{self.rep}, transforms by {path}"
