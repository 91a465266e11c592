"""The numbers of a Rep that kernels need, as plain Python that compilers can trace; a feature axis cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from equiflop.groups import FourierPlan, Rep, fourier_plan
from equiflop.kernels.lanes import Lanes


@dataclass(frozen=True)
class Span:
    """An irrep's place on the axis: ``dim`` rows of ``multiplicity`` channels from ``start`` to ``stop``.

    Attributes:
        dim: dimension of the irrep.
        algebra: dimension of its endomorphism algebra.
        multiplicity: channels of a row.
        start: first channel.
        stop: the channel behind the last.
    """

    dim: int
    algebra: int
    multiplicity: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where everything lies on the axis of a Rep.

    A multiple of the regular representation, ``copies`` times, is also a sequence of ``order`` lanes of ``copies``
    channels: for each irrep, row by row, its ``dim / algebra`` lanes. They all have one length, so that one loop over
    that length serves all irreps side by side.

    Attributes:
        dim: length of the axis.
        order: elements of the group.
        spans: one per irrep, empty ones included.
        copies: copies of the regular representation, or None where the Rep is no multiple of it.
        plan: the group Fourier transform by additions, or None where there is none.
        text: the Rep in words, for messages.
        additions: that transform as a matrix, from irreps to the group's basis: entries 0, 1 and -1; empty without one.
        code: the lanes in numbers (:class:`equiflop.kernels.lanes.Lanes`), for operators; empty where there is no plan,
            the Rep is no multiple of the regular one, or an irrep is not of real type.
        gains: factor of each irrep's rows in the transform by additions; parameters carry it.
    """

    dim: int
    order: int
    spans: tuple[Span, ...]
    copies: int | None
    plan: FourierPlan | None
    gains: tuple[float, ...]
    text: str
    additions: tuple[tuple[float, ...], ...] = ()
    code: tuple[int, ...] = ()

    @property
    def lane_spans(self) -> list[tuple[Span, int]]:
        """Of every lane its irrep's span and its number within the row."""
        copies = self.copies or 1
        return [(s, j) for s in self.spans for _ in range(s.dim) for j in range(s.multiplicity // copies)]


@lru_cache(maxsize=1024)
def layout_of(rep: Rep) -> Layout:
    """The layout of a Rep, made once; a module keeps it, since compilers cannot trace how it is made."""
    spans = tuple(
        Span(block.irrep.dim, block.irrep.endomorphism_dim, block.multiplicity, block.start, block.stop)
        for block in rep.blocks()
    )
    plan = fourier_plan(rep.group)
    gains = (1.0,) * len(spans) if plan is None else plan.irrep_scales(rep.group)
    copies = rep.regular_copies or None
    code: tuple[int, ...] = ()
    if copies is not None and plan is not None and all(span.algebra == 1 for span in spans):
        code = Lanes(tuple((span.dim, span.multiplicity // copies) for span in spans), plan).code()
    additions = _additions(plan, rep.group.order)
    return Layout(rep.dim, rep.group.order, spans, copies, plan, gains, repr(rep), additions, code)


def _additions(plan: FourierPlan | None, order: int) -> tuple[tuple[float, ...], ...]:
    if plan is None:
        return ()
    lanes = torch.eye(order, device="cpu").unbind(0)
    return tuple(tuple(row) for row in torch.stack(plan.synthesise(lanes)).tolist())


def split(x: Tensor, layout: Layout) -> list[Tensor]:
    """Views of the blocks of a feature: shape ``(..., dim)`` to one ``(..., d, multiplicity)`` per irrep."""
    return [x[..., span.start : span.stop].unflatten(-1, (span.dim, span.multiplicity)) for span in layout.spans]


def join(blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`split`."""
    return torch.cat([block.flatten(-2) for block in blocks], dim=-1)


def to_lanes(x: Tensor, layout: Layout) -> list[Tensor]:
    """Views of the lanes of a regular feature: shape ``(..., dim)`` to ``order`` times ``(..., copies)``."""
    n = layout.copies or 1
    return [x[..., k * n : (k + 1) * n] for k in range(layout.order)]


def blocks_to_lanes(blocks: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Blocks ``(..., d, multiplicity)`` to lanes ``(..., copies)``."""
    n = layout.copies or 1
    return [
        block[..., i, j * n : (j + 1) * n]
        for block, span in zip(blocks, layout.spans, strict=True)
        for i in range(span.dim)
        for j in range(span.multiplicity // n)
    ]


def lanes_to_blocks(lanes: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The inverse of :func:`blocks_to_lanes`."""
    n = layout.copies or 1
    blocks = []
    place = 0
    for span in layout.spans:
        width = span.multiplicity // n
        rows = []
        for _ in range(span.dim):
            row = lanes[place : place + width]
            rows.append(row[0] if width == 1 else torch.cat(list(row), dim=-1))
            place += width
        blocks.append(rows[0].unsqueeze(-2) if len(rows) == 1 else torch.stack(rows, dim=-2))
    return blocks


def per_lane(values: Tensor, layout: Layout) -> list[Tensor]:
    """One value per (irrep, multiplicity), ``(sum of multiplicities,)``, to one vector ``(copies,)`` per lane."""
    n = layout.copies or 1
    lanes = []
    start = 0
    for span in layout.spans:
        row = [values[start + k : start + k + n] for k in range(0, span.multiplicity, n)]
        lanes += row * span.dim
        start += span.multiplicity
    return lanes


def per_channel(values: Tensor, layout: Layout) -> Tensor:
    """Spread one value per (irrep, multiplicity) over the rows, ``(sum of multiplicities,)`` to ``(dim,)``."""
    if all(span.dim == 1 for span in layout.spans):
        return values
    parts = []
    start = 0
    for span in layout.spans:
        parts += [values[start : start + span.multiplicity]] * span.dim
        start += span.multiplicity
    return torch.cat(parts)
