"""A network brought into the form made for runtimes: constants folded, so that few, large, standard operators are left.

What :mod:`equiflop.kernels.runtime` cannot do, since it needs other weights, happens here, on a copy:

* the patch embedding becomes one convolution with its whole kernel, a position embedding and a bias that depends on the
  token one constant, token mixing one dense product;
* layer scales and affine parts of norms move into the linear maps beside them;
* in E(ViT) whatever is added to the residual stream is centred, row by row. All norms subtract the means of rows, so
  nothing else sees the difference, and the norms become plain layer norms, which runtimes know. Where the rows of an
  irrep weigh less in the norm (octic ViTs), those channels of the stream are scaled, so that all weigh the same.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Format
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.inference import fold_constants, holds_its_weights
from equiflop.kernels import join, layout_of, split
from equiflop.kernels.layout import per_channel
from equiflop.kernels.norm import entry_weights
from equiflop.models.dense import DenseModel
from equiflop.models.equivariant_resmlp import EquivariantResBlock, MatchedBias
from equiflop.models.equivariant_transformer import TOKENS, EquivariantTransformer
from equiflop.models.tied import become
from equiflop.nn import Block, LayerNorm, LayerScale, PatchEmbed, PositionEmbedding, TokenMixing
from equiflop.nn.checks import check_images


class FoldedPatchEmbed(PatchEmbed):
    """A patch embedding as one convolution."""

    kernel: Tensor
    kernel_bias: Tensor | None

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for images ``(B, C, H, W)``: those of the plain network."""
        return shapes[0].numel() * len(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.img_size if self.strict_img_size else None, self.patch_size)
        x = F.conv2d(x, self.kernel, self.kernel_bias, stride=self.patch_size)
        if self.output_fmt == Format.NHWC:
            return self.norm(x.permute(0, 2, 3, 1))
        return self.norm(x.flatten(2).transpose(1, 2))


class FixedField(nn.Module):
    """A position embedding as a constant; on another grid than its own it is made as before.

    Args:
        made_by: the position embedding.
    """

    field: Tensor

    def __init__(self, made_by: PositionEmbedding) -> None:
        super().__init__()
        self.register_buffer("field", made_by())
        self.grid_size = made_by.grid_size
        self.made_by: PositionEmbedding | None = made_by

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        if grid_size is None or tuple(grid_size) == self.grid_size:
            return self.field
        if self.made_by is None:
            raise ValueError(f"this network was prepared for {self.grid_size} tokens, not {tuple(grid_size)}")
        return self.made_by(grid_size)


