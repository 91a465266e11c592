"""A teacher's weights, projected onto those that an equivariant student can have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equiflop import nn as enn
from equiflop.counting import evaluating
from equiflop.distill.steer.checks import check_student
from equiflop.distill.steer.fit import fit_blocks
from equiflop.distill.steer.heads import Heads, alike_heads, filled
from equiflop.distill.steer.involution import Stream, fit_stream
from equiflop.distill.steer.observe import AT_ONCE, observe
from equiflop.distill.steer.pairing import likeness, pair
from equiflop.grids import grid_decomposition


@dataclass(frozen=True)
class Steering:
    """What was carried over.

    Attributes:
        stream: how the student's residual stream holds the teacher's.
        heads: by block, share of the energy that heads add to the stream of those that have room.
        units: the same of hidden units.
        errors: by block, how far the student's stream behind it is from what it has room for of the teacher's, averaged
            over the views: cross-validated, a share of its energy; empty where nothing was fitted.
    """

    stream: Stream
    heads: tuple[float, ...]
    units: tuple[float, ...]
    errors: tuple[float, ...] = ()

    def __str__(self) -> str:
        parts = (("stream", self.stream.kept.values()), ("heads", self.heads), ("hidden units", self.units))
        shares = ", ".join(f"{name} {100 * min(found):.1f} to {100 * max(found):.1f} %" for name, found in parts)
        if not self.errors:
            return f"steered; carried over of the teacher's {shares}"
        low, high = (100 * bound(self.errors) for bound in (min, max))
        fitted = f"of this stream {low:.2g} to {high:.2g} % is missed, by cross-validation"
        return f"steered; carried over of the teacher's {shares}; {fitted}"


@torch.no_grad()
def steer(
    student: Any, teacher: Any, images: Iterable[Tensor], source: str = "the teacher", fit: bool = True
) -> Steering:
    """Give a student weights projected from its teacher's.

    The residual stream is turned into one in which the mirror image changes signs (:func:`fit_stream`). Affine norms
    and layer scales are folded into the linear maps behind and in front of them. Heads and hidden units are paired with
    their mirror partners, and every weight is projected onto those that commute with the mirroring. Where the teacher
    is equivariant in some basis already, and the student has as many channels of each kind, the student computes what
    the teacher does.

    Args:
        student: the twin for a group of two elements, of the teacher's depth and patches; its weights are overwritten.
        teacher: a network of timm's class ``VisionTransformer``; it is asked in evaluation mode.
        images: batches ``(B, C, H, W)`` as the teacher takes them, or one.
        source: what the teacher is called in messages.
        fit: whether what blocks add is fitted to the teacher's afterwards (:func:`fit_blocks`), or projected alone.

    Returns:
        what was carried over.

    Raises:
        ValueError: if teacher or student are of a kind that this cannot read or write, or images are unfit.
    """
    check_student(student, teacher, source)
    with evaluating(teacher):
        return _steered(student, teacher, _batches(images, next(teacher.parameters())), fit)


def _batches(images: Iterable[Tensor], weight: Tensor) -> list[Tensor]:
    """Images in parts of a few, on the teacher's device and in its numbers."""
    given = [images] if isinstance(images, Tensor) else images
    found = [part.to(weight) for batch in given for part in batch.split(AT_ONCE)]
    if not all(bool(torch.isfinite(part).all()) for part in found):
        raise ValueError("images: hold NaN or infinite numbers")
    return found


def _steered(student: Any, teacher: Any, batches: list[Tensor], fit: bool) -> Steering:
    seen = observe(teacher, batches, student.group)
    stream = fit_stream(seen.stream, *student.rep.multiplicities)
    writer = _Writer(student, teacher, stream)
    writer.embedding()
    heads, units = [], []
    for i, (block, plain) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        heads.append(writer.attention(block, plain, i, seen.heads[i]))
        units.append(writer.mlp(block, plain, i, seen.units[i]))
    writer.head()
    errors = fit_blocks(student, teacher, stream, batches) if fit else ()
    return Steering(stream, tuple(heads), tuple(units), errors)


