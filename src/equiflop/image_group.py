"""Groups that act on images: their elements as flips and turns of the pixels.

Coordinates: ``x`` points right along columns, ``y`` up against rows, the origin is the centre of the grid. An element
``g`` moves the value at position ``p`` to ``g p``: ``(g I)[g p] = I[p]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from equiflop.groups import Action, FiniteGroup, abstract_group, cyclic, dihedral, direct_product

_ELEMENT_NAMES = {
    (1, 0, 0, 1): "identity",
    (0, -1, 1, 0): "quarter turn left",
    (-1, 0, 0, -1): "half turn",
    (0, 1, -1, 0): "quarter turn right",
    (-1, 0, 0, 1): "mirror left-right",
    (1, 0, 0, -1): "mirror up-down",
    (0, 1, 1, 0): "mirror at the diagonal /",
    (0, -1, -1, 0): "mirror at the diagonal \\",
}


@dataclass(frozen=True)
class ImageMove:
    """A symmetry of the image plane: first mirror at the diagonal ``x = y`` or not, then reverse axes.

    Attributes:
        transposes: whether height and width are exchanged.
        reverses: the axes, of -1 and -2, that are reversed afterwards.
    """

    transposes: bool
    reverses: tuple[int, ...]

    @classmethod
    def of(cls, matrix: np.ndarray) -> ImageMove:
        """The move of a signed 2x2 permutation matrix."""
        transposes = bool(matrix[0, 0] == 0)
        signs = matrix.sum(axis=1).tolist()
        return cls(transposes, tuple(axis for axis, sign in zip((-1, -2), signs, strict=True) if sign < 0))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Shape ``(..., H, W)`` to the same, or to ``(..., W, H)``."""
        if self.transposes:
            image = image.transpose(-1, -2).flip(-1, -2)
        return image.flip(self.reverses) if self.reverses else image


class ImageGroup(Action):
    """A finite group with a signed 2x2 permutation matrix per element: how it moves ``(x, y)`` on the image plane.

    ``act`` applies that matrix to coordinates, such as key points; ``act_on_image`` moves the pixels along.

    Args:
        group: the abstract group; of another action, its group is taken.
        matrices: shape ``(order, 2, 2)``; entries 0, 1, -1, one non-zero entry in every row and column.
        name: what it is called in messages; by default the group's name.

    Raises:
        TypeError: if ``group`` is no group.
        ValueError: if the matrices are not signed permutations or do not multiply like the group's elements.

    >>> ImageGroup(cyclic(2), [[[1, 0], [0, 1]], [[-1, 0], [0, 1]]]).swaps_axes
    False
    """

    def __init__(
        self,
        group: FiniteGroup | Action,
        matrices: Sequence[Sequence[Sequence[int]]] | np.ndarray,
        name: str | None = None,
    ) -> None:
        whole = _signed_permutations(abstract_group(group), np.array(matrices))
        super().__init__(group, whole, name)
        self.matrices = whole  # as integers, which index pixels
        self.matrices.setflags(write=False)
        #: What each element does to the last two axes of an image; plain Python, so that compilers can trace it.
        self.moves = tuple(ImageMove.of(matrix) for matrix in whole)

    @cached_property
    def swaps_axes(self) -> bool:
        """Whether some element exchanges height and width (quarter turns and diagonal mirrors)."""
        return any(self.swaps_axes_by(a) for a in range(self.order))

    @cached_property
    def mirrors_columns(self) -> bool:
        """Whether some element reverses the order of columns, or swaps them with rows."""
        return bool((self.matrices[:, 0, 0] != 1).any())

    @cached_property
    def mirrors_rows(self) -> bool:
        """Whether some element reverses the order of rows, or swaps them with columns."""
        return bool((self.matrices[:, 1, 1] != 1).any())

    def swaps_axes_by(self, a: int) -> bool:
        """Whether element ``a`` exchanges height and width."""
        return bool(self.matrices[a, 0, 0] == 0)

    def element_name(self, a: int) -> str:
        """What element ``a`` does to an image, in words."""
        return _ELEMENT_NAMES[tuple(self.matrices[a].ravel().tolist())]

    def act_on_grid(self, a: int, height: int, width: int) -> np.ndarray:
        """Where element ``a`` moves the points of a grid: raster index of ``a p`` for every raster index ``p``.

        Indices of the result refer to the moved grid, which is ``width x height`` if ``a`` swaps the axes.

        Returns:
            integers, shape ``(height * width,)``.
        """
        rows, columns = np.divmod(np.arange(height * width), width)
        x, y = self.matrices[a] @ np.stack([2 * columns - (width - 1), (height - 1) - 2 * rows])
        new_height, new_width = (width, height) if self.swaps_axes_by(a) else (height, width)
        return ((new_height - 1 - y) // 2) * new_width + (x + new_width - 1) // 2

    def act_on_image(self, a: int, image: torch.Tensor) -> torch.Tensor:
        """Apply element ``a`` to an image, ``(..., H, W)`` to ``(..., H, W)``, or ``(..., W, H)`` if it swaps axes."""
        return self.moves[a](image)


_IDENTITY, _MIRROR, _UPSIDE_DOWN = np.eye(2, dtype=np.int64), np.diag([-1, 1]), np.diag([1, -1])
_TURNS = np.stack([np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), k) for k in range(4)])

