"""Parameters that are stored tied and read whole: timm's own code finds the tensor it expects under the name it knows.

A class token of a network is stored as its invariant channels and read with all channels; a layer scale is stored once
per (irrep, multiplicity) and read once per channel. So no optimiser can break the symmetry, and names, weight decay and
layer decay are those of timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from equiflop.kernels.layout import per_channel

View = Callable[[Any, Any], Tensor]


class tied(property):  # noqa: N801  (used like property)
    """A parameter, or a module that makes one, seen through a function.

    What is read is made anew each time: write to what is stored, ``module.get_parameter(name)``.

    Args:
        name: under which it is stored, that of the attribute.
        view: from the owner and what is stored to what is read.
    """

    def __init__(self, name: str, view: View) -> None:
        def read(owner: Any) -> Any:
            stored = nn.Module.__getattr__(owner, name)
            if stored is None or isinstance(stored, Proxy):  # a symbolic trace reads the attribute once more, whole
                return stored
            return view(owner, stored)

        super().__init__(read)
        self.name = name


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Turn a module into a subclass of its class with :class:`tied` attributes; what is None stays None."""
    for base in kind.__mro__:
        for name, attribute in vars(base).items():
            if isinstance(attribute, tied) and module.__dict__.get(name, module) is None:
                del module.__dict__[name]
                module._parameters[name] = None
    module.__class__ = kind


def invariant_channels(owner: Any, token: Tensor) -> Tensor:
    """A token of invariant channels, followed by zeros: ``(..., m)`` to ``(..., rep.dim)``."""
    return F.pad(token, (0, owner.rep.dim - token.shape[-1]))


def spread_channels(owner: Any, values: Tensor) -> Tensor:
    """One value per (irrep, multiplicity) to one per channel."""
    return per_channel(values, owner._layout)


def same_copies(owner: Any, values: Tensor) -> Tensor:
    """The values of one copy for all ``|G|`` copies of the group's basis."""
    return torch.cat([values] * owner.copies, dim=-1)


def made_by(owner: Any, module: nn.Module) -> Tensor:
    """What a module without inputs makes."""
    return module()
