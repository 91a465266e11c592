"""The involution by which a trained stream mirrors best, and the directions in which it is carried over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equiflop.distill.steer.observe import Moments


@dataclass(frozen=True)
class Stream:
    """How a student's residual stream holds the teacher's.

    Attributes:
        basis: ``Z``, shape ``(student's channels, teacher's channels)``: invariant channels first, then sign-flipping
            ones, ``z = Z x`` and ``x = Z^T z``. Its rows are orthogonal to constant vectors, and so are the columns of
            each of the two blocks: neither the teacher's centring nor the student's takes anything away.
        invariant: how many channels are invariant, ``m``.
        kept: by place, the share of the energy ``|x|^2`` of centred vectors that is carried over with its right sign.
    """

    basis: Tensor
    invariant: int
    kept: dict[str, float]

    @property
    def signs(self) -> Tensor:
        """What the mirror multiplies the student's channels by, shape ``(student's channels,)``."""
        signs = torch.ones(len(self.basis), dtype=self.basis.dtype, device="cpu")
        signs[self.invariant :] = -1
        return signs


def fit_stream(stream: dict[str, Moments], invariant: int, flipping: int) -> Stream:
    """Choose the directions in which a stream of ``invariant`` and ``flipping`` channels holds a teacher's.

    The involution ``S = S^T``, ``S^2 = 1`` for which ``sum |y - S x|^2`` is least is ``V sign(L) V^T``, where
    ``V L V^T`` is the symmetric part of ``sum y x^T`` (Procrustes). The sum runs over all places, each of weight
    ``1 / sum |x|^2``. Of the columns of ``V``, as many are taken for each kind as fit, such that most energy is kept:
    ``|(x + y) / 2|^2`` along invariant ones and ``|(x - y) / 2|^2`` along flipping ones. A block of several channels
    holds one direction less than it has channels, since the student's norm centres it.

    Args:
        stream: moments of the teacher's stream by place.
        invariant: multiplicity of the trivial irrep in the student.
        flipping: multiplicity of the other.
    """
    first = next(iter(stream.values())).same
    inner = contrasts(len(first)).to(first.device)  # coordinates of centred vectors
    pairs = {
        name: (inner.T @ moments.same @ inner, inner.T @ moments.across @ inner) for name, moments in stream.items()
    }
    summed = torch.stack([torch.stack(pair) / pair[0].trace().clamp_min(1e-300) for pair in pairs.values()]).sum(0)
    same, across = summed / len(pairs)
    overlaps, directions = torch.linalg.eigh((across + across.T) / 2)
    energies = ((same @ directions) * directions).sum(0)
    gains = torch.stack([(energies + overlaps) / 2, (energies - overlaps) / 2, torch.zeros_like(energies)])
    room = [_room(invariant), _room(flipping)]
    kinds = torch.from_numpy(_chosen(gains, room)).to(first.device)
    blocks = []
    for kind, channels in enumerate((invariant, flipping)):
        order = torch.argsort(gains[kind], descending=True)
        taken = directions[:, order[kinds[order] == kind]]
        embedding = contrasts(channels)[:, : taken.shape[1]].to(first.device)
        blocks.append(embedding @ (inner @ taken).T)
    basis = torch.cat(blocks)
    chosen = [directions[:, kinds == kind] for kind in (0, 1)]
    kept = {name: _kept(*pair, *chosen) for name, pair in pairs.items()}
    return Stream(basis, invariant, kept)


def _room(channels: int) -> int:
    return channels if channels < 2 else channels - 1


def contrasts(channels: int) -> Tensor:
    """An orthonormal basis of the vectors of mean 0, ``(channels, channels - 1)``; for one channel that channel."""
    if channels < 2:
        return torch.eye(channels, dtype=torch.float64)
    columns = torch.tril(torch.ones(channels, channels, dtype=torch.float64), -1).T[:, 1:]
    below = torch.arange(1, channels, dtype=torch.float64)
    columns[torch.arange(1, channels), torch.arange(channels - 1)] = -below
    return columns / (below * (below + 1)).sqrt()


def _chosen(gains: Tensor, room: Sequence[int]) -> np.ndarray:
    """Which kind every direction gets, 0, 1 or none (2), such that the sum of gains is the largest.

    A choice is the best one if no exchange between two kinds, and none around all three, gains anything.
    """
    values = gains.cpu().numpy()
    count = values.shape[1]
    size = max(count, sum(room))  # where there is more room than directions, some of it goes to none
    values = np.pad(values, ((0, 0), (0, size - count)))
    kinds = np.full(size, 2)
    order = np.argsort(values[1] - values[0], kind="stable")
    kinds[order[: room[0]]] = 0
    kinds[order[size - room[1] :]] = 1
    for _ in range(10 * size):
        exchange = _best_exchange(values, kinds)
        if exchange is None:
            break
        for i, kind in exchange:
            kinds[i] = kind
    return kinds[:count]


def _best_exchange(values: np.ndarray, kinds: np.ndarray) -> list[tuple[int, int]] | None:
    """The exchange that gains most, as members with their new kinds; None if none gains anything."""
    best, found = 1e-12, None
    for cycle in ((0, 1), (0, 2), (1, 2), (0, 1, 2), (0, 2, 1)):
        moves: list[tuple[int, int]] = []
        gain = 0.0
        for source, target in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            members = np.flatnonzero(kinds == source)
            if not len(members):
                break
            change = values[target, members] - values[source, members]
            moves.append((int(members[change.argmax()]), target))
            gain += float(change.max())
        else:
            if gain > best:
                best, found = gain, moves
    return found


def _kept(same: Tensor, across: Tensor, invariant: Tensor, flipping: Tensor) -> float:
    even, odd = (same + across) / 2, (same - across) / 2
    energy = ((even @ invariant) * invariant).sum() + ((odd @ flipping) * flipping).sum()
    return float(energy / same.trace().clamp_min(1e-300))


def _about_the_mean(moments: Moments) -> tuple[Tensor, Tensor]:
    mean = moments.total / moments.count
    shift = torch.outer(mean, mean) * moments.count
    across = moments.across - shift
    return moments.same - shift, (across + across.T) / 2


def best_involution(places: Sequence[Moments]) -> Tensor:
    """The involution ``(C, C)`` by which features at several places mirror best, each place weighing the same."""
    summed = torch.zeros_like(places[0].across)
    for moments in places:
        same, across = _about_the_mean(moments)
        summed += across / same.trace().clamp_min(1e-300)
    overlaps, directions = torch.linalg.eigh(summed)
    return directions * torch.where(overlaps < 0, -1.0, 1.0).to(directions) @ directions.T


def share_kept(moments: Moments, involution: Tensor | None = None) -> float:
    """How mirrored features are: ``1 - sum |y - S x|^2 / sum |x|^2`` about their mean.

    Args:
        moments: of the features.
        involution: ``S``; by default the one that keeps most.
    """
    same, across = _about_the_mean(moments)
    overlap = torch.linalg.eigvalsh(across).abs().sum() if involution is None else (across * involution).sum()
    return float(2 * overlap / same.trace().clamp_min(1e-300) - 1)
