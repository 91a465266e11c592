"""Is a network really equivariant? The tester behind ``equiflop check`` and behind this project's own tests.

Longer than other files: what a network may take and give, and what is said of it, make one verdict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equiflop.contract import EquivariantImageModel, EquivariantModel, ShowsFeatures
from equiflop.equivariance import MIN_SPREAD, TOLERANCES, Comparison, compare
from equiflop.groups import Action, FiniteGroup, Rep
from equiflop.image_group import ImageGroup, as_image_group

__all__ = ["MIN_SPREAD", "TOLERANCES", "CheckReport", "Verdict", "check", "randomize_parameters"]

Verdict = Literal["equivariant", "inconclusive", "not equivariant"]


@dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check`.

    Attributes:
        group: the group that was tried, or its action.
        dtype: dtype of the comparison.
        tolerance: largest relative error that passes.
        rows: all comparisons.
        problems: other reasons not to pass, such as a constant output.
    """

    group: FiniteGroup | Action
    dtype: torch.dtype
    tolerance: float
    rows: tuple[Comparison, ...]
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
    def verdict(self) -> Verdict:
        """``"equivariant"``; ``"not equivariant"`` if an error is too large; else ``"inconclusive"``.

        A network whose output hardly depends on the image is invariant to everything, so small errors say nothing of
        it: fresh or barely trained weights can be so.
        """
        if not all(row.error <= self.tolerance for row in self.rows):
            return "not equivariant"
        return "inconclusive" if self.problems else "equivariant"

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance and there is no other problem."""
        return self.verdict == "equivariant"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
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
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = f"largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.0e} ({dtype})"
        lines += [f"problem: {problem}" for problem in self.problems]
        verdict = self.verdict.replace("not", "NOT")
        if self.verdict == "inconclusive":
            verdict += f": {self.problems[0].partition(',')[0]}"
        lines.append(f"{verdict}: {numbers}")
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
    subject: _Subject
    if isinstance(model, EquivariantModel):
        for argument, given in (("group", group), ("input_size", input_size)):
            if given is not None:
                raise ValueError(
                    f"{argument}={given!r}: {type(model).__name__} says its own group and inputs; leave it out"
                )
        subject = _SelfDescribed(model)
    else:
        subject = _Images(model, _group_to_try(model, group), input_size)
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


class _SelfDescribed:
    """A model that says itself what its inputs are and how the group acts (:mod:`equiflop.contract`)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.group: FiniteGroup | Action = model.group

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.model.sample_inputs(batch_size, generator)

    def values(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The output, and the features where the model shows them."""
        features = self.model.named_features(*inputs) if isinstance(self.model, ShowsFeatures) else {}
        return {"output": _tensor(self.model(*inputs), self.model), **features}

    def act_in(self, a: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.model.act_on_inputs(a, *inputs)

    def act_out(self, a: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            what: self.model.act_on_output(a, value) if what == "output" else self.model.act_on_features(a, what, value)
            for what, value in values.items()
        }

    def is_map(self, what: str, value: Tensor) -> bool:
        return False


class _Images:
    """An image network: how images, maps and tokens move is known, the types of channels are the model's to say.

    Args:
        model: the network.
        group: the group to try.
        input_size: size of the images, or None for the model's own.
    """

    def __init__(self, model: Any, group: ImageGroup, input_size: tuple[int, ...] | None) -> None:
        self.model = model
        self.group: ImageGroup = group
        self.input_size = _image_shape(model, input_size if input_size is not None else own_input_size(model))
        self._types: dict[str, Rep | Action | None] = {}

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(batch_size, *self.input_size, generator=generator, dtype=torch.float64),)

    def act_in(self, a: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.group.act_on_image(a, images) for images in inputs)

    def act_out(self, a: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {what: self._moved(a, self._types[what], value) for what, value in values.items()}

    def _moved(self, a: int, channels: Rep | Action | None, value: Tensor) -> Tensor:
        """A map ``(B, C, H, W)`` or vectors ``(B, C)``, ``(B, P, C)`` whose channels transform; None: invariant."""
        if channels is None:
            return value
        if value.ndim < 4:
            return channels.act(a, value)
        return self.group.act_on_image(a, channels.act(a, value, dim=1))

    def is_map(self, what: str, value: Tensor) -> bool:
        return what == "output" and value.ndim == 4

    def values(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The output, unless the model says that it obeys no rule, and the features after every block or stage."""
        (images,) = inputs
        if _returns_features(self.model):
            found = self._features_only(images)
        else:
            found = {**self._output(images), **self._features(images)}
        self._types = {what: channels for what, (_, channels) in found.items()}
        return {what: value for what, (value, _) in found.items()}

    def _output(self, images: Tensor) -> dict[str, tuple[Tensor, Rep | Action | None]]:
        model = self.model
        output_rep = getattr(model, "output_rep", None)
        if output_rep is None and not getattr(model, "invariant_output", True):
            return {}
        output = _tensor(model(images), model)
        if output_rep is not None:
            return {"output": (output, self._output_type(output_rep, output))}
        channels = Rep.trivial(self.group, output.shape[1 if output.ndim == 4 else -1])
        if output.ndim == 3 and hasattr(model, "num_prefix_tokens"):  # logits of every token
            prefix = model.num_prefix_tokens
            grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
            named = {"output": (output[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2), channels)}
            if prefix:
                named["output of class and register tokens"] = (output[:, :prefix], channels)
            return dict(named)
        if output.ndim == 2 or not hasattr(model, "feature_rep"):
            return {"output": (output, channels if output.ndim == 4 else None)}
        return {}

    def _features(self, images: Tensor) -> dict[str, tuple[Tensor, Rep | Action | None]]:
        model = self.model
        if not hasattr(model, "feature_rep"):
            return {}
        prefixes = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
        named: dict[str, tuple[Tensor, Rep | Action | None]] = {}
        for i, found in enumerate(model.forward_intermediates(images, intermediates_only=True, **prefixes)):
            rep = self._type_for(model, model.feature_rep(i))
            if rep is not None:
                feature_map, prefix = found if isinstance(found, tuple) else (found, None)
                named[f"features {i}"] = (feature_map, rep)
                if prefix is not None:
                    named[f"class and register tokens {i}"] = (prefix, rep)
        return named

    def _features_only(self, images: Tensor) -> dict[str, tuple[Tensor, Rep | Action | None]]:
        """The maps that timm's ``features_only=True`` returns."""
        wrapped = self.model.model
        if not isinstance(wrapped, EquivariantImageModel):
            raise ValueError(
                f"model={type(wrapped).__name__} with features_only=True does not say how its features transform "
                "(feature_rep), so there is nothing to compare them with"
            )
        layout = str(getattr(self.model.output_fmt, "value", self.model.output_fmt))
        if layout != "NCHW":
            raise ValueError(f"output_fmt={layout!r} of features_only=True is not compared; use 'NCHW'")
        blocks = range(len(self.model.model.feature_info))
        indices = self.model.out_indices
        taken = blocks[-indices:] if isinstance(indices, int) else [blocks[i] for i in indices]
        named: dict[str, tuple[Tensor, Rep | Action | None]] = {}
        for i, features in zip(taken, self.model(images), strict=True):
            rep = self._type_for(wrapped, wrapped.feature_rep(i))
            if rep is not None:
                named[f"features {i}"] = (features, rep)
        return named

    def _output_type(self, rep: Rep | Action, output: Tensor) -> Rep | Action:
        """The type of the output's channels for the group that is tried."""
        if output.ndim not in (2, 4) or output.shape[1] != rep.dim:
            raise ValueError(
                f"output_rep={rep!r} does not describe an output of shape {tuple(output.shape)}; "
                f"it needs (batch, {rep.dim}) or (batch, {rep.dim}, height, width)"
            )
        fitting = self._type_for(self.model, rep)
        if fitting is None:
            raise ValueError(
                f"group={self.group.name!r} is not the group of the model's output_rep={rep!r}; check it with that"
            )
        return fitting

    def _type_for(self, model: Any, rep: Rep | Action | None) -> Rep | Action | None:
        """``rep`` as a type for the group that is tried, or None where it says nothing of it.

        It is a type of the model's own group, which must act on images in the same way. Invariant channels are so for
        any group.
        """
        if rep is None:
            return None
        own = getattr(model, "group", None)
        if rep.group == self.group.group and (own is None or own == self.group):
            return rep
        invariant = isinstance(rep, Rep) and rep.multiplicities[0] == rep.dim
        return Rep.trivial(self.group, rep.dim) if invariant else None


_Subject = _SelfDescribed | _Images


def _returns_features(model: Any) -> bool:
    """Whether it is what timm's ``features_only=True`` makes of a model with ``forward_intermediates``."""
    return isinstance(getattr(model, "model", None), nn.Module) and hasattr(model, "out_indices")


def _tensor(output: Any, model: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model={type(model).__name__} returns a {type(output).__name__}, of which check knows no rule"
        )
    return output


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


def _found_in_parts(model: nn.Module, look: Callable[[Any], Any]) -> Any:
    """What the model or the first part of it that knows says; None if no part does."""
    return next((found for part in model.modules() if (found := look(part)) is not None), None)


def _group_to_try(model: nn.Module, group: str | ImageGroup | None) -> ImageGroup:
    if group is not None:
        return as_image_group(group)

    def own(part: Any) -> ImageGroup | None:
        found = getattr(part, "group", None)
        return found if isinstance(found, ImageGroup) else None

    return _found_in_parts(model, own) or as_image_group("flop")


def own_input_size(model: nn.Module) -> tuple[int, ...]:
    """The image size that a network, or a part of it, says: (height, width), or with channels in front.

    Raises:
        ValueError: if none does.
    """

    def built_for(part: Any) -> tuple[int, ...] | None:
        for holder in (getattr(part, "patch_embed", None), getattr(part, "stem", None), part):
            size = getattr(holder, "img_size", None)
            if size is not None:
                return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        return None

    def configured(part: Any) -> tuple[int, ...] | None:
        cfg = getattr(part, "pretrained_cfg", None)
        size = cfg.get("input_size") if isinstance(cfg, dict) else None
        return None if size is None else tuple(size)[-2:]

    size = _found_in_parts(model, built_for) or _found_in_parts(model, configured)
    if size is None:
        raise ValueError(
            f"input_size is not given, and neither {type(model).__name__} nor a part of it says one; give (height, "
            "width) or (channels, height, width)"
        )
    return size


def _image_shape(model: nn.Module, input_size: Any) -> tuple[int, ...]:
    """``(channels, height, width)``; channels are those that the model or a part of it says, or 3."""
    if not isinstance(input_size, (tuple, list)) or len(input_size) not in (2, 3) or min(input_size) < 1:
        raise ValueError(
            f"input_size={input_size!r} must be (height, width) or (channels, height, width), all positive"
        )
    if len(input_size) == 3:
        return tuple(input_size)
    channels = _found_in_parts(model, lambda part: getattr(part, "in_chans", None))
    return (int(channels or 3), *input_size)
