"""What layers become under a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from equiflop import Rep
from equiflop.nn import Block
from oracles import group


def step_of(block: nn.Module, dim: int) -> tuple[int, int]:
    """Of a compiled training step: bytes kept for backward with the output, and matrix products, both directions."""
    kept, products = 0, 0

    def count(graph: fx.GraphModule) -> None:
        nonlocal products
        products += sum(str(node.target) in ("aten.mm.default", "aten.addmm.default") for node in graph.graph.nodes)

    def forward(graph: fx.GraphModule, inputs: Any) -> Any:
        nonlocal kept
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [node.meta["val"] for node in outputs if isinstance(node, fx.Node) and node.op != "placeholder"]
        kept += sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
        count(graph)
        return make_boxed_func(graph.forward)

    def backward(graph: fx.GraphModule, inputs: Any) -> Any:
        count(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled = torch.compile(block, backend=backend)
    compiled(torch.randn(8, 50, dim, dtype=torch.bfloat16, requires_grad=True)).float().square().sum().backward()
    return kept, products


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_block_keeps_no_more_than_the_plain_one(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fused attention in both, and with attention written out in both, as E trains in half precision."""
    plain = timm.models.vision_transformer.Block(64, 4, qkv_bias=True, init_values=0.1).train().bfloat16()
    block = Block(Rep.regular_of_dim(group("C2"), 64, "dim"), 4, init_values=0.1).train().bfloat16()
    plain.attn.fused_attn = fused
    if fused:
        monkeypatch.setattr("equiflop.kernels.branch.WRITTEN_OUT_TOKENS", 0)
    kept, products = step_of(block, 64)
    plain_kept, plain_products = step_of(plain, 64)
    statistics = 2 * 8 * 50 * (3 * 4 - 2 * 2)  # two norms; two means and a scale in float32, plain two in bfloat16
    assert kept <= plain_kept + (0 if fused else statistics)
    assert plain_products == 12
    assert products == 2 * plain_products + 2  # one per irrep; the output projection once more backward
