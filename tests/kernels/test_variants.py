"""Every variant of every operation against the reference: the branch's own modules, and the norm's few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import timm
import torch
from timm.layers import QuickGELU
from torch import Tensor, nn
from torch._inductor import config, metrics

from equiflop import Rep, kernels
from equiflop.kernels import TABLE, activation, branch, choose
from equiflop.nn import Block, LayerNorm
from oracles import group, relative_error, scramble

#: Groups whose transform is made of additions; for C3 and D3 no variant of a branch applies.
PLANNED = ("C1", "C2", "C2xC2", "C4", "D4", "Q8")
WITHOUT_PLAN = ("C3", "D3")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the variants that run, as ``operation/variant``."""
    taken: list[str] = []

    def counting(operation: str, variant: kernels.Variant) -> kernels.Variant:
        def run(*args: Any) -> Any:
            count = len(args[2]) if operation == "branches" and variant.name != "parts" else 1
            taken.extend([f"{operation}/{variant.name}"] * count)  # one for every branch
            return variant.run(*args)

        return replace(variant, run=run)

    with monkeypatch.context() as patch:
        for operation, variants in TABLE.items():
            patch.setitem(TABLE, operation, tuple(counting(operation, variant) for variant in variants))
        yield taken


def outputs_and_gradients(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs and parameters of a function that weighs every entry."""
    x = x.clone().requires_grad_()
    y = call(x)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    named = dict(module.named_parameters())
    return [y.detach(), *torch.autograd.grad((weights * y).sum(), [x, *named.values()])]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) < tolerance, i


def block_of(name: str, copies: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> Block:
    rep = Rep.regular(group(name), copies)
    heads = 2 * rep.group.order if options.get("heads") == "regular" else 2
    return scramble(Block(rep, heads, **{"init_values": 0.5, **options}, dtype=dtype))


def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no layer scale": {"init_values": None},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "octic weighting": {"norm_weighting": "octic"},
    "no layer scale, no biases": {"init_values": None, "qkv_bias": False, "proj_bias": False},
    "narrow MLP": {"mlp_ratio": 0.5},
}


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("option", OPTIONS)
def test_eager_with_gradients(name: str, heads: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(name, heads=heads, **OPTIONS[option])
    x = torch.randn(1, 3, block.rep.dim, dtype=torch.float64)
    with kernels.reference(), counted(monkeypatch) as taken:
        expected = outputs_and_gradients(block, block, x)
    assert taken == []
    with counted(monkeypatch) as taken:
        found = outputs_and_gradients(block, block, x)
    assert taken.count("branches/eager") == 2
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize(("batch", "tokens", "copies"), [(1, 1, 2), (1, 7, 4), (3, 5, 6)])
def test_eager_in_place(
    name: str, heads: str, batch: int, tokens: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for act in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), torch.tanh):
        block = block_of(name, copies, heads=heads, act=act)
        x = torch.randn(batch, tokens, block.rep.dim, dtype=torch.float64)
        given = x.clone()
        with torch.no_grad():
            with kernels.reference():
                expected = block(x)
            with counted(monkeypatch) as taken:
                found = block(given)
        assert taken.count("branches/eager") == 2
        assert torch.equal(given, x)
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
def test_lanes_under_a_compiler(name: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(name, heads=heads, **OPTIONS["as it is" if heads == "coupled" else "no layer scale, no biases"])
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.float64)
    with kernels.reference():
        expected = outputs_and_gradients(block, block, x)
    with counted(monkeypatch) as taken:
        found = outputs_and_gradients(compiled(block), block, x)
    assert taken.count("branches/lanes") == 2
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("name", WITHOUT_PLAN)
@pytest.mark.parametrize("heads", ["coupled", "regular"])
def test_groups_without_a_transform_by_additions(name: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their MLP and regular heads are the plain modules; coupled heads need no transform and have their kernel."""
    block = block_of(name, heads=heads)
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.float64)
    with kernels.reference():
        expected = outputs_and_gradients(block, block, x)
    with counted(monkeypatch) as taken:
        found = outputs_and_gradients(block, block, x)
    assert taken.count("branches/eager") == (1 if heads == "coupled" else 0)
    assert_same(found, expected, 1e-12)
    assert_same(outputs_and_gradients(compiled(block), block, x), expected, 1e-12)


