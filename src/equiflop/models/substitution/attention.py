"""Rules for attentions, and for pooling by attention."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, DiffAttention
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn

from equiflop import nn as enn
from equiflop.models import twin_layers
from equiflop.models.substitution.checks import NORMS, exactly, no_counterpart, only
from equiflop.models.substitution.parts import Substitution, rule
from equiflop.models.substitution.positions import position_bias
from equiflop.models.substitution.stream import dropout, inner_norm, per_head_norm
from equiflop.models.tied import become
from equiflop.nn.attention import Heads
from equiflop.nn.linear import OrderName

_TIED: dict[type[nn.Module], type[nn.Module]] = {
    EvaAttention: twin_layers.TwinEvaAttention,
    BeitAttention: twin_layers.TwinBeitAttention,
}


@rule(Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention, DiffAttention)
def attention(parts: Substitution, attn: Any, path: str) -> nn.Module:
    """Attention of every kind but SAM's: what leads in and out is equivariant, what works head by head stays."""
    children = dict(attn.named_children())
    norms = [name for name in ("q_norm", "k_norm", "norm") if type(children.get(name)) in NORMS]
    coupled = type(attn) is Attention and not norms and "gate" not in children
    heads = parts.choose_heads(attn.num_heads, path, per_head=not coupled)
    kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    if heads == "regular" and kv_heads % parts.rep.group.order:
        raise ValueError(parts.does_not_divide(kv_heads, f"keys and values of {path}"))
    order: OrderName = "heads" if heads == "coupled" else "group"
    for name, part in children.items():
        where = f"{path}.{name}"
        if name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"):
            sections = 3 if name == "qkv" else 1
            made: nn.Module = parts.inward(part, where, order, attn.num_heads, sections)
        elif name == "proj":
            made = parts.outward(part, where, order, attn.num_heads)
        elif name in ("q_norm", "k_norm", "sub_norm"):
            made = per_head_norm(parts, part, where)
        elif name == "norm":
            made = inner_norm(parts, part, where, attn.proj.in_features)
        elif name == "attn_drop":
            made = exactly(part, nn.Dropout, where)
        elif name == "proj_drop":
            made = dropout(parts, exactly(part, nn.Dropout, where), where)
        elif name == "rel_pos" and isinstance(attn, RelPosAttention):
            made = position_bias(parts, part, where, getattr(part, "prefix_tokens", 0))
        else:
            raise no_counterpart(part, where)
        setattr(attn, name, made)
    if kv_heads != attn.num_heads:
        for name in ("k_proj", "v_proj"):
            become(getattr(attn, name), twin_layers.LinearToSharedHeads)
            getattr(attn, name).head_dim, getattr(attn, name).repeats = attn.head_dim, attn.num_kv_groups
        attn.num_kv_heads, attn.num_kv_groups, attn.kv_dim = attn.num_heads, 1, attn.attn_dim
    return _own_parameters(parts, attn, path, heads)


def _own_parameters(parts: Substitution, attn: Any, path: str, heads: Heads) -> nn.Module:
    """Parameters and buffers that an attention holds itself."""
    order = parts.rep.group.order
    buffers = ("k_bias", "relative_position_index")
    if isinstance(attn, EvaAttention | BeitAttention):
        only(attn, path, ("q_bias", "v_bias", "relative_position_bias_table"), buffers=buffers)
        attn.copies, attn.group = order, parts.group
        attn.qkv_bias_separate = True  # else the weight of the map is used without the map
        if attn._parameters.get("q_bias") is not None:
            width = attn.q_bias.shape[0]
            attn.k_bias = torch.empty(width, **parts.like(attn.q_bias))
        become(attn, _TIED[type(attn)])
        for name in ("q_bias", "v_bias"):
            if attn._parameters.get(name) is not None:
                parts.tie(attn, name, attn._parameters[name].shape[0] // order)
        if attn._parameters.get("relative_position_bias_table") is not None:
            table = attn.relative_position_bias_table
            parts.tie(attn, "relative_position_bias_table", table.shape[0], table.shape[1] // order)
            size = attn.relative_position_index.shape
            attn.relative_position_index = torch.empty(size, dtype=torch.long, device=parts.dd["device"])
        attn.reset_parameters()
        return attn
    if isinstance(attn, DiffAttention):
        lambdas(parts, attn, path)
        return attn
    only(attn, path)
    return enn.Attention.of(attn, parts.rep, heads) if type(attn) is Attention else attn


def lambdas(parts: Substitution, module: Any, path: str, *others: str) -> None:
    """The factors of differential attention, where there are any: the same for all heads."""
    names = [name for name in module._parameters if name.startswith("lambda_")]
    only(module, path, (*names, *others))
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None:
            module._parameters[name] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device=parts.dd["device"])
            )
    module.reset_parameters()


@rule(AttentionPoolLatent)
def attention_pool(parts: Substitution, pool: AttentionPoolLatent, path: str) -> nn.Module:
    """Pooling by attention, whose latent queries are the same for every copy of the heads."""
    only(pool, path, ("latent",))
    if pool.mlp is None:
        raise ValueError(f"{path} has no output projection (out_features=0), which has no equivariant counterpart")
    projects = not isinstance(pool.q, nn.Identity)
    plain_norms = isinstance(pool.q_norm, nn.Identity) and isinstance(pool.k_norm, nn.Identity)
    heads = parts.choose_heads(pool.num_heads, path, per_head=not (projects and plain_norms))
    order: OrderName = "heads" if heads == "coupled" else "group"
    for name, part in list(pool.named_children()):
        where = f"{path}.{name}"
        if name in ("q", "kv"):
            if projects or name == "kv":
                setattr(pool, name, parts.inward(part, where, order, pool.num_heads, 2 if name == "kv" else 1))
        elif name == "proj":
            pool.proj = parts.outward(part, where, order, pool.num_heads)
        elif name in ("q_norm", "k_norm"):
            setattr(pool, name, per_head_norm(parts, part, where))
        else:
            setattr(pool, name, parts.residual(part, where))
    order_of_group = parts.rep.group.order
    stored = parts.rep.multiplicities[0] if projects else pool.latent_dim // order_of_group
    pool.rep, pool.copies = parts.rep, order_of_group
    become(pool, twin_layers.TwinAttentionPool if projects else twin_layers.TwinAttentionPoolOfQueries)
    parts.tie(pool, "latent", 1, pool.latent_len, stored)
    pool.reset_parameters()
    return pool
