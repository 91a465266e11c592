"""Twins by timm's registry, as folders of the hub load."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from equiflop.grids import ImageGroup
from equiflop.models.twin_build import ENTRY_POINT, build
from equiflop.models.twin_keywords import (
    OWN,
    OWN_OF_VIT,
    check_class,
    check_own,
)
from equiflop.models.twin_plain import plain_network
from equiflop.nn.attention import Heads

_DEFAULT = "deit3_small_patch16_224"

default_cfgs = generate_default_cfgs(
    {
        ENTRY_POINT: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": (),
            "classifier": "head",
        }
    }
)


def create(
    plain: str = _DEFAULT,
    group: str | ImageGroup = "flop",
    heads: Heads | None = None,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    features: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """The twin of a name; see :func:`twin`."""
    own = {key: overrides[key] for key in (*OWN, *OWN_OF_VIT) if key in overrides}
    network = plain_network(plain, {key: value for key, value in overrides.items() if key not in own})
    check_class(network, plain)
    check_own(network, own)
    cfg = getattr(network, "pretrained_cfg", None)
    return build(network, plain, cfg, group, heads, own, pretrained, pretrained_cfg, features or {})


@register_model
def equiflop_twin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twins by timm's registry, as folders of the hub load: ``plain`` names the plain network."""
    of_features = ("features_only", "out_indices", "feature_cls", "cache_dir")  # what timm's builder takes
    features: dict[str, Any] = {key: kwargs.pop(key) for key in of_features if key in kwargs}
    if pretrained and not kwargs.get("pretrained_cfg"):
        raise ValueError("pretrained=True: there are no weights of twins to download")
    noted = kwargs.get("pretrained_cfg")
    if isinstance(noted, dict) and "num_classes" in noted:
        kwargs.setdefault("num_classes", noted["num_classes"])
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if overlay:
        features["pretrained_cfg_overlay"] = overlay
    return create(pretrained=pretrained, features=features, **kwargs)