@pytest.mark.parametrize("heads", ["coupled", "regular"])
def test_features_that_are_no_multiple_of_the_regular_representation(
    heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rep = Rep(group("D4"), (2, 4, 6, 2, 8))
    if heads == "regular":
        with pytest.raises(ValueError, match="multiple of the regular representation"):
            Block(rep, 8, heads="regular")
        return
    block = scramble(Block(rep, 2, mlp_ratio=4.0, init_values=0.5, dtype=torch.float64)) if rep.dim % 2 == 0 else None
    assert block is not None
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    with counted(monkeypatch) as taken:
        found = outputs_and_gradients(block, block, x)
    assert not any(name.startswith("branch") for name in taken)
    with kernels.reference():
        assert_same(found, outputs_and_gradients(block, block, x), 1e-12)


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
def test_float32(name: str, heads: str) -> None:
    block = block_of(name, 8, torch.float32, heads=heads)
    x = torch.randn(2, 5, block.rep.dim)
    with kernels.reference():
        expected = outputs_and_gradients(block, block, x)
        with torch.no_grad():
            values = block(x)
    assert_same(outputs_and_gradients(block, block, x), expected, 1e-5)
    assert_same(outputs_and_gradients(compiled(block), block, x), expected, 1e-5)
    with torch.no_grad():
        assert relative_error(block(x), values) < 1e-5


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
def test_bfloat16(name: str, heads: str) -> None:
    exact = block_of(name, 8, heads=heads)
    block = block_of(name, 8, torch.bfloat16, heads=heads)
    block.load_state_dict(exact.state_dict())
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.bfloat16)
    with torch.no_grad():
        with kernels.reference():
            expected = exact(x.double())
        for found in (block(x), compiled(block)(x)):
            assert found.dtype == torch.bfloat16
            assert relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("name", ["C2", "D4", "C3"])
@pytest.mark.parametrize("heads", ["coupled", "regular"])
def test_autocast(name: str, heads: str) -> None:
    """Of float32 weights: the same steps in half precision, forward and backward, to that precision."""
    block = block_of(name, 8, torch.float32, heads=heads)
    x = torch.randn(2, 5, block.rep.dim)
    with torch.no_grad(), kernels.reference():
        exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        with kernels.reference():
            expected = outputs_and_gradients(block, block, x)
        found = outputs_and_gradients(block, block, x)
        with torch.no_grad():
            values = block(x)
    assert found[0].dtype == expected[0].dtype == values.dtype
    for y in (found[0], values):
        assert relative_error(y, exact) < 2e-2
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() < 5e-2 * b.norm()


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", ["C2", "D4"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_stochastic_depth(name: str, heads: str, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples are dropped, whichever path computes the others."""
    block = block_of(name, heads=heads, drop_path=0.5, init_values=scale).train()
    x = torch.randn(16, 3, block.rep.dim, dtype=torch.float64)

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(7)
        return outputs_and_gradients(call, block, x)

    with kernels.reference():
        expected = run(block)
    with counted(monkeypatch) as taken:
        assert_same(run(block), expected, 1e-12)
    assert taken.count("branches/eager") == 2
    assert_same(run(compiled(block)), expected, 1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of("C2")
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.float64)
    mask = None if is_causal else torch.rand(5, 5) > 0.3
    if mask is not None:
        mask.fill_diagonal_(True)

    def run(x: Tensor) -> Tensor:
        return block(x, attn_mask=mask, is_causal=is_causal)

    with kernels.reference():
        expected = outputs_and_gradients(run, block, x)
    with counted(monkeypatch) as taken:
        assert_same(outputs_and_gradients(run, block, x), expected, 1e-12)
    assert taken.count("branches/eager") == 2
    assert not torch.allclose(block(x), run(x))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("name", ["C2", "D4"])