#: The image groups that have a name: how to make the abstract group, and the matrices of its elements in its numbering.
#: A new entry here is all that a new group needs.
NAMED_IMAGE_GROUPS: dict[str, tuple[Callable[[], FiniteGroup], np.ndarray]] = {
    "flop": (lambda: cyclic(2), np.stack([_IDENTITY, _MIRROR])),
    "updown": (lambda: cyclic(2), np.stack([_IDENTITY, _UPSIDE_DOWN])),
    "flips": (
        lambda: direct_product(cyclic(2), cyclic(2)),
        np.stack([_IDENTITY, _UPSIDE_DOWN, _MIRROR, _MIRROR @ _UPSIDE_DOWN]),
    ),
    "rot4": (lambda: cyclic(4), _TURNS),
    "octic": (lambda: dihedral(4), np.concatenate([_TURNS, _MIRROR @ _TURNS])),
}


@lru_cache(maxsize=16)
def named_image_group(name: str) -> ImageGroup:
    """The image group of a name, one of :data:`NAMED_IMAGE_GROUPS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NAMED_IMAGE_GROUPS:
        raise ValueError(
            f"group={name!r} is unknown; choose from {', '.join(NAMED_IMAGE_GROUPS)} or give an ImageGroup"
        )
    make, matrices = NAMED_IMAGE_GROUPS[name]
    return ImageGroup(make(), matrices, name)


def as_image_group(group: str | ImageGroup) -> ImageGroup:
    """The group itself, or the one of that name.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if it is neither a name nor an :class:`ImageGroup`.
    """
    if isinstance(group, ImageGroup):
        return group
    if isinstance(group, str):
        return named_image_group(group)
    raise TypeError(
        f"group={group!r} is not an ImageGroup; give one of {', '.join(NAMED_IMAGE_GROUPS)} or an ImageGroup"
    )


def _signed_permutations(group: FiniteGroup, matrices: np.ndarray) -> np.ndarray:
    if matrices.shape != (group.order, 2, 2):
        raise ValueError(f"matrices has shape {matrices.shape}; group {group.name} needs ({group.order}, 2, 2)")
    whole = np.rint(matrices).astype(np.int64)
    magnitude = np.abs(whole)
    if not (
        np.array_equal(whole, matrices)
        and magnitude.max() <= 1
        and (magnitude.sum(axis=1) == 1).all()
        and (magnitude.sum(axis=2) == 1).all()
    ):
        raise ValueError("matrices must be signed permutations: one entry 1 or -1 in every row and column, else 0")
    return whole
