"""Image networks: how images and maps move is known, what their channels are the model says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.checking.own import image_shape, own_input_size
from equiflop.checking.self_described import as_tensor
from equiflop.contract import EquivariantImageModel
from equiflop.groups import Action, Rep
from equiflop.image_group import ImageGroup


class Images:
    """An image network: how images, maps and tokens move is known, the types of channels are the model's to say.

    Args:
        model: the network.
        group: the group to try.
        input_size: size of the images, or None for the model's own.
    """

    def __init__(self, model: Any, group: ImageGroup, input_size: tuple[int, ...] | None) -> None:
        self.model = model
        self.group: ImageGroup = group
        self.input_size = image_shape(model, input_size if input_size is not None else own_input_size(model))
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
        output = as_tensor(model(images), model)
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


def _returns_features(model: Any) -> bool:
    """Whether it is what timm's ``features_only=True`` makes of a model with ``forward_intermediates``."""
    return isinstance(getattr(model, "model", None), nn.Module) and hasattr(model, "out_indices")
