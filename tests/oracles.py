"""Slow dense constructions that the library's fast ones are compared with.

They are built from Cayley tables, irrep matrices and pixel arrays alone, and call none of the functions under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from equiflop.grids import ImageGroup, named_image_group
from equiflop.groups import (
    FiniteGroup,
    Irrep,
    Rep,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    flop,
    full_octahedral,
    octahedral,
    quaternion,
    symmetric,
)

Module = TypeVar("Module", bound=nn.Module)

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
    "Oh": full_octahedral,
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
def scramble(module: Module, seed: int = 0) -> Module:
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
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-300))


def gain(layer: Any, irrep: Irrep) -> float:
    """Factor of the weights against the orthonormal map's: ``sqrt(d / |G|)`` for every side in the group's basis.

    Where the transform is made of additions, the factor of its rows, which then have entries 0, +1, -1 alone.
    """
    sides = [layer.in_order.kind, layer.out_order.kind].count("group")
    return 1.0 if layer.by_product else (irrep.dim / layer.in_rep.group.order) ** (sides / 2)


def bias_gain(layer: Any) -> float:
    """Factor of the bias, which is added behind the transform of the input: the output's alone."""
    into_group = layer.out_order.kind == "group" and not layer.by_product
    return float(layer.in_rep.group.order**-0.5) if into_group else 1.0


def dense_linear(layer: Any) -> tuple[Tensor, Tensor]:
    """The dense matrix ``sum_k J_k (x) W_k`` per irrep and the bias of an equivariant linear layer, float64.

    Between orthonormal axes in the order of the irreps, whatever order the layer reads and writes; with sections each
    row of an irrep holds theirs one behind the other.
    """
    in_rep, out_rep = layer.in_rep, layer.out_rep
    out_rep = Rep(out_rep.group, [m * layer.out_order.sections for m in out_rep.multiplicities])
    parameters = dict(layer.named_parameters())
    matrix = torch.zeros(out_rep.dim, in_rep.dim, dtype=torch.float64)
    row = column = 0
    for irrep, m_in, m_out in zip(in_rep.group.irreps, in_rep.multiplicities, out_rep.multiplicities, strict=True):
        height, width = irrep.dim * m_out, irrep.dim * m_in
        if m_in and m_out:
            stored = parameters[f"{irrep.name}.weight"].detach().double() / gain(layer, irrep)
            for k, unit in enumerate(irrep.endomorphisms):
                part = stored[k * m_out : (k + 1) * m_out]
                matrix[row : row + height, column : column + width] += torch.kron(torch.from_numpy(unit), part)
        row, column = row + height, column + width
    bias = torch.zeros(out_rep.dim, dtype=torch.float64)
    trivial = in_rep.group.irreps[0]
    if f"{trivial.name}.bias" in parameters:
        factor = bias_gain(layer)
        bias[: out_rep.multiplicities[0]] = parameters[f"{trivial.name}.bias"].detach().double() / factor
    return matrix, bias


def section_places(rep: Rep, sections: int) -> list[list[int]]:
    """Where the axis of each section lies on the joint axis, in which each row of an irrep holds all sections."""
    places: list[list[int]] = [[] for _ in range(sections)]
    start = 0
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        for row in range(irrep.dim):
            for part in range(sections):
                first = start + row * sections * m + part * m
                places[part] += range(first, first + m)
        start += irrep.dim * sections * m
    return places


def head_places(rep: Rep, heads: int) -> list[list[int]]:
    """Where the channels of each head lie on the axis: its share of every row of every irrep."""
    places: list[list[int]] = [[] for _ in range(heads)]
    start = 0
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        share = m // heads
        for row in range(irrep.dim):
            for head in range(heads):
                first = start + row * m + head * share
                places[head] += range(first, first + share)
        start += irrep.dim * m
    return places


def dense_attention(layer: Any, x: Tensor) -> Tensor:
    """Attention with an explicit vector per head.

    A coupled head holds its share of every row of every irrep, one after the other; a regular one holds channels of one
    group element's copy.
    """
    rep, heads = layer.rep, layer.num_heads
    qkv_matrix, qkv_bias = dense_linear(layer.qkv)
    proj_matrix, proj_bias = dense_linear(layer.proj)
    joint = x @ qkv_matrix.T + qkv_bias
    qkv = [joint[..., places] for places in section_places(rep, 3)]
    own = head_places(rep, heads)
    if layer.heads == "regular":
        spatial = torch.from_numpy(to_spatial(rep))
        qkv = [part @ spatial.T for part in qkv]
        own = torch.arange(rep.dim).view(heads, -1).tolist()
    output = torch.zeros_like(x)
    for places in own:
        q, k, v = (part[..., places] for part in qkv)
        weights = torch.softmax(q @ k.mT / (rep.dim / heads) ** 0.5, dim=-1)
        output[..., places] = weights @ v
    if layer.heads == "regular":
        output = output @ spatial
    return output @ proj_matrix.T + proj_bias


def dense_norm(x: Tensor, rep: Rep, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Layer norm row by row: each row of 2 or more entries is centred, and one sigma divides all entries."""
    rows, scales = [], []
    start = scale_start = 0
    for irrep, m in zip(rep.group.irreps, rep.multiplicities, strict=True):
        for _ in range(irrep.dim):
            if m:
                row = x[..., start : start + m]
                rows.append(row - row.mean(-1, keepdim=True) if m > 1 else row)
                scales.append(weight[scale_start : scale_start + m])
            start += m
        scale_start += m
    centred = torch.cat(rows, dim=-1)
    result = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * torch.cat(scales)
    if bias is not None:
        result[..., : rep.multiplicities[0]] += bias
    return result
