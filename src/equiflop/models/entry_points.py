"""Every model by name: the tables that define them, their plain twins, and their registration in timm."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from equiflop.grids import as_image_group
from equiflop.models.equivariant_convnext import EquivariantConvNeXt, EquivariantIsotropicConvNeXt
from equiflop.models.equivariant_resmlp import EquivariantResMLP
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.isotropic_convnext import IsotropicConvNeXt
from equiflop.models.pretrained import WEIGHTS_VARIABLE, find_pretrained
from equiflop.timm_compat import update_model_args


@dataclass(frozen=True)
class _Family:
    """What the models of one family share.

    Attributes:
        model_class: their class.
        last_features: ``out_indices`` of ``features_only`` by default: the last n, or these.
        cfg: how their input differs from the usual one.
    """

    model_class: type[nn.Module]
    last_features: int | tuple[int, ...] = 3
    cfg: dict[str, Any] = field(default_factory=dict)


_FIXED_SIZE = {"fixed_input_size": True, "crop_pct": 0.9}
_E_VIT = _Family(EquivariantVisionTransformer, cfg=_FIXED_SIZE)
_E_RESMLP = _Family(EquivariantResMLP, cfg=_FIXED_SIZE)
_E_CONVNEXT = _Family(EquivariantConvNeXt, (0, 1, 2, 3), {"classifier": "head.fc"})
_E_ISOTROPIC = _Family(EquivariantIsotropicConvNeXt, cfg={"classifier": "head.fc"})
_PLAIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    EquivariantVisionTransformer: VisionTransformer,
    EquivariantResMLP: MlpMixer,
    EquivariantConvNeXt: ConvNeXt,
    EquivariantIsotropicConvNeXt: IsotropicConvNeXt,
}
_VIT = _Family(VisionTransformer, cfg={**_FIXED_SIZE, "first_conv": "patch_embed.proj"})
_RESMLP = _Family(MlpMixer, cfg={**_FIXED_SIZE, "first_conv": "stem.proj"})
_ISOTROPIC = _Family(IsotropicConvNeXt, cfg={"classifier": "head.fc", "first_conv": "stem"})

# Width, depth, heads and patch size of DeiT III; those of the other families: arXiv 2502.05169, section 4 and its code.
_DEIT3_SIZES: dict[str, dict[str, Any]] = {
    "tiny_patch16": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "medium_patch16": {"embed_dim": 512, "depth": 12, "num_heads": 8, "patch_size": 16},
    "base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
    "huge_patch14": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}
# What the published networks compute, quirks included. It belongs to the group of the row: with another ``group`` the
# model takes the defaults of its class.
# Mirror networks (arXiv 2502.05169) write eps = 1e-6 inside a sum that is halved.
_PUBLISHED_FLOP: dict[str, Any] = {"norm_eps": 0.5e-6}
# ResMLP: GELU in sigmoid form, a bias wherever channel and token are of one irrep, a head that reads both kinds of
# invariants with the same weights.
_PUBLISHED_RESMLP: dict[str, Any] = {"act_layer": "quick_gelu", "matched_bias": True, "head": "paired"}
# Octic networks (arXiv 2505.15441) write eps = 1e-5 inside a sum that is divided by 8, weigh the rows of E in their own
# way, and pool behind the final norm.
_TOKENS_OCTIC: dict[str, Any] = {"token_std": 0.16}
_PUBLISHED_OCTIC: dict[str, Any] = {
    **_TOKENS_OCTIC,
    "norm_eps": 1e-5 / 8,
    "norm_weighting": "octic",
    "fc_norm": False,
    "plain_order": "irreps",
}
# Prefix to group, design and what is published.
_DEIT3_DESIGNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flop": ("flop", "equivariant", _PUBLISHED_FLOP),
    "flop_hybrid": ("flop", "hybrid", _PUBLISHED_FLOP),
    "flop_inv": ("flop", "invariant", _PUBLISHED_FLOP),
    "octic": ("octic", "equivariant", _TOKENS_OCTIC),
    "octic_hybrid": ("octic", "hybrid", _PUBLISHED_OCTIC),
    "octic_inv": ("octic", "invariant", _PUBLISHED_OCTIC),
}
_RESMLP_SIZES: dict[str, dict[str, Any]] = {
    "12": {"embed_dim": 384, "num_blocks": 12, "init_values": 0.1},
    "24": {"embed_dim": 384, "num_blocks": 24, "init_values": 1e-5},
    "big_24": {"embed_dim": 768, "num_blocks": 24, "init_values": 1e-6},
    "large_24": {"embed_dim": 1280, "num_blocks": 24, "init_values": 1e-6},
}
_CONVNEXT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "xlarge": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
}
_ISOTROPIC_SIZES: dict[str, dict[str, Any]] = {
    "small": {"depth": 18, "dim": 384},
    "base": {"depth": 18, "dim": 768},
    "large": {"depth": 36, "dim": 1024},
}


@dataclass(frozen=True)
class _Row:
    """A model.

    Attributes:
        family: its family.
        args: keywords of its class.
        published: keywords that make it compute what was published; they hold for ``args["group"]`` alone.
    """

    family: _Family
    args: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)

    def keywords(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """All keywords, given those of the caller."""
        group = overrides.get("group")
        own = group is None or as_image_group(group) == as_image_group(self.args["group"])
        return {**self.args, **(self.published if own else {}), **overrides}


#: In front of a name of timm: the twin that :func:`equiflop.twin` makes of it.
TWIN = "twin:"

_MODELS: dict[str, _Row] = {}
_PLAIN_TWINS: dict[str, str] = {}

for _prefix, (_group, _design, _published) in _DEIT3_DESIGNS.items():
    for _size, _args in _DEIT3_SIZES.items():
        if _group == "octic" and _size == "tiny_patch16":
            continue  # the octic sizes start at small
        _name = f"{_prefix}_deit3_{_size}_224"
        _MODELS[_name] = _Row(_E_VIT, {**_args, "group": _group, "design": _design}, _published)
        _PLAIN_TWINS[_name] = f"deit3_{_size}_224"
for _size, _args in _RESMLP_SIZES.items():
    _MODELS[f"flop_resmlp_{_size}_224"] = _Row(
        _E_RESMLP, {**_args, "patch_size": 16, "group": "flop"}, _PUBLISHED_RESMLP
    )
    # timm's resmlp_big_24_224 has patches of 8 pixels, the published network of 16.
    _PLAIN_TWINS[f"flop_resmlp_{_size}_224"] = f"resmlp_{_size}_{'patch16_' if _size == 'big_24' else ''}224"
for _size, _args in _CONVNEXT_SIZES.items():
    _MODELS[f"flop_convnext_{_size}"] = _Row(_E_CONVNEXT, {**_args, "group": "flop"}, _PUBLISHED_FLOP)
    _PLAIN_TWINS[f"flop_convnext_{_size}"] = f"convnext_{_size}"
for _size, _args in _ISOTROPIC_SIZES.items():
    _MODELS[f"flop_convnext_isotropic_{_size}"] = _Row(_E_ISOTROPIC, {**_args, "group": "flop"}, _PUBLISHED_FLOP)
    _PLAIN_TWINS[f"flop_convnext_isotropic_{_size}"] = f"convnext_isotropic_{_size}"

_RESMLP_BIG: dict[str, Any] = {
    "num_blocks": 24,
    "embed_dim": 768,
    "patch_size": 16,
    "mlp_ratio": 4,
    "block_layer": partial(ResBlock, init_values=1e-6),
    "norm_layer": Affine,
}

# Plain twins that timm lacks.
_PLAIN_MODELS: dict[str, _Row] = {
    "deit3_tiny_patch16_224": _Row(_VIT, {**_DEIT3_SIZES["tiny_patch16"], "no_embed_class": True, "init_values": 1e-6}),
    "resmlp_big_24_patch16_224": _Row(_RESMLP, _RESMLP_BIG),
    "resmlp_large_24_224": _Row(_RESMLP, {**_RESMLP_BIG, "embed_dim": 1280}),
    **{f"convnext_isotropic_{size}": _Row(_ISOTROPIC, args) for size, args in _ISOTROPIC_SIZES.items()},
}


def plain_twin(name: str, settings: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The plain network that an equivariant one is compared with.

    Args:
        name: name of an equivariant model, or ``"twin:"`` and a name of timm.
        settings: keywords of the equivariant model; the plain twin gets those that it has as well.

    Returns:
        timm's name of the plain twin (of the registered networks, where timm has none) and its keywords: those that
        make it differ from timm's defaults, and ``settings``.

    Raises:
        ValueError: if the name is none of an equivariant model.

    >>> plain_twin("flop_resmlp_big_24_224")
    ('resmlp_big_24_patch16_224', {})
    >>> plain_twin("flop_convnext_tiny", {"group": "updown", "drop_rate": 0.1})
    ('convnext_tiny', {'drop_rate': 0.1})
    """
    if name.startswith(TWIN):
        return name.removeprefix(TWIN), _plain_settings(name, settings or {})
    if name not in _PLAIN_TWINS:
        close = difflib.get_close_matches(name, _PLAIN_TWINS, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; 'equiflop models' lists them"
        raise ValueError(f"name={name!r} is not an equivariant model{hint}")
    return _PLAIN_TWINS[name], _plain_settings(name, settings or {})


def equivariant_models() -> list[str]:
    """Names of all equivariant models, family by family."""
    return list(_PLAIN_TWINS)


def model_keywords(name: str) -> dict[str, Any]:
    """All keywords of an equivariant model, with the values that its name stands for."""
    row = _MODELS[name]
    defaults = {key: value.default for key, value in inspect.signature(row.family.model_class).parameters.items()}
    return defaults | row.keywords({})


def registered_twin(plain: str) -> str | None:
    """The registered E(ResMLP) or E(ConvNeXt) whose plain twin has this name, tag or not; None for other names.

    >>> registered_twin("convnext_tiny"), registered_twin("convnext_tiny.fb_in1k")
    ('flop_convnext_tiny', 'flop_convnext_tiny')
    """
    plain = plain.split(".")[0]
    names = (name for name, twin in _PLAIN_TWINS.items() if twin == plain and _MODELS[name].family is not _E_VIT)
    return next(names, None)


def own_keywords(equivariant: type[nn.Module], plain: type[nn.Module]) -> frozenset[str]:
    """Keywords of an equivariant class that its plain twin does not have."""
    ours, theirs = (set(inspect.signature(cls).parameters) for cls in (equivariant, plain))
    return frozenset(ours - theirs)


def _plain_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of an equivariant model that hold for its plain twin as well."""
    name = registered_twin(name.removeprefix(TWIN)) or name
    equivariant = (_E_VIT if name.startswith(TWIN) else _MODELS[name].family).model_class
    own = own_keywords(equivariant, _PLAIN_CLASSES[equivariant])
    return {key: value for key, value in settings.items() if key not in own}


def _input_cfg(family: _Family) -> dict[str, Any]:
    """timm's description of a model's input; there are no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": (),
        "classifier": "head",
        "license": "apache-2.0",
        **family.cfg,
    }


