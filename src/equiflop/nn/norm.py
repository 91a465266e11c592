"""Equivariant layer norm and layer scale."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.nn.blocks import compiled_for_gpu, per_multiplicity
from equiflop.nn.fixed import FixedTensors

#: How the variances of the rows add up: every entry weighs the same, or as in the published octic code.
Weighting = Literal["entries", "octic"]

#: With more rows than these, a sum over the whole axis for every row costs more than it saves.
_MOST_ROWS = 16


class LayerNorm(FixedTensors):
    """Layer norm of a feature with a Rep: one standard deviation per vector, so that it commutes with the group.

    Every row of every irrep is centred by its own mean over the multiplicities (a row of multiplicity 1 is not: that
    would erase it). All entries are divided by one ``sigma``, ``sigma^2`` being the mean of the squares of the centred
    entries plus ``eps``, so the output has variance 1. The scale is one per (irrep, multiplicity), the bias on the
    trivial irrep only.

    Args:
        rep: type of the feature axis.
        eps: added to the variance. The published mirror networks write ``eps`` inside a sum that is then halved, which
            is ``eps / 2`` here.
        affine: whether there are ``weight`` and ``bias``.
        bias: whether there is a ``bias``.
        weighting: ``"entries"`` as above; ``"octic"`` as published for octic ViTs (arXiv 2505.15441), where the rows of
            a d-dimensional irrep weigh 1/d of one-dimensional rows, whatever their multiplicity.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``weighting`` is unknown or the Rep is empty.

    Shape: ``(..., rep.dim)`` to the same.
    """

    centred: Tensor
    centred_rows: Tensor
    entry_weight: Tensor

    def __init__(
        self,
        rep: Rep,
        eps: float = 1e-6,
        *,
        affine: bool = True,
        bias: bool = True,
        weighting: Weighting = "entries",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rep.dim == 0:
            raise ValueError(f"rep={rep!r} is empty; LayerNorm needs at least one channel")
        if weighting not in ("entries", "octic"):
            raise ValueError(f"weighting={weighting!r} is unknown; choose 'entries' or 'octic'")
        self.rep = rep
        self.eps = eps
        self.weighting = weighting
        # The axis is cut into chunks of one length, so that one reduction serves all rows: a row is one or more chunks.
        self.chunk = math.gcd(*rep.multiplicities)
        self._centres_in_one_pass = sum(b.irrep.dim for b in rep.blocks()) <= _MOST_ROWS
        if self._centres_in_one_pass:
            rows = _indicators(rep)
            self._row_lengths = rows.sum(axis=1).tolist()
            self.fix("centred_rows", rows, device, dtype)
        self._rows_are_chunks = all(m in (0, self.chunk) for m in rep.multiplicities)
        centred = self._centred_chunks()
        self._centres_all = bool(centred.all())
        if not self._centres_all:
            self.fix("centred", centred, device, dtype)
        # Then the centred vector has mean 0 and its variance is sigma^2: torch's fused layer norm does the rest.
        self._fused = weighting == "entries" and self._centres_all
        if not self._fused:
            self.fix("entry_weight", np.repeat(self._chunk_weights() / self.chunk, self.chunk), device, dtype)
        channels = sum(rep.multiplicities)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if affine else None
        has_bias = affine and bias and rep.multiplicities[0] > 0
        self.bias = nn.Parameter(torch.empty(rep.multiplicities[0], device=device, dtype=dtype)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.rep.dim:
            raise ValueError(f"last axis of the input has length {x.shape[-1]}; {self.rep!r} needs {self.rep.dim}")
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        one_pass = self._centres_in_one_pass and compiled_for_gpu(x)
        centred = self._centred_in_one_pass(wide) if one_pass else self._centred(wide)
        weight = None if self.weight is None else per_multiplicity(self.weight, self.rep).to(wide.dtype)
        bias = None if self.bias is None else F.pad(self.bias, (0, self.rep.dim - len(self.bias))).to(wide.dtype)
        if self._fused:
            return F.layer_norm(centred, (self.rep.dim,), weight, bias, self.eps).to(x.dtype)
        sigma2 = (centred.square() * self.entry_weight.to(wide.dtype)).sum(dim=-1, keepdim=True)
        normal = centred * torch.rsqrt(sigma2 + self.eps)
        if weight is not None:
            normal = normal * weight if bias is None else torch.addcmul(bias, normal, weight)
        return normal.to(x.dtype)

    def _centred(self, x: Tensor) -> Tensor:
        chunks = x.unflatten(-1, (-1, self.chunk))
        centre = self._row_means(chunks.mean(dim=-1, keepdim=True))
        if not self._centres_all:
            centre = centre * self.centred.to(x.dtype)[:, None]
        return (chunks - centre).flatten(-2)

    def _centred_in_one_pass(self, x: Tensor) -> Tensor:
        """The same as :meth:`_centred` by one sum over the whole axis for every row.

        A compiler makes one kernel of it and of the variance, which is over the whole axis too.
        """
        for row, length in zip(self.centred_rows.to(x.dtype), self._row_lengths, strict=True):
            x = x - (x * row).sum(dim=-1, keepdim=True) / length * row
        return x

    def _row_means(self, mean: Tensor) -> Tensor:
        """Means of the chunks, ``(..., chunks, 1)``, replaced by the mean of the row that each belongs to."""
        if self._rows_are_chunks:
            return mean
        parts = []
        for part, block in zip(mean.split(self._chunks_per_block(), dim=-2), self.rep.blocks(), strict=True):
            if block.multiplicity <= self.chunk:
                parts.append(part)
            else:
                rows = part.unflatten(-2, (block.irrep.dim, -1))
                parts.append(rows.mean(dim=-2, keepdim=True).expand_as(rows).flatten(-3, -2))
        return torch.cat(parts, dim=-2)

    def _chunks_per_block(self) -> list[int]:
        return [(block.stop - block.start) // self.chunk for block in self.rep.blocks()]

    def _chunk_weights(self) -> np.ndarray:
        """Weight of each chunk's mean square in ``sigma^2``."""
        if self.weighting == "entries":
            return np.full(self.rep.dim // self.chunk, self.chunk / self.rep.dim)
        weights = [
            np.full(count, self.chunk / (self.rep.group.order * block.irrep.dim * max(block.multiplicity, 1)))
            for count, block in zip(self._chunks_per_block(), self.rep.blocks(), strict=True)
        ]
        return np.concatenate(weights)

    def _centred_chunks(self) -> np.ndarray:
        blocks = zip(self._chunks_per_block(), self.rep.blocks(), strict=True)
        return np.concatenate([np.full(count, float(block.multiplicity > 1)) for count, block in blocks])

    def extra_repr(self) -> str:
        option = "" if self.weighting == "entries" else f", weighting={self.weighting!r}"
        return f"{self.rep}, eps={self.eps}{option}"


def _indicators(rep: Rep) -> np.ndarray:
    """For every row of more than one entry 1 at its entries and 0 elsewhere, shape ``(rows, rep.dim)``."""
    place = np.arange(rep.dim)
    rows = [
        (place >= start) & (place < start + block.multiplicity)
        for block in rep.blocks()
        if block.multiplicity > 1
        for start in range(block.start, block.stop, block.multiplicity)
    ]
    return np.array(rows, dtype=float).reshape(len(rows), rep.dim)


class Affine(nn.Module):
    """A learned factor per (irrep, multiplicity) and a bias on the trivial irrep: the "norm" of ResMLP.

    Args:
        rep: type of the feature axis.
        bias: whether there is a bias.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self.weight = nn.Parameter(torch.empty(sum(rep.multiplicities), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rep.multiplicities[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x * per_multiplicity(self.weight, self.rep)
        return x if self.bias is None else x + F.pad(self.bias, (0, self.rep.dim - len(self.bias)))

    def extra_repr(self) -> str:
        return f"{self.rep}, bias={self.bias is not None}"


class LayerScale(nn.Module):
    """A learned factor per (irrep, multiplicity), the same for all rows of an irrep: it commutes with the group.

    Args:
        rep: type of the feature axis.
        init_values: initial value of all factors.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        init_values: float = 1e-4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(sum(rep.multiplicities), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All factors to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * per_multiplicity(self.gamma, self.rep)

    def extra_repr(self) -> str:
        return f"{self.rep}, init_values={self.init_values}"
