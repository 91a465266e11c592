"""What a steered student's blocks add to its stream, fitted to its teacher's by linear least squares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from equiflop import nn as enn
from equiflop.distill.steer.involution import Stream
from equiflop.distill.steer.observe import token_places
from equiflop.kernels import layout_of, split
from equiflop.kernels.orders import read

RIDGE = 1e-2  # times the mean square of what a map reads: where images say little, weights stay as they are
_BRANCHES = (("norm1", "attn", "ls1", "attn.proj"), ("norm2", "mlp", "ls2", "mlp.fc2"))


class LeastSquares:
    """The correction of an equivariant linear map that brings its outputs nearest to what is wanted.

    By Schur's lemma the irreps are problems of their own. For one, with inputs ``a``, a last entry of 1 for the bias of
    the trivial one, and ``r`` what its outputs lack, the correction ``D`` makes
    ``sum |r - D a|^2 + RIDGE mean(diag(sum a a^T)) |D|^2`` least.

    Args:
        linear: the map, in irreps behind.
    """

    def __init__(self, linear: enn.Linear) -> None:
        self.linear = linear
        self.places = {irrep.name: i for i, irrep in enumerate(linear.in_rep.group.irreps)}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, inputs: Tensor, lacking: Tensor) -> None:
        """Add some vectors.

        Args:
            inputs: what the map read, shape ``(..., in_features)``.
            lacking: what is to be added to its outputs, ``(..., out_features)``.
        """
        linear = self.linear
        axes = read(inputs, layout_of(linear.in_rep), linear.in_order, None)
        wanted = split(lacking, layout_of(linear.out_rep))
        for irrep, _ in linear.weights():
            a, r = (parts[self.places[irrep.name]].flatten(0, -2) for parts in (axes, wanted))
            if self._has_bias(irrep):
                a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
            found = (a.mT @ a).double(), (r.mT @ a).double()
            before = self.sums.get(irrep.name)
            self.sums[irrep.name] = found if before is None else (before[0] + found[0], before[1] + found[1])

    def correct(self) -> None:
        """Add the correction to the map's weights and bias."""
        for irrep, weight in self.linear.weights():
            gram, cross = self.sums[irrep.name]
            gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
            step = torch.linalg.solve(gram, cross.mT).mT
            if self._has_bias(irrep):
                self.linear.bias.add_(step[:, -1])  # type: ignore[union-attr]
                step = step[:, :-1]
            weight.add_(step)

    def _has_bias(self, irrep: Any) -> bool:
        return self.linear.bias is not None and self.places[irrep.name] == 0


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
        by block, ``sum |s - t|^2 / sum |t|^2`` of the student's stream ``s`` behind it and what it is to be, ``t``.
    """
    home, training = next(student.parameters()).device, student.training
    student.to(next(teacher.parameters()).device).eval()
    try:
        return _fitted(student, teacher, stream, images)
    finally:
        student.to(home).train(training)


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
                seen, added = _watched(last, own_branch, own_norm(at[2]))
                fitted.add(seen, wanted(*at[:2]) - at[2] - added)
            fitted.correct()
            for at in streams:
                at[2] = at[2] + own_branch(own_norm(at[2]))
        lacking = sum(float((wanted(x, y) - s).square().sum()) for x, y, s in streams)
        errors.append(lacking / sum(float(wanted(x, y).square().sum()) for x, y, _ in streams))
    return tuple(errors)


def _watched(module: nn.Module, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a module is given while a network sees ``x``, and what the network gives."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        out: Tensor = network(x)
    finally:
        hook.remove()
    return seen[0], out
