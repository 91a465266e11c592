"""Rules for what works on single tokens: norms, dropout, layer scales and MLPs."""

from __future__ import annotations

from typing import Any

from timm.layers import (
    DropPath,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchDropoutWithIndices,
    RmsNorm,
    SwiGLU,
)
from torch import nn

from equiflop import nn as enn
from equiflop.models.substitution.checks import NORMS, check_norm, exactly, no_counterpart, only, pointwise
from equiflop.models.substitution.parts import Substitution, rule


@rule(nn.Identity, DropPath, PatchDropout, PatchDropoutWithIndices)
def keep(parts: Substitution, module: nn.Module, path: str) -> nn.Module:
    """What treats all channels alike stays."""
    return parts.kept(module)


@rule(nn.Dropout)
def dropout(parts: Substitution, module: nn.Dropout, path: str) -> nn.Module:
    """Dropout of the copies of irreps."""
    return enn.Dropout(parts.rep, module.p)


@rule(nn.LayerNorm, LayerNorm, RmsNorm)
def norm(parts: Substitution, module: Any, path: str) -> nn.Module:
    """A norm on the residual stream."""
    check_norm(module, path, parts.rep.dim)
    affine = module.weight is not None
    if isinstance(module, RmsNorm):
        return enn.RmsNorm(parts.rep, module.eps, affine=affine, **parts.dd)
    bias = module.bias is not None
    return enn.LayerNorm(parts.rep, module.eps, affine=affine, bias=bias, weighting=parts.weighting, **parts.dd)


def inner_norm(parts: Substitution, module: Any, path: str, channels: int) -> nn.Module:
    """A norm over a whole axis in the group's basis."""
    if isinstance(module, nn.Identity):
        return module
    if type(module) not in NORMS:
        raise no_counterpart(module, path)
    check_norm(module, path, channels)
    centred = not isinstance(module, RmsNorm)
    options: dict[str, Any] = {
        "affine": module.weight is not None,
        "bias": centred and module.bias is not None,
        **parts.dd,
    }
    return enn.TiedNorm(channels, parts.rep.group.order, module.eps, centred=centred, **options)


def per_head_norm(parts: Substitution, norm: nn.Module, path: str) -> nn.Module:
    """The norm of queries or keys of one head, which stays plain."""
    if not isinstance(norm, nn.Identity) and type(norm) not in NORMS:
        raise no_counterpart(norm, path)
    return parts.kept(norm)


@rule(LayerScale)
def layer_scale(parts: Substitution, module: LayerScale, path: str) -> nn.Module:
    """One factor per copy of an irrep."""
    if module.gamma.shape != (parts.rep.dim,):
        raise ValueError(f"{path} has {tuple(module.gamma.shape)} factors where {parts.rep.dim} are supported")
    return enn.LayerScale(parts.rep, module.init_values, **parts.dd)


@rule(nn.Sequential, nn.ModuleList)
def sequence(parts: Substitution, module: nn.Module, path: str) -> nn.Module:
    """Every member of a sequence."""
    parts.children(module, path)
    return module


@rule(Mlp, GluMlp, SwiGLU)
def mlp(parts: Substitution, mlp: Any, path: str) -> nn.Module:
    """MLPs, gated ones as well; what lies between the linear maps is in the group's basis."""
    if isinstance(mlp, GluMlp) and mlp.chunk_dim != -1:
        raise ValueError(f"{path} is a convolution (use_conv=True), which has no equivariant counterpart")
    hidden = getattr(mlp.fc2, "in_features", 0)
    for name, part in list(mlp.named_children()):
        where = f"{path}.{name}"
        if name in ("fc1", "fc1_g", "fc1_x"):
            made: nn.Module = parts.inward(part, where, "group", sections=2 if isinstance(mlp, GluMlp) else 1)
        elif name == "fc2":
            made = parts.outward(part, where, "group")
        elif name == "norm":
            made = inner_norm(parts, part, where, hidden)
        elif name == "act":
            made = pointwise(part, where)
        elif name == "drop1":
            made = enn.Dropout(parts.regular(hidden, where), exactly(part, nn.Dropout, where).p, order="group")
        elif name == "drop2":
            made = dropout(parts, exactly(part, nn.Dropout, where), where)
        else:
            raise no_counterpart(part, where)
        setattr(mlp, name, made)
    only(mlp, path)
    return enn.Mlp.of(mlp, parts.rep) if type(mlp) is Mlp else mlp
