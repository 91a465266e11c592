"""Models that say themselves what their inputs are and how their group acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equiflop.contract import ShowsFeatures
from equiflop.groups import Action, FiniteGroup


class SelfDescribed:
    """A model that says itself what its inputs are and how the group acts (:mod:`equiflop.contract`)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.group: FiniteGroup | Action = model.group

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.model.sample_inputs(batch_size, generator)

    def values(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The output, and the features where the model shows them."""
        features = self.model.named_features(*inputs) if isinstance(self.model, ShowsFeatures) else {}
        return {"output": as_tensor(self.model(*inputs), self.model), **features}

    def act_in(self, a: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.model.act_on_inputs(a, *inputs)

    def act_out(self, a: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            what: self.model.act_on_output(a, value) if what == "output" else self.model.act_on_features(a, what, value)
            for what, value in values.items()
        }

    def is_map(self, what: str, value: Tensor) -> bool:
        return False


def as_tensor(output: Any, model: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model={type(model).__name__} returns a {type(output).__name__}, of which check knows no rule"
        )
    return output