class _Writer:
    """Writes a student's weights; all in float64 and in the coordinates ``z = Z x`` of the student's stream."""

    def __init__(self, student: Any, teacher: Any, stream: Stream) -> None:
        self.student, self.teacher, self.stream = student, teacher, stream
        self.basis = stream.basis.cpu()
        self.signs = stream.signs
        self.split = stream.invariant
        for module in student.modules():
            if isinstance(module, enn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, enn.LayerScale):
                module.gamma.fill_(1.0)

    def read(self, weight: Tensor, bias: Tensor | None, norm: Any, place: str) -> tuple[Tensor, Tensor]:
        """A map that reads the stream through a norm, as one that reads the student's through a norm without affine.

        The student's norm divides by the root mean square of what was kept, over as many channels as it has.
        """
        weight = _wide(weight)
        bias = weight.new_zeros(len(weight)) if bias is None else _wide(bias)
        if norm.bias is not None:
            bias = bias + weight @ _wide(norm.bias)
        if norm.weight is not None:
            weight = weight * _wide(norm.weight)
        ours, theirs = self.basis.shape
        scale = math.sqrt(self.stream.kept[place] * theirs / ours)
        return scale * weight @ self.basis.T, bias

    def write(self, weight: Tensor, bias: Tensor | None, scale: Any) -> tuple[Tensor, Tensor]:
        """A map that writes to the stream, through a layer scale or not, as one that writes to the student's."""
        weight = _wide(weight)
        bias = weight.new_zeros(len(weight)) if bias is None else _wide(bias)
        gamma = getattr(scale, "gamma", None)
        factor = torch.ones_like(bias) if gamma is None else _wide(gamma)
        return self.basis @ (factor[:, None] * weight), self.basis @ (factor * bias)

    def embedding(self) -> None:
        """Patches, position embedding and tokens."""
        plain, made, group = self.teacher, self.student, self.student.group
        weight = plain.patch_embed.proj.weight  # channels, colours, rows, columns
        pixels = torch.from_numpy(grid_decomposition(group, *weight.shape[2:]).matrix)
        weight = _wide(weight).permute(0, 2, 3, 1).flatten(1, 2)  # channels, pixels, colours
        weight = (pixels @ weight).flatten(1)
        weight, bias = self.write(weight, plain.patch_embed.proj.bias, None)
        proj = made.patch_embed.proj
        split = proj.in_rep.multiplicities[0]
        blocks = [weight[: self.split, :split], weight[self.split :, split:]]
        self._set_blocks(proj, blocks, bias[: self.split])
        for name in ("cls_token", "reg_token"):
            token = getattr(plain, name)
            if token is not None:
                getattr(made, name).copy_((_wide(token) @ self.basis.T)[..., : self.split])
        if plain.pos_embed is not None:
            field = _wide(plain.pos_embed)[0] @ self.basis.T
            prefix = len(field) - plain.patch_embed.num_patches
            made.pos_embed.set_field(field[prefix:])
            if prefix:
                made.pos_embed.prefix.copy_(field[:prefix, : self.split])

    def head(self) -> None:
        """The classifier, or what gives the teacher's embedding; it sees the invariant channels."""
        if not isinstance(self.student.head, nn.Linear):
            return
        place = "fc_norm" if isinstance(self.teacher.norm, nn.Identity) else "norm"
        head: Any = self.teacher.head
        classifies = isinstance(head, nn.Linear)
        own, shift = (head.weight, head.bias) if classifies else (torch.eye(self.basis.shape[1]), None)
        weight, bias = self.read(own, shift, getattr(self.teacher, place), place)
        self.student.head.weight.copy_(weight[:, : self.split])
        if self.student.head.bias is not None:
            self.student.head.bias.copy_(bias)

    def mlp(self, block: Any, plain: Any, i: int, seen: Any) -> float:
        """An MLP; returns the share of the hidden units' contributions that is carried over."""
        inward, bias = self.read(plain.mlp.fc1.weight, plain.mlp.fc1.bias, plain.norm2, f"blocks.{i}.norm2")
        outward, shift = self.write(plain.mlp.fc2.weight, plain.mlp.fc2.bias, plain.ls2)
        energy, across = seen.same.cpu() / 2, seen.across.cpu() / 2
        importance = energy.double() * outward.square().sum(0)
        pairs = pair(likeness(across, energy), importance, block.mlp.fc1.out_rep.regular_copies)
        first, second, alone = pairs.first, pairs.second, pairs.alone[:, None]
        rows = torch.where(alone, inward[first], (inward[first] + inward[second] * self.signs) / 2)
        biases = (bias[first] + bias[second]) / 2
        own, other = outward.T[first], outward.T[second] * self.signs
        columns = torch.where(alone, own, own + other) / 2
        self._into_group(block.mlp.fc1, [rows], [biases])
        self._from_group(block.mlp.fc2, columns, shift)
        return pairs.covered

    def attention(self, block: Any, plain: Any, i: int, seen: Any) -> float:
        """An attention; returns the share of the heads' contributions that is carried over."""
        attn, made = plain.attn, block.attn
        inward, bias = self.read(attn.qkv.weight, attn.qkv.bias, plain.norm1, f"blocks.{i}.norm1")
        outward, shift = self.write(attn.proj.weight, attn.proj.bias, plain.ls1)
        queries, keys, values = (part.unflatten(0, (attn.num_heads, -1)) for part in inward.chunk(3))
        shifts = [part.unflatten(0, (attn.num_heads, -1)) for part in bias.chunk(3)]
        into = outward.unflatten(1, (attn.num_heads, -1)).movedim(1, 0)  # heads, channels, head_dim
        shift = shift + (into @ shifts[2][..., None]).sum((0, 2))  # attention weights sum to 1
        # What all keys add to a query's logits alike makes no difference: keys need no bias.
        scale = attn.scale / made.scale
        queries = scale * torch.cat([queries, shifts[0][..., None]], dim=2)  # heads, head_dim, channels + 1
        alike, importance = alike_heads(into, seen.same.cpu() / 2, seen.across.cpu() / 2, self.signs)
        heads = Heads(queries, keys, into, values, self.signs)
        if made.heads == "regular":
            pairs = pair(alike, importance, made.num_heads // 2)
            self._regular_heads(made, heads.paired(pairs, made.head_dim), shift)
            return pairs.covered
        order = torch.argsort(importance, descending=True, stable=True)[: made.num_heads].sort().values
        self._coupled_heads(made, heads, order, shift)
        return float(importance[order].sum() / importance.sum().clamp_min(1e-30))

    def _regular_heads(self, made: Any, parts: list[Tensor], shift: Tensor) -> None:
        """``parts``: queries, keys, values and outputs of one head of every pair, each ``(pairs, head_dim, ...)``."""
        q, k, v, o = (part.flatten(0, 1) for part in parts)
        zero = q.new_zeros(len(q))
        self._into_group(made.qkv, [q[:, :-1], k, v], [q[:, -1], zero, zero])
        self._from_group(made.proj, o, shift)

    def _coupled_heads(self, made: Any, heads: Heads, order: Tensor, shift: Tensor) -> None:
        sections: list[list[Tensor]] = [[], []]
        outputs: list[Tensor] = []
        biases: list[Tensor] = []
        for kind, count in enumerate(self.student.rep.multiplicities):
            q, k, v, o = heads.within(order, kind, count // made.num_heads)
            sections[kind] = [part.flatten(0, 1) for part in (q[..., :-1] if kind == 0 else q, k, v)]
            outputs.append(o.flatten(0, 1))
            if kind == 0:
                flat = q[..., -1].flatten()
                missing = self.student.rep.multiplicities[0] - len(flat)
                biases = [torch.cat([flat, flat.new_zeros(missing)])]
        weights = []
        for kind, (parts, count) in enumerate(zip(sections, self.student.rep.multiplicities, strict=True)):
            weights.append(torch.cat([filled(part, count) for part in parts]))
            outputs[kind] = filled(outputs[kind], count).T
        zero = torch.zeros_like(biases[0])
        self._set_blocks(made.qkv, weights, torch.cat([biases[0], zero, zero]))
        self._set_blocks(made.proj, outputs, shift[: self.split])

    def _into_group(self, linear: enn.Linear, sections: list[Tensor], biases: list[Tensor]) -> None:
        """Rows that every section of a map has in the copy of the identity; those of the mirrored copy follow."""
        count = linear.out_rep.multiplicities[0]
        weight = math.sqrt(2) * torch.cat([filled(part, count) for part in sections])
        bias = math.sqrt(2) * torch.cat([filled(part, count) for part in biases])
        self._set_blocks(linear, [weight[:, : self.split], weight[:, self.split :]], bias)

    def _from_group(self, linear: enn.Linear, columns: Tensor, bias: Tensor) -> None:
        """What every channel in the copy of the identity adds to the stream, shape ``(channels, student's)``."""
        weight = math.sqrt(2) * filled(columns, linear.in_rep.multiplicities[0]).T
        self._set_blocks(linear, [weight[: self.split], weight[self.split :]], bias[: self.split])

    @staticmethod
    def _set_blocks(linear: enn.Linear, blocks: list[Tensor], bias: Tensor) -> None:
        """The blocks of the two irreps between orthonormal bases, and the bias of the trivial one."""
        by_name = dict(zip((irrep.name for irrep in linear.in_rep.group.irreps), blocks, strict=True))
        for irrep, weight in linear.weights():
            weight.copy_(by_name[irrep.name] * linear.gain(irrep))
        if linear.bias is not None:
            linear.bias.copy_(bias * linear.bias_gain)


def _wide(value: Tensor) -> Tensor:
    return value.detach().double().cpu()
