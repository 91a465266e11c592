"""The teacher: a trained plain network, seen at every view of an image that a group makes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from equiflop.classify.model_spec import ModelSpec
from equiflop.classify.objective import renormalising
from equiflop.classify.prediction import Classifier
from equiflop.data import Preprocessing, Split
from equiflop.data.randomness import epoch_order
from equiflop.distill.config import DistillConfig
from equiflop.distill.features import Features, Maps, class_tokens, maps_of, prefix_tokens, widths
from equiflop.image_group import ImageGroup
from equiflop.models import IsotropicConvNeXt
from equiflop.models.entry_points import TWIN
from equiflop.models.equivariant_transformer import EquivariantTransformer
from equiflop.models.twin_networks import TWIN_CLASSES

#: Networks whose features are patches on a grid, with other tokens in front or without.
_CLASSES = (
    *(cls for cls in TWIN_CLASSES if cls.__name__ not in ("NaFlexVit", "VisionTransformerSAM")),
    MlpMixer,
    ConvNeXt,
    IsotropicConvNeXt,
)


class Look(nn.Module):
    """What a network makes of images, as tensors, which compilers return.

    Args:
        model: a network of timm.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts of :class:`Maps`."""
        maps = maps_of(self.model, images)
        return maps.prefix, maps.last, maps.middle, maps.logits


class PlainTeacher(nn.Module):
    """A trained plain network whose features and answers at all views of an image are put side by side.

    For a group ``G`` and the teacher's features ``f``, one token per place, ``t_g(x) = g^-1 f(g x)`` are those at the
    view ``g x``, the tokens put back in their places. The axis ``(t_{g^-1}(x))_g`` of ``|G|`` times ``C`` channels is a
    feature of type ``Rep.regular(G, C)`` in the group's own basis: if the image moves by ``h``, tokens move by ``h``
    and the group permutes the copies.

    Args:
        spec: what it is.
        model: the network, with its weights.
        source: what the user called it, for messages.
        names_classes: whether the names of its classes are known, not only their number.

    Raises:
        ValueError: if it is no plain network of a kind that has a twin, or is equivariant already.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, source: str, names_classes: bool = True) -> None:
        super().__init__()
        if isinstance(model, EquivariantTransformer) or spec.name.startswith(TWIN) or hasattr(model, "group"):
            raise ValueError(f"{source} is equivariant already; the teacher must be a plain network of timm")
        if type(model) not in _CLASSES:
            names = ", ".join(cls.__name__ for cls in _CLASSES)
            raise ValueError(f"{source} is a {type(model).__name__}; a teacher must be of one of the classes {names}")
        self.spec = spec
        self.source = source
        self.names_classes = names_classes
        self.look = Look(model.eval().requires_grad_(False))
        scale, shift = renormalising(spec.preprocessing, spec.preprocessing)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.scale: Tensor
        self.shift: Tensor

    @property
    def model(self) -> Any:
        """The network."""
        return self.look.model

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of its features behind the last block and half way."""
        return widths(self.model)

    @property
    def prefix_tokens(self) -> int:
        """How many of its tokens are no patches."""
        return prefix_tokens(self.model)

    @property
    def class_tokens(self) -> int:
        """How many of its tokens, the first ones, its answers are read from."""
        return class_tokens(self.model)

    @property
    def classifies(self) -> bool:
        """Whether its answers are logits of classes, not an embedding."""
        return bool(self.spec.classes)

    @property
    def outputs(self) -> int:
        """How many numbers it answers with: classes, or channels of the embedding where it does not classify."""
        return int(self.model.num_classes or self.model.head_hidden_size)

    def knows(self, classes: tuple[str, ...]) -> bool:
        """Whether data have its classes, in its order; names that it does not know are taken for other names of its."""
        if self.names_classes:
            return self.spec.classes == classes
        try:
            Classifier(self.spec.name, self.model, self.spec.classes, self.spec.preprocessing).check_classes(classes)
        except ValueError:
            return False
        return True

    def fingerprint(self) -> str:
        """What tells its weights from others: the SHA-256 of all of them."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def take(self, preprocessing: Preprocessing, size_asked: bool = False) -> None:
        """Look at images of this preprocessing from now on.

        Args:
            preprocessing: of the images.
            size_asked: whether the user wants this size, which a ConvNeXt then takes.

        Raises:
            ValueError: if their size or their number of channels is another than its own.
        """
        own = self.spec.preprocessing
        free = size_asked and isinstance(self.model, (ConvNeXt, IsotropicConvNeXt))
        compared = slice(0, 1 if free else None)
        if own.input_size[compared] != preprocessing.input_size[compared]:
            theirs, ours = ("x".join(map(str, p.input_size)) for p in (own, preprocessing))
            size = "" if free else f"--img-size {own.input_size[1]}x{own.input_size[2]} "
            raise ValueError(
                f"{self.source} takes images of {theirs} (channels, height, width), the data gives {ours}; say "
                f"{size}--channels {own.input_size[0]}, or leave out the --img-size, --channels or --recipe that says "
                "otherwise"
            )
        scale, shift = renormalising(preprocessing, own)
        self.scale.copy_(scale)
        self.shift.copy_(shift)

    def train(self, mode: bool = True) -> PlainTeacher:
        """A teacher does not train."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of one view."""
        logits: Tensor = self.model(self.normalised(images))
        return logits

    def normalised(self, images: Tensor) -> Tensor:
        """Images in the teacher's own normalisation."""
        return images * self.scale + self.shift

    @torch.no_grad()
    def views(self, images: Tensor, group: ImageGroup) -> Features:
        """Features at all views.

        Args:
            images: shape ``(B, C, H, W)``.
            group: the group, which acts on the image.

        Returns:
            tokens ``(B, N, |G| C)`` and middle ``(B, patches, |G| C')``, every token of every view normed to mean 0 and
            variance 1, in the group's basis; logits averaged over the views, ``(B, classes)``.
        """
        images = self.normalised(images)
        copies = [self._view(images, group, group.inverse(a)) for a in range(group.order)]
        return Features(
            torch.cat([copy.tokens for copy in copies], dim=-1),
            torch.cat([copy.middle for copy in copies], dim=-1),
            torch.stack([copy.logits for copy in copies]).mean(0),
        )

    def _view(self, images: Tensor, group: ImageGroup, a: int) -> Features:
        """``t_a``: features of the moved images, tokens put back."""
        maps = Maps(*self.look(group.act_on_image(a, images)))
        found = maps.moved(group, group.inverse(a)).features()
        return Features(_normed(found.tokens), _normed(found.middle), _full(found.logits))


def numerical_device(device: torch.device) -> torch.device:
    """The device, or the CPU in the place of one that has no float64, in which moments are summed."""
    return torch.device("cpu") if device.type == "mps" else device


def sample_images(split: Split, config: DistillConfig, device: torch.device, batch_size: int = 32) -> Iterator[Tensor]:
    """Training images as they are, in batches on a device: as many as ``init_images``, the same ones for a seed."""
    order = epoch_order(config.seed, 0, len(split))[: config.init_images]
    for batch in split.batches(order, batch_size, workers=config.workers, skip_unreadable=config.unreadable == "skip"):
        if len(batch.images):
            yield batch.images.to(device)


def _normed(tokens: Tensor) -> Tensor:
    return F.layer_norm(_full(tokens), tokens.shape[-1:])


def _full(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
