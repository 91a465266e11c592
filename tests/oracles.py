"""Slow dense constructions that the library's fast ones are compared with.

They are built from Cayley tables, irrep matrices and pixel arrays alone, and call none of the functions under test.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from equiflop.grids import ImageGroup, named_image_group
from equiflop.groups import (
    FiniteGroup,
    Rep,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    flop,
    octahedral,
    quaternion,
    symmetric,
)

GROUPS: dict[str, Callable[[], FiniteGroup]] = {
    "C1": lambda: cyclic(1),
    "C2": flop,
    "C2xC2": lambda: direct_product(flop(), flop()),
    "C3": lambda: cyclic(3),
    "C4": lambda: cyclic(4),
    "C6": lambda: cyclic(6),
    "C8": lambda: cyclic(8),
    "D1": lambda: dihedral(1),
    "D2": lambda: dihedral(2),
    "D3": lambda: dihedral(3),
    "D4": lambda: dihedral(4),
    "D6": lambda: dihedral(6),
    "A4": lambda: alternating(4),
    "S4": lambda: symmetric(4),
    "O": octahedral,
    "Q8": quaternion,
    "S5": lambda: symmetric(5),
    "C3xC4": lambda: direct_product(cyclic(3), cyclic(4)),
    "Q8xC3": lambda: direct_product(quaternion(), cyclic(3)),
    "Q8xQ8": lambda: direct_product(quaternion(), quaternion()),
    "D4xC2": lambda: direct_product(dihedral(4), flop()),
}

#: Groups for the layers that know nothing of images: every irrep type and dimensions 1 to 4.
LAYER_GROUPS = ("C2", "C2xC2", "C3", "C4", "D3", "D4", "A4", "Q8")

#: All groups that act on images by name.
IMAGE_GROUPS = ("flop", "updown", "flips", "rot4", "octic")

_CACHE: dict[str, FiniteGroup] = {}


def group(name: str) -> FiniteGroup:
    """A group of ``GROUPS``, made once."""
    if name not in _CACHE:
        _CACHE[name] = GROUPS[name]()
    return _CACHE[name]


def image_group(name: str) -> ImageGroup:
    """A named image group."""
    return named_image_group(name)


def left_translation(table: np.ndarray, a: int) -> np.ndarray:
    """The permutation matrix of ``h -> a h``."""
    n = len(table)
    matrix = np.zeros((n, n))
    for h in range(n):
        matrix[table[a][h], h] = 1.0
    return matrix


def action(rep: Rep, a: int) -> np.ndarray:
    """The matrix of element ``a`` on a feature axis, entry by entry from the layout ``[d, multiplicity]``."""
    matrix = np.zeros((rep.dim, rep.dim))
    start = 0
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        for i in range(irrep.dim):
            for j in range(irrep.dim):
                for k in range(m):
                    matrix[start + i * m + k, start + j * m + k] = irrep.matrices[a][i, j]
        start += irrep.dim * m
    return matrix


def tensor_action(rep: Rep, a: int) -> Tensor:
    """:func:`action` as a float64 tensor."""
    return torch.from_numpy(action(rep, a))


def hom_dimension(a: Rep, b: Rep) -> int:
    """Dimension of the space of equivariant maps, by the characters: ``1/|G| sum_g chi_a(g) chi_b(g)``."""
    total = sum(np.trace(action(a, g)) * np.trace(action(b, g)) for g in range(a.group.order))
    value = total / a.group.order
    assert abs(value - round(value)) < 1e-9
    return round(value)


def fourier(g: FiniteGroup) -> np.ndarray:
    """The Fourier matrix: row ``(rho, i, j < d/e)``, column ``h`` holds ``sqrt(d/|G|) rho(h)[i, j]``."""
    rows = []
    for irrep in g.irreps:
        e = {"real": 1, "complex": 2, "quaternionic": 4}[irrep.type]
        for i in range(irrep.dim):
            for j in range(irrep.dim // e):
                rows.append([np.sqrt(irrep.dim / g.order) * irrep.matrices[h][i, j] for h in range(g.order)])
    return np.array(rows)


def to_spatial(rep: Rep) -> np.ndarray:
    """The dense inverse Fourier transform of ``n`` copies: features of type ``rep`` to ``[|G|, n]``."""
    n = rep.dim // rep.group.order
    return np.kron(fourier(rep.group).T, np.eye(n))


def move_image(name: str, a: int, image: np.ndarray) -> np.ndarray:
    """Apply element ``a`` of a named image group to the last two axes, by numpy's flips and turns.

    Turns are counter-clockwise. Element order: ``flips`` is e, up-down, left-right, both; ``octic`` is e, r, r^2, r^3
    and then the left-right mirror after each of them.
    """

    def turn(x: np.ndarray, k: int) -> np.ndarray:
        return np.rot90(x, k, axes=(-2, -1))

    def left_right(x: np.ndarray) -> np.ndarray:
        return np.flip(x, -1)

    def up_down(x: np.ndarray) -> np.ndarray:
        return np.flip(x, -2)

    if name == "flop":
        return left_right(image) if a else image
    if name == "updown":
        return up_down(image) if a else image
    if name == "flips":
        image = up_down(image) if a % 2 else image
        return left_right(image) if a // 2 else image
    if name == "rot4":
        return turn(image, a)
    assert name == "octic"
    return left_right(turn(image, a - 4)) if a >= 4 else turn(image, a)


def move_tensor(name: str, a: int, image: Tensor) -> Tensor:
    """:func:`move_image` of a tensor."""
    return torch.from_numpy(move_image(name, a, image.numpy()).copy())


def move_tokens(name: str, rep: Rep, a: int, tokens: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """The action on ``(B, prefix + N, C)`` features: ``rho(a)`` on the channels, the grid's movement on the tokens."""
    tokens = tokens @ tensor_action(rep, a).to(tokens.dtype).T
    patches = tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = move_tensor(name, a, patches.detach().contiguous()).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([tokens[:, :prefix], patches], dim=1)


@torch.no_grad()
def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters with numbers of order 1, biases and scales included, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        noise = noise / parameter.shape[-1] ** 0.5 if parameter.ndim >= 2 else 0.3 + noise.abs()
        parameter.copy_(noise)
    return module


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-300))
