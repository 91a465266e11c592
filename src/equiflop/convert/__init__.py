"""Weights of the official repositories, turned into weights of our models."""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from dataclasses import dataclass

from torch import Tensor, nn

from equiflop.convert.flop_convnext import map_flop_convnext
from equiflop.convert.flop_parts import FlopMapping
from equiflop.convert.flop_resmlp import map_flop_resmlp
from equiflop.convert.flop_vit import map_flop_vit
from equiflop.convert.mapping import Mapping
from equiflop.convert.octic_vit import map_octic_vit
from equiflop.convert.official import OfficialWeights
from equiflop.grids import named_image_group
from equiflop.models import (
    EquivariantConvNeXt,
    EquivariantIsotropicConvNeXt,
    EquivariantResMLP,
    EquivariantVisionTransformer,
)

__all__ = ["Conversion", "convert_official", "convert_with_report"]


def convert_official(state_dict: MappingType[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn a state dict of the official repositories into one of ``model``, which then computes the same function.

    The computation is in float64; the result has the dtypes of the model's parameters and loads strictly.

    Args:
        state_dict: the official state dict; see ``equiflop convert`` for files that wrap it.
        model: one of our models with the same dimensions. Official networks with symmetrised antisymmetric features
            need ``invariants="norm"``, those without layer scale ``ls_init_value=0``.

    Raises:
        ValueError: if there is no official counterpart of the model, or naming the first entry that does not fit.
    """
    return convert_with_report(state_dict, model).state_dict


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of the official one.

    Attributes:
        state_dict: the state dict of our model.
        used: number of official entries that went into it.
        left_out: official entries that have no place in it, with the reason.
    """

    state_dict: dict[str, Tensor]
    used: int
    left_out: dict[str, str]


def convert_with_report(state_dict: MappingType[str, Tensor], model: nn.Module) -> Conversion:
    """Like :func:`convert_official`, and says which entries were left out.

    Raises:
        ValueError: see :func:`convert_official`.
    """
    official = OfficialWeights(state_dict)
    mapping = _mapped(official, model)
    official.finish()
    own = model.state_dict()
    missing = [name for name in own if name not in mapping.out]
    if missing:
        raise ValueError(f"{missing[0]!r} of the model has no counterpart in the official state dict")
    converted = {name: mapping.out[name].to(tensor.dtype) for name, tensor in own.items()}
    return Conversion(converted, len(state_dict) - len(official.left_out), official.left_out)


def _mapped(official: OfficialWeights, model: nn.Module) -> Mapping:
    group = getattr(model, "group", None)
    if isinstance(model, EquivariantVisionTransformer) and group == named_image_group("octic"):
        octic = Mapping(official)
        map_octic_vit(octic, model)
        return octic
    flop = FlopMapping(official)
    is_flop = group == named_image_group("flop")
    if is_flop and isinstance(model, EquivariantVisionTransformer):
        map_flop_vit(flop, model)
    elif is_flop and isinstance(model, EquivariantResMLP):
        map_flop_resmlp(flop, model)
    elif is_flop and isinstance(model, (EquivariantConvNeXt, EquivariantIsotropicConvNeXt)):
        map_flop_convnext(flop, model)
    else:
        raise ValueError(f"model={type(model).__name__} has no official counterpart whose weights could be converted")
    return flop
