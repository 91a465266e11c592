"""What a plain vision transformer does on images and on their mirror images, as second moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.distill.features import grid_of, prefix_tokens
from equiflop.image_group import ImageGroup


@dataclass
class Moments:
    """Second moments of features ``x`` of images and ``y`` of their mirror images, tokens put back in their places.

    Attributes:
        same: ``sum x x^T + y y^T``, shape ``(C, C)``.
        across: ``sum x y^T + y x^T``, shape ``(C, C)``, symmetric.
        total: ``sum x + y``, shape ``(C,)``.
        count: vectors summed, ``x`` and ``y`` together.
    """

    same: Tensor
    across: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, device: torch.device) -> Moments:
        """Of no image."""
        square = torch.zeros(2, width, width, dtype=dtype, device=device)
        return cls(square[0], square[1], torch.zeros(width, dtype=dtype, device=device))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add features of some images, ``(..., C)``, and of their mirror images."""
        x, y = (part.reshape(-1, part.shape[-1]).to(self.same.dtype) for part in (x, y))
        across = x.T @ y
        self.same += x.T @ x + y.T @ y
        self.across += across + across.T
        self.total += x.sum(0) + y.sum(0)
        self.count += 2 * len(x)


@dataclass
class Energies:
    """The same of units that are looked at one by one.

    Attributes:
        same: ``sum x^2 + y^2``, shape ``(C,)``.
        across: ``sum x y^T + y x^T``, shape ``(C, C)``, symmetric.
    """

    same: Tensor
    across: Tensor

    @classmethod
    def empty(cls, width: int, dtype: torch.dtype, device: torch.device) -> Energies:
        """Of no image."""
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in (width, (width, width))))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add features of some images, ``(..., C)``, and of their mirror images."""
        x, y = (part.reshape(-1, part.shape[-1]).to(self.same.dtype) for part in (x, y))
        across = x.T @ y
        self.same += x.square().sum(0) + y.square().sum(0)
        self.across += across
        self.across += across.T


@dataclass
class Observations:
    """Moments at all places of a network where something is to be learnt.

    Attributes:
        stream: of the residual stream, by the name of the norm that reads it there.
        heads: of the heads' outputs in front of the projection, by block.
        units: of the hidden units of the MLP behind the activation, by block.
    """

    stream: dict[str, Moments] = field(default_factory=dict)
    heads: list[Moments] = field(default_factory=list)
    units: list[Energies] = field(default_factory=list)


def readers(model: Any) -> dict[str, nn.Module]:
    """The norms through which a plain vision transformer reads its residual stream, by their names."""
    found = {f"blocks.{i}.{name}": getattr(block, name) for i, block in enumerate(model.blocks) for name in _NORMS}
    return found | {name: getattr(model, name) for name in ("norm", "fc_norm") if _is_norm(getattr(model, name))}


_NORMS = ("norm1", "norm2")
AT_ONCE = 8  # images: what all places of a ViT-B see of them fills 0.8 GB


def _is_norm(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


@torch.no_grad()
def observe(model: Any, images: Iterable[Tensor], group: ImageGroup) -> Observations:
    """Look at a plain vision transformer at work.

    The residual stream is summed in float64, inner features in the network's own numbers.

    Args:
        model: a network of timm's class ``VisionTransformer``, in evaluation mode.
        images: batches ``(B, C, H, W)`` as the network takes them.
        group: a group of two elements; the second one mirrors the images.

    Raises:
        ValueError: if there are no images.
    """
    weight = next(model.parameters())
    dtype, device = weight.dtype, weight.device
    width = model.embed_dim
    found = Observations({name: Moments.empty(width, torch.float64, device) for name in readers(model)})
    for block in model.blocks:
        found.heads.append(Moments.empty(block.attn.proj.in_features, torch.float64, device))
        found.units.append(Energies.empty(block.mlp.fc2.in_features, dtype, device))
    watched: list[tuple[nn.Module, Moments | Energies]] = [
        (norm, found.stream[name]) for name, norm in readers(model).items()
    ]
    for block, heads, units in zip(model.blocks, found.heads, found.units, strict=True):
        watched += [(block.attn.proj, heads), (block.mlp.fc2, units)]
    places = token_places(model, group, device)
    for batch in (part for given in images for part in given.split(AT_ONCE)):
        here, there = (
            watch(model, view, [module for module, _ in watched])[0] for view in (batch, group.act_on_image(1, batch))
        )
        for (_, moments), x, y in zip(watched, here, there, strict=True):
            moments.add(x, y if y.ndim == 2 else y[:, places])
    if not found.stream[next(iter(found.stream))].count:
        raise ValueError("images: there are none to look at")
    return found


def token_places(model: Any, group: ImageGroup, device: torch.device) -> Tensor:
    """Where the tokens of an image lie among those of its mirror image, shape ``(N,)``."""
    prefix = torch.arange(prefix_tokens(model), device=device)
    places = torch.from_numpy(group.act_on_grid(1, *grid_of(model))).to(device)
    return torch.cat([prefix, places + len(prefix)])


def watch(network: Any, x: Tensor, modules: list[nn.Module]) -> tuple[list[Tensor], Tensor]:
    """What modules are given while a network sees ``x``, and what the network gives."""
    seen: dict[int, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[id(module)] = inputs[0]

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        out: Tensor = network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[id(module)] for module in modules], out
