"""equiflop: vision networks that are equivariant to a symmetry group and, because of it, cheaper.

Importing it registers the models in timm, so ``timm.create_model("flop_deit3_base_patch16_224")`` works.
"""

from typing import TYPE_CHECKING

from equiflop.lazy import is_command_line, lazily

if TYPE_CHECKING or not is_command_line():  # the sub-commands import what they need
    from equiflop import contract, convert, groups, models, nn
    from equiflop.checking import CheckReport, check
    from equiflop.counting import macs
    from equiflop.equivariance import assert_equivariant
    from equiflop.groups import Action, FiniteGroup, Rep
    from equiflop.image_group import ImageGroup
    from equiflop.inference import optimize_for_inference
    from equiflop.layers import linear_layers
    from equiflop.models import equivariant_models, plain_twin
    from equiflop.models.twin import twin
    from equiflop.warnings import EquiflopWarning
if TYPE_CHECKING:
    from equiflop.deploy.export import export

__version__ = "0.2.0"

__all__ = [
    "Action",
    "CheckReport",
    "EquiflopWarning",
    "FiniteGroup",
    "ImageGroup",
    "Rep",
    "assert_equivariant",
    "check",
    "contract",
    "convert",
    "equivariant_models",
    "export",
    "groups",
    "linear_layers",
    "macs",
    "models",
    "nn",
    "optimize_for_inference",
    "plain_twin",
    "twin",
]

#: ``export`` brings trainer and data sets along, so it is never imported before it is used.
__getattr__ = lazily(
    __name__,
    {
        "equiflop": ["contract", "convert", "groups", "models", "nn"],
        "equiflop.checking": ["CheckReport", "check"],
        "equiflop.counting": ["macs"],
        "equiflop.deploy": ["export"],
        "equiflop.equivariance": ["assert_equivariant"],
        "equiflop.groups": ["Action", "FiniteGroup", "Rep"],
        "equiflop.image_group": ["ImageGroup"],
        "equiflop.inference": ["optimize_for_inference"],
        "equiflop.layers": ["linear_layers"],
        "equiflop.models": ["equivariant_models", "plain_twin", "twin"],
        "equiflop.warnings": ["EquiflopWarning"],
    },
)
