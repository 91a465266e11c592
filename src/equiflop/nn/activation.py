"""Pointwise nonlinearities in the spatial domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from equiflop.groups import FourierPlan, Rep, fourier_matrix, fourier_plan
from equiflop.nn.blocks import join, split
from equiflop.nn.fixed import FixedTensors


class FourierActivation(FixedTensors):
    """A pointwise function in the spatial domain, where the group only permutes, between two Fourier transforms.

    For groups whose transform factorises into additions (all the named image groups) no matrix product is made. The
    transforms are orthogonal. Bökman et al., arXiv 2502.05169, section 3.

    Args:
        rep: type of the feature axis; a multiple of the regular representation.
        act: the function, a module or any elementwise callable.
        device: where the constants are made.
        dtype: dtype of the constants.

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
        self.act = nn.GELU() if act is None else act
        self.plan = fourier_plan(rep.group)
        #: A factor per irrep that belongs to the transform; see :meth:`forward_blocks`.
        self.irrep_scales = (1.0,) * len(rep.group.irreps)
        if self.plan is not None:
            self.irrep_scales = self.plan.irrep_scales(rep.group)
        else:
            self.fix("fourier", fourier_matrix(rep.group), device, dtype)

    @property
    def macs_per_vector(self) -> int:
        """MACs of the transforms for one vector: 0 where they are additions, else ``2 |G|`` per channel."""
        return 0 if self.plan is not None else 2 * self.rep.group.order * self.rep.dim

    def forward(self, x: Tensor) -> Tensor:
        if self.plan is None:
            rows = x.unflatten(-1, (self.rep.group.order, self.copies))
            return (self.fourier.to(x.dtype) @ self.act(self.fourier.mT.to(x.dtype) @ rows)).flatten(-2)
        rows = x.unflatten(-1, (self.rep.group.order, self.copies)).unbind(-2)
        values = self.plan.synthesise([row * scale for row, scale in zip(rows, self.plan.scale, strict=True)])
        # One tensor, so that a compiler does not compute every value again for every row of the output.
        activated = self.plan.analyse(self.act(torch.stack(values)).unbind(0))
        return torch.cat([row * scale for row, scale in zip(activated, self.plan.scale, strict=True)], dim=-1)

    def forward_blocks(self, blocks: Sequence[Tensor], overwrite: bool = False) -> list[Tensor]:
        """The same function on a feature that is taken apart: ``(..., d, multiplicity)`` per irrep in and out.

        Without the factors ``irrep_scales``, with which input and output are to be multiplied: the linear maps before
        and behind do that for free.

        Args:
            blocks: one tensor per irrep.
            overwrite: whether the blocks may be overwritten, which saves memory where there are no gradients.
        """
        if self.plan is None:
            return split(self.forward(join(blocks)), self.rep)
        rows = iter(self._activate(blocks, self.plan, overwrite))
        outputs = []
        for irrep in self.rep.group.irreps:
            count = irrep.dim * irrep.regular_multiplicity
            if count == 1:
                outputs.append(next(rows).unsqueeze(-2))
            else:
                stacked = torch.stack([next(rows) for _ in range(count)], dim=-2)
                outputs.append(stacked.unflatten(-2, (irrep.dim, -1)).flatten(-2))
        return outputs

    def scaled(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """The blocks times the factors ``irrep_scales``."""
        return [block * scale for block, scale in zip(blocks, self.irrep_scales, strict=True)]

    def _activate(self, blocks: Sequence[Tensor], plan: FourierPlan, overwrite: bool) -> list[Tensor]:
        """Rows of the transform, each ``(..., copies)``, of the activated feature; no scales."""
        rows = [
            row
            for block, irrep in zip(blocks, self.rep.group.irreps, strict=True)
            for row in block.unflatten(-1, (irrep.regular_multiplicity, self.copies)).flatten(-3, -2).unbind(-2)
        ]
        if not overwrite or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return plan.analyse([self.act(value) for value in plan.synthesise(rows)])
        values = plan.synthesise_(rows)
        for i, value in enumerate(values):
            if type(self.act) is nn.GELU:
                torch.ops.aten.gelu_(value, approximate=self.act.approximate)
            else:
                values[i] = self.act(value)
        return plan.analyse_(values)

    def extra_repr(self) -> str:
        path = "additions" if self.plan is not None else "matrix products"
        return f"{self.rep}, transforms by {path}"
