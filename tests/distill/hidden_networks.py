"""Equivariant vision transformers written as plain ones, and hidden as well as a plain one allows."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from equiflop.distill.steer.involution import contrasts


def dense(function: Any, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of an affine map."""
    bias = function(torch.zeros(1, width, dtype=torch.float64))[0]
    return (function(torch.eye(width, dtype=torch.float64)) - bias).T, bias


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@torch.no_grad()
def hidden(made: Any, settings: dict[str, Any]) -> VisionTransformer:
    """A plain network that computes what an equivariant one does, in another basis, units and heads in another order.

    The norms of a plain network take one mean of all channels away, those of an equivariant one a mean of every kind:
    whatever writes to the stream is centred here, which changes nothing of what is read there.
    """
    plain: Any = VisionTransformer(**settings).double().eval()
    width = plain.embed_dim
    counts = made.rep.multiplicities
    centre = torch.block_diag(*(torch.eye(m, dtype=torch.float64) - 1 / m for m in counts))
    inner = contrasts(width)
    turn = inner @ orthogonal(width - 1) @ inner.T + 1 / width  # leaves constant vectors as they are
    write = turn @ centre
    pad = (0, counts[1])

    def random(*size: int) -> Tensor:
        return 0.5 + torch.rand(*size, dtype=torch.float64)

    def read(weight: Tensor, bias: Tensor | None, norm: Any, plain_norm: Any) -> tuple[Tensor, Tensor]:
        """Folds the one's affine norm in, and the inverse of another one."""
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        bias = bias + weight @ nn.functional.pad(norm.bias, pad)
        weight = weight * norm.weight @ turn.T
        plain_norm.weight.copy_(random(width))
        plain_norm.bias.copy_(torch.randn(width))
        weight = weight / plain_norm.weight
        return weight, bias - weight @ plain_norm.bias

    patch = plain.patch_embed.patch_size
    pixels = plain.patch_embed.proj.in_channels * patch[0] * patch[1]
    made.patch_embed.strict_img_size = False
    images = lambda rows: made.patch_embed(rows.unflatten(1, (-1, *patch)))[:, 0]  # noqa: E731
    weight, bias = dense(images, pixels)
    made.patch_embed.strict_img_size = True
    plain.patch_embed.proj.weight.copy_((write @ weight).reshape(plain.patch_embed.proj.weight.shape))
    plain.patch_embed.proj.bias.copy_(write @ bias)
    plain.pos_embed.copy_(made.pos_embed() @ write.T)
    for name in ("cls_token", "reg_token"):
        if getattr(plain, name) is not None:
            getattr(plain, name).copy_(nn.functional.pad(getattr(made, name), pad) @ write.T)
    for block, own in zip(plain.blocks, made.blocks, strict=True):
        _hide_attention(block, own, read, write, random)
        order = torch.randperm(block.mlp.fc1.out_features)
        weight, bias = read(*dense(own.mlp.fc1, width), own.norm2, block.norm2)
        block.mlp.fc1.weight.copy_(weight[order])
        block.mlp.fc1.bias.copy_(bias[order])
        weight, bias = dense(lambda x, own=own: own.ls2(own.mlp.fc2(x)), block.mlp.fc2.in_features)
        _write(block.mlp.fc2, (write @ weight)[:, order], write @ bias, block.ls2, random)
    last = "fc_norm" if isinstance(plain.norm, nn.Identity) else "norm"
    head = nn.functional.pad(made.head.weight, pad)
    weight, bias = read(head, made.head.bias, getattr(made, last), getattr(plain, last))
    plain.head.weight.copy_(weight)
    plain.head.bias.copy_(bias)
    return plain


def _write(linear: nn.Linear, weight: Tensor, bias: Tensor, scale: Any, random: Any) -> None:
    if isinstance(scale, nn.Identity):
        gamma = torch.ones_like(bias)
    else:
        gamma = random(len(bias))
        scale.gamma.copy_(gamma)
    linear.weight.copy_(weight / gamma[:, None])
    linear.bias.copy_(bias / gamma)


def _hide_attention(block: Any, own: Any, read: Any, write: Tensor, random: Any) -> None:
    attn = block.attn
    width, count, size = attn.qkv.in_features, attn.num_heads, attn.head_dim
    weight, bias = read(*dense(own.attn.qkv, width), own.norm1, block.norm1)
    maps = torch.cat([weight, bias[:, None]], dim=1).reshape(3, count, size, -1)
    out, shift = dense(lambda x: own.ls1(own.attn.proj(x)), width)
    out = (write @ out).unflatten(1, (count, size)).movedim(1, 0)
    order = torch.randperm(count)
    maps, out = maps[:, order], out[order]
    inner = torch.randn(2, count, size, size, dtype=torch.float64) + 3 * torch.eye(size, dtype=torch.float64)
    queries = inner[0] @ maps[0]
    keys = torch.linalg.inv(inner[0]).mT @ maps[1]
    values, out = inner[1] @ maps[2], out @ torch.linalg.inv(inner[1])
    maps = torch.stack([queries, keys, values]).flatten(0, 2)
    attn.qkv.weight.copy_(maps[:, :-1])
    attn.qkv.bias.copy_(maps[:, -1])
    _write(attn.proj, out.movedim(0, 1).flatten(1), write @ shift, block.ls1, random)
