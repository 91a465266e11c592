"""What a network or a part of it says of its group and its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from equiflop.image_group import ImageGroup, as_image_group


def _found_in_parts(model: nn.Module, look: Callable[[Any], Any]) -> Any:
    """What the model or the first part of it that knows says; None if no part does."""
    return next((found for part in model.modules() if (found := look(part)) is not None), None)


def group_to_try(model: nn.Module, group: str | ImageGroup | None) -> ImageGroup:
    if group is not None:
        return as_image_group(group)

    def own(part: Any) -> ImageGroup | None:
        found = getattr(part, "group", None)
        return found if isinstance(found, ImageGroup) else None

    return _found_in_parts(model, own) or as_image_group("flop")


def own_input_size(model: nn.Module) -> tuple[int, ...]:
    """The image size that a network, or a part of it, says: (height, width), or with channels in front.

    Raises:
        ValueError: if none does.
    """

    def built_for(part: Any) -> tuple[int, ...] | None:
        for holder in (getattr(part, "patch_embed", None), getattr(part, "stem", None), part):
            size = getattr(holder, "img_size", None)
            if size is not None:
                return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return None

    def configured(part: Any) -> tuple[int, ...] | None:
        cfg = getattr(part, "pretrained_cfg", None)
        size = cfg.get("input_size") if isinstance(cfg, dict) else None
        return None if size is None else tuple(size)[-2:]

    size = _found_in_parts(model, built_for) or _found_in_parts(model, configured)
    if size is None:
        raise ValueError(
            f"input_size is not given, and neither {type(model).__name__} nor a part of it says one; give (height, "
            "width) or (channels, height, width)"
        )
    return size


def image_shape(model: nn.Module, input_size: Any) -> tuple[int, ...]:
    """``(channels, height, width)``; channels are those that the model or a part of it says, or 3."""
    if not isinstance(input_size, (tuple, list)) or len(input_size) not in (2, 3) or min(input_size) < 1:
        raise ValueError(
            f"input_size={input_size!r} must be (height, width) or (channels, height, width), all positive"
        )
    if len(input_size) == 3:
        return tuple(input_size)
    channels = _found_in_parts(model, lambda part: getattr(part, "in_chans", None))
    return (int(channels or 3), *input_size)
