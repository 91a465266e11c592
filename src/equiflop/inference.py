"""A trained network made as fast as it goes, for inference alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from equiflop.groups import Rep
from equiflop.kernels import is_bare
from equiflop.models.convnext_layers import EquivariantConvNeXtBlock
from equiflop.models.resmlp_layers import ChannelMlp, EquivariantResBlock
from equiflop.nn import Affine, AlgebraLinear, Block, LayerNorm, LayerScale, Linear


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A compiled copy of a network for inference on fixed weights.

    In the blocks of ours layer scales, scale and bias of the norms move into the linear maps beside them; then the copy
    is compiled by ``torch.compile``. A plain network is compiled alone. On a CUDA device parameters become constants
    and the kernels are recorded as a CUDA graph, one for every shape of the input, which saves the time to launch them.

    Args:
        model: any network of ours or of timm, on the device where it will run; it is not changed, nor is its state
            dict.

    Returns:
        a module with the same outputs (to rounding), in evaluation mode, without gradients. Its state dict is another.
    """
    fixed = copy.deepcopy(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    for module in fixed.modules():
        fold_constants(module)
    if not any(tensor.is_cuda for tensor in fixed.parameters()):
        # Not frozen: on CPUs Inductor's packed products gain nothing here, and split the loops around them.
        return torch.compile(fixed)  # type: ignore[return-value]
    compiled: nn.Module = torch.compile(  # type: ignore[assignment]
        fixed, options={"freezing": True, "triton.cudagraphs": True}
    )
    compiled.register_forward_pre_hook(lambda module, inputs: torch.compiler.cudagraph_mark_step_begin())
    compiled.register_forward_hook(lambda module, inputs, outputs: tree_map(torch.clone, outputs))
    return compiled


@torch.no_grad()
def fold_constants(module: nn.Module) -> None:
    """Move norms' affine parts and layer scales of a block into its linear maps; the function stays.

    Token mixing of ResMLP acts on tokens, so that its factors per channel have no place in its weights and stay.
    """
    if isinstance(module, Block):
        _fold_scale(module, "ls1", module.attn.proj)
        _fold_scale(module, "ls2", module.mlp.fc2)
        _fold_norm(module, "norm1", module.attn.qkv)
        _fold_norm(module, "norm2", module.mlp.fc1)
    elif isinstance(module, EquivariantConvNeXtBlock):
        _fold_scale(module, "ls", module.mlp.fc2)
        _fold_norm(module, "norm", module.mlp.fc1)
    elif isinstance(module, EquivariantResBlock):
        mlp: Any = module.mlp_channels
        scale = module.ls2
        if isinstance(mlp, ChannelMlp) and isinstance(scale, LayerScale) and holds_its_weights(mlp.fc2):
            mlp.bias2.bias.mul_(scale.gamma)
        _fold_scale(module, "ls2", mlp.fc2)
        _fold_norm(module, "norm2", mlp.fc1)


def holds_its_weights(linear: nn.Module) -> bool:
    """Whether the map computes what its weights say: no adapter, wrapper, hook or quantised weight in between."""
    kinds = (nn.Linear, AlgebraLinear)
    return is_bare(linear, Linear) and all(any(is_bare(child, kind) for kind in kinds) for child in linear.children())


def _fold_scale(block: nn.Module, name: str, linear: Linear) -> None:
    scale = getattr(block, name)
    if not isinstance(scale, LayerScale) or not holds_its_weights(linear):
        return
    gains = _by_irrep(scale.gamma, scale.rep)
    for irrep, weight in linear.weights():
        weight.mul_(gains[irrep.name].repeat(irrep.endomorphism_dim)[:, None])
    if linear.bias is not None:
        linear.bias.mul_(gains[scale.rep.group.irreps[0].name])
    setattr(block, name, nn.Identity())


def _fold_norm(block: nn.Module, name: str, linear: Linear) -> None:
    norm = getattr(block, name)
    if not isinstance(norm, (LayerNorm, Affine)) or not holds_its_weights(linear):
        return
    if norm.bias is not None and linear.bias is None:
        return
    if norm.bias is not None and linear.bias is not None:
        linear.bias.add_(linear.weights()[0][1] @ norm.bias)
    if norm.weight is not None:
        gains = _by_irrep(norm.weight, norm.rep)
        for irrep, weight in linear.weights():
            weight.mul_(gains[irrep.name])
    if isinstance(norm, Affine):
        setattr(block, name, nn.Identity())
    else:
        norm.weight = norm.bias = None


def _by_irrep(values: Tensor, rep: Rep) -> dict[str, Tensor]:
    names = (irrep.name for irrep in rep.group.irreps)
    return dict(zip(names, values.split(rep.multiplicities), strict=True))
