"""A plain network without memory becomes an equivariant model of timm's."""

from __future__ import annotations

from typing import Any, get_args

from timm.layers import RmsNorm
from timm.models import build_model_with_cfg
from torch import nn

from equiflop.grids import NAMED_IMAGE_GROUPS, ImageGroup, as_image_group
from equiflop.models.equivariant_transformer import Design
from equiflop.models.equivariant_vit import feature_rep
from equiflop.models.image_size import check_image_size
from equiflop.models.tied import become
from equiflop.models.twin_keywords import (
    refusal,
)
from equiflop.models.twin_networks import TWIN_CLASSES
from equiflop.nn.attention import Heads
from equiflop.nn.fit import fit_checkpoint

#: The name under which timm's registry makes twins: folders of twins for the hub load by it.
ENTRY_POINT = "equiflop_twin"
_INPUT_SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def build(
    plain: Any,
    name: str,
    cfg: Any,
    group: str | ImageGroup,
    heads: Heads | None,
    own: dict[str, Any],
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    features: dict[str, Any] | None = None,
    architecture: str | None = ENTRY_POINT,
) -> Any:
    """Make a plain network without memory equivariant, as a model of timm's."""
    group = as_image_group(group)
    variant = architecture or f"{group.name}_{name.split('.')[0]}"
    try:
        _make_equivariant(plain, group, heads, **own)
    except ValueError as error:
        raise refusal(name, str(error)) from error
    return build_model_with_cfg(
        lambda **_: plain,
        variant,
        pretrained,
        pretrained_cfg=_input_cfg(plain, variant, cfg) if pretrained_cfg is None else pretrained_cfg,
        pretrained_filter_fn=fit_checkpoint,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(features or {}),
    )


def _make_equivariant(
    plain: Any,
    group: ImageGroup,
    heads: Heads | None,
    multiplicities: Any = None,
    norm_eps: float | None = None,
    norm_weighting: Any = "entries",
    **own: Any,
) -> None:
    was_training = plain.training
    embed = getattr(plain, "patch_embed", None)
    if embed is not None:
        check_image_size(group, embed.img_size, getattr(plain, "dynamic_img_size", False))
    if norm_eps is not None:
        for module in plain.modules():
            if isinstance(module, nn.LayerNorm | RmsNorm):
                module.eps = norm_eps
    design = own.get("design", "equivariant")
    if design not in get_args(Design):
        raise ValueError(f"design={design!r} is unknown; choose from {', '.join(get_args(Design))}")
    rep = feature_rep(group, plain.embed_dim, multiplicities, design)
    become(plain, TWIN_CLASSES[type(plain)])
    plain.become_equivariant(group, rep, heads, weighting=norm_weighting, **own)
    plain.weight_init_mode = ""
    plain.init_weights(needs_reset=False)
    plain.train(was_training)


def named(group: str | ImageGroup) -> str | ImageGroup:
    """The name of a group that has one, which fits in a file."""
    if isinstance(group, ImageGroup) and group.name in NAMED_IMAGE_GROUPS and group == as_image_group(group.name):
        return group.name
    return group


def _input_cfg(network: Any, architecture: str, cfg: Any) -> dict[str, Any]:
    """timm's description of the input: that of the plain network, without a source of weights."""
    known = cfg if isinstance(cfg, dict) else {}
    embed = network.embedding
    height, width = known.get("input_size", (0, *embed.img_size))[1:] if not embed.strict_img_size else embed.img_size
    return {
        **{key: known[key] for key in _INPUT_SETTINGS if key in known},
        "architecture": architecture,
        "input_size": (embed.in_chans, height, width),
        "fixed_input_size": embed.strict_img_size,
        "num_classes": network.num_classes,
        "first_conv": None,
        "classifier": network.classifier,
    }
