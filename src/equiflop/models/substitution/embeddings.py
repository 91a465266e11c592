"""Patch embeddings."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import PatchEmbed
from torch import nn

from equiflop import nn as enn
from equiflop.models import twin_layers
from equiflop.models.substitution.checks import check_learned, check_linear, check_no_padding, check_patches, only
from equiflop.models.substitution.parts import Substitution, rule
from equiflop.models.tied import become


@rule(PatchEmbed)
def patch_embed(parts: Substitution, embed: PatchEmbed, path: str) -> enn.PatchEmbed:
    """Patch embedding, with the norm behind it."""
    only(embed, path, modules=("proj", "norm"))
    check_no_padding(embed)
    conv = embed.proj
    check_patches(conv, f"{path}.proj", embed.patch_size, parts.rep.dim)
    if embed.img_size is None or (not embed.flatten and embed.output_fmt not in ("NHWC", "NLC")):
        raise ValueError(f"{path} has img_size={embed.img_size}, output_fmt={embed.output_fmt}")
    made = enn.PatchEmbed(
        parts.rep,
        parts.group,
        embed.img_size,
        embed.patch_size,
        conv.in_channels,
        bias=conv.bias is not None,
        strict_img_size=embed.strict_img_size,
        output_fmt="NLC" if embed.flatten else embed.output_fmt.value,
        **parts.dd,
    )
    made.norm = parts.residual(embed.norm, f"{path}.norm")
    return made


def naflex_embeds(parts: Substitution, embeds: Any, path: str, in_chans: int) -> nn.Module:
    """The embedding of a NaFlexVit."""
    if embeds.pos_embed_type not in ("learned", "none"):
        raise ValueError(f"pos_embed={embeds.pos_embed_type!r} has no equivariant counterpart")
    only(embeds, path, ("cls_token", "reg_token", "pos_embed"), ("proj", "norm", "pos_drop"))
    check_no_padding(embeds)
    proj, patch = embeds.proj, embeds.patch_size
    check_learned(embeds.pos_embed, proj.weight.requires_grad)
    if isinstance(proj, nn.Conv2d):
        check_patches(proj, f"{path}.proj", patch, parts.rep.dim)
    else:
        check_linear(proj, f"{path}.proj", math.prod(patch) * in_chans, parts.rep.dim)
    size = tuple(p * n for p, n in zip(patch, embeds.pos_embed_grid_size or (1, 1), strict=True))
    options: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC", **parts.dd}
    embeds.proj = enn.PatchEmbed(parts.rep, parts.group, size, patch, in_chans, bias=proj.bias is not None, **options)
    embeds.norm = parts.residual(embeds.norm, f"{path}.norm")
    embeds.pos_drop = parts.residual(embeds.pos_drop, f"{path}.pos_drop")
    embeds.rep = parts.rep
    become(embeds, twin_layers.TwinNaFlexEmbeds)
    parts.tie_tokens(embeds, "cls_token", "reg_token")
    if embeds.pos_embed is not None:
        grid = embeds.pos_embed.shape[1:3]
        del embeds.pos_embed
        embeds.pos_embed = parts.field((grid[0], grid[1]), 0)
        embeds.pos_embed.resampling = {
            "mode": embeds.pos_embed_interp_mode,
            "antialias": embeds.pos_embed_antialias,
            "align_corners": embeds.pos_embed_align_corners,
        }
    embeds.reset_parameters()
    return embeds
