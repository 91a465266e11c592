"""Linear maps between the residual stream and several regular axes that lie behind each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.nn.linear import Linear, OrderName


class LinearToSeveral(nn.Module):
    """One equivariant map to several axes behind each other, each in an order of its own.

    The fused input projection of parallel blocks: hidden features of the MLP, then queries, keys and values.

    Args:
        in_rep: type of the input.
        outputs: of each axis its Rep and its number of sections.
        bias: whether to add a bias on the trivial irrep of every axis.
        out_order: order of all of them.

    Shape: ``(..., in_rep.dim)`` to ``(..., sum of sections * out_rep.dim)``.
    """

    def __init__(
        self,
        in_rep: Rep,
        outputs: Sequence[tuple[Rep, int]],
        bias: bool = True,
        *,
        out_order: OrderName = "group",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "out_order": out_order, "device": device, "dtype": dtype}
        self.parts = nn.ModuleList([Linear(in_rep, rep, sections=sections, **options) for rep, sections in outputs])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class LinearFromSeveral(nn.Module):
    """The equivariant map from several axes behind each other: the sum of one map from each.

    Args:
        in_reps: types of the axes.
        out_rep: type of the output.
        bias: whether to add a bias on the trivial irrep.
        in_order: order of the axes.

    Shape: ``(..., sum of in_rep.dim)`` to ``(..., out_rep.dim)``.
    """

    def __init__(
        self,
        in_reps: Sequence[Rep],
        out_rep: Rep,
        bias: bool = True,
        *,
        in_order: OrderName = "group",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"in_order": in_order, "device": device, "dtype": dtype}
        self.widths = [rep.dim for rep in in_reps]
        self.parts = nn.ModuleList(
            [Linear(rep, out_rep, bias=bias and i == 0, **options) for i, rep in enumerate(in_reps)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y, *others = (part(axis) for part, axis in zip(self.parts, x.split(self.widths, dim=-1), strict=True))
        for other in others:
            y = y + other
        return y
