"""How equivariant a trained plain network already is, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.distill.features import has_maps, widths
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
        place: "patches" in front of the first block, then "block 0" behind it and so on; of a ConvNeXt "stage 0" in
            front of the first block of a stage and "stage 0 block 0" behind it.
        best: with the best involution of this place.
        common: with the one involution that is best for all places together, in a ConvNeXt of the stage.
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
        side = max(10, *(len(layer.place) + 1 for layer in self.layers))
        rows = [f"{'':<{side}}{'best S':>10}{'common S':>10}{'unchanged':>11}"]
        for layer in self.layers:
            shares = (100 * share for share in (layer.best, layer.common, layer.unchanged))
            rows.append(f"{layer.place:<{side}}" + "{:>8.1f} %{:>8.1f} %{:>9.1f} %".format(*shares))
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
    streams = _streams(model)
    moments = [[Moments.empty(stream.width, torch.float64, weight.device) for _ in stream.places] for stream in streams]
    places = None if has_maps(model) else token_places(model, group, weight.device)
    count = 0
    for batch in images:
        here = _seen(model, streams, teacher.normalised(batch))
        there = _seen(model, streams, teacher.normalised(group.act_on_image(1, batch)))
        for of_stream, xs, ys in zip(moments, here, there, strict=True):
            for place, x, y in zip(of_stream, xs, ys, strict=True):
                place.add(*_put_back(group, places, x, y))
        count += len(batch)
    if not count:
        raise ValueError("images: there are none, so nothing can be said")
    layers: list[Layer] = []
    for stream, found in zip(streams, moments, strict=True):
        common = best_involution(found)
        identity = torch.eye(stream.width, dtype=torch.float64, device=weight.device)
        layers += [
            Layer(name, share_kept(place), share_kept(place, common), share_kept(place, identity))
            for name, place in zip(stream.places, found, strict=True)
        ]
    return MirrorReport(teacher.spec.name, group.name, count, tuple(layers))


@dataclass(frozen=True)
class _Stream:
    """Blocks that add to one stream of features: all of them, or those of a stage.

    Attributes:
        width: channels.
        blocks: in order.
        name: of the stream.
    """

    width: int
    blocks: list[nn.Module]
    name: str = ""

    @property
    def places(self) -> list[str]:
        """What the features in front of the first block and behind every block are called."""
        behind = [f"{self.name} block {i}".strip() for i in range(len(self.blocks))]
        return [self.name or "patches", *behind]


def _streams(model: Any) -> list[_Stream]:
    if not hasattr(model, "stages"):
        return [_Stream(widths(model)[0], list(model.blocks))]
    stages = enumerate(zip(model.stages, model.feature_info, strict=True))
    return [_Stream(int(info["num_chs"]), list(stage.blocks), f"stage {i}") for i, (stage, info) in stages]


def _seen(model: Any, streams: list[_Stream], images: Tensor) -> list[list[Tensor]]:
    """By stream, features in front of the first block and behind every block."""
    seen: list[list[Tensor]] = [[] for _ in streams]
    hooks = []
    for stream, found in zip(streams, seen, strict=True):

        def before(module: nn.Module, inputs: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            found.append(inputs[0])

        def behind(module: nn.Module, inputs: Any, output: Tensor, found: list[Tensor] = found) -> None:
            found.append(output)

        hooks.append(stream.blocks[0].register_forward_pre_hook(before))
        hooks += [block.register_forward_hook(behind) for block in stream.blocks]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _put_back(group: ImageGroup, places: Tensor | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Features of images and of their mirror images as tokens ``(B, N, C)``, every place beside its own.

    Args:
        group: of two elements.
        places: where tokens lie in the mirror image; None for maps.
        x: of images.
        y: of their mirror images.
    """
    if places is None:
        return x.flatten(2).mT, group.act_on_image(1, y).flatten(2).mT
    return x, y[:, places]


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
        ("common", "one for all layers of a width"),
        ("unchanged", "none"),
    ):
        axes.plot([100 * getattr(layer, name) for layer in report.layers], marker=".", label=label)
    axes.set_xticks(range(len(report.layers)), [layer.place for layer in report.layers], rotation=60)
    axes.set(ylabel="variance kept in %", title=report.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, output)
