"""GELU, exact to rounding, without the slow error function of vector libraries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.kernels.choose import TABLE, Variant, choose, is_traced_for_kernels

#: ``erf(z) = z P(z^2) / Q(z^2)`` for ``|z| <= 3.83``, beyond which erf is +-1 to float32 rounding. Coefficients from
#: the constant term up, fitted by weighted least squares to 1.2e-8; ``tests/kernels`` holds GELU against float64.
_P = (1.1283790634276532, 0.18921134188223232, 0.05266468307152994, 0.003734111481915071, 0.0002877267228672633,
      2.1070672070636095e-06)  # fmt: skip
_Q = (1.0, 0.5010163120546148, 0.11368284123325764, 0.014903633408198945, 0.0011614587536133867,
      3.882701702629429e-05)  # fmt: skip
_LIMIT = 3.83


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """``act(x)`` for a pointwise module."""
    return (choose("activation", act, x) or _reference)(act, x)


def _reference(act: nn.Module, x: Tensor) -> Tensor:
    return act(x)


def _normal_cdf(x: Tensor) -> Tensor:
    """``(1 + erf(x / sqrt(2))) / 2`` in float32."""
    z = torch.clamp(x * 0.5**0.5, -_LIMIT, _LIMIT)
    t = z * z
    p, q = _P[-1] * t + _P[-2], _Q[-1] * t + _Q[-2]
    for a, b in zip(_P[-3::-1], _Q[-3::-1], strict=True):
        p, q = p * t + a, q * t + b
    return 0.5 + 0.5 * z * p / q


class _RationalGelu(torch.autograd.Function):
    """``x Phi(x)`` with the derivative ``Phi(x) + x phi(x)``, both of the same ``Phi``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        return (wide * _normal_cdf(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        density = torch.exp(-0.5 * wide * wide) * (2.0 * math.pi) ** -0.5
        return (grads[0].float() * (_normal_cdf(wide) + wide * density)).to(x.dtype)


def _rational(act: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = _RationalGelu.apply(x)
    return y


TABLE["activation"] = (
    Variant(
        "rational",
        lambda act, x: (
            type(act) is nn.GELU
            and act.approximate == "none"
            and x.device.type == "cpu"
            and x.dtype != torch.float64
            and is_traced_for_kernels()
        ),
        _rational,
        "exact GELU, torch.compile for a CPU, float32 or narrower",
    ),
)
