"""Transformers for point clouds: one that is invariant to the symmetries of a cube, and its plain twin."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import calculate_drop_path_rates
from timm.models.vision_transformer import Block as PlainBlock
from torch import Tensor, nn

from equiflop.groups import (
    Action,
    FiniteGroup,
    Rep,
    full_octahedral,
    full_octahedral_matrices,
    octahedral,
    octahedral_rotations,
)
from equiflop.models.classifier import replace_classifier
from equiflop.models.initialise import init_linear
from equiflop.nn import Block, Invariants, LayerNorm
from equiflop.nn.initialise import fan_in_
from equiflop.nn.invariants import InvariantKind
from equiflop.nn.point_embed import PointEmbed, neighbourhoods

PointGroupName = Literal["rotations", "full"]

#: The groups of points in space that have a name: the 24 rotations of a cube, and its 48 symmetries.
NAMED_POINT_GROUPS: dict[str, Callable[[], Action]] = {
    "rotations": lambda: Action(octahedral(), octahedral_rotations(), "rotations"),
    "full": lambda: Action(full_octahedral(), full_octahedral_matrices(), "full"),
}


@lru_cache(maxsize=4)
def named_point_group(name: str) -> Action:
    """The action of a name, one of :data:`NAMED_POINT_GROUPS`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NAMED_POINT_GROUPS:
        raise ValueError(
            f"group={name!r} is unknown; choose 'rotations', 'full' or a pair (FiniteGroup, matrices), or give an "
            "Action"
        )
    return NAMED_POINT_GROUPS[name]()


def as_point_group(group: PointGroupName | Action | tuple[FiniteGroup, Any]) -> Action:
    """A group as it acts on points in space.

    Args:
        group: ``"rotations"``, the 24 rotations of a cube; ``"full"``, its 48 symmetries, reflections included; an
            action on three coordinates; or a pair of a group and matrices ``(order, 3, 3)``.

    Raises:
        ValueError: if the name is unknown, the action is on another number of coordinates, or the matrices are not an
            orthogonal representation of the group.
        TypeError: if it is none of these.
    """
    if isinstance(group, str):
        return named_point_group(group)
    if isinstance(group, tuple) and len(group) == 2:
        finite, matrices = group
        shape = np.shape(matrices)
        if shape != (finite.order, 3, 3):
            raise ValueError(f"group: matrices has shape {shape}; {finite.name} needs ({finite.order}, 3, 3)")
        try:
            group = Action(finite, matrices)
        except ValueError as error:
            raise ValueError(f"group: {error}") from None
    if not isinstance(group, Action):
        raise TypeError(f"group={group!r} is none of 'rotations', 'full', an Action or a pair (FiniteGroup, matrices)")
    if group.dim != 3:
        raise ValueError(f"group={group!r} acts on {group.dim} coordinates; points in space have 3")
    return group


