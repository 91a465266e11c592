"""What the entry points of all families share."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def image_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's description of a model's input; there are no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": None,
        "classifier": "head",
        "license": "apache-2.0",
        **overrides,
    }


def refuse_pretrained(name: str, pretrained: bool, kwargs: dict[str, Any]) -> None:
    """Stop unless weights are not asked for, or the caller's ``pretrained_cfg`` says where they are.

    Raises:
        ValueError: if there are no weights to load.
    """
    if not pretrained:
        return
    sources = ("url", "file", "state_dict", "hf_hub_id")
    for cfg in (kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")):
        values = cfg if isinstance(cfg, dict) else vars(cfg) if hasattr(cfg, "__dict__") else {}
        if any(values.get(source) for source in sources):
            return
    raise ValueError(
        f"pretrained=True: no weights of {name} can be downloaded; turn official ones into a checkpoint with "
        f"'equiflop convert CHECKPOINT --model {name} -o OUT.safetensors'"
    )
