"""How layers start by themselves: one rule for all of them."""

from __future__ import annotations

import math

from torch import Tensor, nn


def fan_in_(weight: Tensor, inputs: float, bias: Tensor | None = None) -> None:
    """Fill a weight with normal numbers of variance ``1 / inputs``, so that variance is kept, and a bias with 0.

    Args:
        weight: any shape; changed in place.
        inputs: how many numbers every output is a sum over.
        bias: changed in place, if there is one.
    """
    nn.init.normal_(weight, std=1.0 / math.sqrt(inputs))
    if bias is not None:
        nn.init.zeros_(bias)
