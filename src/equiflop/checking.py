"""Is a network really equivariant? The tester behind ``equiflop check`` and behind this project's own tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.counting import _input_shape
from equiflop.grids import ImageGroup, as_image_group
from equiflop.groups import Rep
from equiflop.nn import act_on_channels

#: Largest relative error that passes, by dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

#: Outputs whose relative spread over different images is smaller than this count as constant.
MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class CheckRow:
    """One comparison.

    Attributes:
        element: the group element.
        what: what was compared, ``"output"`` or ``"features 3"``.
        error: ``max |f(g x) - g f(x)| / max |f(x)|``.
    """

    element: int
    what: str
    error: float


@dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check`.

    Attributes:
        group: the group that was tried.
        dtype: dtype of the comparison.
        tolerance: largest relative error that passes.
        rows: all comparisons.
        problems: other reasons to fail, such as a constant output.
    """

    group: ImageGroup
    dtype: torch.dtype
    tolerance: float
    rows: tuple[CheckRow, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def errors(self) -> tuple[float, ...]:
        """The largest relative error of every group element."""
        return tuple(
            max((row.error for row in self.rows if row.element == a), default=0.0) for a in range(self.group.order)
        )

    @property
    def max_error(self) -> float:
        """The largest relative error."""
        return max(self.errors)

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance and there is no other problem."""
        return not self.problems and all(row.error <= self.tolerance for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "passed": self.passed,
            "group": self.group.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tolerance": self.tolerance,
            "max_error": self.max_error,
            "problems": list(self.problems),
            "elements": [
                {
                    "element": a,
                    "name": self.group.element_name(a),
                    "error": error,
                    "errors": {row.what: row.error for row in self.rows if row.element == a},
                }
                for a, error in enumerate(self.errors)
            ],
        }

    def __str__(self) -> str:
        lines = [f"{'group element':<24} {'output':>10} {'features':>10}"]
        for a in range(self.group.order):
            output = [row.error for row in self.rows if row.element == a and row.what == "output"]
            features = [row.error for row in self.rows if row.element == a and row.what != "output"]
            cells = [f"{max(errors):.1e}" if errors else "-" for errors in (output, features)]
            lines.append(f"{self.group.element_name(a):<24} {cells[0]:>10} {cells[1]:>10}")
        lines += [f"problem: {problem}" for problem in self.problems]
        verdict = "equivariant" if self.passed else "NOT equivariant"
        dtype = str(self.dtype).removeprefix("torch.")
        lines.append(
            f"{verdict}: largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.0e} ({dtype})"
        )
        return "\n".join(lines)


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
    """Compare a network's outputs and intermediate features on images and on transformed images.

    For every group element ``g`` the output must be invariant, and the features after every block must obey
    ``f(g x) = g f(x)``, where ``g`` moves the tokens and acts on the channels. A copy of the model is used, in
    evaluation mode; the model itself is not touched.

    An output that is a map, ``(B, K, H, W)``, is checked as a map: ``g`` must move its pixels and leave its channels as
    they are. A model whose output channels transform as well says how by an attribute ``output_rep``, a
    :class:`~equiflop.Rep` of ``K`` channels; with it an output ``(B, K)`` must transform too, by ``output_rep`` alone.
    Maps of models with ``feature_rep`` and no ``output_rep`` are features, and compared as such.

    Args:
        model: any image network; features are compared where it has ``feature_rep`` of the same group.
        group: the group to try; by default the model's own, or ``"flop"``.
        input_size: ``(height, width)`` or ``(channels, height, width)``; by default the model's own.
        randomize: whether to fill all parameters with random numbers first: zero biases and tiny scales, as in a fresh
            model, hide mistakes. Leave it off to check trained weights as they are.
        tolerance: largest relative error that passes; by default by dtype (``TOLERANCES``).
        batch_size: number of images, at least 2.
        seed: seed of the images and parameters.

    Raises:
        ValueError: if the input size does not fit, ``batch_size < 2``, or the model's ``output_rep`` does not describe
            its output or belongs to another group.
    """
    if batch_size < 2:
        raise ValueError(
            f"batch_size={batch_size} is too small: at least 2 images are needed to notice a constant output"
        )
    model = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
    group = as_image_group(group if group is not None else getattr(model, "group", "flop"))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = "cpu" if parameter is None else parameter.device
    generator = torch.Generator().manual_seed(seed)
    if randomize:
        randomize_parameters(model, generator)
    size = _input_shape(model, input_size if input_size is not None else _own_input_size(model))
    images = torch.randn(batch_size, *size, generator=generator, dtype=torch.float64).to(device, dtype)

    rows: list[CheckRow] = []
    problems: list[str] = []
    with torch.no_grad():
        reference = _run(model, images, group)
        if not reference:
            problems.append(
                f"nothing was compared: the model does not say how group {group.name!r} acts on its output or features"
            )
        for what, value in reference.items():
            problem = _problem(value.tensor, is_map=what == "output" and value.tensor.ndim == 4)
            if problem:
                problems.append(f"{what} {problem}")
        for a in range(group.order):
            moved = _run(model, group.act_on_image(a, images), group)
            for what, value in reference.items():
                expected = value.moved_by(group, a).double()
                rows.append(CheckRow(a, what, _relative_error(moved[what].tensor.double(), expected)))
    limit = tolerance if tolerance is not None else TOLERANCES.get(dtype, 1e-5)
    return CheckReport(group, dtype, limit, tuple(rows), tuple(problems))


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


@dataclass(frozen=True)
class _Value:
    """An invariant output (without ``rep``), a map ``(B, C, H, W)``, or vectors ``(B, C)``, ``(B, P, C)``."""

    tensor: Tensor
    rep: Rep | None = None

    def moved_by(self, group: ImageGroup, a: int) -> Tensor:
        """What the element ``a`` makes of it."""
        if self.rep is None:
            return self.tensor
        if self.tensor.ndim < 4:
            return act_on_channels(self.rep, a, self.tensor)
        channels_moved = act_on_channels(self.rep, a, self.tensor.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return group.act_on_image(a, channels_moved)


def _run(model: Any, images: Tensor, group: ImageGroup) -> dict[str, _Value]:
    """The output, unless the model says that it obeys no rule, and the features after every block or stage."""
    values: dict[str, _Value] = {}
    if getattr(model, "output_rep", None) is not None:
        output = model(images)
        values["output"] = _Value(output, _output_rep(model.output_rep, output, group))
    elif getattr(model, "invariant_output", True):
        output = model(images)
        if output.ndim == 3 and hasattr(model, "num_prefix_tokens"):  # logits of every token
            prefix = model.num_prefix_tokens
            grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
            channels = Rep.trivial(group, output.shape[-1])
            values["output"] = _Value(output[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2), channels)
            if prefix:
                values["output of class and register tokens"] = _Value(output[:, :prefix], channels)
        elif output.ndim == 2 or not hasattr(model, "feature_rep"):
            values["output"] = _Value(output, Rep.trivial(group, output.shape[1]) if output.ndim == 4 else None)
    if hasattr(model, "feature_rep"):
        prefixes = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
        for i, found in enumerate(model.forward_intermediates(images, intermediates_only=True, **prefixes)):
            rep = _rep_for(group, model.feature_rep(i))
            if rep is not None:
                feature_map, prefix = found if isinstance(found, tuple) else (found, None)
                values[f"features {i}"] = _Value(feature_map, rep)
                if prefix is not None:
                    values[f"class and register tokens {i}"] = _Value(prefix, rep)
    return values


def _output_rep(rep: Rep, output: Tensor, group: ImageGroup) -> Rep:
    """The type of the output's channels for the group that is tried."""
    if output.ndim not in (2, 4) or output.shape[1] != rep.dim:
        raise ValueError(
            f"output_rep={rep!r} does not describe an output of shape {tuple(output.shape)}; "
            f"it needs (batch, {rep.dim}) or (batch, {rep.dim}, height, width)"
        )
    fitting = _rep_for(group, rep)
    if fitting is None:
        raise ValueError(f"group={group.name!r} is not the group of the model's output_rep={rep!r}; check it with that")
    return fitting


def _rep_for(group: ImageGroup, rep: Rep | None) -> Rep | None:
    """``rep`` as a type for ``group``, or None where it says nothing of it; invariant channels are so for any group."""
    if rep is None or rep.group == group:
        return rep
    return Rep.trivial(group, rep.dim) if rep.multiplicities[0] == rep.dim else None


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where there is no number or another shape."""
    if found.shape != expected.shape:
        return float("inf")
    error = (found - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def _problem(value: Tensor, is_map: bool) -> str | None:
    value = value.double()
    if not torch.isfinite(value).all():
        return "is not finite"
    size = value.abs().max()
    spread = (value - value.mean(dim=0, keepdim=True)).abs().max()
    if size == 0 or spread / size < MIN_SPREAD:
        return "is (nearly) the same for all images, so that its invariance says nothing"
    if is_map and value[0, 0].numel() > 1:
        spread = (value - value.mean(dim=(-2, -1), keepdim=True)).abs().max()
        if spread / size < MIN_SPREAD:
            return "is (nearly) the same at all pixels, so that it says nothing of how the map moves"
    return None


def _own_input_size(model: nn.Module) -> tuple[int, ...]:
    for part in (getattr(model, "patch_embed", None), getattr(model, "stem", None), model):
        size = getattr(part, "img_size", None)
        if size is not None:
            return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("input_size", (3, 224, 224)))[-2:]
