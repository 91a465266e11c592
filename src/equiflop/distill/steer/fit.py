"""What a steered student's blocks add to its stream, fitted to its teacher's by linear least squares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equiflop import nn as enn
from equiflop.counting import evaluating
from equiflop.distill.steer.involution import Stream
from equiflop.distill.steer.observe import token_places, watch
from equiflop.kernels import layout_of, split
from equiflop.kernels.orders import read

#: How strongly weights may be kept as they are, in terms of the mean square of what a map reads.
RIDGES = (1e-2, 1e-1, 1.0, 10.0)
_BRANCHES = (("norm1", "attn", "ls1", "attn.proj"), ("norm2", "mlp", "ls2", "mlp.fc2"))


@dataclass
class _Sums:
    """Sums over vectors ``a`` and what is wanted of them, ``r``.

    Attributes:
        gram: ``sum a a^T``.
        cross: ``sum r a^T``.
        size: ``sum |r|^2``.
    """

    gram: Tensor
    cross: Tensor
    size: Tensor

    @classmethod
    def of(cls, a: Tensor, r: Tensor) -> _Sums:
        """Of vectors, one a row."""
        return cls((a.mT @ a).double(), (r.mT @ a).double(), r.double().square().sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.cross + other.cross, self.size + other.size)

    def solution(self, ridge: float) -> Tensor:
        """The ``D`` for which ``sum |r - D a|^2 + ridge mean(diag(gram)) |D|^2`` is least."""
        scale = self.gram.diagonal().mean()
        kept = self.gram / scale + ridge * torch.eye(len(self.gram)).to(self.gram)
        found: Tensor = torch.linalg.solve(kept, self.cross.mT / scale).mT
        return found

    def error(self, step: Tensor) -> float:
        """``sum |r - D a|^2``."""
        return float(self.size + ((step @ self.gram - 2 * self.cross) * step).sum())


class LeastSquares:
    """The correction of an equivariant linear map that brings its outputs nearest to what is wanted.

    By Schur's lemma the irreps, which must be of real type, are problems of their own. For each the ridge is chosen by
    cross-validation: of :data:`RIDGES` the one with which corrections found on every other image err least on those in
    between. Where none of them is better than no correction, there is none.

    Args:
        linear: the map, in irreps behind.
    """

    def __init__(self, linear: enn.Linear) -> None:
        self.linear: Any = linear
        self.places = {irrep.name: i for i, irrep in enumerate(linear.in_rep.group.irreps)}
        self.halves: tuple[dict[str, _Sums], dict[str, _Sums]] = ({}, {})
        self.count = 0

    def add(self, inputs: Tensor, lacking: Tensor) -> None:
        """Add some images.

        Args:
            inputs: what the map read, shape ``(B, ..., in_features)``.
            lacking: what is to be added to its outputs, ``(B, ..., out_features)``.
        """
        full = torch.promote_types(inputs.dtype, torch.float32)
        axes = read(inputs.to(full), layout_of(self.linear.in_rep), self.linear.in_order, None)
        wanted = split(lacking.to(full), layout_of(self.linear.out_rep))
        for irrep, _ in self.linear.weights():
            a, r = (parts[self.places[irrep.name]].flatten(1, -2) for parts in (axes, wanted))
            if self._has_bias(irrep):
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            for half, sums in enumerate(self.halves):
                chosen = slice((half + self.count) % 2, None, 2)
                if len(a[chosen]):
                    found = _Sums.of(a[chosen].flatten(0, 1), r[chosen].flatten(0, 1))
                    sums[irrep.name] = sums[irrep.name] + found if irrep.name in sums else found
        self.count += len(inputs)

    def correct(self) -> float:
        """Add the correction to the map's weights and bias.

        Returns:
            the sum of the squares of what outputs still lack, cross-validated.
        """
        total = 0.0
        for irrep, weight in self.linear.weights():
            halves = [sums[irrep.name] for sums in self.halves if irrep.name in sums]
            errors = {math.inf: sum(float(half.size) for half in halves)}
            if len(halves) == 2 and all(float(half.gram.trace()) > 0 for half in halves):
                errors |= {ridge: _cross_validated(halves[0], halves[1], ridge) for ridge in RIDGES}
            best = min(errors, key=lambda ridge: errors[ridge])
            total += errors[best]
            if best < math.inf:
                step = (halves[0] + halves[1]).solution(best)
                if self._has_bias(irrep):
                    self.linear.bias.add_(step[:, -1])
                    step = step[:, :-1]
                weight.add_(step)
        return total

    def _has_bias(self, irrep: Any) -> bool:
        return self.linear.bias is not None and self.places[irrep.name] == 0


def _cross_validated(first: _Sums, second: _Sums, ridge: float) -> float:
    return first.error(second.solution(ridge)) + second.error(first.solution(ridge))


@torch.no_grad()
def fit_blocks(student: Any, teacher: Any, stream: Stream, images: Iterable[Tensor]) -> tuple[float, ...]:
    """Fit the last linear maps of all attentions and MLPs of a steered student, one after the other.

    With ``x`` and ``y`` the teacher's stream for an image and for its mirror image, tokens put back, the student's is
    to be ``(Z x + D Z y) / 2``, ``D`` being the signs by which the mirror acts. A map makes up for what the maps in
    front of it miss as well: both networks walk through their blocks in step, the student with what was fitted so far.
    The method is that of pruning by reconstruction (He et al., arXiv 1707.06168).

    Args:
        student: its weights projected from the teacher's; it visits the teacher's device.
        teacher: a network of timm's class ``VisionTransformer``, in evaluation mode.
        stream: how the student's stream holds the teacher's.
        images: batches as the teacher takes them; all their tokens are kept, three streams of them.

    Returns:
        by block, ``sum |s - t|^2 / sum |t|^2`` of the student's stream ``s`` behind it and what it is to be, ``t``;
        cross-validated, what is in front of the block's last map being fitted to all images.
    """
    home = next(student.parameters()).device
    student.to(next(teacher.parameters()).device)
    try:
        with evaluating(student):
            return _fitted(student, teacher, stream, images)
    finally:
        student.to(home)


def _fitted(student: Any, teacher: Any, stream: Stream, images: Iterable[Tensor]) -> tuple[float, ...]:
    weight, own = next(teacher.parameters()), next(student.parameters())
    places = token_places(teacher, student.group, weight.device)
    basis, signs = stream.basis.to(weight), stream.signs.to(weight)

    def wanted(x: Tensor, y: Tensor) -> Tensor:
        return (x @ basis.T + signs * (y[:, places] @ basis.T)).to(own) / 2

    streams: list[list[Tensor]] = []
    for batch in images:
        views = batch, student.group.act_on_image(1, batch)
        streams.append([teacher._pos_embed(teacher.patch_embed(view)) for view in views])
        streams[-1].append(student._pos_embed(student.patch_embed(batch.to(own))))
    errors = []
    for made, plain in zip(student.blocks, teacher.blocks, strict=True):
        for names in _BRANCHES:
            norm, branch, scale, _ = (plain.get_submodule(name) for name in names)
            own_norm, own_branch, _, last = (made.get_submodule(name) for name in names)
            fitted = LeastSquares(last)
            for at in streams:
                at[:2] = [x + scale(branch(norm(x))) for x in at[:2]]
                (seen,), added = watch(own_branch, own_norm(at[2]), [last])
                fitted.add(seen, wanted(*at[:2]) - at[2] - added)
            lacking = fitted.correct()
            for at in streams:
                at[2] = at[2] + own_branch(own_norm(at[2]))
        errors.append(lacking / sum(float(wanted(x, y).square().sum()) for x, y, _ in streams))
    return tuple(errors)
