"""Official E(ViT) state dicts (arXiv 2502.05169): every block, hybrid and early-invariant designs."""

from __future__ import annotations

import math
from typing import Any

import torch

from equiflop.convert.flop_parts import PARTS, FlopMapping
from equiflop.models import EquivariantVisionTransformer
from equiflop.nn import Block, LayerNorm


def map_flop_vit(mapping: FlopMapping, model: EquivariantVisionTransformer) -> None:
    """Fill in the model's state dict.

    Raises:
        ValueError: if the two do not fit, naming the first entry that does not.
    """
    mapping.patch_embed(model.patch_embed, "patch_embed", "patch_embed", 1.0, math.sqrt(0.5))
    permutation = "patch_embed.flatten_and_permute.permutation"
    if permutation in mapping.official:
        rows, columns = model.patch_embed.grid_size
        order = torch.cat(mapping.left_and_right((rows, columns)))
        mapping.official.drop(permutation, order, f"the token order of a {rows}x{columns} grid")
    _tokens(mapping, model)
    for i, block in enumerate(model.blocks):
        if isinstance(block, Block):
            _equivariant_block(mapping, block, f"blocks.{i}")
        else:
            mapping.plain_block(block, f"blocks.{i}", f"blocks.{i}")
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name)
        if isinstance(norm, LayerNorm):
            mapping.layer_norm(norm, "norm", name)
        else:
            mapping.plain(norm, "norm", name)
    mapping.plain(model.head, "head", "head")


def _tokens(mapping: FlopMapping, model: EquivariantVisionTransformer) -> None:
    half = model.embed_dim // 2
    if model.cls_token is not None:
        mapping.out["cls_token"] = mapping.official.take("cls_token.0", (1, 1, half))
        mapping.official.drop("cls_token.1", torch.zeros(1, 1, half), "zero")
    if model.pos_embed is not None:
        for i, (irrep, _) in enumerate(PARTS):
            shape = model.pos_embed.get_parameter(f"weight_{irrep}").shape
            mapping.out[f"pos_embed.weight_{irrep}"] = mapping.official.take(f"pos_embed.{i}", (1, *shape))[0]


def _equivariant_block(mapping: FlopMapping, block: Block, name: str) -> None:
    for branch, norm, scale in (("1", block.norm1, block.ls1), ("2", block.norm2, block.ls2)):
        mapping.layer_norm(norm, f"{name}.norm{branch}", f"{name}.norm{branch}")
        mapping.scale(scale, f"{name}.gamma_{branch}", f"{name}.ls{branch}")
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        linear: Any = block.get_submodule(part)
        mapping.linear(linear, f"{name}.{part}", f"{name}.{part}")
    mixer = f"{name}.attn.attn_mixer"
    if mixer in mapping.official:  # logits = m0 * (symmetric term) + m1 * (antisymmetric term): a factor of the queries
        queries = block.rep.multiplicities[0]
        for (irrep, _), factor in zip(PARTS, mapping.official.take(mixer, (2,)), strict=True):
            mapping.out[f"{name}.attn.qkv.{irrep}.weight"][:queries] *= factor
            if irrep == "A" and block.attn.qkv.bias is not None:
                mapping.out[f"{name}.attn.qkv.A.bias"][:queries] *= factor
