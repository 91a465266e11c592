"""Official octic ViT state dicts (arXiv 2505.15441), hybrid and invariant, DeiT III and DINOv2 flavours.

There a feature is a tuple of the one-dimensional irreps and a tensor ``[2, 2c]`` for E, whose two copies, "left" and
"right", lie behind each other; with the copies in this order its layout is ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiflop.convert.mapping import Mapping
from equiflop.grids import grid_decomposition
from equiflop.models import EquivariantVisionTransformer
from equiflop.models.transition import ToInvariants
from equiflop.nn import Block, LayerNorm, LayerScale, Linear, PatchEmbed, PositionEmbedding

#: One-dimensional irreps with their values on the quarter turn and on the left-right mirror.
CHARACTERS = {"A1": (1, 1), "A2": (1, -1), "B1": (-1, 1), "B2": (-1, -1)}
#: Names of what is stored per component, in the official order; E has two copies.
COMPONENTS = (*CHARACTERS, "E_left", "E_right")
#: The published spatial domain differs from ours by this orthogonal map of the two copies of E.
COPIES = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu") / math.sqrt(2.0)
#: Parts of a training checkpoint that belong to losses, not to the network.
LOSS_HEADS = ("dino_head.", "ibot_head.")


def map_octic_vit(mapping: Mapping, model: EquivariantVisionTransformer) -> None:
    """Fill in the model's state dict.

    Raises:
        ValueError: if the two do not fit, naming the first entry that does not.
    """
    if model.design == "equivariant":
        raise ValueError(
            "model is octic in every block, which no published network is; "
            "use octic_hybrid_deit3_* or octic_inv_deit3_*"
        )
    if any(True for _ in model.fc_norm.parameters()):
        raise ValueError("fc_norm=True norms the pooled token, the official network every token; use fc_norm=False")
    _patch_embed(mapping, model.patch_embed, model.patch_embed.proj.out_rep.multiplicities[0])
    _tokens(mapping, model)
    if model.pos_embed is not None:
        _position_embedding(mapping, model.pos_embed)
    for i, block in enumerate(model.blocks):
        if isinstance(block, Block):
            _octic_block(mapping, block, f"blocks.{i}")
        else:
            mapping.plain_block(block, f"blocks.{i}", f"blocks.{i}")
    if model.design == "invariant":
        name, enter = next((name, part) for name, part in model.named_modules() if isinstance(part, ToInvariants))
        if enter.invariants.kind != "norm":
            raise ValueError(f"invariants={enter.invariants.kind!r} are not those of the official networks; use 'norm'")
        mapping.plain(enter.proj, "invariant_proj", f"{name}.proj")
    for name, parameter in model.norm.named_parameters(recurse=False):
        mapping.out[f"norm.{name}"] = mapping.official.take(f"norm.{name}", parameter.shape)
    mapping.plain(model.head, "head", "head")
    mapping.official.leave_out(LOSS_HEADS, "part of a training loss")


def unfold(quadrant: Tensor, component: str) -> Tensor:
    """The square that a component's top-left quadrant stands for, without the published scale.

    Args:
        quadrant: shape ``(..., h, h)``, axes row and column.
        component: one of :data:`COMPONENTS`.

    Returns:
        shape ``(d, ..., 2h, 2h)``, one square per row of the irrep.
    """
    half = quadrant.shape[-1]
    padded = torch.nn.functional.pad(quadrant, (0, half, 0, half))
    if component.startswith("E"):
        top = padded + padded.flip(-2)
        row = top - top.flip(-1)
        return torch.stack([row, torch.rot90(row, 1, (-2, -1))])
    turn, mirror = CHARACTERS[component]
    turned = [turn**k * torch.rot90(padded, k, (-2, -1)) for k in range(4)]
    return torch.stack([part + mirror * part.flip(-1) for part in turned]).sum(0, keepdim=True)


def _patch_embed(mapping: Mapping, embed: PatchEmbed, channels: int) -> None:
    """Kernels unfolded, then written in the orthonormal pixel coordinates of a patch."""
    height, width = embed.patch_size
    if height != width or height % 2:
        raise ValueError(f"patch_size={embed.patch_size}: official octic models have square patches of even side")
    decomposition = grid_decomposition(embed.group, height, width)
    basis = torch.from_numpy(np.array(decomposition.matrix))
    rows: dict[str, list[Tensor]] = {}
    for component in COMPONENTS:
        name = f"patch_embed.lift8.conv_{component}"
        quadrant = mapping.official.take(f"{name}.weight", (channels, embed.in_chans, height // 2, height // 2))
        scale = 0.5 if component.startswith("E") else math.sqrt(2.0) / 4.0
        rows.setdefault(component[:2].rstrip("_"), []).append(scale * unfold(quadrant, component)[0].flatten(2))
    for block in decomposition.rep.blocks():
        name = f"proj.{block.irrep.name}.weight"
        if block.multiplicity:
            pixels = basis[block.start : block.start + block.multiplicity]  # first row of the irrep
            kernel = torch.cat(rows[block.irrep.name])  # channels, in_chans, pixels
            mapping.out[f"patch_embed.{name}"] = torch.einsum("kp,ocp->okc", pixels, kernel).flatten(1)
    if embed.proj.bias is not None:
        bias = mapping.official.take("patch_embed.lift8.conv_A1.bias", (channels,))
        mapping.out["patch_embed.proj.A1.bias"] = bias


def _tokens(mapping: Mapping, model: EquivariantVisionTransformer) -> None:
    """Class, register and mask tokens: the trivial component alone is not zero."""
    channels = model.rep.multiplicities[0]
    for official, ours, count in (
        ("cls_token", "cls_token", 1),
        ("register_tokens", "reg_token", model.num_reg_tokens),
    ):
        token = getattr(model, ours)
        if token is None:
            continue
        mapping.out[ours] = mapping.official.take(f"{official}.0", (1, count, channels))
        by_rows = official == "cls_token" and f"{official}.5" not in mapping.official  # E as one tensor
        for i in range(1, 5 if by_rows else 8):
            shape = (1, count, 2, 2 * channels) if i == 4 and by_rows else (1, count, channels)
            mapping.official.drop(f"{official}.{i}", torch.zeros(shape), "zero")
    for i in range(8):
        if f"mask_token.{i}" in mapping.official:
            reason = "only training with masked patches uses it"
            mapping.official.ignore(f"mask_token.{i}", (1, channels), reason)


def _position_embedding(mapping: Mapping, pos_embed: PositionEmbedding) -> None:
    rows, columns = pos_embed.grid_size
    if rows != columns or rows % 2:
        raise ValueError(f"the token grid {rows}x{columns} is not a square of even side; official octic grids are")
    channels = pos_embed.rep.multiplicities[0]
    parts: list[Tensor] = []
    for i, component in enumerate(COMPONENTS):
        quadrant = mapping.official.take(f"pos_embed.{i}", (rows // 2, rows // 2, channels))
        parts.append(unfold(quadrant.permute(2, 0, 1), component))  # d, channels, rows, columns
    field = torch.cat([*(part[0] for part in parts[:4]), torch.cat(parts[4:], dim=1).flatten(0, 1)])
    exact = PositionEmbedding(pos_embed.rep, pos_embed.group, (rows, columns), device="cpu", dtype=torch.float64)
    exact.set_field(field.flatten(1).T)
    mapping.out.update({f"pos_embed.{name}": value for name, value in exact.state_dict().items()})


def _octic_block(mapping: Mapping, block: Block, name: str) -> None:
    for branch, norm, scale in (("1", block.norm1, block.ls1), ("2", block.norm2, block.ls2)):
        _layer_norm(mapping, norm, f"{name}.norm{branch}")
        _layer_scale(mapping, scale, name, branch)
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        linear: Any = block.get_submodule(part)
        _linear(mapping, linear, f"{name}.{part}")
    into, out_of = f"{name}.mlp.fc1.E.weight", f"{name}.mlp.fc2.E.weight"
    mapping.out[into] = torch.einsum("ij,jcm->icm", COPIES, mapping.out[into].unflatten(0, (2, -1))).flatten(0, 1)
    mapping.out[out_of] = torch.einsum("mjc,ij->mic", mapping.out[out_of].unflatten(1, (2, -1)), COPIES).flatten(1)


def _linear(mapping: Mapping, linear: Linear, name: str) -> None:
    for irrep, weight in linear.weights():
        found = mapping.official.take(f"{name}.lin_{irrep.name}.weight", weight.shape)
        mapping.out[f"{name}.{irrep.name}.weight"] = linear.gain(irrep) * found
    if linear.bias is not None:
        bias = mapping.official.take(f"{name}.lin_A1.bias", linear.bias.shape)
        mapping.out[f"{name}.A1.bias"] = linear.bias_gain * bias


def _layer_norm(mapping: Mapping, norm: LayerNorm, name: str) -> None:
    assert norm.weight is not None and norm.bias is not None
    mapping.out[f"{name}.weight"] = _per_multiplicity(mapping, norm, f"{name}.scaling")
    mapping.out[f"{name}.bias"] = mapping.official.take(f"{name}.scaling.beta", norm.bias.shape)


def _layer_scale(mapping: Mapping, scale: torch.nn.Module, block: str, branch: str) -> None:
    if isinstance(scale, LayerScale):
        names = (f"{block}.gamma_{branch}", f"{block}.ls{branch}")
        source = next((name for name in names if f"{name}.alpha_A1" in mapping.official), names[0])
        mapping.out[f"{block}.ls{branch}.gamma"] = _per_multiplicity(mapping, scale, source)


def _per_multiplicity(mapping: Mapping, module: LayerNorm | LayerScale, source: str) -> Tensor:
    """``alpha_A1`` to ``alpha_E`` behind each other."""
    named = zip(module.rep.group.irreps, module.rep.multiplicities, strict=True)
    return torch.cat([mapping.official.take(f"{source}.alpha_{irrep.name}", (m,)) for irrep, m in named])
