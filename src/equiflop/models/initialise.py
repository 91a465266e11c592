"""How networks start: linear maps as published, or every layer by its own rule."""

from __future__ import annotations

from collections.abc import Collection

import torch
from timm.layers import GluMlp, SwiGLU
from torch import nn

from equiflop.nn import Linear


def init_linear(linear: nn.Module, std: float = 0.02) -> None:
    """Weights truncated normal (of an equivariant map those between orthonormal bases), bias 0."""
    if isinstance(linear, Linear):
        linear.init_weights(lambda weight, algebra: nn.init.trunc_normal_(weight, std=std))
    elif isinstance(linear, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def init_linears(module: nn.Module, skip: Collection[str] = (), std: float = 0.02) -> None:
    """:func:`init_linear` for all linear maps inside, but for those in the children named in ``skip``."""
    for name, child in module.named_children():
        if name in skip:
            continue
        if isinstance(child, (Linear, nn.Linear)):
            init_linear(child, std)
        else:
            init_linears(child, std=std)


@torch.no_grad()
def open_gates(module: nn.Module) -> None:
    """Gated MLPs start as timm's ViTs do: gates near 1, whatever the input (weights 1e-6, bias 1 in every copy)."""
    for mlp in module.modules():
        gate = mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1 if isinstance(mlp, GluMlp) else None
        if not isinstance(gate, Linear):
            continue
        sections = gate.out_order.sections  # the gate is the last, as timm has it
        for irrep, weight in gate.weights():
            weight.unflatten(0, (irrep.endomorphism_dim, sections, -1))[:, -1].normal_(std=1e-6)
        if gate.bias is not None:
            order = gate.in_rep.group.order
            gate.bias.unflatten(0, (sections, -1))[-1].fill_(order**0.5 * gate.bias_gain)


def reset_all(module: nn.Module) -> None:
    """Every layer by its own ``reset_parameters``, the parts of a layer before the layer."""
    for part in reversed(list(module.modules())[1:]):
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
