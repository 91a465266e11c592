"""Maps from a feature to quantities that the group does not change."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from equiflop.groups import FiniteGroup, Irrep, Rep
from equiflop.groups.polynomials import invariant_generators
from equiflop.kernels import layout_of, split
from equiflop.nn.checks import check_axis
from equiflop.nn.fixed import FixedTensors
from equiflop.nn.spatial import ToSpatial

InvariantKind = Literal["trivial", "norm", "magnitudes", "power_spectrum", "polynomial"]


class Invariants(FixedTensors):
    """Invariants of a feature vector.

    * ``"trivial"``: the trivial irrep alone.
    * ``"norm"``: also the norms of the other irreps, one per multiplicity: ``|x|`` where ``d = 1``, the 2-norm over the
      rows otherwise. (The published octic networks call these the power spectrum.)
    * ``"magnitudes"``: as many values as channels: the trivial irrep, and of every copy of another irrep the absolute
      values of its rows, the largest first. For groups whose irreps consist of signed permutations (all the named image
      groups); where ``d = 1`` the same as ``"norm"``.
    * ``"power_spectrum"``: the trivial irrep, and for every copy of the regular representation all products of degree
      2 that are invariant: the inner products ``x_i . J x_j`` of an irrep's columns within the copy, ``J`` running over
      its endomorphisms. Unlike norms they also know the angle between columns.
    * ``"polynomial"``: for every copy of the regular representation generators of all its invariant polynomials
      (:func:`equiflop.groups.polynomials.invariant_generators`). They are complete: two copies agree on them exactly if
      the group moves one into the other. Groups of order up to 8; for D4 32 polynomials of degree up to 5, as many and
      of the same degrees as in arXiv 2505.15441.

    Args:
        rep: type of the feature axis; for the last two kinds a multiple of the regular representation.
        kind: which invariants.

    Raises:
        ValueError: if ``kind`` is unknown, or needs another Rep or a smaller group.

    Shape: ``(..., rep.dim)`` to ``(..., out_features)``; invariants slow, multiplicities or copies fast.
    """

    def __init__(
        self,
        rep: Rep,
        kind: InvariantKind = "trivial",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(InvariantKind):
            raise ValueError(f"invariants={kind!r} is unknown; choose from {', '.join(get_args(InvariantKind))}")
        self.rep = rep
        self.kind = kind
        self._layout = layout_of(rep)
        copies = rep.regular_copies
        if kind in ("power_spectrum", "polynomial") and not copies:
            raise ValueError(
                f"invariants={kind!r} needs a multiple of the regular representation, not {rep!r}; use 'norm'"
            )
        if kind == "trivial":
            self.out_features = rep.multiplicities[0]
        elif kind == "norm":
            self.out_features = sum(rep.multiplicities)
        elif kind == "magnitudes":
            if not has_magnitudes(rep.group):
                raise ValueError(
                    f"invariants='magnitudes' needs irreps of signed permutations; group {rep.group.name!r} has "
                    "others; use 'norm'"
                )
            self.out_features = rep.dim
        elif kind == "power_spectrum":
            pairs = sum(len(_column_pairs(irrep)) for irrep in rep.group.irreps[1:])
            self.out_features = rep.multiplicities[0] * (1 + pairs)
            self._endomorphisms = [irrep.endomorphisms.tolist() for irrep in rep.group.irreps]
        else:
            monomials = invariant_generators(rep.group)
            self.out_features = rep.multiplicities[0] * len(monomials)
            self.to_spatial = ToSpatial(rep, device=device, dtype=dtype)
            self.degrees = tuple(sorted({len(monomial) for monomial in monomials}))
            for degree in self.degrees:
                elements = np.array([monomial for monomial in monomials if len(monomial) == degree])
                moved = rep.group.table[:, elements]  # |G|, polynomials, degree
                self.fix(f"elements_{degree}", np.ascontiguousarray(moved.transpose(2, 1, 0)), device)

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.rep.dim, self._layout.text)
        if self.kind == "trivial":
            return x[..., : self.rep.multiplicities[0]]
        if self.kind == "polynomial":
            return self._polynomials(self.to_spatial(x)).flatten(-2)
        trivial, *others = split(x, self._layout)
        if self.kind == "magnitudes":
            magnitudes = [
                block.squeeze(-2).abs() if irrep.dim == 1 else block.abs().sort(dim=-2, descending=True)[0].flatten(-2)
                for block, irrep in zip(others, self.rep.group.irreps[1:], strict=True)
            ]
            return torch.cat([trivial.squeeze(-2), *magnitudes], dim=-1)
        if self.kind == "norm":
            norms = [
                block.squeeze(-2).abs() if irrep.dim == 1 else torch.linalg.vector_norm(block, dim=-2)
                for block, irrep in zip(others, self.rep.group.irreps[1:], strict=True)
            ]
            return torch.cat([trivial.squeeze(-2), *norms], dim=-1)
        products = [
            product
            for block, irrep, endomorphisms in zip(
                others, self.rep.group.irreps[1:], self._endomorphisms[1:], strict=True
            )
            for product in _inner_products(block, irrep, endomorphisms)
        ]
        return torch.cat([trivial.squeeze(-2), *products], dim=-1)

    def _polynomials(self, values: Tensor) -> Tensor:
        """Shape ``(..., |G|, copies)`` to ``(..., polynomials, copies)``."""
        parts = []
        for degree in self.degrees:
            elements = getattr(self, f"elements_{degree}")  # degree, polynomials, |G|
            product: Tensor | None = None
            for factor in elements.flatten(1).unbind(0):
                picked = values.index_select(-2, factor)
                product = picked if product is None else product * picked
            assert product is not None
            parts.append(product.unflatten(-2, elements.shape[1:]).mean(dim=-2))
        return torch.cat(parts, dim=-2)

    def extra_repr(self) -> str:
        return f"{self.rep}, {self.kind!r} -> {self.out_features}"


def all_magnitudes(group: FiniteGroup) -> InvariantKind:
    """The kind of invariants with as many values as channels, or the nearest one for groups that have none."""
    return "magnitudes" if has_magnitudes(group) else "norm"


def has_magnitudes(group: FiniteGroup) -> bool:
    """Whether every irrep consists of signed permutations, which move absolute values of rows about."""
    return all(bool(np.isin(np.abs(irrep.matrices).round(12), (0.0, 1.0)).all()) for irrep in group.irreps)


def _column_pairs(irrep: Irrep) -> list[tuple[int, int, int]]:
    """Columns ``i <= j`` of a copy and an endomorphism ``k`` whose product ``x_i . J_k x_j`` is not always 0."""
    columns = range(irrep.regular_multiplicity)
    return [
        (i, j, k)
        for i in columns
        for j in columns
        for k in range(irrep.endomorphism_dim)
        if i < j or (i == j and k == 0)  # J_k is antisymmetric for k > 0
    ]


def _inner_products(block: Tensor, irrep: Irrep, endomorphisms: list[list[list[float]]]) -> list[Tensor]:
    """``x_i . J_k x_j`` for all pairs, each of shape ``(..., copies)``."""
    apart = block.unflatten(-1, (irrep.regular_multiplicity, -1))
    rows = [[apart[..., i, j, :] for j in range(irrep.regular_multiplicity)] for i in range(irrep.dim)]
    products = []
    for i, j, k in _column_pairs(irrep):
        terms = [
            rows[a][i] * rows[b][j] * endomorphisms[k][a][b]
            for a in range(irrep.dim)
            for b in range(irrep.dim)
            if endomorphisms[k][a][b]
        ]
        products.append(torch.stack(terms).sum(0))
    return products
