"""GELU and its sigmoid form, exact to rounding, without the slow functions of vector libraries."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from equiflop.kernels.choose import TABLE, Variant, choose, is_traced_for_kernels

# ``f(z) = z P(z^2) / Q(z^2)`` up to a limit beyond which f is +-1 to float32 rounding. Coefficients from the constant
# term up, fitted by weighted least squares; ``tests/kernels`` holds the activations against float64.
#: The error function for ``|z| <= 3.83``, to 1.2e-8.
_ERF_LIMIT = 3.83
_ERF = (
    (1.1283790634276532, 0.18921134188223232, 0.05266468307152994, 0.003734111481915071, 0.0002877267228672633,
     2.1070672070636095e-06),
    (1.0, 0.5010163120546148, 0.11368284123325764, 0.014903633408198945, 0.0011614587536133867,
     3.882701702629429e-05),
)  # fmt: skip
#: The hyperbolic tangent for ``|z| <= 8``, to 3e-10.
_TANH_LIMIT = 8.0
_TANH = (
    (0.9999999983843559, 0.13722529081515664, 0.003922023531221076, 2.9111840337531378e-05, 3.3345627329913076e-08,
     -1.4375491590280681e-11),
    (1.0, 0.47055861658328463, 0.02744157268294039, 0.0004034006114687468, 1.36583079250544e-06),
)  # fmt: skip
#: The factor in ``x sigmoid(factor x)``.
_SIGMOID_FACTORS: dict[type[nn.Module], float] = {QuickGELU: 1.702, nn.SiLU: 1.0}


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """``act(x)`` for a pointwise module."""
    return (choose("activation", act, x) or _reference)(act, x)


def activate_(act: nn.Module, x: Tensor) -> Tensor:
    """:func:`activate` that overwrites ``x`` where it can, to hold less memory."""
    if type(act) is nn.GELU:
        return torch.ops.aten.gelu_(x, approximate=act.approximate)
    if type(act) is QuickGELU:
        return x.mul_((x * _SIGMOID_FACTORS[QuickGELU]).sigmoid_())
    return act(x)


def _reference(act: nn.Module, x: Tensor) -> Tensor:
    return act(x)


def _half_of_one_plus(z: Tensor, limit: float, coefficients: tuple[tuple[float, ...], ...]) -> Tensor:
    """``(1 + f(z)) / 2``."""
    z = torch.clamp(z, -limit, limit)
    t = z * z
    values = []
    for *lower, highest in coefficients:
        value = highest * t + lower[-1]
        for coefficient in lower[-2::-1]:
            value = value * t + coefficient
        values.append(value)
    return 0.5 + 0.5 * z * values[0] / values[1]


def _gate(x: Tensor, factor: float) -> Tensor:
    """``Phi(x)`` of the normal distribution for factor 0, else ``sigmoid(factor x)``."""
    if factor == 0.0:
        return _half_of_one_plus(x * 0.5**0.5, _ERF_LIMIT, _ERF)
    return _half_of_one_plus(x * (0.5 * factor), _TANH_LIMIT, _TANH)


class _Gated(torch.autograd.Function):
    """``x gate(x)`` in float32, with its derivative from the same gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        wide = x.float()
        return (wide * _gate(wide, factor)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        wide = x.float()
        gate = _gate(wide, ctx.factor)
        if ctx.factor == 0.0:
            slope = torch.exp(-0.5 * wide * wide) * (2.0 * math.pi) ** -0.5
        else:
            slope = ctx.factor * gate * (1.0 - gate)
        return (grads[0].float() * (gate + wide * slope)).to(x.dtype), None


def _rational(act: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = _Gated.apply(x, _SIGMOID_FACTORS.get(type(act), 0.0))
    return y


def _fits_rational(act: nn.Module, x: Tensor) -> bool:
    known = type(act) in _SIGMOID_FACTORS or (type(act) is nn.GELU and act.approximate == "none")
    return known and x.device.type == "cpu" and x.dtype != torch.float64 and is_traced_for_kernels()


TABLE["activation"] = (
    Variant(
        "rational",
        _fits_rational,
        _rational,
        "exact GELU, its sigmoid form, SiLU; torch.compile for a CPU, float32 or narrower",
    ),
)
