"""``assert_equivariant`` is tested itself: it lets equivariant functions pass, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equiflop
from equiflop import Action, Rep, assert_equivariant
from equiflop.contract import CountsMacs, EquivariantImageModel, EquivariantLayer, EquivariantModel, ShowsFeatures
from equiflop.equivariance import TOLERANCES
from equiflop.groups import cyclic, dihedral, flop
from equiflop.models import Segmenter
from equiflop.models.graph_network import GraphNetwork, SetNetwork
from equiflop.models.point_transformer import PlainPointTransformer, PointTransformer
from equiflop.models.signal_network import SignalNetwork
from equiflop.nn.circulant import CirculantLinear
from equiflop.nn.permutation import GraphLinear, SetLinear
from equiflop.nn.point_embed import PointEmbed
from oracles import image_group, scramble
from small_vits import small_vit


def roll(g: int, x: Tensor) -> Tensor:
    return x.roll(g, -1)


def flip(g: int, x: Tensor) -> Tensor:
    return x.flip(-1) if g else x


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

EQUIVARIANT: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "pointwise": (torch.sin, roll, roll),
    "sum": (lambda x: x.sum(-1), roll, None),
    "sum, as a function of the output": (lambda x: x.sum(-1), roll, lambda g, y: y),
    "a number": (lambda x: x.square().sum(), roll, None),
    "neighbours": (lambda x: x * x.roll(1, -1), roll, roll),
    "spectrum": (lambda x: torch.fft.rfft(x).abs(), roll, None),
    "complex": (
        lambda x: torch.fft.fft(x),
        roll,
        lambda g, y: y * torch.exp(-2j * torch.pi * g * torch.arange(6, dtype=torch.float64) / 6),
    ),
    "two outputs": (lambda x: (x.exp(), x.sum(-1)), roll, (roll, None)),
    "a list of outputs": (lambda x: [x.exp(), x.cos()], roll, [roll, roll]),
    "integers": (lambda x: x.argsort(-1).argsort(-1), roll, roll),
    "booleans": (lambda x: x > x.mean(), roll, roll),
}


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_equivariant_functions_pass(name: str) -> None:
    fn, act_in, act_out = EQUIVARIANT[name]
    assert_equivariant(fn, act_in, act_out, range(6), X)
    assert_equivariant(fn, act_in, act_out, iter([5, 2]), inputs=(X,))
    assert_equivariant(fn, act_in, act_out, cyclic(6), shape=(2, 6))
    if name != "complex":
        for dtype in (torch.float32, torch.float16):
            if name != "spectrum" or dtype == torch.float32:
                assert_equivariant(fn, act_in, act_out, range(6), X.to(dtype))


NOT_EQUIVARIANT: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "cumulative sum": (lambda x: x.cumsum(-1), roll, roll),
    "first entry": (lambda x: x[..., 0], roll, None),
    "moves the wrong way": (lambda x: x.flip(-1), roll, roll),
    "off by 1e-10": (lambda x: x + 1e-10 * torch.arange(6.0, dtype=torch.float64), roll, roll),
    "second output": (lambda x: (x.exp(), x[..., 1]), roll, (roll, None)),
    "a constant that should move": (lambda x: torch.arange(6.0).expand(3, 6), roll, roll),
    "rank of a place": (lambda x: torch.arange(6).expand(3, 6) * (x > 0), roll, roll),
}


@pytest.mark.parametrize("name", NOT_EQUIVARIANT)
def test_functions_that_are_not_equivariant_raise(name: str) -> None:
    fn, act_in, act_out = NOT_EQUIVARIANT[name]
    with pytest.raises(AssertionError) as caught:
        assert_equivariant(fn, act_in, act_out, range(6), X)
    found = re.fullmatch(
        r"not equivariant at element (\d): relative error (\S+) of (?:the output|output \d), "
        r"tolerance 1e-(\d\d) \(float\d\d\)",
        str(caught.value),
    )
    assert found and int(found[1]) in range(1, 6) and float(found[2]) > 10.0 ** -int(found[3])
    assert_equivariant(fn, act_in, act_out, [0], X) if "constant" not in name else None


def test_the_element_is_named_and_one_bad_element_is_enough() -> None:
    def bad_at_three(g: int, x: Tensor) -> Tensor:
        return x.roll(g + (g == 3), -1)

    assert_equivariant(torch.sin, bad_at_three, roll, [0, 1, 2, 4, 5], X)
    with pytest.raises(AssertionError, match=r"^not equivariant at element 3: relative error"):
        assert_equivariant(torch.sin, bad_at_three, roll, range(6), X)
    octic = image_group("octic")
    with pytest.raises(AssertionError, match=r"at element [1357] \((quarter turn|mirror at the diagonal)"):
        assert_equivariant(lambda x: x.cumsum(-1).flip(-1).cumsum(-1), octic, octic, [0, 1, 3], shape=(1, 2, 4, 4))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.ones(3),
        lambda x: torch.zeros(3, 6),
        lambda x: 1.0 + 1e-6 * x.sum(-1),
        lambda x: torch.full((3,), 7),
        lambda x: (x.sum(-1), torch.ones(3)),
        lambda x: x.new_zeros(3, 0),
        lambda x: torch.tensor(2.0),
    ],
)
def test_outputs_that_say_nothing_are_inconclusive(fn: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match=r"^inconclusive: (the output|output 1|every output) is (nearly|empty)"):
        assert_equivariant(fn, roll, None, range(6), X)


def test_a_constant_batch_is_not_mistaken_for_a_constant_function() -> None:
    """The spread over other inputs counts, whatever the axes of the given one mean."""
    assert_equivariant(lambda x: x.sum(-1), roll, None, range(6), X[:1].expand(3, 6))
    assert_equivariant(torch.sin, roll, roll, range(6), X[0])
    assert_equivariant(lambda ids: ids.amax(-1), roll, None, range(6), torch.tensor([[1, 5, 9, 2, 0, 4]]))


@pytest.mark.parametrize(
    ("fn", "act_out", "words"),
    [
        (lambda x: x * float("nan"), roll, "the output is not finite"),
        (lambda x: x / 0.0, roll, "the output is not finite"),
        (lambda x: (x, x.log()), (roll, roll), "output 1 is not finite"),
        (
            lambda x: torch.where(x[:, :1] == X[:, :1], x, torch.nan),
            roll,
            "element [1-5]: relative error inf of the out",
        ),
        (lambda x: x[:, : 6 if x[0, 0] == X[0, 0] else 5], roll, r"has shape \(3, 5\) instead of \(3, 6\)"),
        (lambda x: (x,) * (2 if x[0, 0] == X[0, 0] else 1), (roll, roll), "output 1 is missing"),
        (lambda x: x.sum(-1), Rep(cyclic(6), (1, 1, 1, 1)), r"does not fit act_out: x has shape \(3,\)"),
        (lambda x: x, Action.permuting(flop(), [(0, 1), (1, 0)]), r"does not fit act_out: x has shape \(3, 6\)"),
    ],
)
def test_numbers_and_shapes(fn: Callable[[Tensor], Any], act_out: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words) as caught:
        assert_equivariant(fn, roll, act_out, range(6), X)
    assert "\n" not in str(caught.value)


def test_several_inputs() -> None:
    y = torch.randn(3, 6, 2, dtype=torch.float64)

    def roll_rows(g: int, x: Tensor) -> Tensor:
        return x.roll(g, 1)

    def both(g: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return roll(g, x), roll_rows(g, y)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bi,bij->bj", x, y)

    for act_in in ((roll, roll_rows), [roll, roll_rows], both):
        assert_equivariant(product, act_in, None, range(6), (X, y))
        assert_equivariant(lambda x, y: (x, y), act_in, act_in, range(6), (X, y))
        assert_equivariant(product, act_in, None, range(6), shape=((3, 6), (3, 6, 2)))
    mask = torch.tensor([[True, True, False, True, False, True]] * 3)
    assert_equivariant(lambda x, m: x * m, (roll, roll), roll, range(6), (X, mask))
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(product, (roll, None), None, range(6), (X, y))


def test_reps_actions_and_image_groups_act() -> None:
    g = dihedral(4)
    rep, wide = Rep.regular(g, 2), Rep.regular(g, 3)
    layer = scramble(equiflop.nn.Linear(rep, wide, dtype=torch.float64))
    x = torch.randn(3, rep.dim, dtype=torch.float64)
    assert_equivariant(layer, rep, wide, g, x)
    assert_equivariant(layer, layer.in_rep, layer.out_rep, range(8))
    with pytest.raises(AssertionError, match="not equivariant at element"):
        assert_equivariant(lambda x: layer(x).relu(), rep, wide, g, x)
    eyes = Action.permuting(flop(), [(0, 1, 2), (0, 2, 1)], name="eyes")
    assert_equivariant(lambda x: x.softmax(-1), eyes, eyes, eyes)
    with pytest.raises(AssertionError, match=r"at element 1 \(\(1 2\)\)"):
        assert_equivariant(lambda x: x * torch.arange(3), eyes, eyes, eyes)
    for name in ("flop", "octic"):
        images = image_group(name)
        assert_equivariant(lambda x: x.exp(), images, images, images)
        assert_equivariant(lambda x: x.mean((1, 2, 3)), images, None, images, shape=(2, 3, 5, 7))
        with pytest.raises(AssertionError, match=r"element \d \((mirror|quarter|half)"):
            assert_equivariant(lambda x: x.cumsum(-1), images, images, images)


def test_models_that_say_their_inputs() -> None:
    for model in (
        PointTransformer(4, embed_dim=48, depth=1, num_heads=2, neighbours=4),
        SignalNetwork(6, 2, 4, width=8),
    ):
        model = scramble(model).double().eval()
        assert_equivariant(model, model.act_on_inputs, model.act_on_output, model.group)
        assert_equivariant(model.float(), model.act_on_inputs, None, model.group, tolerance=1e-4)
    graph = scramble(GraphNetwork(2, 3, 4)).double().eval()
    assert_equivariant(graph, graph.act_on_inputs, None, graph.group)
    nodes = graph.sample_inputs(2, torch.Generator())[0]
    action = graph.group
    assert_equivariant(nn.GELU(), lambda a, x: action.act(a, x, 1), lambda a, x: action.act(a, x, 1), action, nodes)
    with pytest.raises(AssertionError, match=r"not equivariant at element \d+"):
        assert_equivariant(lambda n: n.cumsum(1), lambda a, x: action.act(a, x, 1), None, action, nodes)


def test_random_inputs_have_the_dtype_of_the_parameters() -> None:
    seen: list[Tensor] = []

    class Sine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.sin()

    assert_equivariant(Sine(2, 2, dtype=torch.bfloat16), roll, roll, range(6), shape=(2, 6))
    assert {x.dtype for x in seen} == {torch.bfloat16}
    seen.clear()
    assert_equivariant(Sine(2, 2), roll, roll, range(6), shape=(2, 6), dtype=torch.float64, seed=3)
    first, count = seen[0], len(seen)
    assert_equivariant(Sine(2, 2), roll, roll, range(6), shape=(2, 6), dtype=torch.float64, seed=3)
    assert first.dtype == torch.float64 and torch.equal(seen[count], first) and not first.requires_grad


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerance_by_dtype(dtype: torch.dtype) -> None:
    x = torch.rand(2, 6, dtype=torch.float64).add(1.0).to(dtype)
    limit = TOLERANCES[dtype]

    def off_by(error: float) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            y = x.double()
            return torch.cat([y[:, :1] + error * y.max(), y[:, 1:]], 1)

        return fn

    assert_equivariant(off_by(0.3 * limit), roll, roll, range(6), x)
    with pytest.raises(AssertionError, match=rf"tolerance {limit:.0e} \({str(dtype).removeprefix('torch.')}\)"):
        assert_equivariant(off_by(4.0 * limit), roll, roll, range(6), x)
    assert_equivariant(off_by(4.0 * limit), roll, roll, range(6), x, tolerance=6 * limit)


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(ValueError, match="inputs: give a tensor, a tuple of tensors, or shape="):
        assert_equivariant(torch.sin, roll, roll, range(6))
    with pytest.raises(ValueError, match="elements is empty"):
        assert_equivariant(torch.sin, roll, roll, [], X)
    with pytest.raises(TypeError, match="elements=6 must be group elements"):
        assert_equivariant(torch.sin, roll, roll, 6, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inputs and shape or dtype exclude each other"):
        assert_equivariant(torch.sin, roll, roll, range(6), X, shape=(2, 6))
    with pytest.raises(ValueError, match="inputs='x' must be a tensor or a tuple of tensors"):
        assert_equivariant(torch.sin, roll, roll, range(6), "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="act_in has 2 entries for 1 tensors; it needs one for each"):
        assert_equivariant(torch.sin, (roll, roll), roll, range(6), X)
    with pytest.raises(ValueError, match="act_out has 1 entries for 2 tensors"):
        assert_equivariant(lambda x: (x, x), roll, (roll,), range(6), X)
    with pytest.raises(ValueError, match="act_out returned 1 tensors for 2"):
        assert_equivariant(lambda x: (x, x), roll, lambda g, y, z: y, range(6), X)
    with pytest.raises(TypeError, match="act_in='roll' is no function, Rep, Action, ImageGroup or None"):
        assert_equivariant(torch.sin, "roll", roll, range(6), X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn returned dict; a tensor, or a tuple or list of tensors"):
        assert_equivariant(lambda x: {"y": x}, roll, roll, range(6), X)
    with pytest.raises(ValueError, match=r"x has shape \(3, 6\); Rep\(C2: 1 A\) acts on 1 entries"):
        assert_equivariant(torch.sin, Rep(flop(), (1, 0)), None, range(2), X)


def test_who_keeps_the_contract() -> None:
    """Layers and models of the library say of themselves what the protocols name; plain ones do not."""
    rep = Rep.regular(flop(), 2)
    octahedral = PointTransformer(2, embed_dim=24, depth=1, num_heads=1).group
    for layer in (equiflop.nn.Linear(rep, rep), PointEmbed(octahedral, 1)):
        assert isinstance(layer, EquivariantLayer)
    for counted in (PointEmbed(octahedral, 1), CirculantLinear(3, 1, 1), SetLinear(1, 1), GraphLinear(1, 1, 1, 1)):
        assert isinstance(counted, CountsMacs)
    models = (
        PointTransformer(2, embed_dim=24, depth=1, num_heads=1), SetNetwork(1, 2), GraphNetwork(1, 1, 2),
        SignalNetwork(3, 1, 2),
    )  # fmt: skip
    for model in models:
        assert isinstance(model, EquivariantModel) and isinstance(model, ShowsFeatures)
        inputs = model.sample_inputs(3, torch.Generator())
        assert all(len(x) == 3 and x.dtype in (torch.float64, torch.bool) for x in inputs)
        moved = model.act_on_inputs(0, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, moved, strict=True))
    for image_model in (small_vit(), Segmenter(small_vit(), 3)):
        assert isinstance(image_model, EquivariantImageModel) and not isinstance(image_model, EquivariantModel)
    for plain in (nn.Linear(2, 2), PlainPointTransformer(2, embed_dim=24, num_heads=1)):
        assert not isinstance(plain, (EquivariantLayer, EquivariantModel, EquivariantImageModel, CountsMacs))


def test_every_output_of_many_is_compared() -> None:
    def many(x: Tensor) -> tuple[Tensor, ...]:
        return (*[x] * 70, x.cumsum(-1))

    def mirrored(g: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.flip(-1) if g else t for t in tensors)

    with pytest.raises(AssertionError, match="output 70"):
        assert_equivariant(many, mirrored, mirrored, range(2), torch.randn(2, 5, dtype=torch.float64))
