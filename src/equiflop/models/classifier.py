"""The classifier behind invariant features."""

from __future__ import annotations

from typing import Any

from torch import nn


def replace_classifier(model: Any, num_classes: int) -> None:
    """Give ``model`` a new ``head`` of ``num_classes`` outputs on its ``head_hidden_size`` invariants; none for 0."""
    weight = next(model.parameters())
    model.num_classes = num_classes
    model.head = (
        nn.Linear(model.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
        if num_classes > 0
        else nn.Identity()
    )
    model.head.train(model.training)
