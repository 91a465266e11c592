"""A trained network made as fast as it goes, for inference alone."""

from __future__ import annotations

import copy

import torch
from torch import nn


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A compiled copy of a network for inference on fixed weights.

    Args:
        model: any network of ours or of timm; it is not changed, nor is its state dict.

    Returns:
        a module with the same outputs (to rounding), in evaluation mode, without gradients.
    """
    fixed = copy.deepcopy(getattr(model, "_orig_mod", model)).eval().requires_grad_(False)
    compiled: nn.Module = torch.compile(fixed, options={"freezing": True})  # type: ignore[assignment]
    return compiled
