"""What layers keep for backward, and computing the batch in parts: neither may change a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from equiflop import Rep
from equiflop.kernels import branch, layout_of
from equiflop.nn import Block, Mlp
from equiflop.nn.residual import Branch, residual_branches
from oracles import group, relative_error, scramble
from small_vits import scrambled, small_vit


def bytes_kept(module: nn.Module, x: Tensor) -> int:
    """Bytes of activations, the input among them, that backward needs."""
    ours = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("name", ["C2", "C2xC2"])
def test_block_keeps_no_more_than_the_plain_one(name: str) -> None:
    dim, heads = 64, 4
    plain = timm.models.vision_transformer.Block(dim, heads, qkv_bias=True, init_values=0.1).train()
    block = Block(Rep.regular_of_dim(group(name), dim, "dim"), heads, init_values=0.1).train()
    x = torch.randn(2, 50, dim, requires_grad=True)
    assert bytes_kept(block, x) <= 1.02 * bytes_kept(plain, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func() -> None:
    model = scrambled(small_vit(dtype=torch.float64))
    parameters = dict(model.named_parameters())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    per_image = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    expected = torch.autograd.grad(loss(parameters, images[1]), list(parameters.values()))
    for found, value in zip(per_image.values(), expected, strict=True):
        assert relative_error(found[1], value) < 1e-12


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that the products of a branch really see."""
    sizes: list[int] = []
    whole: Callable[..., list[Tensor]] = branch._mlp

    def counted(lanes: list[Tensor], *args: Any) -> list[Tensor]:
        sizes.append(len(lanes[0]))
        return whole(lanes, *args)

    monkeypatch.setattr(branch, "_mlp", counted)
    return sizes


def mlp_branch(mlp: Mlp, x: Tensor) -> Tensor:
    """The branch of an MLP alone: no norm, no scale."""
    nothing = nn.Identity()
    return residual_branches(x, layout_of(mlp.rep), Branch(nothing, mlp, nothing, nothing))


@pytest.mark.parametrize("name", ["C2", "C4", "D4", "Q8"])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_parts_of_the_batch_give_the_whole(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = group(name)
    rep = Rep.regular(g, 2)
    mlp = scramble(Mlp(rep, Rep.regular(g, 8), dtype=torch.float64)).eval()
    x = torch.randn(batch, 7, rep.dim, dtype=torch.float64)
    expected = (x + mlp(x)).detach()
    three = 3 * 7 * 8 * g.order * 8  # bytes of three of the batch
    monkeypatch.setattr(branch, "PART_BYTES", three)
    monkeypatch.setattr(branch, "LARGE_BYTES", three)
    sizes = counting(monkeypatch)
    with torch.no_grad():
        found = mlp_branch(mlp, x)
    assert sum(sizes) == batch and len(sizes) == -(-batch // 3) and max(sizes) <= 3
    assert relative_error(found, expected) < 1e-14


def test_gradients_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rep = Rep.regular(group("C2"), 2)
    mlp = Mlp(rep, Rep.regular(group("C2"), 8))
    monkeypatch.setattr(branch, "PART_BYTES", 1)
    monkeypatch.setattr(branch, "LARGE_BYTES", 1)
    sizes = counting(monkeypatch)
    mlp_branch(mlp, torch.randn(4, 3, 4))
    with torch.no_grad():
        mlp_branch(mlp, torch.randn(0, 3, 4))
    assert sizes == [4, 0]


@pytest.mark.slow
def test_compiled_network_takes_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch, "PART_BYTES", 10_000)
    monkeypatch.setattr(branch, "LARGE_BYTES", 10_000)
    model = scramble(small_vit())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch in (4, 3, 5, 8, 1):
            images = torch.randn(batch, 3, 32, 32)
            assert relative_error(compiled(images), model(images)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # the first size, any size, one image