def _names_source(kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller says where there are weights."""
    sources = ("url", "file", "state_dict", "hf_hub_id")
    for cfg in (kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")):
        values = cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", {})
        if any(values.get(source) for source in sources):
            return True
    return False


def _with_weights(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords, with a source of weights and what else the model was trained with.

    Raises:
        ValueError: if there are no weights.
    """
    tag = kwargs.get("pretrained_cfg")
    found = None
    if tag is None or isinstance(tag, str):
        found = find_pretrained(name, tag, kwargs.get("cache_dir"))
    if found is None:
        raise ValueError(
            f"pretrained=True: there are no weights of {name} to download; set {WEIGHTS_VARIABLE} to a folder or to "
            "hf-hub:OWNER where there are, or pretrained_cfg_overlay=dict(file=...); official ones become such a file "
            "by: equiflop convert IN -o OUT"
        )
    sources = {"pretrained_cfg": found.cfg, "pretrained_model_args": found.model_args}
    return {**found.model_args, **kwargs, **sources}


def _entry_point(name: str, row: _Row) -> Callable[..., nn.Module]:
    family = row.family

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and not _names_source(kwargs):
            kwargs = _with_weights(name, kwargs)
        made_with = kwargs.get("pretrained_model_args") or {}
        out_indices = kwargs.pop("out_indices", family.last_features)
        model = build_model_with_cfg(
            family.model_class,
            name,
            pretrained,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            pretrained_filter_fn=getattr(family.model_class, "fit_checkpoint", None),
            **row.keywords(kwargs),
        )
        if made_with:
            update_model_args(model, **made_with)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: {family.model_class.__name__} with {row.keywords({})}."
    return create


_TO_REGISTER = {
    **_MODELS,
    **{name: row for name, row in _PLAIN_MODELS.items() if not timm.is_model(name)},
}

default_cfgs = generate_default_cfgs({name: _input_cfg(row.family) for name, row in _TO_REGISTER.items()})

__all__ = ["equivariant_models", "plain_twin"]  # register_model appends the entry points

for _name, _row in _TO_REGISTER.items():
    globals()[_name] = register_model(_entry_point(_name, _row))
