"""Entry points of E(ViT) in timm: the DeiT III sizes, in the designs ``equivariant``, ``hybrid`` and ``invariant``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from equiflop.models.defaults import image_cfg, refuse_pretrained
from equiflop.models.equivariant_vit import EquivariantVisionTransformer

#: Width, depth, heads and patch size of the DeiT III sizes (SPEC of arXiv 2502.05169, table of models).
SIZES: dict[str, dict[str, int]] = {
    "tiny_patch16": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "medium_patch16": {"embed_dim": 512, "depth": 12, "num_heads": 8, "patch_size": 16},
    "base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
    "huge_patch14": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

_PREFIXES = {
    "flop": {"group": "flop", "design": "equivariant"},
    "flop_hybrid": {"group": "flop", "design": "hybrid"},
    "flop_inv": {"group": "flop", "design": "invariant"},
}

#: Name of every model of this file, and the keywords that define it.
MODEL_ARGS: dict[str, dict[str, Any]] = {
    f"{prefix}_deit3_{size}_224": {**dimensions, **options}
    for prefix, options in _PREFIXES.items()
    for size, dimensions in SIZES.items()
}

#: timm's plain network of the same width, depth and heads.
PLAIN_TWINS: dict[str, tuple[str, dict[str, Any]]] = {name: (name[name.index("deit3") :], {}) for name in MODEL_ARGS}

default_cfgs = generate_default_cfgs({name: image_cfg() for name in MODEL_ARGS})


def _entry_point(name: str, model_args: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        refuse_pretrained(name, pretrained, kwargs)
        return build_model_with_cfg(
            EquivariantVisionTransformer,
            name,
            pretrained,
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            **{**model_args, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"E(ViT) {name}; keywords of :class:`EquivariantVisionTransformer`."
    return create


for _name, _model_args in MODEL_ARGS.items():
    globals()[_name] = register_model(_entry_point(_name, _model_args))
