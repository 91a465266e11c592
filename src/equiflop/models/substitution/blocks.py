"""Rules for the blocks of vision transformers."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import nn

from equiflop import nn as enn
from equiflop.kernels import layout_of
from equiflop.models import twin_layers
from equiflop.models.substitution.attention import lambdas
from equiflop.models.substitution.checks import check_linear, exactly, only, pointwise
from equiflop.models.substitution.parts import Substitution, rule
from equiflop.models.substitution.stream import per_head_norm
from equiflop.models.tied import become

_TIED: dict[type[nn.Module], type[nn.Module]] = {
    EvaBlock: twin_layers.TwinEvaBlock,
    BeitBlock: twin_layers.TwinBeitBlock,
    ParallelScalingBlock: twin_layers.TwinParallelScalingBlock,
    DiffParallelScalingBlock: twin_layers.TwinDiffParallelScalingBlock,
}


@rule(ResPostBlock, ParallelThingsBlock, EvaBlock, EvaBlockPostNorm, BeitBlock, RelPosBlock, ResPostRelPosBlock)
def residual_block(parts: Substitution, block: Any, path: str) -> nn.Module:
    """A block whose parts lie on the residual stream, with its own layer scales where it has them."""
    parts.children(block, path)
    only(block, path, ("gamma_1", "gamma_2"))
    kind = _TIED.get(type(block))
    if kind is not None:
        block.rep, block._layout = parts.rep, layout_of(parts.rep)
        become(block, kind)
        for name in ("gamma_1", "gamma_2"):
            parts.tie(block, name, sum(parts.rep.multiplicities))
        block.reset_parameters()
    return block


@rule(Block)
def standard_block(parts: Substitution, block: Block, path: str) -> nn.Module:
    """A block of ``VisionTransformer``: :class:`equiflop.nn.Block`."""
    residual_block(parts, block, path)
    only(block, path, modules=("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"))
    return enn.Block.of(block, parts.rep)


@rule(ParallelScalingBlock, DiffParallelScalingBlock)
def parallel_block(parts: Substitution, block: Any, path: str) -> nn.Module:
    """Attention and MLP side by side, with one linear map into both and one out of both."""
    parts.choose_heads(block.num_heads, path, per_head=True)
    hidden, width = block.in_split[0], block.in_split[1]
    check_linear(block.in_proj, f"{path}.in_proj", in_features=parts.rep.dim, out_features=hidden + 3 * width)
    reps = parts.regular(width, f"{path}.in_proj"), parts.regular(hidden, f"{path}.in_proj")
    for name, part in list(block.named_children()):
        where = f"{path}.{name}"
        if name == "in_proj":
            has_bias = part.bias is not None
            made: nn.Module = enn.LinearToSeveral(parts.rep, [(reps[1], 1), (reps[0], 3)], has_bias, **parts.dd)
        elif name == "out_proj":
            check_linear(part, where, in_features=hidden + width, out_features=parts.rep.dim)
            made = enn.LinearFromSeveral(reps, parts.rep, part.bias is not None, **parts.dd)
        elif name in ("attn_out_proj", "mlp_out_proj"):
            made = parts.outward(part, where, "group")
        elif name in ("q_norm", "k_norm", "sub_norm"):
            made = per_head_norm(parts, part, where)
        elif name == "mlp_act":
            made = pointwise(part, where)
        elif name == "mlp_drop":
            made = enn.Dropout(reps[1], exactly(part, nn.Dropout, where).p, order="group")
        elif name == "attn_drop":
            made = exactly(part, nn.Dropout, where)
        else:
            made = parts.residual(part, where)
        setattr(block, name, made)
    block.copies = parts.rep.group.order
    become(block, _TIED[type(block)])
    parts.tie(block, "mlp_bias", hidden // block.copies)
    lambdas(parts, block, path, "mlp_bias")
    return block
