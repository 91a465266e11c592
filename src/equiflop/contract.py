"""What a layer and a model say of themselves, so that :func:`equiflop.check` and the counters can use them.

A new layer or model needs no base class and no entry in a list: it has these attributes and methods. All inputs and
outputs are plain tensors. Group elements are the integers ``0 .. order - 1`` of ``group``.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from equiflop.groups import Action, FiniteGroup, Rep
from equiflop.image_group import ImageGroup


@runtime_checkable
class EquivariantLayer(Protocol):
    """A layer whose input and output transform along one axis: ``layer(in_rep.act(g, x)) = out_rep.act(g, layer(x))``.

    Attributes:
        in_rep: how the group acts on the features that come in, most often along the last axis.
        out_rep: how it acts on those that go out; its group is that of ``in_rep``.
    """

    @property
    def in_rep(self) -> Rep | Action: ...

    @property
    def out_rep(self) -> Rep | Action: ...


@runtime_checkable
class CountsMacs(Protocol):
    """A module that makes products (matrix products, convolutions, attention) of its own."""

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds of the module's own products for inputs of these shapes, the batch axis included.

        Modules inside it count themselves.
        """
        ...


@runtime_checkable
class EquivariantModel(Protocol):
    """A model of any kind of input: ``model(*act_on_inputs(g, *x)) = act_on_output(g, model(*x))``.

    Attributes:
        group: the group, or its action on whatever the input is made of.
    """

    @property
    def group(self) -> FiniteGroup | Action: ...

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs of the model, on the CPU, floating-point ones in float64; ``check`` converts them."""
        ...

    def act_on_inputs(self, a: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What element ``a`` makes of the inputs, one tensor for each."""
        ...

    def act_on_output(self, a: int, output: Tensor) -> Tensor:
        """What element ``a`` makes of the output; the output itself if that is invariant."""
        ...


@runtime_checkable
class ShowsFeatures(Protocol):
    """A model whose intermediate features can be compared as well: a break deep inside may hardly move the output."""

    def named_features(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Intermediate features by names that do not depend on the inputs."""
        ...

    def act_on_features(self, a: int, name: str, features: Tensor) -> Tensor:
        """What element ``a`` makes of the features of that name."""
        ...


@runtime_checkable
class EquivariantImageModel(Protocol):
    """An image model with timm's methods; ``check`` knows how images, maps and tokens move, and asks only for types.

    It may also have ``output_rep``, a ``Rep`` or ``Action`` of the output's channels if the output is not invariant, or
    ``invariant_output = False`` if it obeys no rule. Features come from timm's ``forward_intermediates``.

    Attributes:
        group: how the group acts on the pixels.
    """

    @property
    def group(self) -> ImageGroup: ...

    def feature_rep(self, block: int) -> Rep | None:
        """Type of the channels after a block or stage, or None where the features obey no rule."""
        ...