@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (5, 2), (8, 3)])
def test_parts_of_the_batch(
    name: str, batch: int, parts: int, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = block_of(name)
    x = torch.randn(batch, 7, block.rep.dim, dtype=torch.float64)
    with torch.no_grad(), kernels.reference():
        expected = block(x)
    three = 3 * 7 * 4 * block.rep.dim * 8  # bytes of hidden features of three images
    monkeypatch.setattr(branch, "PART_BYTES", three)
    monkeypatch.setattr(branch, "LARGE_BYTES", three)
    with torch.no_grad(), counted(monkeypatch) as names:
        found = (compiled(block) if compiling else block)(x)
    assert names.count("branches/parts") == (1 if parts > 1 else 0)
    assert relative_error(found, expected) < 1e-14
    with counted(monkeypatch) as names:
        block(x)
    assert "branches/parts" not in names  # gradients need the whole


NORMS: list[tuple[str, tuple[int, ...]]] = [
    ("C1", (6,)),
    ("C2", (5, 3)),
    ("C2", (4, 4)),
    ("C2", (4, 0)),
    ("C2", (1, 1)),
    ("C2xC2", (3, 3, 3, 3)),
    ("C3", (3, 3)),
    ("C4", (4, 4, 4)),
    ("D4", (4, 4, 4, 4, 8)),
    ("D4", (1, 1, 1, 1, 2)),
    ("D4", (1, 0, 3, 4, 2)),
    ("Q8", (2, 2, 2, 2, 2)),
    ("D3", (2, 2, 4)),
]


@pytest.mark.parametrize("weighting", ["entries", "octic"])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("name", "multiplicities"), NORMS)
def test_norm(
    name: str,
    multiplicities: tuple[int, ...],
    affine: bool,
    bias: bool,
    weighting: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rep = Rep(group(name), multiplicities)
    norm = scramble(LayerNorm(rep, 1e-3, affine=affine, bias=bias, weighting=weighting, dtype=torch.float64))
    x = 3.0 + torch.randn(2, 5, rep.dim, dtype=torch.float64)
    with kernels.reference():
        expected = outputs_and_gradients(norm, norm, x)
    with counted(monkeypatch) as taken:
        assert_same(outputs_and_gradients(norm, norm, x), expected, 1e-12)
    fused = weighting == "entries" and min(multiplicities) > 1
    assert taken == (["layer_norm/torch"] if fused else [])
    if affine != bias:
        return  # compiled as the others
    with counted(monkeypatch) as taken:
        assert_same(outputs_and_gradients(compiled(norm), norm, x), expected, 1e-12)
    assert taken == (["layer_norm/lanes"] if rep.regular_copies else [])


@pytest.mark.parametrize("name", ["C2", "D4"])
def test_norm_of_features_far_from_zero(name: str) -> None:
    """A mean a thousand times the deviation costs no digits that the reference keeps."""
    rep = Rep.regular(group(name), 16)
    exact = scramble(LayerNorm(rep, dtype=torch.float64))
    norm = LayerNorm(rep)
    norm.load_state_dict(exact.state_dict())
    x = torch.randn(2, 5, rep.dim) + 1000.0
    with kernels.reference():
        expected = exact(x.double())
    for found in (norm(x), compiled(norm)(x)):
        assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("name", ["C2", "D4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    rep = Rep.regular(group(name), 16)
    norm = scramble(LayerNorm(rep, dtype=dtype))
    exact = LayerNorm(rep, dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, rep.dim).to(dtype)
    expected = exact(x.double())
    with kernels.reference():
        reference = norm(x)
    for found in (norm(x), compiled(norm)(x), reference):
        assert found.dtype == dtype
        assert relative_error(found, expected) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("form", get_args(kernels.Form))
@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", PLANNED)
def test_the_form_made_for_runtimes(name: str, heads: str, form: kernels.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(name, 16, heads=heads)
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.float64)
    with kernels.reference():
        expected = outputs_and_gradients(block, block, x)
    with counted(monkeypatch) as taken, kernels.for_runtimes(form, subtract_means=False):
        found = outputs_and_gradients(block, block, x)
        linear = block.attn.qkv(x)
    real = all(irrep.endomorphism_dim == 1 for irrep in group(name).irreps)
    variant = "branches/stacked" if form == "stacked" and real else "branches/runtime"
    assert taken.count(variant) == 2 and taken.count("linear/runtime") == 1
    assert_same(found, expected, 1e-11)
    with kernels.reference():
        assert relative_error(linear, block.attn.qkv(x)) < 1e-11


def test_the_table_is_complete() -> None:
    """What this file compares is all there is."""
    names = {f"{operation}/{variant.name}" for operation, variants in TABLE.items() for variant in variants}
    assert names == {
        *("branches/parts", "branches/lanes", "branches/eager", "layer_norm/torch", "layer_norm/lanes"),
        *("attention/written out", "activation/rational", "branches/triton"),
        *("branches/stacked", "branches/runtime", "layer_norm/runtime", "linear/runtime"),
    }
    assert all(variant.when for variants in TABLE.values() for variant in variants)
    assert choose._forced is False


@pytest.mark.parametrize("act", [nn.GELU(), QuickGELU(), nn.SiLU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rational_activations(dtype: torch.dtype, act: nn.Module) -> None:
    """Values and derivatives against float64, over the whole range."""
    x = torch.linspace(-12.0, 12.0, 40_001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = act(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    with torch.no_grad():
        inference = compiled(activation.activate)(act, x)
    found = compiled(activation.activate)(act, x)
    (found_slope,) = torch.autograd.grad(found.sum(), x)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for value, wanted in ((inference, expected), (found, expected), (found_slope, slope)):
        assert value.dtype == dtype
        assert ((value.double() - wanted).abs() <= tolerance * exact.abs().clamp_min(1.0)).all()
    assert torch.equal(kernels.TABLE["activation"][0].run(act, torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("name", ["C2", "D4"])
def test_attention_written_out(name: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, fused attention gives way to softmax and two products, with the same values and gradients."""
    block = block_of(name, copies=8, heads=heads)
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.float64)
    expected = outputs_and_gradients(block, block, x)
    block.attn.fused_attn = False
    with counted(monkeypatch) as taken:
        for call in (block, compiled(block)):
            assert_same(outputs_and_gradients(call, block, x), expected, 1e-12)
    assert taken.count("attention/written out") >= 2


def test_compiled_training_in_half_precision_writes_attention_out(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of("C2", dtype=torch.bfloat16)
    x = torch.randn(2, 5, block.rep.dim, dtype=torch.bfloat16)
    with counted(monkeypatch) as taken:
        compiled(block)(x).sum().backward()
        assert "attention/written out" in taken
        taken.clear()
        with torch.no_grad():
            compiled(block)(x)
    assert "attention/written out" not in taken


@pytest.mark.slow
def test_passes_over_memory_in_half_precision() -> None:
    """Bytes of the compiled graph, bfloat16: no more than plain's, but for the heads, which are gathered and taken
    apart once: eight times the features."""
    x = torch.randn(4, 50, 128, dtype=torch.bfloat16)
    plain = timm.models.vision_transformer.Block(128, 8, qkv_bias=True, init_values=0.1).bfloat16()
    heads_bytes = 8 * x.numel() * x.element_size()
    for heads in ("coupled", "regular"):
        block = Block(Rep.regular_of_dim(group("C2"), 128), 8, heads=heads, init_values=0.1).bfloat16()
        assert bytes_and_kernels(block, x)[0] - heads_bytes <= bytes_and_kernels(plain, x)[0]
        assert bytes_and_kernels(block, x)[1] <= bytes_and_kernels(plain, x)[1] + 1


def bytes_and_kernels(block: nn.Module, x: Tensor) -> tuple[int, int]:
    """What Inductor's scheduler counts for one compiled forward step."""
    torch._dynamo.reset()
    metrics.reset()
    torch._logging.set_logs(inductor_metrics=True)
    try:
        with torch.no_grad(), config.patch(fx_graph_cache=False):
            torch.compile(block.eval())(x)
    finally:
        torch._logging.set_logs()
    return metrics.num_bytes_accessed, metrics.generated_kernel_count
