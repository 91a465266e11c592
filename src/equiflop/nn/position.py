"""What depends on position inside a branch: in copy ``g`` of the group's basis it is the plain network's, seen through
``g^-1``.

Regular heads come as ``|G|`` copies that the group permutes. Where copy 0 has the value ``T(p)`` at position ``p``,
copy ``g`` has ``T(g^-1 p)``; then the group moves tokens and copies together, as it does functions on itself:
``(g f)(h, p) = f(g^-1 h, g^-1 p)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.image_group import ImageGroup


def seen_by_copies(group: ImageGroup, tables: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """A table of values on a grid as each copy sees it.

    Args:
        group: the group that acts on the grid.
        tables: the plain network's table on ``grid``, shape ``(..., H * W, D)``, and behind it, where the group swaps
            the axes and the grid is not square, that on the turned grid.
        grid: rows and columns of the result.

    Returns:
        one table per group element, shape ``(..., H * W, D)``.
    """
    turned = (grid[1], grid[0])
    copies = []
    for a, move in enumerate(group.moves):
        swapped = group.swaps_axes_by(a)
        table = tables[-1] if swapped else tables[0]
        image = table.movedim(-1, -2).unflatten(-1, turned if swapped else grid)
        copies.append(move(image).flatten(-2).movedim(-2, -1))
    return copies


def tokens_seen_by_copies(group: ImageGroup, grid: tuple[int, int], prefix: int, device: Any = None) -> Tensor:
    """Which token each copy sees at each place, shape ``(|G|, prefix + H * W)``; class and register tokens stay.

    The grid is square if the group swaps its axes.
    """
    tokens = torch.arange(grid[0] * grid[1], device=device)
    seen = [move(tokens.view(grid)).flatten() for move in group.moves]
    front = torch.arange(prefix, device=device)
    return torch.stack([torch.cat([front, prefix + places]) for places in seen])


class RotaryPositions(nn.Module):
    """A rotary position embedding of timm for regular heads: a table of its own for every head.

    Args:
        rope: timm's module, for one copy of the heads; its frequencies, learned ones too, are those of all copies.
        group: the group that acts on the token grid.
        heads_per_copy: heads of one copy.
        grid_size: the grid of tokens where ``rope`` keeps its table, None where it makes one for every size.
    """

    def __init__(
        self, rope: nn.Module, group: ImageGroup, heads_per_copy: int, grid_size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.rope = rope
        self.group = group
        self.heads_per_copy = heads_per_copy
        self.grid_size = grid_size
        if hasattr(rope, "feat_shape"):
            self.feat_shape = rope.feat_shape

    def update_feat_shape(self, feat_shape: Sequence[int]) -> None:
        """Another grid from now on; see timm."""
        if self.grid_size is not None:
            self.grid_size = (feat_shape[0], feat_shape[1])
        if hasattr(self.rope, "update_feat_shape"):
            self.rope.update_feat_shape(list(feat_shape))
            self.feat_shape = self.rope.feat_shape

    def get_embed(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Sines and cosines, shape ``([depth,] heads, H * W, 2 * head_dim)``, copy after copy.

        Args:
            shape: the grid of tokens; by default the kept one.
            dtype: of the result.
        """
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if shape is None:
            assert self.grid_size is not None
            grid = self.grid_size
            tables = [self.rope.get_embed(**options)]
        else:
            grid = (shape[0], shape[1])
            tables = [self.rope.get_embed(shape=list(grid), **options)]
            if self.group.swaps_axes and grid[0] != grid[1]:
                tables.append(self.rope.get_embed(shape=[grid[1], grid[0]], **options))
        copies = seen_by_copies(self.group, tables, grid)
        if copies[0].ndim == 2:  # one table for all heads
            copies = [copy.expand(self.heads_per_copy, -1, -1) for copy in copies]
        return torch.cat(copies, dim=-3)

    def no_weight_decay(self) -> set[str]:
        """Learned frequencies."""
        inner = getattr(self.rope, "no_weight_decay", set)()
        return {f"rope.{name}" for name in inner}


class PositionBias(nn.Module):
    """A relative position bias of timm for regular heads.

    Args:
        bias: timm's module for the heads of one copy: ``RelPosBias``, ``RelPosMlp`` or BEiT's ``RelativePositionBias``.
        group: the group that acts on the token grid.
        prefix: class and register tokens in front.
    """

    def __init__(self, bias: nn.Module, group: ImageGroup, prefix: int) -> None:
        super().__init__()
        self.bias = bias
        self.group = group
        self.prefix = prefix

    @property
    def window_size(self) -> tuple[int, int]:
        """The grid of tokens."""
        height, width = self.bias.window_size
        return int(height), int(width)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Another grid from now on; see timm."""
        self.bias.set_window_size(window_size)

    def get_bias(self) -> Tensor:
        """Shape ``(1, heads, N, N)``, copy after copy."""
        return bias_of_copies(self.bias.get_bias(), self.group, self.window_size, self.prefix)

    def forward(self, attn: Tensor | None = None, shared_rel_pos: Tensor | None = None) -> Tensor:
        """The bias added to attention scores; without them, the bias ``(heads, N, N)`` as BEiT's blocks share it."""
        if attn is not None:
            return attn + self.get_bias()
        return bias_of_copies(self.bias(), self.group, self.window_size, self.prefix)


def bias_of_copies(bias: Tensor, group: ImageGroup, grid: tuple[int, int], prefix: int) -> Tensor:
    """A bias between tokens as each copy sees it, shape ``(..., heads, N, N)`` to ``(..., |G| * heads, N, N)``."""
    seen = tokens_seen_by_copies(group, grid, prefix, bias.device)
    return torch.cat([bias.index_select(-2, places).index_select(-1, places) for places in seen], dim=-3)
