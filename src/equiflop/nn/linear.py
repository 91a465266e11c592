"""Equivariant linear maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Irrep, Rep
from equiflop.groups.group import algebra_table
from equiflop.nn.blocks import join, split

# Plain numbers, so that compilers can trace them.
_ALGEBRA_TABLES = {e: algebra_table(e) for e in (2, 4)}


class Linear(nn.Module):
    """The general equivariant linear map between two Reps: block-diagonal over the irreps (Schur's lemma).

    For an irrep with endomorphism algebra of dimension ``e`` (1, 2 or 4) the block is ``sum_k J_k (x) W_k``. It is
    stored as one 2-D parameter ``weight_<irrep>`` of shape ``(e * m_out, m_in)``, the ``W_k`` below each other; irreps
    that are absent on one side have none. The bias has one entry per trivial output channel.
    Source: Bökman et al., arXiv 2502.05169, section 3.

    Initialised so that inputs of variance 1 give outputs of variance 1.

    Args:
        in_rep: type of the input axis.
        out_rep: type of the output axis; irreps that the input lacks are zero in the output.
        bias: whether to add a bias on the trivial irrep.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if the two Reps belong to different groups.

    Shape: ``(..., in_rep.dim)`` to ``(..., out_rep.dim)``.
    """

    def __init__(
        self,
        in_rep: Rep,
        out_rep: Rep,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_rep.group != out_rep.group:
            raise ValueError(f"in_rep={in_rep!r} and out_rep={out_rep!r} belong to different groups")
        self.in_rep = in_rep
        self.out_rep = out_rep
        self._weight_names: list[str | None] = []
        for irrep, m_in, m_out in zip(in_rep.group.irreps, in_rep.multiplicities, out_rep.multiplicities, strict=True):
            name = f"weight_{irrep.name}" if m_in and m_out else None
            if name is not None:
                shape = (irrep.endomorphism_dim * m_out, m_in)
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            self._weight_names.append(name)
        has_bias = bias and out_rep.multiplicities[0] > 0
        self.bias = (
            nn.Parameter(torch.empty(out_rep.multiplicities[0], device=device, dtype=dtype)) if has_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance ``1 / (e * m_in)``, bias 0."""
        for irrep, weight in self.weights():
            nn.init.normal_(weight, std=1.0 / math.sqrt(irrep.endomorphism_dim * weight.shape[1]))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def weights(self) -> list[tuple[Irrep, Tensor]]:
        """The weight of every irrep that has one."""
        named = zip(self.in_rep.group.irreps, self._weight_names, strict=True)
        return [(irrep, getattr(self, name)) for irrep, name in named if name is not None]

    @property
    def macs_per_vector(self) -> int:
        """MACs for one input vector: ``sum d * e * m_out * m_in``."""
        return sum(irrep.dim * weight.numel() for irrep, weight in self.weights())

    def forward(self, x: Tensor) -> Tensor:
        return join(self.forward_blocks(split(x, self.in_rep)))

    def forward_blocks(
        self,
        blocks: Sequence[Tensor],
        input_scales: Sequence[float] | None = None,
        output_scales: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """The same map on a feature that is taken apart: ``(..., d, m_in)`` per irrep to ``(..., d, m_out)``.

        Args:
            blocks: one tensor per irrep.
            input_scales: a factor per irrep that the input is multiplied with; the matrix product takes it for free.
            output_scales: likewise for the output, bias included.
        """
        outputs = []
        ones = [1.0] * len(blocks)
        inner, outer = input_scales or ones, output_scales or ones
        for i, (irrep, x) in enumerate(zip(self.in_rep.group.irreps, blocks, strict=True)):
            name = self._weight_names[i]
            bias = self.bias if i == 0 else None
            if name is not None:
                outputs.append(_schur_block(x, getattr(self, name), irrep, bias, inner[i], outer[i]))
            else:
                zeros = x.new_zeros((*x.shape[:-1], self.out_rep.multiplicities[i]))
                outputs.append(zeros if bias is None else zeros + bias * outer[i])
        return outputs

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"{self.in_rep} -> {self.out_rep}, {count} parameters, bias={self.bias is not None}"


def _schur_block(x: Tensor, weight: Tensor, irrep: Irrep, bias: Tensor | None, inner: float, outer: float) -> Tensor:
    """``outer * (inner * W x + bias)`` for one irrep's block: ``(..., d, m_in)`` to ``(..., d, m_out)``."""
    e = irrep.endomorphism_dim
    m_out = weight.shape[0] // e
    if e == 1:
        flat = _product(x.reshape(-1, x.shape[-1]), weight, bias, inner * outer, outer)
        return flat.view(*x.shape[:-1], m_out)
    # Rows come as (algebra element, copy); the algebra's elements join the multiplicities in one larger product.
    copies = irrep.regular_multiplicity
    rows = x.unflatten(-2, (e, copies)).transpose(-3, -2).flatten(-2)  # (..., copies, e * m_in)
    wide = algebra_weight(weight.unflatten(0, (e, m_out)))
    out = _product(rows.reshape(-1, rows.shape[-1]), wide, None, inner * outer, outer).view(*rows.shape[:-1], e * m_out)
    return out.unflatten(-1, (e, m_out)).transpose(-3, -2).flatten(-3, -2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha * x W^T + beta * bias`` for a matrix ``x``."""
    if alpha == 1.0 and beta == 1.0:
        return F.linear(x, weight, bias)
    if x.is_cuda:  # cuBLAS adds a bias for free only without factors
        return F.linear(x, weight * alpha, None if bias is None else bias * beta)
    if bias is None:  # with beta = 0 the first argument is not read
        return torch.addmm(x.new_zeros(1), x, weight.t(), beta=0.0, alpha=alpha)
    return torch.addmm(bias, x, weight.t(), beta=beta, alpha=alpha)


def algebra_weight(weights: Tensor) -> Tensor:
    """``sum_k U_k (x) W_k`` for the algebra's units ``U_k``: ``(e, m_out, m_in)`` to ``(e * m_out, e * m_in)``."""
    rows = [
        torch.cat([weights[k] if sign > 0 else -weights[k] for k, sign in row], dim=1)
        for row in _ALGEBRA_TABLES[weights.shape[0]]
    ]
    return torch.cat(rows)
