"""What a vision network makes of images, as tokens: behind its last block and half way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.image_group import ImageGroup
from equiflop.models import IsotropicConvNeXt


@dataclass(frozen=True)
class Features:
    """What a network makes of images.

    Attributes:
        tokens: behind the last block, in transformers and MLPs behind the last norm, ``(B, N, C)``; tokens that are
            no patches first.
        middle: patch tokens half way, ``(B, patches, C')``: behind half of the blocks or the last stage but one.
        logits: ``(B, classes)``, or without a classifier the embedding, ``(B, channels)``.
    """

    tokens: Tensor
    middle: Tensor
    logits: Tensor

    def first(self, count: int) -> Features:
        """Those of the first images."""
        return Features(self.tokens[:count], self.middle[:count], self.logits[:count])


@dataclass(frozen=True)
class Maps:
    """Features with the patch tokens in their places.

    Attributes:
        prefix: tokens that are no patches, ``(B, K, C)``.
        last: the other tokens behind the last block, ``(B, C, H, W)``.
        middle: those half way, ``(B, C', H', W')``.
        logits: ``(B, classes)``.
    """

    prefix: Tensor
    last: Tensor
    middle: Tensor
    logits: Tensor

    def moved(self, group: ImageGroup, a: int) -> Maps:
        """The same with every map moved by a group element, as an image is; channels stay as they are."""
        last, middle = (group.act_on_image(a, part) for part in (self.last, self.middle))
        return Maps(self.prefix, last, middle, self.logits)

    def features(self) -> Features:
        """As tokens, places in raster order."""
        last, middle = (part.flatten(2).mT for part in (self.last, self.middle))
        return Features(torch.cat([self.prefix, last], dim=1), middle, self.logits)


def maps_of(model: Any, images: Tensor) -> Maps:
    """Features of a network of timm, or of its twin.

    Args:
        model: a vision transformer, ResMLP or ConvNeXt.
        images: ``(B, colours, H, W)``.
    """
    at = _half_way(model)
    if has_maps(model):
        last, (middle,) = model.forward_intermediates(images, [at])
        return Maps(last.new_zeros(len(last), 0, last.shape[1]), last, middle, model.forward_head(last))
    tokens, (middle,) = model.forward_intermediates(images, [at], output_fmt="NLC")
    grid, prefix = grid_of(model), prefix_tokens(model)
    last, middle = (part.mT.unflatten(2, grid) for part in (tokens[:, prefix:], middle))
    return Maps(tokens[:, :prefix], last, middle, model.forward_head(tokens))


def features_of(model: Any, images: Tensor) -> Features:
    """The same as tokens."""
    return maps_of(model, images).features()


def has_maps(model: nn.Module) -> bool:
    """Whether features are maps, not tokens."""
    return isinstance(model, ConvNeXt | IsotropicConvNeXt)


def prefix_tokens(model: Any) -> int:
    """How many tokens are no patches."""
    return int(getattr(model, "num_prefix_tokens", 0))


def class_tokens(model: Any) -> int:
    """How many tokens, the first ones, answers are read from: a class token and DeiT's distillation token."""
    return sum(getattr(model, name, None) is not None for name in ("cls_token", "dist_token"))


def grid_of(model: Any) -> tuple[int, int]:
    """Rows and columns of patches of a transformer or an MLP."""
    embed = model.stem if hasattr(model, "stem") else model.patch_embed
    height, width = embed.grid_size
    return int(height), int(width)


def widths(model: Any) -> tuple[int, int]:
    """Channels of the tokens behind the last block and half way."""
    last, middle = model.feature_info[-1], model.feature_info[_half_way(model)]
    return int(last["num_chs"]), int(middle["num_chs"])


def types(model: Any) -> tuple[Rep, Rep]:
    """Types of an equivariant network's features behind the last block and half way."""
    if hasattr(model, "stages"):
        return model.reps[-1], model.reps[_half_way(model)]
    return model.rep, model.rep


def _half_way(model: Any) -> int:
    """The block or stage behind which the middle lies."""
    if hasattr(model, "stages"):
        return max(len(model.stages) - 2, 0)
    return max(len(model.blocks) // 2, 1) - 1
