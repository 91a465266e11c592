"""Products, MLPs and norms with their gradients, made of the operators beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equiflop.kernels.gpu.norm_ops import schur_norm, schur_norm_backward
from equiflop.kernels.gpu.operands import Axis
from equiflop.kernels.gpu.product_ops import schur_product, schur_weight_gradient


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
        scale: Tensor | None = None,
        residual: Tensor | None = None,
        path: Tensor | None = None,
        activation: str = "",
        keeps: bool = False,
    ) -> list[Tensor]:
        """See :func:`schur_product`."""
        return schur_product(
            x,
            list(weights),
            bias,
            scale,
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
            x.dtype if residual is None else residual.dtype,
        )

    def backward(
        self,
        dy: Tensor,
        weights: Sequence[Tensor],
        scale: Tensor | None = None,
        activation: str = "",
        kept: Tensor | None = None,
    ) -> list[Tensor]:
        """The gradient of the input; with the values that lie before an activation, see :func:`schur_product`."""
        if scale is not None:
            factors = scale.split([weight.shape[0] for weight in weights])
            weights = [(w * factor.unsqueeze(1)).to(w.dtype) for w, factor in zip(weights, factors, strict=True)]
        return schur_product(
            dy,
            list(weights),
            None,
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

    def gradients(
        self, dy: Tensor, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, scale: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Of the weights, the bias and the layer scale."""
        axes = (list(self.lanes), self.reads, self.writes, self.sections, self.heads)
        flat, *others = schur_weight_gradient(dy, x, list(weights), bias, scale, *axes)
        parts = flat.split([weight.numel() for weight in weights])
        dw = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        return dw, None if bias is None else others[0], None if scale is None else others[-1]


def multiply(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    how: Map,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    path: Tensor | None = None,
) -> Tensor:
    """``residual + path * scale * map(x)``: rows ``(T, dim)``."""
    if _has_gradients(x, *weights, bias, scale, residual):
        out: Tensor = _Multiply.apply(x, bias, scale, residual, path, how, *weights)
        return out
    return how.forward(x, weights, bias, scale=scale, residual=residual, path=path)[0]


def multiply_twice(
    x: Tensor,
    weights: tuple[Sequence[Tensor], Sequence[Tensor]],
    biases: tuple[Tensor | None, Tensor | None],
    hows: tuple[Map, Map],
    activation: str,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    path: Tensor | None = None,
) -> Tensor:
    """``residual + path * scale * map2(act(map1(x)))``, the activation in the group's basis."""
    if _has_gradients(x, *weights[0], *weights[1], *biases, scale, residual):
        tensors = (x, *biases, scale, residual, path)
        out: Tensor = _MultiplyTwice.apply(*tensors, hows, activation, *weights[0], *weights[1])
        return out
    hidden = hows[0].forward(x, weights[0], biases[0], activation=activation)[0]
    return hows[1].forward(hidden, weights[1], biases[1], scale=scale, residual=residual, path=path)[0]


def _has_gradients(*tensors: Tensor | None) -> bool:
    """Whether a function of autograd is needed: without, Dynamo miscounts the arguments of one with ``*weights``."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        path: Tensor | None,
        how: Map,
        *weights: Tensor,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, bias, scale, path, *weights)
        return how.forward(x, weights, bias, scale=scale, residual=residual, path=path)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, bias, scale, path, *weights = ctx.saved_tensors
        dy = _behind_path(grads[0], path, x.dtype)
        dx = ctx.how.backward(dy, weights, scale)[0] if ctx.needs_input_grad[0] else None
        dw, db, dscale = [None] * len(weights), None, None
        if any(ctx.needs_input_grad[1:3]) or any(ctx.needs_input_grad[6:]):
            dw, db, dscale = ctx.how.gradients(dy, x, weights, bias, scale)
        dresidual = grads[0] if ctx.needs_input_grad[3] else None
        return dx, db, dscale, dresidual, None, None, *dw


class _MultiplyTwice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        path: Tensor | None,
        hows: tuple[Map, Map],
        activation: str,
        *weights: Tensor,
    ) -> Tensor:
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        hidden, kept = hows[0].forward(x, first, bias1, activation=activation, keeps=True)
        ctx.hows, ctx.activation = hows, activation
        ctx.save_for_backward(x, kept, bias1, bias2, scale, path, *weights)
        return hows[1].forward(hidden, second, bias2, scale=scale, residual=residual, path=path)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, kept, bias1, bias2, scale, path, *weights = ctx.saved_tensors
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        dy = _behind_path(grads[0], path, x.dtype)
        dhidden, hidden = ctx.hows[1].backward(dy, second, scale, ctx.activation, kept)
        dw2, db2, dscale = ctx.hows[1].gradients(dy, hidden, second, bias2, scale)
        dw1, db1, _ = ctx.hows[0].gradients(dhidden, x, first, bias1)
        dx = ctx.hows[0].backward(dhidden, first)[0] if ctx.needs_input_grad[0] else None
        dresidual = grads[0] if ctx.needs_input_grad[4] else None
        return dx, db1, db2, dscale, dresidual, None, None, None, *dw1, *dw2


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
        dx, sums = schur_norm_backward(x, dy, before, weight, inverse, list(ctx.lanes), list(ctx.entries), bias)
        dw = None if weight is None else sums[: weight.numel()]
        db = None if bias is None else sums[len(sums) - bias.numel() :]
        return dx, dw, db, None, None, None, None


def _behind_path(dy: Tensor, path: Tensor | None, dtype: torch.dtype) -> Tensor:
    if path is not None:
        dy = (dy.view(path.shape[0], -1, dy.shape[-1]) * path.view(-1, 1, 1)).view(dy.shape)
    return dy.to(dtype)
