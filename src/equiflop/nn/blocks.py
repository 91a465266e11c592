"""A feature axis taken apart into its irreps, and put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equiflop.groups import Rep


def split(x: Tensor, rep: Rep) -> list[Tensor]:
    """Views of the blocks of a feature: shape ``(..., rep.dim)`` to one ``(..., d, multiplicity)`` per irrep.

    Raises:
        ValueError: if the last axis does not have length ``rep.dim``.
    """
    if x.shape[-1] != rep.dim:
        raise ValueError(f"last axis of the input has length {x.shape[-1]}; {rep!r} needs {rep.dim}")
    return [
        x[..., block.start : block.stop].unflatten(-1, (block.irrep.dim, block.multiplicity)) for block in rep.blocks()
    ]


def join(blocks: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`split`."""
    return torch.cat([block.flatten(-2) for block in blocks], dim=-1)


def per_multiplicity(vector: Tensor, rep: Rep) -> Tensor:
    """Spread one value per (irrep, multiplicity) over the rows, ``(sum of multiplicities,)`` to ``(rep.dim,)``."""
    if len(vector) == rep.dim:
        return vector
    parts = vector.split(rep.multiplicities)
    return torch.cat([part.repeat(irrep.dim) for part, irrep in zip(parts, rep.group.irreps, strict=True)])


def compiled_for_gpu(x: Tensor) -> bool:
    """Whether a compiler for GPUs is at work: pointwise steps cost nothing inside a kernel, every kernel costs."""
    return x.is_cuda and torch.compiler.is_compiling()
