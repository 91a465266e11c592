"""A network brought into the form made for runtimes: constants folded, so that few, large, standard operators are left.

What :mod:`equiflop.kernels.runtime` cannot do, since it needs other weights, happens here, on a copy:

* a patch embedding and a downsampling become one convolution with its whole kernel, a position embedding and a bias
  that depends on the token one constant, token mixing one dense product;
* layer scales and affine parts of norms move into the linear maps beside them;
* in E(ViT) whatever is added to the residual stream is centred, row by row. All norms subtract the means of rows, so
  nothing else sees the difference, and the norms become plain layer norms, which runtimes know. Where the rows of an
  irrep weigh less in the norm (octic ViTs), those channels of the stream are scaled, so that all weigh the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.deploy.folded import (
    FixedBias,
    FixedField,
    FoldedChannelMlp,
    FoldedConvNeXtBlock,
    FoldedDownsample,
    FoldedPatchEmbed,
    MixedTokens,
)
from equiflop.groups import Rep
from equiflop.inference import fold_constants, holds_its_weights
from equiflop.kernels import join, layout_of, split
from equiflop.kernels.norm import entry_weights
from equiflop.models.convnext_layers import EquivariantConvNeXtBlock, EquivariantStem
from equiflop.models.dense import DenseModel
from equiflop.models.equivariant_transformer import TOKENS, EquivariantTransformer
from equiflop.models.resmlp_layers import ChannelMlp, EquivariantResBlock
from equiflop.models.tied import become
from equiflop.nn import Block, LayerNorm, LayerScale, PatchEmbed, PositionEmbedding, TokenMixing
from equiflop.nn.depthwise import DepthwiseConv
from equiflop.nn.downsample import Downsample


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
        _fold(module, dynamic_size)
    if readers:
        _centre_stream(_transformer(fixed), scales)
    return fixed


def _fold(module: Any, dynamic_size: bool) -> None:
    """Compute the constants of a module, or of what it holds."""
    if type(module) is PatchEmbed:
        _fold_patches(module)
    if type(module) is EquivariantStem and type(module.norm) is LayerNorm:
        _centre_stem(module)
    if type(module) is EquivariantConvNeXtBlock:
        _fold_convnext_block(module)
    if isinstance(module, EquivariantResBlock) and type(module.linear_tokens) is TokenMixing:
        module.linear_tokens = MixedTokens(module)  # type: ignore[assignment]
        module.norm1 = module.ls1 = nn.Identity()  # type: ignore[assignment]
    if type(module) is ChannelMlp:
        module.bias1, module.bias2 = FixedBias(module.bias1), FixedBias(module.bias2)  # type: ignore[assignment]
        become(module, FoldedChannelMlp)
    for name, child in list(module.named_children()):
        if isinstance(child, PositionEmbedding) and not dynamic_size:
            setattr(module, name, FixedField(child))
        if type(child) is Downsample:
            setattr(module, name, _folded_downsample(child))


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
    _write_centred(embed, rep, scales)
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
    """Replace a patch embedding by the convolution that it is."""
    weight = next(embed.proj.parameters())
    kernel, bias = _convolution(
        lambda patches: embed.proj(embed.transform(patches.flatten(1, 2)).flatten(-2)),
        (*embed.patch_size, embed.in_chans),
        weight,
    )
    become(embed, FoldedPatchEmbed)
    del embed.proj, embed.transform
    embed.register_buffer("kernel", kernel)
    embed.register_buffer("kernel_bias", bias)


def _folded_downsample(module: Downsample) -> FoldedDownsample:
    weight = next(module.parameters())
    return FoldedDownsample(*_convolution(lambda x: module(x)[:, 0, 0], (2, 2, module.in_rep.dim), weight))


def _convolution(
    patches_to_output: Callable[[Tensor], Tensor], size: tuple[int, int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Kernel ``(out, C, h, w)`` and bias of an affine map of patches: what it answers to every pixel by itself.

    Args:
        patches_to_output: from ``(B, h, w, C)`` to ``(B, out)``.
        size: ``h``, ``w`` and ``C``.
        like: a tensor of the same type and device.
    """
    height, width, channels = size
    pixels = torch.eye(math.prod(size), dtype=like.dtype, device=like.device).view(-1, height, width, channels)
    at_rest = patches_to_output(torch.zeros_like(pixels[:1]))[0]
    answers = patches_to_output(pixels) - at_rest  # h * w * C, out
    return answers.view(height, width, channels, -1).permute(3, 2, 0, 1).contiguous(), at_rest


def _centre_stem(stem: Any) -> None:
    """Centre what the norm behind a patch embedding reads, where nothing else does."""
    rep: Rep = stem.norm.rep
    if type(stem.proj) is not PatchEmbed or any(multiplicity == 1 for multiplicity in rep.multiplicities):
        return
    _fold_patches(stem.proj)
    _write_centred(stem.proj, rep, [1.0] * len(rep.multiplicities))
    stem.norm.centred = True


def _write_centred(embed: Any, rep: Rep, scales: list[float]) -> None:
    embed.kernel = _written(embed.kernel.movedim(0, -1), rep, scales).movedim(-1, 0).contiguous()
    embed.kernel_bias = _written(embed.kernel_bias, rep, scales)


def _fold_convnext_block(block: Any) -> None:
    depthwise: DepthwiseConv = block.conv_dw
    block.register_buffer("kernel", depthwise.kernel())
    block.register_buffer("kernel_bias", depthwise.bias_of_outputs())
    block.part, block.order = depthwise.part, depthwise.order()
    become(block, FoldedConvNeXtBlock)
    del block.conv_dw
