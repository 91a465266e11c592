"""Official E(ResMLP) state dicts (arXiv 2502.05169).

The official network keeps its tokens in symmetric and antisymmetric combinations of mirror images all the way; ours are
in raster order between blocks and combined inside.
"""

from __future__ import annotations

import math

import torch

from equiflop.convert.flop_parts import PARTS, FlopMapping
from equiflop.models import EquivariantResMLP
from equiflop.models.resmlp_layers import ChannelMlp, EquivariantResBlock


def map_flop_resmlp(mapping: FlopMapping, model: EquivariantResMLP) -> None:
    """Fill in the model's state dict.

    Raises:
        ValueError: if the two do not fit, naming the first entry that does not.
    """
    mapping.patch_embed(model.stem, "patch_embed", "stem", math.sqrt(2.0), 1.0)
    indices = mapping.left_and_right(model.stem.grid_size)
    for side, index in zip(("left", "right"), indices, strict=True):
        name = f"patch_embed.flatten_and_permute_to_fourier.{side}_idx"
        if name in mapping.official:
            mapping.official.drop(name, index, "the token order of a {}x{} grid".format(*model.stem.grid_size))
    for i, block in enumerate(model.blocks):
        _block(mapping, block, f"blocks.{i}")
    for ours, official in (("weight", "alpha"), ("bias", "beta")):
        mapping.out[f"head_norm.{ours}"] = mapping.official.take(f"norm.{official}", (model.head_hidden_size,))
    mapping.plain(model.head, "head", "head")


def _block(mapping: FlopMapping, block: EquivariantResBlock, name: str) -> None:
    channels = (block.ls1.rep.multiplicities[0],)
    for branch, norm, scale in (("1", block.norm1, block.ls1), ("2", block.norm2, block.ls2)):
        mapping.scale(norm, f"{name}.norm{branch}", f"{name}.norm{branch}")
        mapping.scale(scale, f"{name}.gamma_{branch}", f"{name}.ls{branch}")
        for _, part in PARTS:
            mapping.official.ignore(f"{name}.norm{branch}.beta_{part}", channels, "the official network never uses it")
    tokens = block.linear_tokens
    mapping.linear(tokens.linear, f"{name}.attn", f"{name}.linear_tokens.linear", stem="lin")
    biases = [
        mapping.official.take(f"{name}.attn.lin_{part}.bias", (count,))
        for (_, part), count in zip(PARTS, tokens.transform.rep.multiplicities, strict=True)
    ]
    mapping.out[f"{name}.linear_tokens.bias"] = torch.cat(biases)
    mlp = block.mlp_channels
    assert isinstance(mlp, ChannelMlp)
    for part, linear, bias in (("1", mlp.fc1, mlp.bias1), ("2", mlp.fc2, mlp.bias2)):
        mapping.linear(linear, f"{name}.mlp.fc{part}", f"{name}.mlp_channels.fc{part}", stem="lin")
        halves = [
            mapping.official.take(f"{name}.mlp.fc{part}.lin_{suffix}.bias", (len(bias.bias) // 2,))
            for _, suffix in PARTS
        ]
        mapping.out[f"{name}.mlp_channels.bias{part}.bias"] = torch.cat(halves)
