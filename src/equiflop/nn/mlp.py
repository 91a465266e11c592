"""Equivariant MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Mlp as PlainMlp
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.kernels import layout_of
from equiflop.kernels.branch import Mlp as MlpParts
from equiflop.kernels.watched import is_bare
from equiflop.nn.dropout import Dropout
from equiflop.nn.linear import Linear


class Mlp(PlainMlp):
    """timm's ``Mlp`` whose linear maps lead from irreps into the group's basis and back.

    In between the group only permutes, so that the activation is a plain module on a plain tensor. That is the Fourier
    activation of Bökman et al., arXiv 2502.05169, section 3, the transforms taken over by the linear maps.

    Args:
        rep: type of the feature axis.
        hidden_rep: type of the hidden axis; a multiple of the regular representation.
        act: the pointwise function, a module or any elementwise callable; GELU by default.
        bias: whether both linear maps have a bias (on the trivial irrep).
        drop: dropout after the activation and after the output.

    Raises:
        ValueError: if ``hidden_rep`` is not a multiple of the regular representation.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        hidden_rep: Rep,
        *,
        act: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(1, act_layer=nn.Identity, bias=False, device="meta")
        self.rep = rep
        self._hidden = layout_of(hidden_rep)
        self.fc1 = Linear(rep, hidden_rep, bias=bias, out_order="group", **dd)
        self.act = nn.GELU() if act is None else act if isinstance(act, nn.Module) else Pointwise(act)
        self._pointwise = type(self.act)  # another one may not be: it is called with the whole axis
        self.drop1 = Dropout(hidden_rep, drop, order="group")
        self.fc2 = Linear(hidden_rep, rep, bias=bias, in_order="group", **dd)
        self.drop2 = Dropout(rep, drop)

    @classmethod
    def of(cls, plain: PlainMlp, rep: Rep) -> Mlp:
        """timm's module itself as this one, its linear maps and dropouts being equivariant already."""
        plain.__class__ = cls
        plain.rep, plain._hidden, plain._pointwise = rep, layout_of(plain.fc1.out_rep), type(plain.act)
        return plain

    def parts(self) -> MlpParts | None:
        """What a kernel needs, or None where the modules have to be called."""
        return self._parts_of(Mlp)

    def _parts_of(self, kind: type[Mlp]) -> MlpParts | None:
        """:meth:`parts` where this is of the class ``kind``, not of one made from it."""
        act = self.act
        if not (is_bare(self, kind) and is_bare(self.norm, nn.Identity) and is_bare(act, self._pointwise)):
            return None
        if act._parameters or act._modules or act._buffers:  # perhaps one per channel
            return None
        if not all(
            is_bare(drop, Dropout) and (drop.p == 0.0 or not drop.training) for drop in (self.drop1, self.drop2)
        ):
            return None
        fc1, fc2 = self.fc1, self.fc2
        first, second = (fc.maps() if isinstance(fc, Linear) else None for fc in (fc1, fc2))
        if first is None or second is None:
            return None
        return MlpParts(first, self.act, second, self._hidden)


class Pointwise(nn.Module):
    """An elementwise callable as a module.

    Args:
        function: the callable.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
