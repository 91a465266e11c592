"""Small E(ViT)s made by the registered entry points, and how their outputs must move."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

import equiflop  # noqa: F401  (registers the models)
from equiflop.models import EquivariantVisionTransformer
from oracles import image_group, move_tensor, move_tokens, relative_error, scramble

#: One registered name per design; the sizes of a design differ in numbers alone.
DESIGNS = {
    "equivariant": "flop_deit3_small_patch16_224",
    "hybrid": "flop_hybrid_deit3_small_patch16_224",
    "invariant": "flop_inv_deit3_small_patch16_224",
}


def small_vit(name: str = DESIGNS["equivariant"], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """A registered model with two thin equivariant blocks (and two plain ones), in evaluation mode."""
    depth = 2 if name.startswith("flop_deit3") else 4
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 7}
    return timm.create_model(name, **{**options, **kwargs}).to(dtype).eval()


def scrambled(model: EquivariantVisionTransformer) -> Any:
    """All parameters of order one."""
    return scramble(model)


def images_for(model: Any, size: tuple[int, int] = (32, 32), batch: int = 2) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, model.patch_embed.in_chans, *size).to(dtype)


@torch.no_grad()
def worst_error(model: Any, name: str, size: tuple[int, int] = (32, 32), spread: float = 1e-4) -> float:
    """Largest relative error of logits and features over all elements of a named group.

    Logits that differ by less than ``spread`` between two images would make their invariance worthless.
    """
    images = images_for(model, size)
    grid = (size[0] // model.patch_embed.patch_size[0], size[1] // model.patch_embed.patch_size[1])
    prefix = model.num_prefix_tokens
    logits, features = model(images), model.forward_features(images)
    assert torch.isfinite(logits).all() and (logits[0] - logits[1]).abs().max() >= spread * logits.abs().max()
    worst = 0.0
    for a in range(image_group(name).order):
        moved = move_tensor(name, a, images.double()).to(images.dtype)
        if model.design != "hybrid":
            expected = logits
            if model.global_pool == "":
                expected = torch.cat([logits[:, :prefix], move_grid(name, a, logits[:, prefix:], grid)], 1)
            worst = max(worst, relative_error(model(moved), expected))
        if model.design == "equivariant":
            expected = move_tokens(name, model.rep, a, features.double(), grid, prefix)
            worst = max(worst, relative_error(model.forward_features(moved), expected))
        elif model.design == "invariant":  # behind the invariants the group moves tokens alone
            expected = torch.cat([features[:, :prefix], move_grid(name, a, features[:, prefix:], grid)], 1)
            worst = max(worst, relative_error(model.forward_features(moved), expected))
        if model.equivariant_depth == 0:
            continue
        steps = [i for i in range(len(model.blocks)) if i < model.equivariant_depth]
        here = model.forward_intermediates(images, steps, output_fmt="NLC", intermediates_only=True)
        there = model.forward_intermediates(moved, steps, output_fmt="NLC", intermediates_only=True)
        for before, after in zip(here, there, strict=True):
            worst = max(worst, relative_error(after, move_tokens(name, model.rep, a, before.double(), grid)))
    return worst


def move_grid(name: str, a: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Move patch tokens ``(B, N, C)`` and leave their channels as they are."""
    patches = tokens.unflatten(1, grid).permute(0, 3, 1, 2).double().contiguous()
    return move_tensor(name, a, patches).permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)
