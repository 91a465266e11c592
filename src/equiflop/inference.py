"""A trained network made as fast as it goes, for inference alone."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_map

from equiflop.nn import Block, LayerNorm, LayerScale
from equiflop.nn.attention import Attention
from equiflop.nn.linear import Linear
from equiflop.nn.mlp import Mlp


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A compiled copy of a network for inference on fixed weights.

    In the transformer blocks of ours layer scales, scale and bias of the layer norms, and factors of the Fourier
    transforms move into the linear maps; then the copy is compiled by ``torch.compile`` with its parameters as
    constants. A plain network is compiled alone. On a CUDA device the kernels are recorded as a CUDA graph, one for
    every shape of the input, which saves the time to launch them.

    Args:
        model: any network of ours or of timm, on the device where it will run; it is not changed, nor is its state
            dict.

    Returns:
        a module with the same outputs (to rounding), in evaluation mode, without gradients. Its state dict is another.
    """
    fixed = copy.deepcopy(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    for module in fixed.modules():
        if isinstance(module, Block):
            fold_constants(module)
    graphs = any(tensor.is_cuda for tensor in fixed.parameters())
    compiled: nn.Module = torch.compile(  # type: ignore[assignment]
        fixed, options={"freezing": True, "triton.cudagraphs": graphs}
    )
    if graphs:
        compiled.register_forward_pre_hook(lambda module, inputs: torch.compiler.cudagraph_mark_step_begin())
        compiled.register_forward_hook(lambda module, inputs, outputs: tree_map(torch.clone, outputs))
    return compiled


@torch.no_grad()
def fold_constants(block: Block) -> None:
    """Move layer scales and affine parts of layer norms into the linear maps beside them; the function stays."""
    for norm, branch, name in ((block.norm1, block.attn, "ls1"), (block.norm2, block.mlp, "ls2")):
        scale = getattr(block, name)
        assert isinstance(branch, (Attention, Mlp))
        first, last = (branch.qkv, branch.proj) if isinstance(branch, Attention) else (branch.fc1, branch.fc2)
        if isinstance(scale, LayerScale):
            _scale_outputs(last, scale)
            setattr(block, name, nn.Identity())
        if norm.weight is not None and (norm.bias is None or first.bias is not None):
            _absorb_affine(first, norm)
    assert isinstance(block.mlp, Mlp)
    _absorb_irrep_scales(block.mlp)


def _scale_outputs(linear: Linear, scale: LayerScale) -> None:
    gains = dict(zip((irrep.name for irrep in scale.rep.group.irreps), _split(scale.gamma, scale), strict=True))
    for irrep, weight in linear.weights():
        weight.mul_(gains[irrep.name].repeat(irrep.endomorphism_dim)[:, None])
    if linear.bias is not None:
        linear.bias.mul_(_split(scale.gamma, scale)[0])


def _absorb_affine(linear: Linear, norm: LayerNorm) -> None:
    assert norm.weight is not None
    gains = dict(zip((irrep.name for irrep in norm.rep.group.irreps), _split(norm.weight, norm), strict=True))
    if norm.bias is not None and linear.bias is not None:
        trivial = linear.weights()[0][1]
        linear.bias.add_(trivial @ norm.bias)
    for irrep, weight in linear.weights():
        weight.mul_(gains[irrep.name])
    norm.weight = norm.bias = None


def _absorb_irrep_scales(mlp: Mlp) -> None:
    """The factors of the Fourier transforms go into the weights, so that the products are plain ones."""
    for linear in (mlp.fc1, mlp.fc2):
        scales = dict(zip(linear.in_rep.group.irreps, mlp.act.irrep_scales, strict=True))
        for irrep, weight in linear.weights():
            weight.mul_(scales[irrep])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.mul_(mlp.act.irrep_scales[0])
    mlp.act.irrep_scales = (1.0,) * len(mlp.act.irrep_scales)


def _split(values: torch.Tensor, module: LayerNorm | LayerScale) -> tuple[torch.Tensor, ...]:
    return values.split(module.rep.multiplicities)
