"""Products, MLPs and norms with their gradients, made of the kernels of ``launch``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equiflop.kernels.gpu.launch import (
    schur_norm,
    schur_norm_backward,
    schur_product,
    schur_weight_gradient,
)
from equiflop.kernels.gpu.products import Axis


class Map(NamedTuple):
    """How a product's axes are ordered.

    Attributes:
        lanes: of both sides, in numbers (``Layout.code``).
        reads: order of the input.
        writes: order of the output.
        sections: parts of the output behind each other.
        heads: that share every irrep.
    """

    lanes: tuple[int, ...]
    reads: Axis = "irreps"
    writes: Axis = "irreps"
    sections: int = 1
    heads: int = 1

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        path: Tensor | None = None,
        activation: str = "",
        keeps: bool = False,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """See :func:`schur_product`."""
        return schur_product(
            x,
            list(weights),
            bias,
            residual,
            path,
            None,
            list(self.lanes),
            self.reads,
            self.writes,
            1,
            self.sections,
            self.heads,
            activation,
            keeps,
            False,
            dtype or x.dtype,
        )

    def backward(
        self, dy: Tensor, weights: Sequence[Tensor], activation: str = "", kept: Tensor | None = None
    ) -> list[Tensor]:
        """The gradient of the input; with the values that lie before an activation, see :func:`schur_product`."""
        return schur_product(
            dy,
            list(weights),
            None,
            None,
            None,
            kept,
            list(self.lanes),
            self.writes,
            self.reads,
            self.sections,
            1,
            self.heads,
            activation,
            False,
            True,
            dy.dtype,
        )

    def weight_gradients(self, dy: Tensor, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """One per weight, in its dtype."""
        flat = schur_weight_gradient(dy, x, list(self.lanes), self.reads, self.writes, self.sections, self.heads)
        flat = flat.to(weights[0].dtype)
        parts = flat.split([weight.numel() for weight in weights])
        return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]

    def bias_gradient(self, dy: Tensor, bias: Tensor) -> Tensor:
        """Summed over tokens: of the trivial irrep alone, whose lane comes first."""
        n = bias.numel() // self.sections
        parts = dy.view(dy.shape[0], self.sections, dy.shape[-1] // self.sections)
        if self.writes == "heads":
            trivial = parts.unflatten(-1, (self.heads, -1))[..., : n // self.heads].flatten(-2)
        elif self.writes == "group":
            trivial = parts.unflatten(-1, (-1, n)).sum(-2)
        else:
            trivial = parts[..., :n]
        return trivial.sum(0, dtype=torch.float32).flatten().to(bias.dtype)


class Multiply(torch.autograd.Function):
    """``residual + path * map(x)``: rows ``(T, dim)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        path: Tensor | None,
        how: Map,
        *weights: Tensor,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, bias, path, *weights)
        dtype = None if residual is None else residual.dtype
        return how.forward(x, weights, bias, residual=residual, path=path, dtype=dtype)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, bias, path, *weights = ctx.saved_tensors
        dy = _behind_path(grads[0], path, x.dtype)
        dx = ctx.how.backward(dy, weights)[0] if ctx.needs_input_grad[0] else None
        db = None if bias is None else ctx.how.bias_gradient(dy, bias)
        dw = ctx.how.weight_gradients(dy, x, weights) if any(ctx.needs_input_grad[5:]) else [None] * len(weights)
        dresidual = grads[0] if ctx.needs_input_grad[2] else None
        return dx, db, dresidual, None, None, *dw


class MultiplyTwice(torch.autograd.Function):
    """``residual + path * map2(act(map1(x)))``, the activation in the group's basis."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        residual: Tensor | None,
        path: Tensor | None,
        hows: tuple[Map, Map],
        activation: str,
        *weights: Tensor,
    ) -> Tensor:
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        keeps = any(ctx.needs_input_grad)
        hidden, *kept = hows[0].forward(x, first, bias1, activation=activation, keeps=keeps)
        if keeps:
            ctx.hows, ctx.activation = hows, activation
            ctx.save_for_backward(x, kept[0], bias1, bias2, path, *weights)
        dtype = None if residual is None else residual.dtype
        return hows[1].forward(hidden, second, bias2, residual=residual, path=path, dtype=dtype)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, kept, bias1, bias2, path, *weights = ctx.saved_tensors
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        dy = _behind_path(grads[0], path, x.dtype)
        dhidden, hidden = ctx.hows[1].backward(dy, second, ctx.activation, kept)
        dw2 = ctx.hows[1].weight_gradients(dy, hidden, second)
        dw1 = ctx.hows[0].weight_gradients(dhidden, x, first)
        db1 = None if bias1 is None else ctx.hows[0].bias_gradient(dhidden, bias1)
        db2 = None if bias2 is None else ctx.hows[1].bias_gradient(dy, bias2)
        dx = ctx.hows[0].backward(dhidden, first)[0] if ctx.needs_input_grad[0] else None
        dresidual = grads[0] if ctx.needs_input_grad[3] else None
        return dx, db1, db2, dresidual, None, None, None, *dw1, *dw2


class Normalise(torch.autograd.Function):
    """``x`` and its layer norm: the gradient that comes along the residual stream is added by the norm's own kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lanes: tuple[int, ...],
        entries: tuple[float, ...],
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        y, inverse = schur_norm(x, weight, bias, list(lanes), list(entries), eps, dtype)
        ctx.save_for_backward(x, weight, bias, inverse)
        ctx.lanes, ctx.entries = lanes, entries
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, inverse = ctx.saved_tensors
        before, dy = grads
        if dy is None:
            return before, None, None, None, None, None, None
        dx, sums = schur_norm_backward(
            x, dy, before, weight, inverse, list(ctx.lanes), list(ctx.entries), bias is not None
        )
        dw = None if weight is None else sums[: weight.numel()].to(weight.dtype)
        db = None if bias is None else sums[len(sums) - bias.numel() :].to(bias.dtype)
        return dx, dw, db, None, None, None, None


def _behind_path(dy: Tensor, path: Tensor | None, dtype: torch.dtype) -> Tensor:
    if path is not None:
        dy = (dy.view(path.shape[0], -1, dy.shape[-1]) * path.view(-1, 1, 1)).view(dy.shape)
    return dy.to(dtype)
