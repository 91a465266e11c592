"""Fitting what a steered student's blocks add to its stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hidden_networks import hidden
from test_steer import images, network, plain_settings
from torch import Tensor
from torch.func import functional_call, jacrev

from equiflop.distill.steer import Steering, steer
from equiflop.distill.steer.fit import LeastSquares
from equiflop.grids import named_image_group
from equiflop.groups import Rep
from equiflop.nn import Linear

FLOP = named_image_group("flop")


@torch.no_grad()
def perturbed(settings: dict[str, Any]) -> Any:
    """A plain network that is nearly, not quite, an equivariant one in disguise."""
    teacher = hidden(network(**settings), plain_settings(settings))
    for weight in teacher.parameters():
        weight.mul_(1 + 0.1 * torch.randn_like(weight))
    return teacher


@pytest.mark.parametrize(
    ("rep", "order"),
    [(Rep.regular(FLOP, 3), "group"), (Rep.regular(FLOP, 3), "irreps"), (Rep(FLOP, [4, 2]), "heads")],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.01, 10.0])
def test_least_squares_are_those_of_the_parameters(
    rep: Rep, order: Any, bias: bool, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with numpy's, the outputs being a linear function of all parameters; with the error on other images."""
    monkeypatch.setattr("equiflop.distill.steer.fit.RIDGES", (ridge,))
    torch.manual_seed(0)
    linear = Linear(rep, Rep(FLOP, [3, 2]), bias=bias, in_order=order, num_heads=2, dtype=torch.float64)
    before = {name: value.detach().clone() for name, value in linear.named_parameters()}
    x = torch.randn(40, 7, rep.dim, dtype=torch.float64)
    with torch.no_grad():
        wanted = Linear(rep, Rep(FLOP, [3, 2]), bias=bias, in_order=order, num_heads=2, dtype=torch.float64)(x)
        wanted += 0.1 * torch.randn_like(wanted)
    jacobians: dict[str, Tensor] = jacrev(lambda parameters: functional_call(linear, parameters, x))(before)
    design = torch.cat([jacobians[name].flatten(3) for name in before], dim=-1)

    def solved(chosen: slice) -> np.ndarray:
        weights = []
        for name, value in before.items():  # an entry changes one output, by its input
            irrep = name.split(".")[0]
            inputs = jacobians[f"{irrep}.weight"][chosen].square().sum((0, 1, 2))[0]
            if f"{irrep}.bias" in before:
                inputs = torch.cat([inputs, inputs.new_full((1,), x[chosen, :, 0].numel())])
            weights.append(torch.full((value.numel(),), float(inputs.mean()), dtype=torch.float64))
        kept = torch.cat(weights).mul(ridge).sqrt().diag()
        rows = torch.cat([design[chosen].flatten(0, 2), kept])
        goals = torch.cat([wanted[chosen].flatten(), kept.new_zeros(len(kept))])
        return np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)[0]

    fitted = LeastSquares(linear)
    for part, lacking in zip(x.split(15), wanted.split(15), strict=True):
        fitted.add(part, lacking)
    with torch.no_grad():
        error = fitted.correct()
    found = torch.cat([(value - before[name]).flatten() for name, value in linear.named_parameters()])
    np.testing.assert_allclose(found.detach().numpy(), solved(slice(None)), atol=1e-11)
    halves = slice(0, None, 2), slice(1, None, 2)
    missed = [
        wanted[there].numpy() - (design[there] @ torch.from_numpy(solved(here))).numpy()
        for here, there in (halves, halves[::-1])
    ]
    assert error == pytest.approx(sum((part**2).sum() for part in missed), rel=1e-9)


@pytest.mark.parametrize("vectors", [torch.zeros(10, 3, 6), torch.full((10, 3, 6), 1e-25)])
def test_maps_that_read_nothing_stay(vectors: Tensor) -> None:
    linear = Linear(Rep.regular(FLOP, 3), Rep(FLOP, [3, 2]), in_order="group", bias=False)
    before = [value.clone() for value in linear.parameters()]
    fitted = LeastSquares(linear)
    fitted.add(vectors, torch.randn(10, 3, 5))
    with torch.no_grad():
        fitted.correct()
    for value, old in zip(linear.parameters(), before, strict=True):
        torch.testing.assert_close(value, old)


@torch.no_grad()
def stream_errors(student: Any, teacher: Any, found: Steering, x: Tensor, axis: int = -1) -> list[float]:
    """By block, the squared error of the student's stream over the square of the teacher's, averaged over the views."""
    streams: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: streams.append(output))
        for net in (teacher, student)
        for block in net.blocks
    ]
    for net, view in ((teacher, x), (teacher, x.flip(axis)), (student, x)):
        net(view)
    for hook in hooks:
        hook.remove()
    prefix = teacher.num_prefix_tokens
    moved = torch.arange(16).reshape(4, 4).flip(axis).flatten()
    places = torch.cat([torch.arange(prefix), prefix + moved])
    errors = []
    for there, back, own in zip(*(streams[k : k + 3] for k in (0, 3, 6)), strict=True):
        basis = found.stream.basis
        wanted = (there @ basis.T + found.stream.signs * (back[:, places] @ basis.T)) / 2
        errors.append(float((own - wanted).square().sum() / wanted.square().sum()))
    return errors


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": "coupled", "num_heads": 3},
        {"heads": "regular", "group": "updown", "reg_tokens": 2, "no_embed_class": False},
        {"heads": "coupled", "num_heads": 2, "global_pool": "avg", "class_token": False, "init_values": None},
    ],
    ids=["coupled", "regular", "no scale"],
)
@pytest.mark.parametrize("width", [24, 12])
def test_brings_the_stream_nearer_to_the_teachers(settings: dict[str, Any], width: int) -> None:
    """On other images too; the student stays as it was otherwise, and equivariant."""
    teacher = perturbed(settings)
    x = torch.randn(30, 2, 24, 24, dtype=torch.float64)
    axis = -2 if settings.get("group") == "updown" else -1
    errors = []
    for fit in (False, True):
        student = network(seed=1, **settings, embed_dim=width).train()
        found = steer(student, teacher, images(200), fit=fit)
        assert student.training and bool(found.errors) is fit
        errors.append(stream_errors(student.eval(), teacher, found, x, axis)[-1])
        torch.testing.assert_close(student(x.flip(axis)), student(x))
    assert errors[1] < 0.8 * errors[0], errors


def test_one_image_is_not_enough() -> None:
    """There is no other one to tell whether a correction is one: the weights are projected alone."""
    settings = {"heads": "coupled", "num_heads": 2}
    teacher = perturbed(settings)
    students = [network(seed=1, **settings, embed_dim=16) for _ in range(2)]
    x = images(20)[0]
    found = [steer(student, teacher, x[:1], fit=fit) for student, fit in zip(students, (True, False), strict=True)]
    for name, value in students[0].state_dict().items():
        assert torch.equal(value, students[1].state_dict()[name]), name
    assert found[0].errors == pytest.approx(stream_errors(students[0], teacher, found[0], x[:1]), rel=1e-9)


def test_errors_are_those_of_other_images() -> None:
    """What cross-validation tells is about what is found on images that were not looked at."""
    settings = {"heads": "coupled", "num_heads": 2}
    teacher, student = perturbed(settings), network(seed=1, **settings, embed_dim=16)
    found = steer(student, teacher, images(200))
    seen = stream_errors(student, teacher, found, torch.cat(images(200)))
    for error, other in zip(found.errors, seen, strict=True):
        assert other < 1.3 * error < 1.8 * other
    assert "cross-validation" in str(found)
