"""The heads of a teacher as bilinear forms, which no choice of a basis within a head changes."""

from __future__ import annotations

import torch
from torch import Tensor

from equiflop.distill.steer.pairing import Pairing, likeness


class Heads:
    """The bilinear forms of a teacher's heads: ``q^T k`` with the query's bias, and ``o v``."""

    def __init__(self, queries: Tensor, keys: Tensor, outputs: Tensor, values: Tensor, signs: Tensor) -> None:
        self.queries, self.keys, self.outputs, self.values = queries, keys, outputs.transpose(1, 2), values
        self.signs = signs
        self.signs_and_bias = torch.cat([signs, torch.ones(1, dtype=signs.dtype)])

    def paired(self, pairs: Pairing, head_dim: int) -> list[Tensor]:
        """One head for every pair: its forms are the mean of one's and the other's mirrored ones, of rank head_dim."""
        made: list[list[Tensor]] = [[], [], [], []]
        for i, j in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            alone = i == j
            forms = []
            for left, right, signs in (
                (self.queries, self.keys, self.signs_and_bias),
                (self.outputs, self.values, self.signs),
            ):
                factors = [left[i]], [right[i]]
                if not alone:
                    factors[0].append(left[j] * signs)
                    factors[1].append(right[j] * self.signs)
                forms.append(_low_rank(torch.cat(factors[0]), torch.cat(factors[1]), head_dim, 1 if alone else 0.5))
            (q, k), (o, v) = forms
            # Both copies of an output add up: of one alone each is half, of a pair each is one of the two.
            for place, part in zip(made, (q, k, v, o / 2 if alone else o), strict=True):
                place.append(part)
        return [torch.stack(parts) for parts in made]

    def within(self, order: Tensor, kind: int, rank: int) -> list[Tensor]:
        """The forms of some heads on the channels of one kind, of a given rank."""
        invariant = int((self.signs > 0).sum())
        own = slice(0, invariant) if kind == 0 else slice(invariant, len(self.signs))
        with_bias = [*range(invariant), len(self.signs)]
        made: list[list[Tensor]] = [[], [], [], []]
        for i in order.tolist():
            queries = self.queries[i][:, with_bias] if kind == 0 else self.queries[i][:, own]
            q, k = _low_rank(queries, self.keys[i][:, own], rank)
            o, v = _low_rank(self.outputs[i][:, own], self.values[i][:, own], rank)
            for place, part in zip(made, (q, k, v, o), strict=True):
                place.append(part)
        return [torch.stack(parts) for parts in made]


def _low_rank(left: Tensor, right: Tensor, rank: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The best factors ``(rank, ...)`` of the form ``factor * left^T right``, the weight shared out evenly."""
    q_left, r_left = torch.linalg.qr(left.T)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(factor * r_left @ r_right.T)
    root = values[:rank].sqrt()
    found = (q_left @ u[:, :rank] * root).T, (q_right @ vt[:rank].T * root).T
    return filled(found[0], rank), filled(found[1], rank)


def alike_heads(into: Tensor, same: Tensor, across: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Likeness of what heads add to the stream with what others add for the mirror image, and its energy.

    Args:
        into: ``(heads, channels, head_dim)``.
        same: second moments of the heads' outputs, ``(heads * head_dim,)`` squared.
        across: those across image and mirror image.
        signs: of the channels.
    """
    count, _, size = into.shape
    flat = into.movedim(0, 1).flatten(1)  # channels, heads * head_dim
    blocks = (count, size, count, size)
    mirrored = ((flat.T * signs) @ flat * across).reshape(blocks).sum((1, 3))
    energy = (flat.T @ flat * same).reshape(blocks).sum((1, 3)).diagonal()
    return likeness((mirrored + mirrored.T) / 2, energy), energy


def filled(rows: Tensor, count: int) -> Tensor:
    """As many rows as asked for, further ones zero."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows
