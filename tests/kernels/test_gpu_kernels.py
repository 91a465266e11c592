"""Triton kernels, run by Triton's interpreter, against products in float64 and the branches' own modules."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, QuickGELU
from torch import Tensor, nn

from equiflop import Rep, kernels
from equiflop.kernels import Layout, layout_of, orders, schur
from equiflop.kernels import norm as norms
from equiflop.kernels.gpu import branch, functions, product_ops
from equiflop.kernels.gpu.functions import Map
from equiflop.kernels.gpu.operands import Axis
from equiflop.kernels.gpu.products import ACTIVATIONS
from equiflop.kernels.lanes import Lanes, decode
from equiflop.kernels.layout import per_channel
from equiflop.kernels.orders import Order
from equiflop.nn import Block
from oracles import group, relative_error, scramble

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="no GPU, nor TRITON_INTERPRET=1 as in 'make test'")
DEVICE = "cuda" if CUDA else "cpu"
NAMES = ("C2", "C2xC2", "D4")
AXES: tuple[Axis, ...] = get_args(Axis)
#: On a GPU products of float32 take its tensor units, which round to 10 bits.
TOLERANCES = {torch.float32: 2e-3 if CUDA else 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MODULES = {"gelu": nn.GELU(), "quick_gelu": QuickGELU(), "silu": nn.SiLU(), "relu": nn.ReLU()}


def layouts(name: str, copies: int, out: int) -> tuple[Layout, Layout]:
    return layout_of(Rep.regular(group(name), copies)), layout_of(Rep.regular(group(name), out))


def weights_of(a: Layout, b: Layout, sections: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    pairs = zip(a.spans, b.spans, strict=True)
    return [
        (torch.randn(sections * to.multiplicity, of.multiplicity) / of.multiplicity**0.5).to(DEVICE, dtype)
        for of, to in pairs
    ]


def product(x: Tensor, weights: list[Tensor], bias: Tensor | None, a: Layout, b: Layout, how: Map) -> Tensor:
    """The product in float64 by ``orders`` and ``schur``, which their own tests hold to dense maps."""
    wide = [weight.double() for weight in weights]
    blocks = orders.read(x.double(), a, Order(how.reads, 1, how.heads), None)
    first = None if bias is None else bias.double()
    out = [
        schur.block_product(block, weight, first if i == 0 else None, 1)
        for i, (block, weight) in enumerate(zip(blocks, wide, strict=True))
    ]
    return orders.write(out, b, Order(how.writes, how.sections, how.heads), None)


@pytest.mark.parametrize("name", [*NAMES, "C1"])
def test_lanes_in_numbers(name: str) -> None:
    layout = layout_of(Rep.regular(group(name), 3))
    lanes = decode(layout.code)
    assert layout.plan is not None and lanes.plan.order == layout.plan.order
    assert lanes.plan.stages == layout.plan.stages and lanes.count == group(name).order
    assert lanes.spans == tuple((span.dim, span.multiplicity // 3) for span in layout.spans)
    assert decode(Lanes(lanes.spans, lanes.plan).code()) == lanes


@pytest.mark.parametrize("name", ["C4", "Q8", "C3", "D3"])
def test_groups_that_have_no_kernels(name: str) -> None:
    """Irreps of complex or quaternionic type, or no transform by additions."""
    assert layout_of(Rep.regular(group(name), 16)).code == ()


@pytest.mark.parametrize("reads", AXES)
@pytest.mark.parametrize(("writes", "sections"), [(a, n) for a in AXES for n in (1, 3) if (a, n) != ("irreps", 3)])
@pytest.mark.parametrize("name", NAMES)
def test_a_product_and_its_gradients(name: str, reads: Axis, writes: Axis, sections: int) -> None:
    """Sizes that fill no tile, in every order of both axes; parts of irreps, within their blocks, no layer asks for."""
    a, b = layouts(name, 20, 36 if name == "C2" else 12)
    heads = 4 if "heads" in (reads, writes) else 1
    how = Map(a.code, reads, writes, sections, heads)
    weights = weights_of(a, b, sections)
    bias = torch.randn(sections * b.spans[0].multiplicity, device=DEVICE)
    x = torch.randn(37, a.dim, device=DEVICE)
    factors = torch.randn(37, sections * b.dim, device=DEVICE)
    given = [tensor.clone().requires_grad_() for tensor in (x, bias, *weights)]
    y = functions.multiply(given[0], given[2:], given[1], how)
    exact = [tensor.double().requires_grad_() for tensor in (x, bias, *weights)]
    expected = product(exact[0], exact[2:], exact[1], a, b, how)
    assert relative_error(y, expected) < TOLERANCES[torch.float32]
    found = torch.autograd.grad((y * factors).sum(), given)
    for i, (own, other) in enumerate(zip(found, torch.autograd.grad((expected * factors).sum(), exact), strict=True)):
        assert own.dtype == torch.float32 and relative_error(own, other) < TOLERANCES[torch.float32], i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Sums and changes of basis in float32: the error is that of rounding the result."""
    a, b = layouts(name, 64, 16)
    weights = weights_of(a, b, 1, dtype)
    x = torch.randn(9, a.dim, device=DEVICE, dtype=dtype)
    how = Map(a.code, "irreps", "group")
    y = functions.multiply(x, weights, None, how)
    assert y.dtype == dtype
    expected = product(x, weights, None, a, b, how)
    assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-3).all()


def test_rows_that_lie_apart() -> None:
    """Views with gaps between rows are read in place; others are copied."""
    a, b = layouts("D4", 16, 16)
    weights, how = weights_of(a, b), Map(a.code)
    wide = torch.randn(5, 2 * a.dim, device=DEVICE)
    columns = torch.randn(a.dim, 5, device=DEVICE).T
    for x in (wide[:, : a.dim], wide[::2, a.dim :], columns):
        y = functions.multiply(x, weights, None, how)
        assert relative_error(y, product(x, weights, None, a, b, how)) < TOLERANCES[torch.float32]
    batched = torch.randn(2, 3, a.dim, device=DEVICE)
    y = functions.multiply(batched, weights, None, how)
    assert y.shape == (6, b.dim)


@pytest.mark.parametrize(("writes", "sections"), [("irreps", 1), ("heads", 3)])
@pytest.mark.parametrize("reads", ["irreps", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_by_descriptors(
    name: str, reads: Axis, writes: Axis, sections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On request, where rows begin at multiples of 16 bytes: the same products and gradients, by other loads."""
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no Hopper")
    monkeypatch.setenv("EQUIFLOP_TMA", "1")
    taken: list[bool] = []
    run = product_ops.run_tuned

    def noted(what: Any, *arguments: Any) -> None:
        taken.append(getattr(what, "descriptors", False))
        run(what, *arguments)

    monkeypatch.setattr(product_ops, "run_tuned", noted)
    a, b = layouts(name, 20, 36 if name == "C2" else 12)
    how = Map(a.code, reads, writes, sections, 4)
    weights = weights_of(a, b, sections)
    x = torch.randn(37, a.dim, device=DEVICE)
    x.requires_grad_()
    y = functions.multiply(x, weights, None, how)
    assert taken == [True]
    expected = product(x, weights, None, a, b, how)
    assert relative_error(y, expected) < TOLERANCES[torch.float32]
    (gradient,) = torch.autograd.grad(y.square().sum(), [x])
    (exact,) = torch.autograd.grad(expected.square().sum(), [x])
    assert relative_error(gradient, exact) < 2 * TOLERANCES[torch.float32]
    assert taken[1:] == [writes != "heads"]
    functions.multiply(torch.randn(5, a.dim + 1, device=DEVICE)[:, : a.dim], weights, None, how)  # rows 4 bytes off
    assert taken[2:] == [False]


def test_no_rows() -> None:
    a, b = layouts("C2", 16, 16)
    given = [torch.zeros(0, a.dim, device=DEVICE, requires_grad=True), *weights_of(a, b)]
    given[1:] = [weight.requires_grad_() for weight in given[1:]]
    y = functions.multiply(given[0], given[1:], None, Map(a.code))
    assert y.shape == (0, b.dim)
    dx, *dw = torch.autograd.grad(y.sum(), given)
    assert dx.shape == (0, a.dim) and all(not grad.any() for grad in dw)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_mlp_and_its_gradients(name: str, activation: str) -> None:
    a, b = layouts(name, 16, 20)
    first, second = weights_of(a, b), weights_of(b, a)
    bias1, bias2 = (torch.randn(side.spans[0].multiplicity, device=DEVICE) for side in (b, a))
    x, residual = torch.randn(2, 6 * 3, a.dim, device=DEVICE)
    path = torch.tensor([0.0, 1.25, 2.0], device=DEVICE)
    scale = torch.randn(sum(span.multiplicity for span in a.spans), device=DEVICE)
    tensors = (x, bias1, bias2, scale, residual, *first, *second)

    def exactly(x: Tensor, bias1: Tensor, bias2: Tensor, scale: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        count = len(weights) // 2
        spatial = product(x, list(weights[:count]), bias1, a, b, Map(a.code, "irreps", "group"))
        out = product(MODULES[activation](spatial), list(weights[count:]), bias2, b, a, Map(a.code, "group", "irreps"))
        return residual + path.double().repeat_interleave(6)[:, None] * per_channel(scale, a) * out

    given = [tensor.clone().requires_grad_() for tensor in tensors]
    how = Map(a.code)

    def found_by(x: Tensor, bias1: Tensor, bias2: Tensor, scale: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        both = (weights[: len(first)], weights[len(first) :])
        around = {"scale": scale, "residual": residual, "path": path}
        return functions.multiply_twice(x, both, (bias1, bias2), (how, how), activation, **around)

    y = found_by(*given)
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected = exactly(*exact)
    assert relative_error(y, expected) < TOLERANCES[torch.float32]
    found = torch.autograd.grad(y.square().sum(), given)
    for i, (own, other) in enumerate(zip(found, torch.autograd.grad(expected.square().sum(), exact), strict=True)):
        assert relative_error(own, other) < 2 * TOLERANCES[torch.float32], i
    with torch.no_grad():
        again = found_by(*tensors)
    assert torch.equal(again, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_those_of_the_activation(activation: str) -> None:
    """The derivative that the kernels write out, against PyTorch's."""
    z = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
    functions_of = {"exp": torch.exp, "erf": torch.erf, "sigmoid": torch.sigmoid, "where": torch.where}
    space = {"z": z.detach(), "tl": type("tl", (), {**functions_of, "maximum": lambda a, b: a.clamp(min=b)})}
    value, slope = ACTIVATIONS[activation]
    y = MODULES[activation](z)
    (expected,) = torch.autograd.grad(y.sum(), z)
    assert torch.allclose(eval(value, space), y.detach(), atol=1e-12)
    assert torch.allclose(torch.as_tensor(eval(slope, space)) + 0 * z.detach(), expected, atol=1e-12)


@pytest.mark.parametrize("weighting", get_args(norms.Weighting))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_and_its_gradients(name: str, affine: bool, weighting: norms.Weighting) -> None:
    layout = layout_of(Rep.regular(group(name), 20))
    count = sum(span.multiplicity for span in layout.spans)
    x, carried = torch.randn(2, 11, layout.dim, device=DEVICE)
    weight, bias = (torch.randn(count, device=DEVICE), torch.randn(20, device=DEVICE)) if affine else (None, None)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    norm = norms.Norm(exact[1], exact[2], 1e-4, weighting)
    with kernels.reference():
        expected = norms.layer_norm(exact[0], layout, norm)  # type: ignore[arg-type]
    given = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    entries = tuple(norms.entry_weights(layout, norm))
    along, y = functions.Normalise.apply(*given, layout.code, entries, 1e-4, torch.float32)
    assert torch.equal(along, x)
    tolerance = 1e-5
    assert relative_error(y, expected) < tolerance
    loss = (y * carried).sum() + (along * carried).sum()
    exact_loss = (expected * carried).sum() + (exact[0] * carried).sum()
    found = torch.autograd.grad(loss, [t for t in given if t is not None])
    others = torch.autograd.grad(exact_loss, [t for t in exact if t is not None])
    for i, (own, other) in enumerate(zip(found, others, strict=True)):
        assert relative_error(own, other) < tolerance, i


def block_of(name: str, copies: int = 16, **options: Any) -> Block:
    rep = Rep.regular(group(name), copies)
    heads = rep.group.order if options.get("heads") == "regular" else 2
    block = Block(rep, heads, **{"init_values": 0.5, "mlp_ratio": 2.0, **options})
    return scramble(block).to(DEVICE)


def with_gradients(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    factors = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((factors * y).sum(), [x, *module.parameters()])]


def is_taken(module: Block, x: Tensor) -> bool:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        variants = kernels.TABLE["branches"]
        first = kernels.Variant("triton", branch.fits, lambda *a: found.append(1) or branch.by_triton(*a), "")  # type: ignore[func-returns-value]
        patch.setitem(kernels.TABLE, "branches", (first, *variants[1:]))
        module(x)
    return bool(found)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "regular heads": {"heads": "regular"},
    "no layer scale, no biases": {"init_values": None, "qkv_bias": False, "proj_bias": False},
    "octic weighting, SiLU": {"norm_weighting": "octic", "act": nn.SiLU()},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_what_its_modules_are(name: str, option: str) -> None:
    block = block_of(name, **OPTIONS[option])
    x = torch.randn(2, 7, block.rep.dim, device=DEVICE)
    exact = copy.deepcopy(block).double()
    with kernels.reference():
        expected = with_gradients(exact, exact, x.double())
    with branch.anywhere():
        assert is_taken(block, x)
        found = with_gradients(block, block, x)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) < 5 * TOLERANCES[torch.float32], i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["C2", "D4"])
def test_a_block_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """No further from float64 than what the modules give in that precision."""
    block = block_of(name, 32 if name == "C2" else 16).to(dtype)
    x = torch.randn(2, 5, block.rep.dim, device=DEVICE, dtype=dtype)
    exact = copy.deepcopy(block).double()
    with kernels.reference():
        expected = with_gradients(exact, exact, x.double())
        others = with_gradients(block, block, x)
    with branch.anywhere():
        found = with_gradients(block, block, x)
    for i, (own, other, right) in enumerate(zip(found, others, expected, strict=True)):
        assert own.dtype == dtype
        limit = max(1.5 * relative_error(other, right), 2 * TOLERANCES[dtype])
        assert relative_error(own, right) < limit, i


@pytest.mark.parametrize("name", ["C2", "D4"])
def test_autocast(name: str) -> None:
    """A residual stream in float32, products in bfloat16, gradients in the weights' float32."""
    block = block_of(name, 32 if name == "C2" else 16)
    x = torch.randn(2, 5, block.rep.dim, device=DEVICE)
    with kernels.reference():
        expected = with_gradients(block, block, x)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return block(x)

    with branch.anywhere():
        found = with_gradients(call, block, x)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == torch.float32 and relative_error(a, b) < 4e-2, i


def test_stochastic_depth() -> None:
    block = block_of("C2", drop_path=0.5)
    block.train()
    x = torch.randn(6, 3, block.rep.dim, device=DEVICE)
    assert isinstance(block.drop_path1, DropPath)
    torch.manual_seed(3)
    with kernels.reference():
        expected = with_gradients(block, block, x)
    torch.manual_seed(3)
    with branch.anywhere():
        found = with_gradients(block, block, x)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) < 5 * TOLERANCES[torch.float32], i


def test_a_branch_alone() -> None:
    """Without a norm in front, without the sum, and with a mask."""
    block = block_of("D4")
    block.norm2 = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 4, block.rep.dim, device=DEVICE)
    mask = torch.randn(4, 4, device=DEVICE)
    with kernels.reference():
        expected = with_gradients(lambda x: block(x, attn_mask=mask), block, x)[:2]
    with branch.anywhere():
        found = with_gradients(lambda x: block(x, attn_mask=mask), block, x)[:2]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5 * TOLERANCES[torch.float32]


def test_frozen_weights_get_no_gradient() -> None:
    block = block_of("C2")
    block.attn.requires_grad_(False)
    x = torch.randn(1, 4, block.rep.dim, device=DEVICE)
    with branch.anywhere():
        block(x).sum().backward()
    assert all(p.grad is None for p in block.attn.parameters())
    assert all(p.grad is not None for p in block.mlp.parameters())


def test_gradient_checkpointing() -> None:
    block = block_of("C2")
    x = torch.randn(1, 4, block.rep.dim, device=DEVICE)
    with branch.anywhere():
        expected = with_gradients(block, block, x)
        found = with_gradients(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False), block, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_reference_s_gradients() -> None:
    """What the kernels' gradients are compared with, against finite differences."""
    block = scramble(Block(Rep.regular(group("D4"), 2), 2, mlp_ratio=1.0, init_values=0.5, dtype=torch.float64))
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    with kernels.reference():
        assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap over attention
