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
from equiflop.distill.steer.fit import RIDGE, LeastSquares
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
def test_least_squares_are_those_of_the_parameters(rep: Rep, order: Any, bias: bool) -> None:
    """Compared with numpy's, the outputs being a linear function of all parameters."""
    torch.manual_seed(0)
    linear = Linear(rep, Rep(FLOP, [3, 2]), bias=bias, in_order=order, num_heads=2, dtype=torch.float64)
    before = {name: value.detach().clone() for name, value in linear.named_parameters()}
    x, lacking = torch.randn(40, rep.dim, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    jacobians: dict[str, Tensor] = jacrev(lambda parameters: functional_call(linear, parameters, x))(before)
    design = torch.cat([jacobians[name].flatten(0, 1).flatten(1) for name in before], dim=1)
    weights = []
    for name, value in before.items():  # an entry changes one output, by its input
        irrep = name.split(".")[0]
        inputs = jacobians[f"{irrep}.weight"].square().sum((0, 1))[0]
        if f"{irrep}.bias" in before:
            inputs = torch.cat([inputs, inputs.new_full((1,), len(x))])
        weights.append(torch.full((value.numel(),), float(inputs.mean()), dtype=torch.float64))
    ridge = torch.cat(weights).mul(RIDGE).sqrt().diag()
    augmented = torch.cat([design, ridge]), torch.cat([lacking.flatten(), ridge.new_zeros(len(ridge))])
    expected = np.linalg.lstsq(augmented[0].numpy(), augmented[1].numpy(), rcond=None)[0]

    fitted = LeastSquares(linear)
    for part, wanted in zip(x.split(15), lacking.split(15), strict=True):
        fitted.add(part, wanted)
    with torch.no_grad():
        fitted.correct()
    found = torch.cat([(value - before[name]).flatten() for name, value in linear.named_parameters()])
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-12)


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


def test_errors_are_those_of_the_streams() -> None:
    settings = {"heads": "coupled", "num_heads": 2}
    teacher, student = perturbed(settings), network(seed=1, **settings, embed_dim=16)
    x = torch.cat(images(20))
    found = steer(student, teacher, [x])
    assert found.errors == pytest.approx(stream_errors(student, teacher, found, x), rel=1e-9)
    assert "off by" in str(found)