class MixedTokens(nn.Module):
    """Token mixing as one dense product, affine "norm" and layer scale with it: ``M (x * factor) + table``.

    The product has the MACs of the plain network, twice those of the map taken apart into irreps. In its place go the
    transforms of all tokens, which cost runtimes more.

    Args:
        block: the block whose first branch it is.
    """

    matrix: Tensor
    factor: Tensor
    table: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        mixing, norm, scale = block.linear_tokens, block.norm1, block.ls1
        tokens, rep = mixing.transform.rep.dim, mixing.rep
        like = mixing.bias
        nothing = torch.zeros(1, tokens, rep.dim, dtype=like.dtype, device=like.device)
        at_rest = mixing(nothing)[0]
        columns = []
        for token in range(tokens):  # one after the other: together they take as many images as there are tokens
            nothing[:, token] = 1.0
            columns.append(mixing(nothing)[0, :, 0] - at_rest[:, 0])
            nothing[:, token] = 0.0
        gamma = per_channel(scale.gamma, layout_of(rep))
        shift = norm(torch.zeros_like(at_rest))
        self.register_buffer("matrix", torch.stack(columns, dim=1))
        self.register_buffer("factor", gamma * (norm(torch.ones_like(gamma)) - norm(torch.zeros_like(gamma))))
        self.register_buffer("table", gamma * (self.matrix @ shift + at_rest))

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for ``(B, N, C)``."""
        return shapes[0].numel() * len(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.matrix, x * self.factor) + self.table


@torch.no_grad()
def prepared(model: nn.Module, dynamic_size: bool = False) -> nn.Module:
    """A copy of a network in evaluation mode, ready to be exported within ``kernels.for_runtimes()``.

    Args:
        model: any network; of one that is not ours the copy is the network itself.
        dynamic_size: whether images of any size have to go through; then position embeddings stay as they are.
    """
    fixed = copy.deepcopy(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    readers = [] if dynamic_size else _readers(fixed)
    scales = _scales(readers[0]) if readers else []
    for norm in readers:
        _weigh_rows_alike(norm, scales, next(fixed.parameters()).dtype)
    for module in fixed.modules():
        fold_constants(module)
    for module in list(fixed.modules()):
        if type(module) is PatchEmbed:
            _fold_patches(module)
        if isinstance(module, EquivariantResBlock) and type(module.linear_tokens) is TokenMixing:
            module.linear_tokens = MixedTokens(module)  # type: ignore[assignment]
            module.norm1 = module.ls1 = nn.Identity()  # type: ignore[assignment]
        if isinstance(module, MatchedBias):
            module.fix_table()
        for name, child in list(module.named_children()):
            if isinstance(child, PositionEmbedding) and not dynamic_size:
                setattr(module, name, FixedField(child))
    if readers:
        _centre_stream(_transformer(fixed), scales)
    return fixed


def _transformer(model: Any) -> Any:
    """The transformer whose features are read through its last norm alone, or None."""
    network = model.backbone if isinstance(model, DenseModel) else model
    return network if isinstance(network, EquivariantTransformer) else None


def _readers(model: Any) -> list[LayerNorm]:
    """The norms that read the residual stream of an E(ViT), where they are all that reads it; else an empty list."""
    network = _transformer(model)
    if network is None or network.design != "equivariant" or any(m == 1 for m in network.rep.multiplicities):
        return []
    writers_are_known = type(network.embedding) is PatchEmbed and all(
        part is None or isinstance(part, nn.Identity)
        for part in (network.embedding.norm, getattr(network, "norm_pre", None))
    )
    last = getattr(network, "norm", None)
    if isinstance(last, nn.Identity) and getattr(network, "attn_pool", None) is None:
        last = network.fc_norm
    norms = [last, *(norm for block in network.blocks for norm in _norms(block))]
    if not writers_are_known or not all(type(norm) is LayerNorm for norm in norms):
        return []
    return norms if len({norm.weighting for norm in norms}) == 1 else []


def _norms(block: Any) -> list[Any]:
    """The norms of a standard block; for any other None, which is no norm."""
    if type(block) is not Block or not all(holds_its_weights(part) for part in (block.attn.proj, block.mlp.fc2)):
        return [None]
    if not all(isinstance(scale, LayerScale | nn.Identity) for scale in (block.ls1, block.ls2)):
        return [None]
    return [block.norm1, block.norm2]


def _scales(norm: LayerNorm) -> list[float]:
    """What the channels of every irrep are multiplied by in the stream."""
    return [(weight * norm.rep.dim) ** 0.5 for weight in entry_weights(norm._layout, norm.parts())]


def _weigh_rows_alike(norm: LayerNorm, scales: list[float], dtype: torch.dtype) -> None:
    """Let a norm read a stream whose channels are scaled."""
    if norm.weighting != "entries":
        multiplicities = norm.rep.multiplicities
        factors = [torch.full((m,), 1 / scale, dtype=dtype) for m, scale in zip(multiplicities, scales, strict=True)]
        factor = torch.cat(factors)
        norm.weight = nn.Parameter(factor if norm.weight is None else norm.weight * factor, False)
        norm.weighting = "entries"
    norm.centred = True


def _centre_stream(network: Any, scales: list[float]) -> None:
    """Centre and scale what is written to the stream."""
    rep: Rep = network.rep
    embed: Any = network.embedding
    embed.kernel = _written(embed.kernel.movedim(0, -1), rep, scales).movedim(-1, 0)
    if embed.kernel_bias is not None:
        embed.kernel_bias = _written(embed.kernel_bias, rep, scales)
    field = getattr(network, "pos_embed", None)
    if isinstance(field, FixedField):
        field.field, field.made_by = _written(field.field, rep, scales), None
    for name in TOKENS:
        token = network._parameters.get(name)
        if token is not None:  # invariant channels alone
            token.sub_(token.mean(dim=-1, keepdim=True))
    for block in network.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            for scale, (irrep, weight) in zip(_present(scales, rep), linear.weights(), strict=True):
                rows = weight.view(irrep.endomorphism_dim, -1, weight.shape[-1])
                rows.sub_(rows.mean(dim=1, keepdim=True)).mul_(scale)
            if linear.bias is not None:
                linear.bias.sub_(linear.bias.mean())


def _present(scales: list[float], rep: Rep) -> list[float]:
    return [scale for scale, multiplicity in zip(scales, rep.multiplicities, strict=True) if multiplicity]


def _written(x: Tensor, rep: Rep, scales: list[float]) -> Tensor:
    """Features ``(..., rep.dim)``, every row centred and scaled."""
    parts = []
    for block, scale in zip(split(x, layout_of(rep)), scales, strict=True):
        parts.append((block - block.mean(dim=-1, keepdim=True)) * scale if block.shape[-1] else block)
    return join(parts)


def _fold_patches(embed: Any) -> None:
    """Replace a patch embedding by the convolution that it is: what it answers to every pixel by itself."""
    height, width = embed.patch_size
    pixels = embed.in_chans * height * width
    weight = next(embed.proj.parameters())
    impulses = torch.eye(pixels, dtype=weight.dtype, device=weight.device).view(pixels, embed.in_chans, height, width)
    patches = impulses.permute(0, 2, 3, 1).flatten(1, 2)  # pixels of a patch, then channels
    bias = embed.proj.bias
    answer = embed.proj(embed.transform(patches).flatten(-2))
    at_rest = None if bias is None else F.pad(bias, (0, answer.shape[-1] - len(bias)))
    kernel = (answer if at_rest is None else answer - at_rest).T.reshape(-1, embed.in_chans, height, width)
    become(embed, FoldedPatchEmbed)
    del embed.proj, embed.transform
    embed.register_buffer("kernel", kernel.contiguous())
    embed.register_buffer("kernel_bias", at_rest)
