"""Equivariant norms, affine "norm" and layer scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from equiflop.groups import Rep
from equiflop.kernels import layout_of
from equiflop.kernels import norm as kernels
from equiflop.kernels.layout import per_channel
from equiflop.kernels.norm import Weighting
from equiflop.nn.checks import check_axis


def _reset_affine(weight: Tensor | None, bias: Tensor | None = None) -> None:
    if weight is not None:
        nn.init.ones_(weight)
    if bias is not None:
        nn.init.zeros_(bias)


class LayerNorm(nn.Module):
    """Layer norm of a feature with a Rep: one standard deviation per vector, so that it commutes with the group.

    Every row of every irrep is centred by its own mean over the multiplicities (a row of multiplicity 1 is not: that
    would erase it). All entries are divided by one ``sigma``, ``sigma^2`` being the mean of the squares of the centred
    entries plus ``eps``, so the output has variance 1. The scale is one per (irrep, multiplicity), the bias on the
    trivial irrep only.

    Args:
        rep: type of the feature axis.
        eps: added to the variance. The published mirror networks write ``eps`` inside a sum that is then halved, which
            is ``eps / 2`` here.
        affine: whether there are ``weight`` and ``bias``.
        bias: whether there is a ``bias``.
        weighting: ``"entries"`` as above; ``"octic"`` as published for octic ViTs (arXiv 2505.15441), where the rows of
            a d-dimensional irrep weigh 1/d of one-dimensional rows, whatever their multiplicity.

    Raises:
        ValueError: if ``weighting`` is unknown or the Rep is empty.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        eps: float = 1e-6,
        *,
        affine: bool = True,
        bias: bool = True,
        weighting: Weighting = "entries",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rep.dim == 0:
            raise ValueError(f"rep={rep!r} is empty; LayerNorm needs at least one channel")
        if weighting not in ("entries", "octic"):
            raise ValueError(f"weighting={weighting!r} is unknown; choose 'entries' or 'octic'")
        self.rep = rep
        self.eps = eps
        self.weighting: Weighting = weighting
        #: Whether every row of the input has mean 0 already, as an export makes it; then nothing is subtracted.
        self.centred = False
        self._layout = layout_of(rep)
        channels = sum(rep.multiplicities)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if affine else None
        has_bias = affine and bias and rep.multiplicities[0] > 0
        self.bias = nn.Parameter(torch.empty(rep.multiplicities[0], device=device, dtype=dtype)) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        _reset_affine(self.weight, self.bias)

    def parts(self) -> kernels.Norm:
        """What a kernel needs."""
        return kernels.Norm(self.weight, self.bias, self.eps, self.weighting, self.centred)

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.rep.dim, self._layout.text)
        return _layer_norm(x, self)

    def extra_repr(self) -> str:
        option = "" if self.weighting == "entries" else f", weighting={self.weighting!r}"
        return f"{self.rep}, eps={self.eps}{option}"


def _layer_norm(x: Tensor, module: LayerNorm) -> Tensor:
    """One step of a symbolic trace, since the way it is computed depends on dtype and device."""
    if has_torch_function_unary(x):
        return handle_torch_function(_layer_norm, (x,), x, module)
    return kernels.layer_norm(x, module._layout, module.parts())


class RmsNorm(nn.Module):
    """Root-mean-square norm of a feature with a Rep: one factor per vector, so that it commutes with the group.

    Args:
        rep: type of the feature axis.
        eps: added to the mean of the squares.
        affine: whether there is a ``weight``, one per (irrep, multiplicity).

    Raises:
        ValueError: if the Rep is empty.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        eps: float = 1e-6,
        *,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rep.dim == 0:
            raise ValueError(f"rep={rep!r} is empty; RmsNorm needs at least one channel")
        self.rep = rep
        self.eps = eps
        self._layout = layout_of(rep)
        channels = sum(rep.multiplicities)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1."""
        _reset_affine(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.rep.dim, self._layout.text)
        scale = None if self.weight is None else per_channel(self.weight, self._layout)
        return F.rms_norm(x, (self.rep.dim,), scale, self.eps)

    def extra_repr(self) -> str:
        return f"{self.rep}, eps={self.eps}"


class TiedNorm(nn.Module):
    """A plain norm over an axis in the group's basis whose parameters are the same for all ``|G|`` copies.

    The group permutes the copies, and neither mean nor variance over all of them changes.

    Args:
        channels: length of the axis.
        order: elements of the group.
        eps: added to the variance, or to the mean of the squares.
        centred: layer norm; else root-mean-square norm.
        affine: whether there is a ``weight``.
        bias: whether there is a ``bias``.

    Shape: ``(..., channels)`` to the same.
    """

    def __init__(
        self,
        channels: int,
        order: int,
        eps: float,
        *,
        centred: bool = True,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.order, self.eps, self.centred = channels, order, eps, centred
        shape = (channels // order,)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        _reset_affine(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.repeat(self.order) for p in (self.weight, self.bias))
        if self.centred:
            return F.layer_norm(x, (self.channels,), weight, bias, self.eps)
        return F.rms_norm(x, (self.channels,), weight, self.eps)

    def extra_repr(self) -> str:
        kind = "layer norm" if self.centred else "root-mean-square norm"
        return f"{kind}, {self.order} x {self.channels // self.order} channels, eps={self.eps}"


class Affine(nn.Module):
    """A learned factor per (irrep, multiplicity) and a bias on the trivial irrep: the "norm" of ResMLP.

    Args:
        rep: type of the feature axis.
        bias: whether there is a bias.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self._layout = layout_of(rep)
        self.weight = nn.Parameter(torch.empty(sum(rep.multiplicities), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rep.multiplicities[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        _reset_affine(self.weight, self.bias)

    def parts(self) -> kernels.Affine:
        """What a kernel needs."""
        return kernels.Affine(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _affine(x, self)

    def extra_repr(self) -> str:
        return f"{self.rep}, bias={self.bias is not None}"


def _affine(x: Tensor, module: Affine) -> Tensor:
    """One step of a symbolic trace."""
    if has_torch_function_unary(x):
        return handle_torch_function(_affine, (x,), x, module)
    return kernels.affine(x, module._layout, module.parts())


class LayerScale(nn.Module):
    """A learned factor per (irrep, multiplicity), the same for all rows of an irrep: it commutes with the group.

    Args:
        rep: type of the feature axis.
        init_values: initial value of all factors.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        init_values: float = 1e-4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self._layout = layout_of(rep)
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(sum(rep.multiplicities), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All factors to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel(self.gamma, self._layout)

    def extra_repr(self) -> str:
        return f"{self.rep}, init_values={self.init_values}"
