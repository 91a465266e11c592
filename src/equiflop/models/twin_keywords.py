"""Keywords of twins that are none of the plain network, and which networks have twins."""

from __future__ import annotations

from typing import Any

from torch import nn

from equiflop.models.equivariant_transformer import EquivariantTransformer
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.twin_networks import TWIN_CLASSES

#: Overrides that are no keywords of the plain network.
OWN = ("invariants", "multiplicities", "norm_eps", "norm_weighting", "token_std", "device", "dtype")
#: More of them, for twins of a ``VisionTransformer``.
OWN_OF_VIT = ("design", "equivariant_depth", "plain_order", "plain_norm_eps")


def refusal(name: str, reason: str) -> ValueError:
    """What is raised for a network that has no twin."""
    return ValueError(f"{name} has no twin: {reason}")


def check_class(network: nn.Module, name: str) -> None:
    """See that a network is of a class that has twins.

    Raises:
        ValueError: if not.
    """
    if isinstance(network, EquivariantTransformer):
        raise refusal(name, "it is an equivariant network already; give the plain one")
    if type(network) not in TWIN_CLASSES:
        supported = ", ".join(cls.__name__ for cls in TWIN_CLASSES)
        kind = type(network).__name__
        also = "the ConvNeXt and ResMLP of 'equiflop models'"
        raise refusal(name, f"its class is {kind}; supported are timm's {supported}, and {also}")


def own_keywords(network: nn.Module) -> tuple[str, ...]:
    """Overrides that the twin of this network takes itself."""
    is_vit = TWIN_CLASSES[type(network)] is EquivariantVisionTransformer
    return (*OWN, *OWN_OF_VIT) if is_vit else OWN


def split_overrides(network: nn.Module, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the twin, and those of the plain network."""
    check_own(network, overrides)
    known = own_keywords(network)
    own = {key: value for key, value in overrides.items() if key in known}
    return own, {key: value for key, value in overrides.items() if key not in known}


def check_own(network: nn.Module, overrides: dict[str, Any]) -> None:
    """See that no override is for twins of another class.

    Raises:
        ValueError: if one is.
    """
    known = own_keywords(network)
    for key in overrides:
        if key in OWN_OF_VIT and key not in known:
            raise ValueError(
                f"override {key}={overrides[key]!r} is for twins of a VisionTransformer, not of a "
                f"{type(network).__name__}"
            )
