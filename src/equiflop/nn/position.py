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
from timm.layers import resize_rel_pos_bias_table
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import handle_torch_function, has_torch_function

from equiflop.image_group import ImageGroup
from equiflop.nn.fit import warn_of_fit


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
    copies = []
    for move in group.moves:
        table, sides = (tables[-1], (grid[1], grid[0])) if move.transposes else (tables[0], grid)
        image = table.movedim(-1, -2).unflatten(-1, sides)
        copies.append(move(image).flatten(-2).movedim(-2, -1))
    return copies


class RotaryPositions(nn.Module):
    """A rotary position embedding of timm for regular heads: a table of its own for every head.

    Args:
        rope: timm's module, for one copy of the heads; its frequencies, learned ones too, are those of all copies.
        group: the group that acts on the token grid.
        heads_per_copy: heads of one copy.
        grid_size: the grid of tokens where ``rope`` keeps its table, None where it makes one for every size.
    """

    rope: Any

    def __init__(
        self, rope: nn.Module, group: ImageGroup, heads_per_copy: int, grid_size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.rope = rope
        self.group = group
        self.heads_per_copy = heads_per_copy
        self.grid_size = grid_size
        self.turns = any(move.transposes for move in group.moves)
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
        if shape is None:
            assert self.grid_size is not None
            return self._seen([self._table(None, dtype)], self.grid_size)
        return _on_any_grid(shape[0], shape[1], dtype, self)

    def _table(self, shape: tuple[int, int] | None, dtype: torch.dtype | None) -> Tensor:
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if shape is not None:
            options["shape"] = list(shape)
        table: Tensor = self.rope.get_embed(**options)
        return table

    def _seen(self, tables: list[Tensor], grid: tuple[int, int]) -> Tensor:
        copies = seen_by_copies(self.group, tables, grid)
        if not isinstance(self.rope, RotaryEmbeddingMixed):  # one table for all heads
            copies = [copy.expand(self.heads_per_copy, -1, -1) for copy in copies]
        return torch.cat(copies, dim=-3)

    def no_weight_decay(self) -> set[str]:
        """Learned frequencies."""
        inner: set[str] = self.rope.no_weight_decay() if hasattr(self.rope, "no_weight_decay") else set()
        return {f"rope.{name}" for name in inner}


def _on_any_grid(rows: int, columns: int, dtype: torch.dtype | None, module: RotaryPositions) -> Tensor:
    """One step of a symbolic trace, since turned grids are another table."""
    if has_torch_function((rows, columns)):
        return handle_torch_function(_on_any_grid, (rows, columns), rows, columns, dtype, module)
    draws = module.training and getattr(module.rope, "aug_active", False)
    state = torch.get_rng_state() if draws else None
    tables = [module._table((rows, columns), dtype)]
    if module.turns and not statically_known_true(rows == columns):
        if state is not None:  # the same shift and scale for all copies
            torch.set_rng_state(state)
        tables.append(module._table((columns, rows), dtype))
    return module._seen(tables, (rows, columns))


class PositionBias(nn.Module):
    """A relative position bias of timm for regular heads.

    Args:
        bias: timm's module for the heads of one copy: ``RelPosBias``, ``RelPosMlp`` or BEiT's ``RelativePositionBias``.
        group: the group that acts on the token grid.
        prefix: class and register tokens in front.
    """

    bias: Any

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

    def fit_weights(self, state: dict[str, Any], prefix: str) -> str | None:
        """Fit the table of another grid of tokens within a state dict; see :func:`equiflop.nn.fit.fit_checkpoint`."""
        table = getattr(self.bias, "relative_position_bias_table", None)
        return fit_table(table, self.window_size, state, f"{prefix}bias.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        warn_of_fit(self.fit_weights(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_bias(self) -> Tensor:
        """Shape ``(1, heads, N, N)``, copy after copy."""
        return bias_of_copies(self.bias.get_bias(), self.group, self.window_size, self.prefix)

    def forward(self, attn: Tensor | None = None, shared_rel_pos: Tensor | None = None) -> Tensor:
        """The bias added to attention scores; without them, the bias ``(heads, N, N)`` as BEiT's blocks share it."""
        if attn is not None:
            return attn + self.get_bias()
        return bias_of_copies(self.bias(), self.group, self.window_size, self.prefix)


def bias_of_copies(bias: Tensor, group: ImageGroup, grid: tuple[int, int], prefix: int) -> Tensor:
    """A bias between tokens as each copy sees it, ``(..., heads, N, N)`` to ``(..., |G| * heads, N, N)``.

    Class and register tokens, ``prefix`` many, stay in front. The grid is square if the group swaps its axes.
    """
    tokens = torch.arange(prefix, prefix + grid[0] * grid[1], device=bias.device).view(grid)
    front = torch.arange(prefix, device=bias.device)
    copies = []
    for move in group.moves:
        seen = torch.cat([front, move(tokens).flatten()])
        copies.append(bias.index_select(-2, seen).index_select(-1, seen))
    return torch.cat(copies, dim=-3)


def fit_table(own: Tensor | None, window: tuple[int, int], state: dict[str, Any], prefix: str) -> str | None:
    """Resample the table of a relative position bias of another, square grid within a state dict, as timm does.

    Returns:
        what was done, or None if nothing had to be.
    """
    key = f"{prefix}relative_position_bias_table"
    table = state.get(key)
    if own is None or not isinstance(table, Tensor) or table.shape == own.shape or table.shape[1:] != own.shape[1:]:
        return None
    state[key] = resize_rel_pos_bias_table(table, tuple(window), tuple(own.shape))
    return f"relative position bias resampled to {window[0]}x{window[1]} tokens"
