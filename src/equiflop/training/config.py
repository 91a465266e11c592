"""Everything that decides the outcome of a training run, in one place."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: Fields that may change between an interrupted run and its continuation: they do not change the result.
_FREE_ON_RESUME = ("out", "compile", "device", "workers", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: a name that timm knows, such as ``"flop_deit3_small_patch16_224"``.
        data: a built-in set or a folder, see :func:`equiflop.data.open_data`.
        out: folder for checkpoints, the log and the final weights.
        model_kwargs: timm's keywords for the model; they may hold what JSON holds.
        image_size: (height, width); None for the size of the data or of the model.
        channels: 1 or 3; None for what the data has.
        epochs: passes over the training images.
        batch_size: images a step; the images left over at an epoch's end wait for the next epoch's order.
        optimizer: timm's name of the optimiser.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        weight_decay: not applied to biases, norms and what the model exempts.
        warmup_epochs: epochs of linear warm-up; may be a fraction.
        label_smoothing: share of the target that is spread over all classes.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        clip_grad: largest norm of the gradient; 0 for no limit.
        mirror: probability of mirroring a training image.
        shift: largest shift in pixels of images that live in memory.
        crop_scale: smallest share of the area that a random crop of an image file keeps.
        seed: decides initialisation, order, augmentation and stochastic depth.
        amp: autocast to bfloat16 in training; measurements are in float32.
        compile: use ``torch.compile``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"`` or a device with its number.
        workers: processes that decode image files.
        keep_checkpoints: how many checkpoints to keep.

    Raises:
        ValueError: if a value is out of range.
        TypeError: if ``model_kwargs`` is not a dictionary.
    """

    model: str
    data: str
    out: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    clip_grad: float = 1.0
    mirror: float = 0.5
    shift: int = 2
    crop_scale: float = 0.35
    seed: int = 0
    amp: bool = False
    compile: bool = False
    device: str = "auto"
    workers: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.model_kwargs, dict):
            raise TypeError(f"model_kwargs={self.model_kwargs!r} is not a dictionary")
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("lr", 0, math.inf),
            ("min_lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("warmup_epochs", 0, self.epochs),
            ("label_smoothing", 0, 1),
            ("drop_path", 0, 1),
            ("clip_grad", 0, math.inf),
            ("mirror", 0, 1),
            ("shift", 0, math.inf),
            ("crop_scale", 0, 1),
            ("seed", 0, 2**63 - 1),
            ("workers", 0, math.inf),
            ("keep_checkpoints", 1, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name}={value} must be {limits}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown training option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the fields in which two runs would differ in their result."""
        return [
            item.name
            for item in fields(self)
            if item.name not in _FREE_ON_RESUME and getattr(self, item.name) != getattr(other, item.name)
        ]
