"""Which hidden units, and which heads, are each other's mirror partners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Partners that are less alike than this are taken one by one instead.
ALIKE = 0.5


@dataclass(frozen=True)
class Pairing:
    """Units that are carried over, each with its partner; a student holds one of them, and its mirror image.

    Attributes:
        first: numbers of units, the most important first.
        second: their partners; a unit taken by itself has itself.
        covered: share of the importance of all units that is carried over.
    """

    first: Tensor
    second: Tensor
    covered: float

    @property
    def alone(self) -> Tensor:
        """Which units are taken by themselves."""
        return self.first == self.second


def likeness(across: Tensor, energy: Tensor) -> Tensor:
    """``2 <a_i(x), a_j(y)> / (|a_i|^2 + |a_j|^2)``: 1 where ``a_j`` of the mirror image is ``a_i`` of the image.

    Args:
        across: ``<a_i(x), a_j(y)>``, symmetric, shape ``(n, n)``.
        energy: ``|a_i|^2``, shape ``(n,)``.
    """
    return (
        2 * across / (energy[:, None] + energy[None, :]).clamp_min(1e-300 if across.dtype == torch.float64 else 1e-30)
    )


def pair(alike: Tensor, importance: Tensor, slots: int) -> Pairing:
    """Pair units, the most alike first, and choose those that matter most.

    That is done greedily: two units that are each other's best partner of those left are a pair, and a unit that is its
    own best partner stays alone. What a unit alone contributes, averaged over image and mirror image, is carried over
    exactly, but takes as much room as a pair.

    Args:
        alike: likeness of every two units, of a unit with itself too, shape ``(n, n)``.
        importance: of every unit, ``(n,)``.
        slots: how many pairs, or units alone, there is room for.
    """
    count = len(alike)
    left = alike.clone()
    partner = torch.full((count,), -1, device=alike.device)
    while bool((partner < 0).any()):
        best = left.argmax(dim=1)
        free = torch.nonzero(partner < 0).flatten()
        mutual = free[best[best[free]] == free]
        if not len(mutual):  # ties around a circle
            mutual = free[:1]
            best[best[mutual]] = mutual
        partner[mutual] = best[mutual]
        partner[best[mutual]] = mutual
        done = torch.nonzero(partner >= 0).flatten()
        left[done] = -torch.inf
        left[:, done] = -torch.inf
    units = torch.arange(count, device=alike.device)
    partner = torch.where(alike[units, partner] < ALIKE, units, partner)
    first = units[units <= partner]
    second = partner[first]
    weight = torch.where(first == second, importance[first], importance[first] + importance[second])
    order = torch.argsort(weight, descending=True, stable=True)[:slots]
    covered = float(weight[order].sum() / importance.sum().clamp_min(1e-30))
    return Pairing(first[order], second[order], covered)
