"""Plain networks that the equivariant ones are compared with, where timm has none."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from equiflop.models.defaults import image_cfg, refuse_pretrained
from equiflop.models.equivariant_deit3 import PLAIN_TWINS as _DEIT3_TWINS

default_cfgs = generate_default_cfgs(
    {"deit3_tiny_patch16_224": image_cfg(first_conv="patch_embed.proj")},
)

_PLAIN_TWINS: dict[str, tuple[str, dict[str, Any]]] = {**_DEIT3_TWINS}


def plain_twin(name: str) -> tuple[str, dict[str, Any]]:
    """The plain network that an equivariant one is compared with.

    Args:
        name: name of an equivariant model.

    Returns:
        timm's name of the plain twin and the keywords that differ from its defaults.

    Raises:
        ValueError: if the name is none of an equivariant model.

    >>> plain_twin("flop_deit3_small_patch16_224")
    ('deit3_small_patch16_224', {})
    """
    if name not in _PLAIN_TWINS:
        import difflib

        close = difflib.get_close_matches(name, _PLAIN_TWINS, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; 'equiflop models' lists them"
        raise ValueError(f"name={name!r} is not an equivariant model{hint}")
    twin, overrides = _PLAIN_TWINS[name]
    return twin, dict(overrides)


def equivariant_models() -> list[str]:
    """Names of all equivariant models, in the order in which they are listed."""
    return list(_PLAIN_TWINS)


if not timm.is_model("deit3_tiny_patch16_224"):

    @register_model
    def deit3_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        """DeiT III tiny: the size of DeiT tiny with the architecture of DeiT III."""
        refuse_pretrained("deit3_tiny_patch16_224", pretrained, kwargs)
        model_args = {
            "patch_size": 16,
            "embed_dim": 192,
            "depth": 12,
            "num_heads": 3,
            "no_embed_class": True,
            "init_values": 1e-6,
        }
        return build_model_with_cfg(
            VisionTransformer,
            "deit3_tiny_patch16_224",
            pretrained,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **{**model_args, **kwargs},
        )
