"""One small model of every kind that is registered, with parameters of order one."""

from __future__ import annotations

from typing import Any

import timm
import torch

import equiflop  # noqa: F401  (registers the models)
from oracles import scramble

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_OCTIC = {**_VIT, "embed_dim": 64}
KEYWORDS: dict[str, dict[str, Any]] = {
    "flop_deit3_small_patch16_224": _VIT,
    "flop_hybrid_deit3_small_patch16_224": {**_VIT, "depth": 4},
    "flop_inv_deit3_small_patch16_224": {**_VIT, "depth": 4},
    "octic_deit3_small_patch16_224": _OCTIC,
    "octic_hybrid_deit3_small_patch16_224": {**_OCTIC, "depth": 4},
    "octic_inv_deit3_small_patch16_224": {**_OCTIC, "depth": 4},
    "flop_resmlp_12_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2},
    "flop_convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 32, 64), "ls_init_value": 0.5},
    "flop_convnext_isotropic_small": {"depth": 2, "dim": 32, "patch_size": 8},
}
ALL = list(KEYWORDS)
VIT, OCTIC, RESMLP, CONVNEXT = ALL[0], ALL[3], ALL[6], ALL[7]
#: Models whose answer does not change when the image is mirrored.
INVARIANT = [name for name in ALL if "hybrid" not in name]


def small_model(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """In evaluation mode, with seven classes unless told otherwise."""
    model = timm.create_model(name, **{"num_classes": 7, **KEYWORDS[name], **kwargs})
    return scramble(model.to(dtype).eval())


def first_block(name: str) -> str:
    """Name of the first block or stage."""
    return "stages.0" if name == CONVNEXT else "blocks.0"


def classifier(name: str) -> str:
    """Name of the classifier."""
    return "head.fc" if "convnext" in name else "head"
