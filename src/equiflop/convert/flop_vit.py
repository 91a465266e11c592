"""Official E(ViT) state dicts (arXiv 2502.05169): every block, hybrid and early-invariant designs.

The official network keeps tokens as the left half of the grid followed by the mirrored right half, and features as two
tensors, symmetric and antisymmetric. Ours are in raster order, the antisymmetric channels behind the symmetric ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.convert.official import OfficialWeights
from equiflop.models import EquivariantVisionTransformer
from equiflop.nn import Block, LayerNorm, LayerScale, Linear


def convert_flop_vit(official: OfficialWeights, model: EquivariantVisionTransformer) -> dict[str, Tensor]:
    """The model's state dict, float64, from an official one.

    Raises:
        ValueError: if the two do not fit, naming the first entry that does not.
    """
    out: dict[str, Tensor] = {}
    _patch_embed(official, model, out)
    _tokens(official, model, out)
    for i, block in enumerate(model.blocks):
        if isinstance(block, Block):
            _equivariant_block(official, block, f"blocks.{i}", out)
        else:
            _plain_block(official, block, f"blocks.{i}", out)
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name)
        if isinstance(norm, LayerNorm):
            _norm(official, norm, "norm", name, out)
        elif not isinstance(norm, nn.Identity):
            _plain(official, norm, "norm", name, out)
    if not isinstance(model.head, nn.Identity):
        _plain(official, model.head, "head", "head", out)
    return out


def _patch_embed(official: OfficialWeights, model: EquivariantVisionTransformer, out: dict[str, Tensor]) -> None:
    """Left halves of the kernels. ``sqrt(1/2)`` times the sum of both halves is our symmetric coordinate."""
    embed = model.patch_embed
    height, width = embed.patch_size
    if width % 2:
        raise ValueError(f"patch_size={embed.patch_size} is odd in width; official models have even patches")
    half = model.embed_dim // 2
    for irrep, part in zip(("A", "B"), ("sym", "asym"), strict=True):
        kernel = official.take(f"patch_embed.proj_{part}.weight", (half, embed.in_chans, height, width // 2))
        out[f"patch_embed.proj.weight_{irrep}"] = kernel.permute(0, 2, 3, 1).flatten(1)
    if embed.proj.bias is not None:
        out["patch_embed.proj.bias"] = official.take("patch_embed.proj_sym.bias", (half,)) * math.sqrt(0.5)
    rows, columns = embed.grid_size
    permutation = "patch_embed.flatten_and_permute.permutation"
    if permutation in official:
        raster = torch.arange(rows * columns).view(rows, columns)
        left, right = raster[:, : columns // 2], raster[:, columns // 2 :].flip(1)
        expected = torch.cat([left.flatten(), right.flatten()])
        official.drop(permutation, expected, f"the token order of a {rows}x{columns} grid")


def _tokens(official: OfficialWeights, model: EquivariantVisionTransformer, out: dict[str, Tensor]) -> None:
    half = model.embed_dim // 2
    if model.cls_token is not None:
        out["cls_token"] = official.take("cls_token.0", (1, 1, half))
        official.drop("cls_token.1", torch.zeros(1, 1, half), "zero")
    if model.pos_embed is not None:
        for i, irrep in enumerate(("A", "B")):
            shape = model.pos_embed.get_parameter(f"weight_{irrep}").shape
            out[f"pos_embed.weight_{irrep}"] = official.take(f"pos_embed.{i}", (1, *shape))[0]


def _equivariant_block(official: OfficialWeights, block: Block, name: str, out: dict[str, Tensor]) -> None:
    for branch, norm, scale in (("1", block.norm1, block.ls1), ("2", block.norm2, block.ls2)):
        _norm(official, norm, f"{name}.norm{branch}", f"{name}.norm{branch}", out)
        if isinstance(scale, LayerScale):
            out[f"{name}.ls{branch}.gamma"] = _both(official, f"{name}.gamma_{branch}.alpha", scale.gamma)
    for part, linear in (
        ("attn.qkv", block.attn.qkv),
        ("attn.proj", block.attn.proj),
        ("mlp.fc1", block.mlp.fc1),
        ("mlp.fc2", block.mlp.fc2),
    ):
        _linear(official, linear, f"{name}.{part}", out)
    mixer = f"{name}.attn.attn_mixer"
    if mixer in official:  # logits = m0 * (symmetric term) + m1 * (antisymmetric term): a factor of the queries
        for irrep, factor in zip(("A", "B"), official.take(mixer, (2,)), strict=True):
            queries = out[f"{name}.attn.qkv.weight_{irrep}"]
            queries[: len(queries) // 3] *= factor
            if irrep == "A" and block.attn.qkv.bias is not None:
                bias = out[f"{name}.attn.qkv.bias"]
                bias[: len(bias) // 3] *= factor


def _linear(official: OfficialWeights, linear: Linear, name: str, out: dict[str, Tensor]) -> None:
    for irrep, part in zip(("A", "B"), ("sym", "asym"), strict=True):
        weight = linear.get_parameter(f"weight_{irrep}")
        out[f"{name}.weight_{irrep}"] = official.take(f"{name}.linear_{part}.weight", weight.shape)
    if linear.bias is not None:
        out[f"{name}.bias"] = official.take(f"{name}.linear_sym.bias", linear.bias.shape)


def _norm(official: OfficialWeights, norm: LayerNorm, source: str, target: str, out: dict[str, Tensor]) -> None:
    assert norm.weight is not None and norm.bias is not None
    out[f"{target}.weight"] = _both(official, f"{source}.scaling.alpha", norm.weight)
    out[f"{target}.bias"] = official.take(f"{source}.scaling.beta", norm.bias.shape)


def _both(official: OfficialWeights, name: str, like: Tensor) -> Tensor:
    half = (len(like) // 2,)
    return torch.cat([official.take(f"{name}_sym", half), official.take(f"{name}_asym", half)])


def _plain_block(official: OfficialWeights, block: Any, name: str, out: dict[str, Tensor]) -> None:
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        _plain(official, block.get_submodule(part), f"{name}.{part}", f"{name}.{part}", out)
    for branch in ("1", "2"):
        scale = block.get_submodule(f"ls{branch}")
        if not isinstance(scale, nn.Identity):
            out[f"{name}.ls{branch}.gamma"] = official.take(f"{name}.gamma_{branch}", scale.gamma.shape)


def _plain(official: OfficialWeights, module: nn.Module, source: str, target: str, out: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        out[f"{target}.{name}"] = official.take(f"{source}.{name}", parameter.shape)
