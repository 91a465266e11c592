"""Official E(ConvNeXt) state dicts (arXiv 2502.05169), the staged and the isotropic network."""

from __future__ import annotations

import math
from typing import Any

import torch

from equiflop.convert.flop_parts import FlopMapping
from equiflop.models import EquivariantConvNeXt, EquivariantIsotropicConvNeXt
from equiflop.models.convnext_layers import EquivariantConvNeXtBlock
from equiflop.nn import DepthwiseConv, Downsample


def map_flop_convnext(mapping: FlopMapping, model: EquivariantConvNeXt | EquivariantIsotropicConvNeXt) -> None:
    """Fill in the model's state dict.

    Raises:
        ValueError: if the two do not fit, naming the first entry that does not.
    """
    stem: Any = model.stem
    if isinstance(model, EquivariantIsotropicConvNeXt):
        mapping.patch_embed(stem.proj, "stem", "stem.proj", 1.0, math.sqrt(0.5))
        for i, block in enumerate(model.blocks):
            _block(mapping, block, f"blocks.{i}", f"blocks.{i}")
    else:
        mapping.patch_embed(stem.proj, "downsample_layers.0.0", "stem.proj", 1.0, math.sqrt(0.5))
        mapping.layer_norm(stem.norm, "downsample_layers.0.1", "stem.norm")
        stages: Any = model.stages
        for i, stage in enumerate(stages):
            if i > 0:
                norm, downsample = stage.downsample
                mapping.layer_norm(norm, f"downsample_layers.{i}.0", f"stages.{i}.downsample.0")
                _downsample(mapping, downsample, f"downsample_layers.{i}.1", f"stages.{i}.downsample.1")
            for j, block in enumerate(stage.blocks):
                _block(mapping, block, f"stages.{i}.{j}", f"stages.{i}.blocks.{j}")
    mapping.plain(model.head.norm, "norm", "head.norm")
    mapping.plain(model.head.fc, "head", "head.fc")


def _block(mapping: FlopMapping, block: EquivariantConvNeXtBlock, source: str, target: str) -> None:
    _depthwise(mapping, block.conv_dw, f"{source}.dwconv", f"{target}.conv_dw")
    mapping.layer_norm(block.norm, f"{source}.norm", f"{target}.norm")
    mapping.linear(block.mlp.fc1, f"{source}.pwconv1", f"{target}.mlp.fc1", kernel=(1, 1))
    mapping.linear(block.mlp.fc2, f"{source}.pwconv2", f"{target}.mlp.fc2", kernel=(1, 1))
    mapping.scale(block.ls, f"{source}.gamma", f"{target}.ls")


def _depthwise(mapping: FlopMapping, conv: DepthwiseConv, source: str, target: str) -> None:
    """Symmetric kernels keep the irrep and are stored with their middle column, antisymmetric ones swap it."""
    side, part = conv.kernel_size, conv.part
    for irrep, paths, columns in (
        ("A", ("sym_to_sym", "asym_to_asym"), side // 2 + 1),
        ("B", ("asym_to_sym", "sym_to_asym"), side // 2),
    ):
        kernels = [mapping.official.take(f"{source}.{path}.weight", (part, 1, side, columns)) for path in paths]
        mapping.out[f"{target}.weight_{irrep}"] = torch.cat(kernels).flatten(1)
    for path in ("asym_to_sym", "sym_to_asym"):
        name = f"{source}.{path}.zero_center"
        if name in mapping.official:
            mapping.official.drop(name, torch.zeros(part, 1, side, 1), "zero")
    if conv.bias is not None:
        biases = [mapping.official.take(f"{source}.{path}.bias", (part,)) for path in ("sym_to_sym", "asym_to_sym")]
        mapping.out[f"{target}.bias"] = torch.cat(biases)


def _downsample(mapping: FlopMapping, downsample: Downsample, source: str, target: str) -> None:
    """Left columns of 2x2 kernels, which see ``sqrt(2)`` times our orthonormal pixel coordinates.

    Our inputs of an irrep are the products with symmetric pixels, then those with antisymmetric ones; the rows of a
    window are slow, the channels fast.
    """
    channels_in = downsample.in_rep.multiplicities[0]
    channels_out = downsample.proj.out_rep.multiplicities[0]
    for irrep, paths in (("A", ("sym_to_sym", "asym_to_sym")), ("B", ("asym_to_asym", "sym_to_asym"))):
        kernels = [
            mapping.official.take(f"{source}.{path}.weight", (channels_out, channels_in, 2, 1)) for path in paths
        ]
        columns = [kernel.squeeze(-1).transpose(1, 2).flatten(1) for kernel in kernels]
        mapping.out[f"{target}.proj.{irrep}.weight"] = math.sqrt(2.0) * torch.cat(columns, dim=1)
    if downsample.proj.bias is not None:
        mapping.out[f"{target}.proj.A.bias"] = mapping.official.take(f"{source}.sym_to_sym.bias", (channels_out,))
