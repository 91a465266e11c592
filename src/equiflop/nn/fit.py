"""Weights of a model for another image size or other image channels, fitted when they are loaded."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from equiflop.warnings import EquiflopWarning


def warn_of_fit(done: str | None) -> None:
    """Say what was done to weights that did not fit; nothing for None."""
    if done is not None:
        warnings.warn(f"loading weights of another model: {done}", EquiflopWarning, stacklevel=3)


def fit_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict fitted to a model of another image size or number of image channels, as timm does it: the position
    embedding is resampled, the patch embedding summed or repeated over the channels.

    Args:
        state_dict: weights of a model that is the same otherwise.
        model: the model.

    Returns:
        a new state dict; what fits is left as it is.
    """
    state = dict(state_dict)
    for path, module in model.named_modules():
        fit = getattr(module, "fit_weights", None)
        if callable(fit):
            fit(state, f"{path}." if path else "")
    return state
