"""Points of a grid turned into irreps: the first half of patch embedding and of any map that mixes positions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from equiflop.grids import ImageGroup, grid_decomposition
from equiflop.groups import Rep
from equiflop.nn.fixed import FixedTensors


class GridTransform(FixedTensors):
    """The orthogonal change of basis from the points of a grid to irreps, for ``n`` channels at once.

    It is made of additions for the named image groups, and a matrix product for groups without such a factorisation.

    Args:
        group: the group that acts on the grid.
        height: rows of the grid.
        width: columns of the grid.

    Raises:
        ValueError: if the group does not act on a grid of this shape.

    Shape: ``(..., height * width, n)`` to the same; rows are ordered by ``self.rep``, so that flattening the last two
    axes gives a feature of type ``n * rep``.
    """

    basis: Tensor
    gather: Tensor
    pick: Tensor
    scales: Tensor
    source: Tensor
    back_scales: Tensor
    scatter: Tensor

    def __init__(
        self,
        group: ImageGroup,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        decomposition = grid_decomposition(group, height, width)
        self.size = (height, width)
        self.rep: Rep = decomposition.rep
        plan = decomposition.fast_plan
        self.plan = None if plan is None else plan.fourier
        self.scale: float | None = None
        self.picks = False
        if plan is None:
            self.fix("basis", decomposition.matrix, device, dtype)
            return
        self.group_order, self.orbits = plan.gather.shape
        self.fix("gather", plan.gather.reshape(-1), device)
        self.picks = not np.array_equal(plan.pick, np.arange(plan.gather.size))
        self.fix("scatter", plan.scatter, device)
        if self.picks:
            self.fix("pick", plan.pick, device)
            self.fix("source", plan.source.reshape(-1), device)
        if not self.picks and len(set(plan.scale.tolist())) == 1:
            self.scale = float(plan.scale[0])
        else:
            self.fix("scales", plan.scale[:, None], device, dtype)
            self.fix("back_scales", plan.back_scale.reshape(-1, 1), device, dtype)

    @property
    def macs_per_channel(self) -> int:
        """MACs for one grid and channel: 0 where the transform is made of additions."""
        return 0 if self.plan is not None else self.rep.dim**2

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(..., height * width, n)``."""
        return math.prod(shapes[0][:-2]) * shapes[0][-1] * self.macs_per_channel

    def forward(self, x: Tensor) -> Tensor:
        if self.plan is None:
            return self.basis.to(x.dtype) @ x
        values = x.index_select(-2, self.gather)
        rows = torch.cat(self.plan.analyse(self._parts(values)), dim=-2)
        if self.picks:
            rows = rows.index_select(-2, self.pick)
        return rows * (self.scales.to(rows.dtype) if self.scale is None else self.scale)

    def inverse(self, x: Tensor) -> Tensor:
        """The transform back, rows of ``self.rep`` to points in raster order: ``(..., points, n)`` to the same."""
        if self.plan is None:
            return self.basis.mT.to(x.dtype) @ x
        if self.picks:
            x = x.index_select(-2, self.source)
        x = x * (self.back_scales.to(x.dtype) if self.scale is None else self.scale)
        values = torch.cat(self.plan.synthesise(self._parts(x)), dim=-2)
        return values.index_select(-2, self.scatter)

    def _parts(self, x: Tensor) -> list[Tensor]:
        """The values of one group element after the other, each ``(..., orbits, n)``."""
        return [x[..., k * self.orbits : (k + 1) * self.orbits, :] for k in range(self.group_order)]

    def extra_repr(self) -> str:
        path = "additions" if self.plan is not None else "matrix product"
        return f"{self.size[0]}x{self.size[1]} points -> {self.rep}, by {path}"
