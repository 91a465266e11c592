"""Equivariant position embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import handle_torch_function, has_torch_function

from equiflop.grids import ImageGroup, field_tables
from equiflop.groups import Irrep, Rep
from equiflop.kernels import Layout, layout_of, split
from equiflop.nn.fit import warn_of_fit
from equiflop.nn.fixed import FixedTensors


class PositionEmbedding(FixedTensors):
    """A learned field on the token grid with ``pos[g token] = rho(g) pos[token]``.

    It is stored tied by orbits, one value per orbit, so that no optimiser can break the symmetry. Where a token stays
    in place under part of the group, only the components which that part leaves fixed exist. Parameters are
    ``weight_<irrep>`` of shape ``(free values, multiplicity)``: for the mirror group row ``i`` belongs to token
    ``i`` of the left half in raster order (middle column included, where it is not zero).

    Args:
        rep: type of the feature axis.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid. If the group swaps the axes and the grid is not square, the
            field lives on a square grid of about as many tokens and is resampled.
        prefix_tokens: how many class and register tokens have an embedding of their own (on the trivial irrep).
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        grid_size: tuple[int, int],
        prefix_tokens: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self._layout = layout_of(rep)
        self.group = group
        #: How the field is resampled: keywords of ``torch.nn.functional.interpolate``.
        self.resampling: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}
        if group.swaps_axes and grid_size[0] != grid_size[1]:
            side = round((grid_size[0] * grid_size[1]) ** 0.5)
            grid_size = (side, side)
        self.grid_size = grid_size
        self._rows: list[int] = []
        self._row_scales: list[np.ndarray] = []
        # Numbers, not arrays, so that compilers can trace the projection.
        self._actions = [
            (move, [irrep.matrices[a].tolist() for irrep in group.irreps]) for a, move in enumerate(group.moves)
        ]
        for irrep, multiplicity in zip(group.irreps, rep.multiplicities, strict=True):
            index, coefficients, stabilisers = field_tables(group, irrep, grid_size)
            rows = len(stabilisers) if multiplicity else 0
            self._rows.append(rows)
            self._row_scales.append(np.sqrt(stabilisers / irrep.dim))
            if rows:
                self.fix(f"index_{irrep.name}", index, device)
                self.fix(f"coefficients_{irrep.name}", coefficients, device, dtype)
                self.register_parameter(
                    f"weight_{irrep.name}", nn.Parameter(torch.empty(rows, multiplicity, device=device, dtype=dtype))
                )
        self.prefix = (
            nn.Parameter(torch.empty(prefix_tokens, rep.multiplicities[0], device=device, dtype=dtype))
            if prefix_tokens
            else None
        )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Truncated normal.

        Args:
            std: standard deviation of a one-dimensional irrep where no element but the identity leaves the token in
                place. A d-dimensional one has ``std / sqrt(d)``, and a token that s elements leave in place ``sqrt(s)``
                times as much: so the sum over a group of independent fields comes out, as in the published octic code.
        """
        for (irrep, rows), scales in zip(self._blocks(), self._row_scales, strict=True):
            if rows:
                weight = getattr(self, f"weight_{irrep.name}")
                nn.init.trunc_normal_(weight, std=std)
                with torch.no_grad():
                    weight *= torch.from_numpy(scales)[:, None].to(weight)
        if self.prefix is not None:
            nn.init.trunc_normal_(self.prefix, std=std)

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        """The field on its own or another grid.

        Returns:
            shape ``(1, prefix_tokens + rows * columns, rep.dim)``, tokens in raster order.
        """
        field = self._field()
        if grid_size is not None:
            rows, columns = (int(side) if isinstance(side, Tensor) else side for side in grid_size)  # in jit.trace
            field = _on_grid(field, rows, columns, self)
        if self.prefix is not None:
            field = torch.cat([F.pad(self.prefix, (0, self.rep.dim - self.prefix.shape[1])), field])
        return field.unsqueeze(0)

    @torch.no_grad()
    def set_field(self, field: Tensor) -> None:
        """Set the parameters from a field, projecting it onto the equivariant ones.

        Args:
            field: shape ``(rows * columns, rep.dim)`` on this module's grid.
        """
        for (irrep, rows), block in zip(self._blocks(), split(field, self._layout), strict=True):
            if not rows:
                continue
            index, coefficients, _ = field_tables(self.group, irrep, self.grid_size)
            basis = torch.from_numpy(coefficients).to(field)  # tokens, d, components
            values = (basis[..., None] * block[:, :, None].to(field)).sum(1)  # tokens, components, multiplicity
            used = torch.from_numpy((coefficients != 0).any(axis=1)).to(field.device)
            place = torch.from_numpy(index).to(field.device)[used]
            total = field.new_zeros(rows, block.shape[-1]).index_add_(0, place, values[used])
            count = field.new_zeros(rows).index_add_(0, place, torch.ones_like(place, dtype=field.dtype))
            getattr(self, f"weight_{irrep.name}").copy_(total / count[:, None])

    def resized(self, grid_size: tuple[int, int]) -> PositionEmbedding:
        """A new embedding for another grid, resampled from this one."""
        weight = next(self.parameters())
        new = PositionEmbedding(
            self.rep,
            self.group,
            grid_size,
            0 if self.prefix is None else len(self.prefix),
            device=weight.device,
            dtype=weight.dtype,
        )
        new.resampling = self.resampling
        with torch.no_grad():
            new.set_field(self._resampled(self._field(), new.grid_size))
            if new.prefix is not None and self.prefix is not None:
                new.prefix.copy_(self.prefix)
        return new.requires_grad_(weight.requires_grad)

    def fit_weights(self, state: dict[str, Any], prefix: str) -> str | None:
        """Resample the weights of another grid within a state dict, in place.

        Args:
            state: a state dict.
            prefix: of this module's keys in it.

        Returns:
            what was done, or None if nothing had to be (or could be: then loading them reports the sizes).
        """
        own = {name: weight for name, weight in self.named_parameters() if name.startswith("weight_")}
        names = [f"weight_{irrep.name}" for irrep in self.group.irreps]
        weights = {name: state[prefix + name] for name in names if isinstance(state.get(prefix + name), Tensor)}
        shapes = {name: weight.shape for name, weight in weights.items()}
        if not weights or shapes == {name: weight.shape for name, weight in own.items()}:
            return None
        widths = {f"weight_{i.name}": m for i, m in zip(self.group.irreps, self.rep.multiplicities, strict=True)}
        if any(shape[1:] != (widths[name],) for name, shape in shapes.items()):
            return None
        grid = self._grid_of({name: len(weights.get(name, ())) for name in names if widths[name]})
        if grid is None:
            return None
        like = next(iter(weights.values()))
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        old = PositionEmbedding(self.rep, self.group, grid, device=like.device, dtype=dtype)
        old.load_state_dict(weights)
        resized = old.resized(self.grid_size).state_dict()
        for name in weights:
            del state[prefix + name]
        state.update({prefix + name: weight.to(like.dtype) for name, weight in resized.items()})
        before, after = ("x".join(map(str, size)) for size in (grid, self.grid_size))
        return f"position embedding resampled from {before} to {after} tokens"

    def _grid_of(self, rows: dict[str, int]) -> tuple[int, int] | None:
        """The grid on which the field has so many values of each irrep: a square one, or the one whose sides are most
        nearly in proportion to this module's; None if there is none."""
        free = {f"weight_{irrep.name}": irrep for irrep in self.group.irreps}
        if rows.keys() == free.keys():  # an irrep occurs among the tokens as often as the field has values of it
            tokens = sum(count * free[name].dim // free[name].endomorphism_dim for name, count in rows.items())
            sides = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
        else:  # between one token for each value and |G| of them
            most = max(rows.values(), default=0)
            sides = [(h, h) for h in range(1, math.isqrt(most * self.group.order) + 1) if h * h >= most]
        aspect = self.grid_size[0] / self.grid_size[1]
        sides.sort(key=lambda side: (side[0] != side[1], abs(math.log(side[0] / side[1] / aspect))))
        for side in sides:
            if self.group.swaps_axes and side[0] != side[1]:
                continue
            if rows == {name: len(field_tables(self.group, free[name], side)[2]) for name in rows}:
                return side
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the weights of another grid as well."""
        warn_of_fit(self.fit_weights(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _blocks(self) -> list[tuple[Irrep, int]]:
        return list(zip(self.group.irreps, self._rows, strict=True))

    def _field(self) -> Tensor:
        """Shape ``(rows * columns, rep.dim)``."""
        tokens = self.grid_size[0] * self.grid_size[1]
        parts = []
        for (irrep, rows), multiplicity in zip(self._blocks(), self.rep.multiplicities, strict=True):
            if not rows:
                parts.append(next(self.parameters()).new_zeros(tokens, irrep.dim * multiplicity))
                continue
            weight = getattr(self, f"weight_{irrep.name}")
            index = getattr(self, f"index_{irrep.name}")
            coefficients = getattr(self, f"coefficients_{irrep.name}").to(weight.dtype)
            values = weight.index_select(0, index.flatten()).unflatten(0, index.shape)  # tokens, components, m
            parts.append((coefficients[..., None] * values[:, None]).sum(2).flatten(1))
        return torch.cat(parts, dim=1)

    def _resampled(self, field: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Resampling in the parameters' own precision, then projection onto equivariant fields."""
        wide = field.float() if field.dtype in (torch.float16, torch.bfloat16) else field
        rows, columns = (
            _resampling_matrix(old, new, wide, self.resampling)
            for old, new in zip(self.grid_size, grid_size, strict=True)
        )
        image = (rows[:, :, None, None] * wide.unflatten(0, self.grid_size)).sum(1)  # new rows, old columns, C
        image = (columns[:, :, None] * image[:, None]).sum(2).permute(2, 0, 1)
        # A symbolic size may be anything: then only what mirrors is averaged. What swaps the axes loses nothing but
        # rounding by it, since rows and columns are resampled alike.
        square = statically_known_true(image.shape[-1] == image.shape[-2])
        moved = [
            _act(self._layout, matrices, move(image).permute(1, 2, 0))
            for move, matrices in self._actions
            if square or not move.transposes
        ]
        return torch.stack(moved).mean(0).flatten(0, 1).to(field.dtype)

    def extra_repr(self) -> str:
        return f"{self.grid_size[0]}x{self.grid_size[1]} tokens, {self.rep}"


def _on_grid(field: Tensor, rows: int, columns: int, module: PositionEmbedding) -> Tensor:
    """The field on another grid; one step of a symbolic trace. A size that is a symbol is never taken for the own one,
    so that an export makes no assumption about it."""
    if has_torch_function((rows, columns)):
        return handle_torch_function(_on_grid, (rows, columns), field, rows, columns, module)
    own_rows, own_columns = module.grid_size
    if statically_known_true(rows == own_rows) and statically_known_true(columns == own_columns):
        return field
    return module._resampled(field, (rows, columns))


def act_on_channels(rep: Rep, a: int, x: Tensor) -> Tensor:
    """Apply ``rep.matrix(a)`` to the last axis, irrep by irrep; shape ``(..., rep.dim)`` to the same."""
    return rep.act(a, x)


def _act(layout: Layout, matrices: Sequence[list[list[float]]], x: Tensor) -> Tensor:
    """Apply one matrix per irrep to the rows of its block."""
    parts = []
    for matrix, part in zip(matrices, split(x, layout), strict=True):
        rows = part.unbind(-2)
        for coefficients in matrix:
            terms = [row if c == 1.0 else row * c for c, row in zip(coefficients, rows, strict=True) if c]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            parts.append(total)
    return torch.cat(parts, dim=-1)


def _resampling_matrix(old: int, new: int, like: Tensor, resampling: dict[str, Any]) -> Tensor:
    """Resampling along one axis as a matrix, shape ``(new, old)``; by default bicubic with antialiasing.

    The resampling is linear and separable. Its weights need no gradient, so torch's resampling is never differentiated,
    which compilers cannot do for sizes that vary.
    """
    identity = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(identity, size=(new, old), **resampling)[0, 0]
