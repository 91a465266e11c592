"""What holds for every layer: all dtypes, all ways to run it, and constants that are exact everywhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from equiflop import Action, Rep, assert_equivariant
from equiflop import nn as enn
from equiflop.groups import FiniteGroup, abstract_group
from oracles import group, image_group, move_tensor, move_tokens, relative_error, scramble, tensor_action

ABSTRACT_GROUPS = ("C2", "C4", "D4", "C3", "D3", "Q8", "A4")
GRID_GROUPS = ("flop", "rot4", "octic")


@dataclass(frozen=True)
class Case:
    """A layer, its input, and how the group acts on both ends."""

    name: str
    layer: str
    build: Callable[[torch.dtype | None], nn.Module]
    group: FiniteGroup | Action
    shape: tuple[int, ...]
    act_in: Callable[[int, Tensor], Tensor]
    act_out: Callable[[int, Tensor], Tensor]


def channel_case(layer: str, name: str) -> Case:
    g = group(name)
    rep = Rep.regular(g, 4)
    wide = Rep.regular(g, 6)

    def build(dtype: torch.dtype | None) -> nn.Module:
        layers: dict[str, Callable[[], nn.Module]] = {
            "Linear": lambda: enn.Linear(rep, wide, dtype=dtype),
            "LayerNorm": lambda: enn.LayerNorm(rep, dtype=dtype),
            "LayerScale": lambda: enn.LayerScale(rep, dtype=dtype),
            "FourierActivation": lambda: enn.FourierActivation(rep, dtype=dtype),
            "Attention": lambda: enn.Attention(rep, 2, dtype=dtype),
            "Mlp": lambda: enn.Mlp(rep, wide, dtype=dtype),
            "Block": lambda: enn.Block(rep, 2, init_values=0.1, dtype=dtype),
            "Dropout": lambda: enn.Dropout(rep, 0.5),
            "Invariants": lambda: enn.Invariants(rep, "norm"),
        }
        return layers[layer]()

    def act(rep: Rep) -> Callable[[int, Tensor], Tensor]:
        return lambda a, x: x @ tensor_action(rep, a).to(x.dtype).T

    act_out = {"Linear": act(wide), "Invariants": lambda a, x: x}.get(layer, act(rep))
    return Case(f"{layer} {name}", layer, build, g, (2, 5, rep.dim), act(rep), act_out)


def grid_case(layer: str, name: str) -> Case:
    g = image_group(name)
    rep = Rep.regular(g, 2)

    def act_image(a: int, x: Tensor) -> Tensor:
        return move_tensor(name, a, x)

    if layer == "PatchEmbed":
        return Case(
            f"{layer} {name}",
            layer,
            lambda dtype: enn.PatchEmbed(rep, g, 12, 4, dtype=dtype),
            g,
            (2, 3, 12, 12),
            act_image,
            lambda a, x: move_tokens(name, rep, a, x, (3, 3)),
        )
    if layer == "GridTransform":
        pixels = enn.GridTransform(g, 5, 5).rep

        def act_points(a: int, x: Tensor) -> Tensor:
            return act_image(a, x.mT.unflatten(-1, (5, 5)).contiguous()).flatten(-2).mT

        def act_pixels(a: int, x: Tensor) -> Tensor:
            return tensor_action(pixels, a).to(x.dtype) @ x

        return Case(
            f"{layer} {name}",
            layer,
            lambda dtype: enn.GridTransform(g, 5, 5, dtype=dtype),
            g,
            (2, 25, 4),
            act_points,
            act_pixels,
        )

    class Added(nn.Module):
        """A position embedding, added to its input."""

        def __init__(self, dtype: torch.dtype | None) -> None:
            super().__init__()
            self.pos = enn.PositionEmbedding(rep, g, (3, 3), dtype=dtype)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.pos()

    def act_tokens(a: int, x: Tensor) -> Tensor:
        return move_tokens(name, rep, a, x, (3, 3))

    return Case(f"{layer} {name}", layer, Added, g, (2, 9, rep.dim), act_tokens, act_tokens)


CHANNEL_LAYERS = (
    "Linear", "LayerNorm", "LayerScale", "FourierActivation", "Attention", "Mlp", "Block", "Dropout", "Invariants"
)  # fmt: skip
CASES = [channel_case(layer, name) for layer in CHANNEL_LAYERS for name in ABSTRACT_GROUPS]
CASES += [
    grid_case(layer, name) for layer in ("PatchEmbed", "GridTransform", "PositionEmbedding") for name in GRID_GROUPS
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
#: Irreps of every type and of dimension 1 and 2; transforms by additions and by matrix products.
RUN_GROUPS = ("C2", "D4", "C3", "Q8", "flop", "rot4", "octic")
run_cases = [case for case in CASES if case.name.split()[1] in RUN_GROUPS]
each_way_to_run = pytest.mark.parametrize("case", run_cases, ids=[case.name for case in run_cases])


def made(case: Case, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    return scramble(case.build(dtype)).eval()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equivariance(case: Case, dtype: torch.dtype) -> None:
    def act_in(a: int, x: Tensor) -> Tensor:
        return case.act_in(a, x.double()).to(dtype)

    def act_out(a: int, y: Tensor) -> Tensor:
        assert y.dtype == dtype
        return case.act_out(a, y.double())

    assert_equivariant(made(case, dtype), act_in, act_out, range(case.group.order), torch.randn(case.shape).to(dtype))


@every_case
def test_float32_is_close_to_float64(case: Case) -> None:
    exact, rounded = made(case), made(case, torch.float32)
    x = torch.randn(case.shape)
    assert relative_error(rounded(x), exact(x.double())) < 1e-5


@every_case
def test_gradients_reach_input_and_parameters(case: Case) -> None:
    layer = made(case)
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    (layer(x) ** 3).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_case
def test_gradients_are_the_derivatives(case: Case) -> None:
    """Against finite differences, with respect to the input and all parameters together."""
    layer = made(case)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


@every_case
def test_fixed_tensors_are_no_state(case: Case) -> None:
    layer = made(case)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    assert not any(p.numel() and p.dtype != torch.float64 for p in layer.parameters())
    assert set(layer.train().state_dict()) == set(layer.eval().state_dict())


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float64),
    "half and double": lambda m: m.half().double(),
    "bfloat16 and to": lambda m: m.to(torch.bfloat16).to(dtype=torch.float64),
}


@every_case
@pytest.mark.parametrize("cast", CASTS)
def test_fixed_tensors_are_exact_after_a_cast(case: Case, cast: str) -> None:
    """A float32 layer cast to float64 is a float64 layer, but for the rounding of its learned parameters."""
    fresh = made(case)
    cast_layer = CASTS[cast](case.build(torch.float32)).eval()
    cast_layer.load_state_dict(fresh.state_dict())
    assert all(b.dtype in (torch.float64, torch.int64) for b in cast_layer.buffers())
    x = torch.randn(case.shape, dtype=torch.float64)
    expected = fresh(x)
    assert (cast_layer(x) - expected).abs().max() <= 1e-15 * expected.abs().max()
    assert (fresh.float().double()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_case
def test_meta_then_materialised(case: Case) -> None:
    fresh = made(case, torch.float32)
    with torch.device("meta"):
        layer = case.build(torch.float32).eval()
        assert layer(torch.empty(case.shape)).shape == fresh(torch.zeros(case.shape, device="cpu")).shape
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(fresh.state_dict())
    x = torch.randn(case.shape)
    assert torch.equal(layer(x), fresh(x))


@every_case
def test_copies_and_pickles(case: Case) -> None:
    layer = made(case, torch.float32)
    x = torch.randn(case.shape)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    for (name, a), b in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr(), name
    assert (other.double()(x.double()) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    if "PositionEmbedding" not in case.name:  # its stand-in class here is a local one
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@every_case
def test_layers_show_their_reps(case: Case) -> None:
    text = repr(made(case))
    assert f"{abstract_group(case.group).name}: " in text


@each_way_to_run
def test_compiled_graph_is_whole_and_equal(case: Case) -> None:
    torch.compiler.reset()
    layer = made(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(case.shape, dtype=torch.float64)
    assert relative_error(compiled(x), layer(x)) < 1e-12


inductor_cases = [case for case in CASES if case.name.split()[1] in ("C2", "D4", "flop", "octic")]


@pytest.mark.slow
@pytest.mark.parametrize("case", inductor_cases, ids=[case.name for case in inductor_cases])
def test_compiled_by_inductor_is_equal(case: Case) -> None:
    torch.compiler.reset()
    layer = made(case, torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(case.shape)
    assert relative_error(compiled(x), layer(x)) < 1e-5


@each_way_to_run
def test_exported_program_is_equal(case: Case) -> None:
    layer = made(case)
    x = torch.randn(case.shape, dtype=torch.float64)
    program = torch.export.export(layer, (x,))
    assert relative_error(program.module()(x), layer(x)) < 1e-12


@each_way_to_run
def test_autocast(case: Case) -> None:
    layer = made(case, torch.float32)
    x = torch.randn(case.shape)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.isfinite(found).all()
    assert relative_error(found, layer(x)) < 3e-2


@each_way_to_run
def test_any_number_of_leading_axes(case: Case) -> None:
    if case.layer in ("PatchEmbed", "Attention", "Block", "PositionEmbedding"):
        x = torch.randn(3, *case.shape[1:])
        expected = torch.cat([made(case, torch.float32)(row[None]) for row in x])
        assert relative_error(made(case, torch.float32)(x), expected) < 1e-5
        return
    layer = made(case)
    x = torch.randn(2, 1, 3, *case.shape[1:], dtype=torch.float64)
    assert relative_error(layer(x), torch.stack([layer(row) for row in x])) < 1e-12
    assert layer(torch.randn(0, *case.shape[1:], dtype=torch.float64)).shape[0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_way_to_run
def test_on_a_gpu(case: Case) -> None:
    layer = made(case)
    x = torch.randn(case.shape, dtype=torch.float64)
    expected = layer(x)
    moved = layer.cuda()
    assert relative_error(moved(x.cuda()).cpu(), expected) < 1e-12
    with torch.device("cuda"):
        direct = case.build(torch.float64).eval()
    direct.load_state_dict(layer.state_dict())
    assert relative_error(direct(x.cuda()).cpu(), expected) < 1e-12
