"""int8 for PyTorch's graphs, by torchao's PT2E: which ranges, and how they are found.

All ranges are symmetric, -127 to 127 steps around zero, so that a flipped sign stays one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

#: The smallest step. A layer scale that is folded into weights makes channels far smaller than the quantisers' own
#: limit of 2 ** -12, below which they would be zero.
SMALLEST_STEP = 2.0**-60


def ranges() -> Any:
    """How activations and weights are counted: per tensor and per output channel, both symmetric."""
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    bounds = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}
    activations = QuantizationSpec(
        **bounds,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=SMALLEST_STEP),
    )
    weights = QuantizationSpec(
        **bounds,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=SMALLEST_STEP),
    )
    return QuantizationConfig(activations, activations, weights, None)


def quantised(graph: Any, quantizer: Any, images: np.ndarray, batch: int) -> nn.Module:
    """A graph in int8.

    Args:
        graph: of ``torch.export``, as a module.
        quantizer: says what becomes int8.
        images: those by which ranges are found, ``(N, C, H, W)``.
        batch: how many go through at once.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    watched = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for start in range(0, len(images) - batch + 1, batch):
            watched(torch.from_numpy(images[start : start + batch]))
    return convert_pt2e(watched)


def is_quantised(node: Any) -> bool:
    """Whether a node of a graph gives numbers that come from int8."""
    return "dequantize" in str(getattr(node, "target", ""))
