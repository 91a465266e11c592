"""The check: outputs and features of inputs and of transformed inputs are compared."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from equiflop.checking.images import Images
from equiflop.checking.own import group_to_try
from equiflop.checking.report import CheckReport
from equiflop.checking.self_described import SelfDescribed
from equiflop.contract import EquivariantModel
from equiflop.equivariance import MIN_SPREAD, TOLERANCES, Comparison, compare
from equiflop.image_group import ImageGroup


def check(
    model: nn.Module,
    *,
    group: str | ImageGroup | None = None,
    input_size: tuple[int, ...] | None = None,
    randomize: bool = True,
    tolerance: float | None = None,
    batch_size: int = 2,
    seed: int = 0,
) -> CheckReport:
    """Compare a network's outputs and intermediate features on inputs and on transformed inputs.

    For every group element ``g`` the output must be invariant, and the features after every block must obey
    ``f(g x) = g f(x)``, where ``g`` moves the tokens and acts on the channels. A copy of the model is used, in
    evaluation mode; the model itself is not touched.

    Networks of points, sets, graphs and signals, and any other that has the methods of
    :class:`equiflop.contract.EquivariantModel`, say themselves what their inputs are and how their group acts. All
    others are image networks, and what holds for images and maps is known:

    An output that is a map, ``(B, K, H, W)``, is checked as a map: ``g`` must move its pixels and leave its channels as
    they are. A model whose output channels transform as well says how by an attribute ``output_rep``, a
    :class:`~equiflop.Rep` or :class:`~equiflop.Action` of ``K`` channels; with it an output ``(B, K)`` must transform
    too, by ``output_rep`` alone. Maps of models with ``feature_rep`` and no ``output_rep`` are features, and compared
    as such; so are those of timm's ``features_only=True`` around such a model.

    Args:
        model: the network; features are compared where it has ``feature_rep`` of the same group, or
            ``named_features`` (:mod:`equiflop.contract`).
        group: of image networks, the group to try; by default the model's own or that of a part of it, or ``"flop"``.
        input_size: of image networks, ``(height, width)`` or ``(channels, height, width)``; by default the model's own
            or that of a part of it.
        randomize: whether to fill all parameters with random numbers first: zero biases and tiny scales, as in a fresh
            model, hide mistakes. Leave it off to check trained weights as they are.
        tolerance: largest relative error that passes; by default by dtype (``TOLERANCES``).
        batch_size: number of inputs, at least 2.
        seed: seed of the inputs and parameters.

    Returns:
        A report with a verdict: ``"equivariant"`` (passed), ``"not equivariant"``, or ``"inconclusive"`` where errors
        are small and say nothing, since the output is nearly the same for all images or nothing was compared.

    Raises:
        ValueError: if the input size does not fit or neither the model nor its parts say one, ``batch_size < 2``, the
            model's ``output_rep`` does not describe its output or belongs to another group, the output is no tensor, or
            ``group`` or ``input_size`` is given for a model that says its own.
    """
    if batch_size < 2:
        raise ValueError(
            f"batch_size={batch_size} is too small: at least 2 images are needed to notice a constant output"
        )
    model = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = "cpu" if parameter is None else parameter.device
    generator = torch.Generator().manual_seed(seed)
    subject: SelfDescribed | Images
    if isinstance(model, EquivariantModel):
        for argument, given in (("group", group), ("input_size", input_size)):
            if given is not None:
                raise ValueError(
                    f"{argument}={given!r}: {type(model).__name__} says its own group and inputs; leave it out"
                )
        subject = SelfDescribed(model)
    else:
        subject = Images(model, group_to_try(model, group), input_size)
    if randomize:
        randomize_parameters(model, generator)
    samples = subject.sample_inputs(batch_size, generator)
    inputs = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in samples)

    rows: tuple[Comparison, ...] = ()
    problems: list[str] = []
    with torch.no_grad():
        reference = subject.values(*inputs)
        if not reference:
            problems.append(
                f"nothing was compared: the model does not say how group {subject.group.name!r} acts on its output or "
                "features"
            )
        for what, value in reference.items():
            problem = _problem(value, is_map=subject.is_map(what, value))
            if problem:
                problems.append(f"{what} {problem}")
        elements = range(subject.group.order)
        rows = tuple(compare(subject.values, subject.act_in, subject.act_out, elements, inputs, reference))
    limit = tolerance if tolerance is not None else TOLERANCES.get(dtype, 1e-5)
    return CheckReport(subject.group, dtype, limit, rows, tuple(problems))


@torch.no_grad()
def randomize_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters so that signals keep their size and nothing is zero.

    Matrices and kernels are normal with variance 1 / fan-in, biases normal with standard deviation 0.5, all other
    vectors (scales) uniform in [0.5, 1.5].
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value = noise / max(parameter[0].numel(), 1) ** 0.5
        elif name.endswith("bias"):
            value = 0.5 * noise
        else:
            value = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(value)


def _problem(value: Tensor, is_map: bool) -> str | None:
    """Why a value compares with anything, so that small errors say nothing."""
    value = value.double()
    if not torch.isfinite(value).all():
        return "is not finite"
    size = value.abs().max()
    spread = (value - value.mean(dim=0, keepdim=True)).abs().max()
    if size == 0 or spread / size < MIN_SPREAD:
        return "is nearly the same for all images, so that its invariance says nothing"
    if is_map and value[0, 0].numel() > 1:
        spread = (value - value.mean(dim=(-2, -1), keepdim=True)).abs().max()
        if spread / size < MIN_SPREAD:
            return "is nearly the same at all pixels, so that it says nothing of how the map moves"
    return None