def normalised(points: Tensor) -> Tensor:
    """Clouds with their mean at the origin and a root mean square radius of 1; a cloud of equal points becomes 0.

    Shape: ``(B, N, 3)`` to the same.

    Raises:
        ValueError: if the input is no batch of clouds in space.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points has shape {tuple(points.shape)}; point transformers need (B, N, 3)")
    centred = points - points.mean(dim=1, keepdim=True)
    mean_square = centred.square().sum(dim=-1, keepdim=True).mean(dim=1, keepdim=True)
    return centred * mean_square.clamp_min(torch.finfo(points.dtype).tiny).rsqrt()


class _PointClassifier(nn.Module):
    """What both networks share: embedding, blocks, norm, mean over the points, head.

    The parts are made by the subclass.
    """

    embed: nn.Module
    blocks: nn.Sequential
    norm: nn.Module
    invariants: nn.Module
    head_drop: nn.Dropout
    head: nn.Module
    num_classes: int
    embed_dim: int
    head_hidden_size: int

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return self.embed_dim

    def forward_features(self, points: Tensor) -> Tensor:
        """Features of all points, ``(B, N, 3)`` to ``(B, N, embed_dim)``."""
        return self.norm(self.blocks(self.embed(normalised(points))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the points, invariants and classifier.

        Args:
            x: features, shape ``(B, N, embed_dim)``.
            pre_logits: return the features before the classifier, ``(B, head_hidden_size)``, instead of the logits.
        """
        x = self.head_drop(self.invariants(x.mean(dim=1)))
        return x if pre_logits else self.head(x)

    def forward(self, points: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(points))

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 classes for none."""
        replace_classifier(self, num_classes)

    def _make_head(self, num_classes: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=device, dtype=dtype)
            init_linear(self.head)


class PointTransformer(_PointClassifier):
    """Transformer on the points of a cloud; its logits do not change under the group or another order of the points.

    Every point carries ``embed_dim / |G|`` functions on the group (:class:`~equiflop.nn.point_embed.PointEmbed`). The
    group moves the cloud in space and acts on the channels of each token; it does not move the tokens. The cloud is
    centred and scaled first, so the logits do not depend on its place and size either.

    Args:
        num_classes: classes; 0 for no classifier.
        group: ``"rotations"``, the 24 rotations of a cube; ``"full"``, all its 48 symmetries: mirror images, such as a
            left and a right screw, then have the same logits; or any :class:`~equiflop.Action` on three coordinates, or
            what makes one: a pair of a group and its matrices ``(order, 3, 3)``.
        embed_dim: width; a multiple of the group's order.
        depth: number of blocks.
        num_heads: heads of the attention; must divide ``embed_dim / |G|`` for the named groups.
        mlp_ratio: width of the MLP over ``embed_dim``.
        neighbours: points that the embedding of a point looks at, itself included; clouds must have more points.
        invariants: what the classifier sees: ``"norm"``, the trivial irrep and the norms of all others; or
            ``"trivial"``, the trivial irrep alone, which for these large groups is few: ``embed_dim / |G|`` channels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; linear in depth.

    Raises:
        ValueError: if the group is unknown, or width, heads or hidden width do not fit it.

    Shape: ``(B, N, 3)`` to ``(B, num_classes)``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        group: PointGroupName | Action | tuple[FiniteGroup, Any] = "rotations",
        embed_dim: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        neighbours: int = 8,
        invariants: InvariantKind = "norm",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = as_point_group(group)
        self.rep = Rep.regular_of_dim(self.group, embed_dim, "embed_dim")
        self.embed_dim = embed_dim
        self.neighbours = neighbours
        self.embed = PointEmbed(
            self.group,
            embed_dim // self.group.order,
            neighbours=neighbours,
            device=device,
            dtype=dtype,
        )
        blocks = [
            Block(self.rep, num_heads, mlp_ratio=mlp_ratio, drop_path=rate, device=device, dtype=dtype)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(self.rep, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.invariants: Invariants = Invariants(self.rep, invariants)
        self.head_hidden_size = self.invariants.out_features
        self._make_head(num_classes, device, dtype)

    def feature_rep(self, block: int) -> Rep:
        """Type of the features after block ``block`` (-1: before the first)."""
        return self.rep

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random clouds, for :func:`equiflop.check`."""
        points = 2 * self.neighbours + 4
        return (torch.randn(batch_size, points, 3, generator=generator, dtype=torch.float64),)

    def act_on_inputs(self, a: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Clouds moved by element ``a``."""
        return tuple(self.group.act(a, points) for points in inputs)

    def act_on_output(self, a: int, output: Tensor) -> Tensor:
        """Logits do not change."""
        return output

    def named_features(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Features before the first block and after each, and behind the norm; ``(B, N, embed_dim)``."""
        x = self.embed(normalised(*inputs))
        features = {"embedded points": x}
        for i, block in enumerate(self.blocks):
            features[f"features {i}"] = x = block(x)
        features["normalised features"] = self.norm(x)
        return features

    def act_on_features(self, a: int, name: str, features: Tensor) -> Tensor:
        """Channels transform, points keep their places."""
        return self.rep.act(a, features)


class PlainPointEmbed(nn.Module):
    """The plain twin of ``PointEmbed``: the same network, seen from one orientation and as wide as all together.

    Args:
        embed_dim: width.
        neighbours: points in a neighbourhood, the point itself included.

    Raises:
        ValueError: if ``neighbours`` is not positive.

    Shape: ``(B, N, 3)`` to ``(B, N, embed_dim)``.
    """

    def __init__(
        self,
        embed_dim: int,
        neighbours: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} is not positive; PlainPointEmbed needs neighbours >= 1")
        self.neighbours = neighbours
        self.lift = nn.Linear(6, embed_dim, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, points: Tensor) -> Tensor:
        offsets, weights = neighbourhoods(points, self.neighbours)
        vectors = torch.cat([points.unsqueeze(2).expand_as(offsets), offsets], dim=-1)
        hidden = self.act(self.lift(vectors))
        return self.proj((hidden * weights.unsqueeze(-1)).sum(dim=-2))


class PlainPointTransformer(_PointClassifier):
    """The plain twin of :class:`PointTransformer`: the same layout of ordinary layers, with timm's blocks.

    It ignores the order of the points, the place and the size of the cloud as well, but not its orientation. Linear
    maps start like those of the twin: variance 1 / fan-in, biases 0.

    Args:
        num_classes: classes; 0 for no classifier.
        embed_dim: width.
        depth: number of blocks.
        num_heads: heads of the attention.
        mlp_ratio: width of the MLP over ``embed_dim``.
        neighbours: points that the embedding of a point looks at, itself included; clouds must have more points.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; linear in depth.

    Raises:
        ValueError: if ``num_heads`` does not divide ``embed_dim``.

    Shape: ``(B, N, 3)`` to ``(B, num_classes)``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        embed_dim: int = 192,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        neighbours: int = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        self.neighbours = neighbours
        self.embed = PlainPointEmbed(embed_dim, neighbours, device=device, dtype=dtype)
        blocks = [
            PlainBlock(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate, device=device, dtype=dtype
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.invariants = nn.Identity()
        self.head_hidden_size = embed_dim
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_in_(module.weight, module.in_features, module.bias)
        self._make_head(num_classes, device, dtype)
