"""What a twin computes, by the plain network itself: with a plain network in every copy it is that network, seen from
every side.

A twin of ``|G|`` times the width can hold a plain network in each of the ``|G|`` copies of the group's basis. Then copy
``g`` of its features must be the plain network's features of ``g^-1 x``, and its logits the mean over the copies. Norms
over all copies are taken out of both, since they would mix them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from equiflop import nn as enn
from equiflop.groups import fourier_matrix
from equiflop.groups.rep import Rep
from equiflop.image_group import ImageGroup, named_image_group
from equiflop.models.twin import twin
from oracles import relative_error

NAMES = (
    "vit_small_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_siglip_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
    "eva_giant_patch14_224",
    "eva02_base_patch14_224",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_mixed_ape_224",
    "vit_base_patch16_sapiens2",
    "beit_base_patch16_224",
    "vit_relpos_base_patch16_cls_224",
    "vit_srelpos_small_patch16_224",
    "naflexvit_base_patch16_map",
    "samvit_base_patch16",
)
pytestmark = pytest.mark.filterwarnings("ignore:the twin is untrained:equiflop.EquiflopWarning")


def without_norms(network: Any) -> Any:
    """The network without norms over the whole width; those of single heads stay."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm | RmsNorm | enn.TiedNorm) and name not in (
                "q_norm",
                "k_norm",
                "sub_norm",
            ):
                setattr(module, name, nn.Identity())
    return network


def plain_network(name: str, copies: int) -> Any:
    patch = 14 if "patch14" in name else 16
    options: dict[str, Any] = {"embed_dim": 32 * copies, "num_heads": 2 * copies, "depth": 2, "mlp_ratio": 3.0}
    options |= {"pos_embed_grid_size": (3, 3)} if "naflex" in name else {"img_size": 3 * patch}
    if "samvit" in name:
        options |= {"neck_chans": 8 * copies, "window_size": 2, "global_attn_indexes": (1,)}
    if "sapiens2" in name:
        options["num_kv_heads"] = copies
    return without_norms(timm.create_model(name, num_classes=5, **options).double()).eval()


@torch.no_grad()
def shrink(network: Any) -> None:
    """Weights that keep features of order one through blocks without norms."""
    for name, parameter in network.named_parameters():
        scale = 0.5 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(scale * torch.randn_like(parameter))
        if name.endswith(("cls_token", "reg_token", "dist_token", "pos_embed", "freqs", "table")):
            parameter.copy_(torch.randn_like(parameter))


