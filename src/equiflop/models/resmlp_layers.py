"""What E(ResMLP) is made of: biases that depend on tokens, the channel MLP, blocks, and the head's invariants."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from equiflop.grids import ImageGroup, grid_decomposition
from equiflop.groups import Rep
from equiflop.kernels import Order, is_bare, layout_of
from equiflop.kernels.branch import Mlp as MlpParts
from equiflop.kernels.layout import to_lanes
from equiflop.kernels.orders import write
from equiflop.nn import (
    Affine,
    FixedTensors,
    GridTransform,
    Invariants,
    LayerScale,
    Mlp,
    TokenMixing,
)
from equiflop.nn.invariants import InvariantKind
from equiflop.nn.residual import Branch, residual_branches


class MatchedBias(FixedTensors):
    """A bias on every channel of a group with one-dimensional irreps, as in the published E(ResMLP).

    In token coordinates it is the same number for all tokens of the channel's own irrep; the product of the two irreps
    is trivial. On the grid a symmetric channel gets its bias times ``sqrt(1/2)`` everywhere (times 1 in a middle
    column), an antisymmetric one with opposite signs left and right.

    Args:
        rep: type of the channels.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid.
        order: order of the channels, ``"irreps"`` or ``"group"``.

    Shape: ``(B, rows * columns, rep.dim)`` to the same.
    """

    fields: Tensor

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        grid_size: tuple[int, int],
        order: Literal["irreps", "group"] = "irreps",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if any(irrep.dim > 1 for irrep in group.irreps):
            raise ValueError(f"matched_bias=True needs one-dimensional irreps; group {group.name!r} has others")
        self.rep = rep
        self.order = Order(order)
        self._layout = layout_of(rep)
        decomposition = grid_decomposition(group, *grid_size)
        gains = self._layout.gains if order == "group" else (1.0,) * len(group.irreps)
        fields = [
            gain * decomposition.matrix[block.start : block.stop].sum(0)
            for gain, block in zip(gains, decomposition.rep.blocks(), strict=True)
        ]
        self.fix("fields", np.stack(fields, axis=1), device, dtype)
        self.bias = nn.Parameter(torch.zeros(rep.dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.bias)

    def table(self) -> Tensor:
        """What is added to every token, ``(rows * columns, rep.dim)``."""
        fields = self.fields.to(self.bias.dtype)
        spans = self._layout.spans  # of one-dimensional irreps
        blocks = [fields[:, i, None, None] * self.bias[span.start : span.stop] for i, span in enumerate(spans)]
        return write(blocks, self._layout, self.order, None)

    def lanes(self) -> list[Tensor]:
        """The table in the group's basis by lanes, each ``(rows * columns, copies)``."""
        return to_lanes(self.table(), self._layout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table().to(x.dtype)


class ChannelMlp(Mlp):
    """An MLP across channels whose biases depend on the tokens (:class:`MatchedBias`).

    Args:
        rep: type of the channels.
        hidden_rep: type of the hidden channels; a multiple of the regular representation.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid.
        act: the pointwise function.
        drop: dropout after the activation and after the output.

    Shape: ``(B, rows * columns, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        hidden_rep: Rep,
        group: ImageGroup,
        grid_size: tuple[int, int],
        act: nn.Module | None = None,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(rep, hidden_rep, act=act, bias=False, drop=drop, **dd)
        self.bias1 = MatchedBias(hidden_rep, group, grid_size, "group", **dd)
        self.bias2 = MatchedBias(rep, group, grid_size, **dd)

    def parts(self) -> MlpParts | None:
        """What a kernel needs, or None where the modules have to be called."""
        parts = self._parts_of(ChannelMlp)
        if parts is None or not (is_bare(self.bias1, MatchedBias) and is_bare(self.bias2, MatchedBias)):
            return None
        return parts._replace(bias1=self.bias1.lanes(), bias2=self.bias2.table())

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.bias1(self.fc1(x))))
        return self.drop2(self.bias2(self.fc2(x)))


class EquivariantResBlock(nn.Module):
    """Token mixing and channel mixing, each a residual branch with affine "norm" and layer scale.

    Args:
        rep: type of the channels.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid.
        matched_bias: whether biases stand wherever channel and token are of one irrep, as in the published mirror
            network (affine "norms" have none then), instead of on trivial channels.
        mlp_ratio: hidden width of the channel MLP over ``rep.dim``.
        init_values: initial layer scale.
        act: the pointwise function; GELU by default.
        drop: dropout of the channel MLP.
        drop_path: probability to drop a branch, per sample.

    Shape: ``(B, rows * columns, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        grid_size: tuple[int, int],
        *,
        matched_bias: bool = False,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        act: nn.Module | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_rep = Rep.regular_of_dim(group, int(rep.dim * mlp_ratio), f"int({rep.dim} * mlp_ratio)")
        self._layout = layout_of(rep)
        self.norm1 = Affine(rep, bias=not matched_bias, **dd)
        self.linear_tokens = TokenMixing(rep, group, grid_size, matched_bias=matched_bias, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = Affine(rep, bias=not matched_bias, **dd)
        self.mlp_channels: nn.Module = (
            ChannelMlp(rep, hidden_rep, group, grid_size, act, drop, **dd)
            if matched_bias
            else Mlp(rep, hidden_rep, act=act, drop=drop, **dd)
        )
        self.ls1 = LayerScale(rep, init_values, **dd)
        self.ls2 = LayerScale(rep, init_values, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return residual_branches(
            x,
            self._layout,
            Branch(self.norm1, self.linear_tokens, self.ls1, self.drop_path),
            Branch(self.norm2, self.mlp_channels, self.ls2, self.drop_path),
        )


class PairedInvariants(Invariants):
    """The head's invariants of the published E(ResMLP), averaged over tokens.

    Symmetric channels at symmetric tokens and antisymmetric channels at antisymmetric tokens are both invariant; they
    share the weights behind, so their token coordinates are averaged together. ``"norm"`` adds the absolute values of
    the other two combinations.

    Args:
        rep: type of the channels.
        kind: ``"trivial"`` or ``"norm"``.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid.

    Shape: ``(B, rows * columns, rep.dim)`` to ``(B, out_features)``.
    """

    def __init__(
        self,
        rep: Rep,
        kind: InvariantKind,
        group: ImageGroup,
        grid_size: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rep, kind)
        if kind not in ("trivial", "norm"):
            raise ValueError(f"invariants={kind!r} does not go with head='paired'; choose 'trivial' or 'norm'")
        if group.order != 2:
            raise ValueError(f"head='paired' needs a group of two elements; {group.name!r} has {group.order}")
        self.transform = GridTransform(group, *grid_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        symmetric, antisymmetric = self.transform(x).split(self.transform.rep.multiplicities, dim=1)
        (ss, as_), (sa, aa) = symmetric.chunk(2, dim=-1), antisymmetric.chunk(2, dim=-1)
        invariants = torch.cat([ss, aa], dim=1).mean(1)
        if self.kind == "trivial":
            return invariants
        return torch.cat([invariants, torch.cat([sa, as_], dim=1).abs().mean(1)], dim=-1)


class MeanInvariants(Invariants):
    """Invariants of every token, averaged over tokens: ``(B, N, rep.dim)`` to ``(B, out_features)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)
