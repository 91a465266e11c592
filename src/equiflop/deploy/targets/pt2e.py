"""int8 for PyTorch's graphs, by torchao's PT2E: which ranges, and how they are found.

All ranges are symmetric, -127 to 127 steps around zero, so that a flipped sign stays one; weights for x86 -64 to 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from equiflop.deploy.targets.base import LARGEST_WEIGHT

aten = torch.ops.aten

#: The smallest step. A layer scale that is folded into weights makes channels far smaller than the quantisers' own
#: limit of 2 ** -12, below which they would be zero.
SMALLEST_STEP = 2.0**-60
#: What the quantiser for Inductor makes int8.
SOURCES: dict[Any, Any] = {aten.linear.default: F.linear, aten.conv2d.default: F.conv2d}
#: Products of a program.
PRODUCTS = (*SOURCES, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.scaled_dot_product_attention.default)


def ranges(unsigned: bool = False) -> Any:
    """How activations and weights are counted: per tensor and per output channel, both symmetric.

    Args:
        unsigned: whether activations are stored with 128 added, 1 to 255, as x86 multiplies them; weights are then no
            larger than :data:`LARGEST_WEIGHT`.
    """
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    class Unsigned(MinMaxObserver):
        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self.quant_min = 1  # observers are made with ranges that hold a 0, whatever it stands for

    signed = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}
    activations = QuantizationSpec(
        **({"dtype": torch.uint8, "quant_min": 0, "quant_max": 255} if unsigned else signed),
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=(Unsigned if unsigned else MinMaxObserver).with_args(eps=SMALLEST_STEP),
    )
    largest = LARGEST_WEIGHT if unsigned else 127
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-largest,
        quant_max=largest,
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
    of_weights = [node for node in watched.graph.nodes if node.op == "call_module" and node.args[0].op == "get_attr"]
    with torch.no_grad():
        for start in range(0, len(images) - batch + 1, batch):
            watched(torch.from_numpy(images[start : start + batch]))
            if not start:  # weights stay what they are: looked at once
                for node in of_weights:
                    watched.get_submodule(node.target).forward = _same
    return convert_pt2e(watched)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def quantised_program(program: Any, example: torch.Tensor, images: np.ndarray, dynamic_shapes: Any) -> Any:
    """A program whose linear maps and convolutions are in int8, as Inductor's int8 kernels for x86 expect it.

    Args:
        program: of ``torch.export``.
        example: images ``(B, C, H, W)``.
        images: those by which ranges are found, ``(N, C, H, W)``.
        dynamic_shapes: as for ``torch.export.export``.
    """
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    graph = program.module()
    for node in graph.graph.nodes:
        source = SOURCES.get(node.target)
        if source is not None:  # by which the quantiser looks for them, and which only modules' calls leave behind
            node.meta["source_fn_stack"] = [(node.name, source)]
    graph = quantised(graph, X86InductorQuantizer().set_global(ranges(unsigned=True)), images, len(example))
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=dynamic_shapes)


def share_of(program: Any) -> float:
    """The share of a program's products whose factors both come from int8."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    products = [node for node in calls if node.target in PRODUCTS]
    whole = [node for node in products if all(is_quantised(factor) for factor in node.args[:2])]
    return len(whole) / max(len(products), 1)


def is_quantised(node: Any) -> bool:
    """Whether a node of a graph gives numbers that come from int8."""
    return "dequantize" in str(getattr(node, "target", ""))