class Copies:
    """How tensors of the plain network lie in a twin that holds it ``|G|`` times."""

    def __init__(self, group: ImageGroup) -> None:
        self.group = group
        self.order = group.order
        self.fourier = torch.from_numpy(fourier_matrix(group.group))
        self.columns = [irrep.regular_multiplicity for irrep in group.irreps]

    def irreps(self, copies: Tensor) -> Tensor:
        """From ``(..., |G|, n)`` to the irreps' order ``(..., |G| * n)``."""
        n = copies.shape[-1]
        rows = torch.einsum("kg,...gn->...kn", self.fourier, copies)
        parts, start = [], 0
        for irrep, columns in zip(self.group.irreps, self.columns, strict=True):
            part = rows[..., start : start + irrep.dim * columns, :]
            parts.append(part.reshape(*rows.shape[:-2], irrep.dim * columns * n))
            start += irrep.dim * columns
        return torch.cat(parts, dim=-1)

    def fill_linear(self, made: enn.Linear, weight: Tensor, bias: Tensor | None) -> None:
        sections = made.out_order.sections
        apart = weight.unflatten(0, (sections, -1))
        for (irrep, own), columns in zip(made.weights(), self.columns, strict=True):
            block = torch.stack([torch.kron(torch.eye(columns).double(), part) for part in apart]).flatten(0, 1)
            own.copy_(made.gain(irrep) * block)
        if bias is not None:
            assert made.bias is not None
            made.bias.copy_(made.bias_gain * self.order**0.5 * bias)

    def fill_convolution(self, made: enn.TiedConv2d, weight: Tensor) -> None:
        """Copy g convolves copy g of the input with the kernel moved by g; nothing of the others."""
        made.weight.zero_()
        for g in range(self.order):
            moved = self.group.act_on_image(g, weight)  # out, in, k, k
            for places, values in zip(made.index[g, g], moved.permute(2, 3, 0, 1), strict=True):
                made.weight[places] = values

    def fill_patches(self, made: enn.PatchEmbed, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` of shape ``(C, in_chans, p, p)``: copy g has the kernel moved by g."""
        side = weight.shape[-1]
        moved = torch.stack([self.group.act_on_image(g, weight) for g in range(self.order)])  # G, C, in, p, p
        matrix = moved.permute(2, 3, 4, 0, 1).flatten(1, 2)  # in, pixels, G, C
        by_irrep = self.irreps(matrix)  # in, pixels, G * C
        transform = made.transform(torch.eye(side * side).double().unsqueeze(-1)).squeeze(-1)  # pixels, pixels
        blocks = torch.einsum("ipo,pk->oki", by_irrep, transform)  # outputs, rep of the pixels, in
        starts = zip(made.proj.weights(), made.proj.out_rep.blocks(), made.transform.rep.blocks(), strict=True)
        for (irrep, own), out, pixels in starts:
            block = blocks[out.start : out.start + out.multiplicity, pixels.start : pixels.start + pixels.multiplicity]
            own.copy_(made.proj.gain(irrep) * block.flatten(1))
        if bias is not None:
            assert made.proj.bias is not None
            made.proj.bias.copy_(self.order**0.5 * bias)


@torch.no_grad()
def fill(made: Any, plain: Any, group: ImageGroup) -> None:
    """Put the plain network's parameters into every copy of the twin."""
    copies = Copies(group)
    left = dict(plain.state_dict())
    for path, module in made.named_modules():
        at = f"{path}." if path else ""
        if isinstance(module, enn.PatchEmbed):
            origin = at if f"{at}proj.weight" in left else at.removesuffix("proj.")
            weight, bias = left.pop(f"{origin}proj.weight"), left.pop(f"{origin}proj.bias", None)
            if weight.ndim == 2:  # pixels, then channels
                weight = weight.unflatten(1, (*module.patch_size, -1)).permute(0, 3, 1, 2)
            copies.fill_patches(module, weight, bias)
        elif isinstance(module, enn.TiedConv2d):
            copies.fill_convolution(module, left.pop(f"{at}weight"))
        elif isinstance(module, enn.LinearToSeveral | enn.LinearFromSeveral):
            weight, bias = left.pop(f"{at}weight"), left.pop(f"{at}bias", None)
            into = isinstance(module, enn.LinearToSeveral)
            maps: list[Any] = list(module.parts)
            if into:
                widths = [p.out_order.sections * p.out_rep.dim // group.order for p in maps]
            else:
                widths = [p.in_rep.dim // group.order for p in maps]
            weights = weight.split(widths, dim=0 if into else 1)
            biases = [None] * len(widths) if bias is None else bias.split(widths) if into else (bias, None)
            for part, one_weight, one_bias in zip(maps, weights, biases, strict=True):
                copies.fill_linear(part, one_weight, one_bias)
        elif isinstance(module, enn.Linear):
            if f"{at}weight" in left:
                weight = left.pop(f"{at}weight").flatten(1)
                copies.fill_linear(module, weight, left.pop(f"{at}bias", None))
        elif isinstance(module, enn.PositionEmbedding):
            value = left.pop("pos_embed" if path == "patch_embed.positions" else path).flatten(1, -2)[0]
            prefix = 0 if module.prefix is None else len(module.prefix)
            if module.prefix is not None:
                module.prefix.copy_(group.order**0.5 * value[:prefix])
            image = value[prefix:].T.unflatten(1, module.grid_size)
            seen = torch.stack([group.act_on_image(g, image).flatten(1).T for g in range(group.order)], dim=1)
            module.set_field(copies.irreps(seen))
        elif isinstance(module, enn.LayerScale):
            module.gamma.copy_(left.pop(f"{at}gamma").repeat(sum(copies.columns)))
        elif isinstance(module, nn.Linear) and path in ("head", "head_dist", "head.fc"):
            module.weight.copy_(left.pop(f"{at}weight") / group.order**0.5)
            module.bias.copy_(left.pop(f"{at}bias"))
    stored = dict(made.named_parameters())
    for key, value in left.items():
        inner = (("rope.", "rope.rope."), ("rel_pos.", "rel_pos.bias."), ("attn.", "attn.core."))
        for name in (key, *(key.replace(*pair) for pair in inner)):
            if name in stored:
                kind = name.split(".")[-1]
                if kind in ("cls_token", "reg_token", "dist_token", "latent"):
                    value = group.order**0.5 * value
                if kind.startswith("gamma"):
                    value = value.repeat(sum(copies.columns))
                stored[name].copy_(value)
                break
        else:
            raise AssertionError(f"{key} of the plain network has no place in its twin")


@pytest.mark.parametrize("group", ["flop", "octic"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_plain_network_see_the_image_from_every_side(name: str, group: str) -> None:
    moves = named_image_group(group)
    plain = plain_network(name, 1)
    shrink(plain)
    made: Any = twin(plain_network(name, moves.order), group)
    fill(made, plain, moves)
    side = 14 if "patch14" in name else 16
    images = torch.randn(2, 3, 3 * side, 3 * side, dtype=torch.float64)
    with torch.no_grad():
        features = made.forward_features(images)
        seen = [plain.forward_features(moves.act_on_image(moves.group.inverse(g), images)) for g in range(moves.order)]
        prefix = getattr(plain, "num_prefix_tokens", 0)
        if features.ndim == 4:
            features = features.flatten(2).mT
            seen = [image.flatten(2).mT for image in seen]
        expected = []
        for g, tokens in enumerate(seen):  # back to where they stand in the image
            patches = tokens[:, prefix:].transpose(1, 2).unflatten(-1, (3, 3))
            patches = moves.act_on_image(g, patches).flatten(2).transpose(1, 2)
            expected.append(torch.cat([tokens[:, :prefix], patches], dim=1))
        assert relative_error(features, Copies(moves).irreps(torch.stack(expected, dim=-2))) < 1e-10
        logits = torch.stack([plain(moves.act_on_image(g, images)) for g in range(moves.order)]).mean(0)
        assert logits.std() > 1e-3
        assert relative_error(made(images), logits) < 1e-10


def test_the_copies_are_a_regular_feature() -> None:
    """The change of basis of this file is the one of the groups: features of copies transform by the Rep's matrices."""
    group = named_image_group("octic")
    copies = torch.randn(8, 3, dtype=torch.float64)
    rep = Rep.regular(group, 3)
    for a in range(8):
        moved = torch.empty_like(copies)
        for h in range(8):
            moved[group.group.multiply(a, h)] = copies[h]
        found = Copies(group).irreps(moved)
        assert np.allclose(found, rep.matrix(a) @ Copies(group).irreps(copies), atol=1e-12)
