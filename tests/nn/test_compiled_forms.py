"""What layers become under a compiler, and the forms they take on GPUs, run here on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from equiflop import Rep
from equiflop.nn import Block, LayerNorm, Mlp
from oracles import group, relative_error, scramble


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that makes layers take the form they have when compiled for GPUs."""

    def switch() -> None:
        for module in ("norm", "mlp"):
            monkeypatch.setattr(f"equiflop.nn.{module}.compiled_for_gpu", lambda x: True)

    return switch


def both_forms(module: nn.Module, dim: int, switch: Callable[[], None]) -> list[list[Tensor]]:
    """Outputs and gradients of both forms."""
    x = torch.randn(2, 5, dim, dtype=torch.float64, requires_grad=True)
    found = []
    for _ in range(2):
        y = module(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        switch()
    return found


@pytest.mark.parametrize("weighting", ["entries", "octic"])
@pytest.mark.parametrize(
    ("name", "multiplicities"),
    [("C2", (5, 3)), ("C2", (4, 0)), ("C3", (3, 3)), ("D4", (4, 4, 4, 4, 8)), ("D4", (1, 0, 3, 4, 2)), ("S4", None)],
)
def test_norm_in_one_pass(
    name: str, multiplicities: tuple[int, ...] | None, weighting: Literal["entries", "octic"], as_on_gpus: Any
) -> None:
    rep = Rep.regular(group(name), 3) if multiplicities is None else Rep(group(name), multiplicities)
    norm = scramble(LayerNorm(rep, weighting=weighting, dtype=torch.float64))
    for before, after in zip(*both_forms(norm, rep.dim, as_on_gpus), strict=True):
        assert relative_error(after, before) < 1e-12


def test_norm_of_many_rows_keeps_its_form(as_on_gpus: Any) -> None:
    rep = Rep.regular(group("S5"), 1)
    assert not hasattr(LayerNorm(rep), "centred_rows")
    as_on_gpus()
    assert LayerNorm(rep)(torch.randn(2, rep.dim)).shape == (2, rep.dim)


@pytest.mark.parametrize("name", ["C2", "C3", "D4", "Q8"])
def test_factors_of_the_transforms_beside_the_activation(name: str, as_on_gpus: Any) -> None:
    rep = Rep.regular(group(name), 4)
    mlp = scramble(Mlp(rep, 2 * rep, dtype=torch.float64))
    for before, after in zip(*both_forms(mlp, rep.dim, as_on_gpus), strict=True):
        assert relative_error(after, before) < 1e-12


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


@pytest.mark.parametrize("on_gpus", [False, True])
def test_compiled_block_keeps_no_more_than_the_plain_one(on_gpus: bool, as_on_gpus: Any) -> None:
    plain = timm.models.vision_transformer.Block(64, 4, qkv_bias=True, init_values=0.1).train().bfloat16()
    block = Block(Rep.regular_of_dim(group("C2"), 64, "dim"), 4, init_values=0.1).train().bfloat16()
    if on_gpus:
        as_on_gpus()
    kept, products = step_of(block, 64)
    plain_kept, plain_products = step_of(plain, 64)
    assert kept <= plain_kept
    assert plain_products == 12
    assert products == 2 * plain_products + 2  # one per irrep; the output projection once more backward