def test_when_kernels_are_not_taken() -> None:
    block = block_of("C2")
    x = torch.randn(1, 4, block.rep.dim, device=DEVICE)
    assert not is_taken(block, x)  # float32 has PyTorch's own products
    with branch.anywhere():
        assert is_taken(block, x)
        with kernels.without_triton():
            assert not is_taken(block, x)
        with kernels.reference():
            assert not is_taken(block, x)
        assert not is_taken(block_of("C2", 8), torch.randn(1, 4, 16, device=DEVICE))  # lanes that fill no tile
        assert not is_taken(block_of("C2", act=nn.GELU("tanh")), x)
        assert not is_taken(block_of("C4"), torch.randn(1, 4, 64, device=DEVICE))
        with torch.no_grad():
            mapped = torch.func.vmap(block)(x[None])
        assert relative_error(mapped[0], block(x)) < 5 * TOLERANCES[torch.float32]


@pytest.mark.parametrize("name", ["flop_deit3_small_patch16_224", "octic_deit3_small_patch16_224"])
def test_a_whole_network(name: str) -> None:
    """Class and register tokens, the head: everything around the blocks is as it was."""
    size = (32, 48) if name.startswith("flop") else (32, 32)
    options = {"embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": size, "reg_tokens": 1}
    model = scramble(timm.create_model(name, **options)).to(DEVICE).eval()
    images = torch.randn(2, 3, *size, device=DEVICE)
    with torch.no_grad(), kernels.reference():
        expected = model(images)
    with torch.no_grad(), branch.anywhere():
        found = model(images)
    assert relative_error(found, expected) < 10 * TOLERANCES[torch.float32]
    assert relative_error(F.softmax(found, 1), F.softmax(expected, 1)) < 10 * TOLERANCES[torch.float32]
