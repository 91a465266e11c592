"""How equivariant a trained plain network already is, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.distill.steer.involution import best_involution, share_kept
from equiflop.distill.steer.observe import Moments, token_places
from equiflop.distill.teacher import PlainTeacher
from equiflop.figure_files import check_figure_file, save_figure
from equiflop.image_group import ImageGroup


@dataclass(frozen=True)
class Layer:
    """How features at one place mirror: shares ``1 - |y - S x|^2 / |x|^2``, summed over images and tokens.

    ``x`` are features of images and ``y`` those of their mirror images, tokens put back, both about their mean. 1 says
    that mirroring an image does nothing but the involution ``S``, 0 that ``S x`` is no better a guess than the mean.

    Attributes:
        place: "patches" in front of the first block, then "block 0" behind it and so on.
        best: with the best involution of this place.
        common: with the one involution that is best for all places together.
        unchanged: with the identity.
    """

    place: str
    best: float
    common: float
    unchanged: float


@dataclass(frozen=True)
class MirrorReport:
    """All layers of a network.

    Attributes:
        name: of the network.
        group: name of the group.
        images: how many were looked at, each mirrored as well.
        layers: from the image on.
    """

    name: str
    group: str
    images: int
    layers: tuple[Layer, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [f"{'':<10}{'best S':>10}{'common S':>10}{'unchanged':>11}"]
        for layer in self.layers:
            shares = (100 * share for share in (layer.best, layer.common, layer.unchanged))
            rows.append("{:<10}{:>8.1f} %{:>8.1f} %{:>9.1f} %".format(layer.place, *shares))
        title = f"{self.name}, {self.images:,} images and their mirror images: share of the features' variance kept"
        return "\n".join([title, *rows])


@torch.no_grad()
def mirror_report(teacher: PlainTeacher, images: Iterable[Tensor], group: ImageGroup) -> MirrorReport:
    """Look at a plain network's residual stream in front of the first block and behind every block.

    Args:
        teacher: the network.
        images: batches ``(B, C, H, W)``, as they are given to :meth:`PlainTeacher.forward`.
        group: a group of two elements.

    Raises:
        ValueError: if the group is larger, or there are no images.
    """
    if group.order != 2:
        raise ValueError(f"group={group.name!r}: the report is for groups of one mirroring, flop or updown")
    model = teacher.model
    weight = next(model.parameters())
    places = token_places(model, group, weight.device)
    moments = [Moments.empty(teacher.width, torch.float64, weight.device) for _ in range(len(model.blocks) + 1)]
    count = 0
    for batch in images:
        here, there = (_stream(model, teacher.normalised(view)) for view in (batch, group.act_on_image(1, batch)))
        for place, x, y in zip(moments, here, there, strict=True):
            place.add(x, y[:, places])
        count += len(batch)
    if not count:
        raise ValueError("images: there are none, so nothing can be said")
    common = best_involution(moments)
    identity = torch.eye(teacher.width, dtype=torch.float64, device=weight.device)
    names = ["patches", *(f"block {i}" for i in range(len(model.blocks)))]
    layers = [
        Layer(name, share_kept(place), share_kept(place, common), share_kept(place, identity))
        for name, place in zip(names, moments, strict=True)
    ]
    return MirrorReport(teacher.spec.name, group.name, count, tuple(layers))


def _stream(model: Any, images: Tensor) -> list[Tensor]:
    """Features in front of the first block and behind every block."""
    seen: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    def behind(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    hooks = [model.blocks[0].register_forward_pre_hook(before)]
    hooks += [block.register_forward_hook(behind) for block in model.blocks]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def draw_report(report: MirrorReport, output: Path) -> None:
    """Draw the shares by layer.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the file is not an image of a known kind.
        OSError: if it cannot be written; what was there before is then intact.
    """
    check_figure_file(output, "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (
        ("best", "best involution of the layer"),
        ("common", "one for all layers"),
        ("unchanged", "none"),
    ):
        axes.plot([100 * getattr(layer, name) for layer in report.layers], marker=".", label=label)
    axes.set_xticks(range(len(report.layers)), [layer.place for layer in report.layers], rotation=60)
    axes.set(ylabel="variance kept in %", title=report.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, output)
