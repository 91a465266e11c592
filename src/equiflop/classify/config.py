"""Everything that decides the outcome of training a classifier, in one place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from equiflop.training.config import RunConfig, setting

#: What the help shows first.
_FIRST = ("model", "data", "out", "model_kwargs", "image_size", "channels")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The training of one classifier. :meth:`describe` lists what every field means; the command line shows the same.

    Raises:
        ValueError: if a value is out of range or unknown, or two values contradict each other.
        TypeError: if a value is of the wrong type.
    """

    model: str = field(metadata={"help": "A name that timm knows, such as flop_deit3_small_patch16_224."})
    data: str = field(
        metadata={
            "help": "fashion-mnist, fashion-mnist-part, digits, a folder with train/CLASS/* and test/CLASS/*, or "
            "timm's name of a data set such as torch/cifar10, hfds/NAME or wds/FOLDER."
        }
    )
    model_kwargs: dict[str, Any] = setting({}, "Keywords of the model.")
    image_size: tuple[int, int] | None = setting(None, "Height and width of the input.  [default: the data's]")
    channels: int | None = setting(None, "1 (grey) or 3 (colour).  [default: the data's]", 1, 3)

    start_from: str = setting("", "Fine-tune: a run, file or checkpoint of equiflop to take the weights from.")
    freeze_backbone: bool = setting(False, "Train the classifier alone (linear probe).")
    grad_checkpointing: bool = setting(False, "Save memory by computing the blocks once more backward.")

    loss: str = setting("ce", "Cross-entropy, or binary cross-entropy of every class.", choices=("ce", "bce"))
    label_smoothing: float = setting(0.1, "Share of the target spread over all classes.", 0, 1)
    drop_path: float = setting(0.0, "Stochastic depth: rate of the last block.", 0, 1)
    drop_path_schedule: str = setting(
        "linear", "Rate of the other blocks: growing from 0, or all the same.", choices=("linear", "constant")
    )
    teacher: str = setting("", "Distil from this: a run of equiflop, or a pretrained model of timm.")
    distillation: str = setting("hard", "Learn the teacher's answers, or its probabilities.", choices=("hard", "soft"))
    distillation_weight: float = setting(0.5, "Share of the loss that is distillation.", 0, 1)
    distillation_temperature: float = setting(1.0, "Softens the probabilities of both networks.", 1e-6)

    mirror: float = setting(0.5, "Probability of mirroring an image.", 0, 1)
    shift: int = setting(2, "Largest shift in pixels (sets in memory).", 0)
    crop_scale: float = setting(0.35, "Smallest share of the area that a random crop keeps (image files).", 0, 1)
    crop_mode: str = setting(
        "rrc", "Random resized crop, or resize and crop at random (image files).", choices=("rrc", "rkrc")
    )
    auto_augment: str = setting("", "timm's policy (image files), such as 3a (3-Augment) or rand-m9-mstd0.5-inc1.")
    color_jitter: float = setting(0.0, "Strength of colour jitter (image files).", 0)
    random_erasing: float = setting(0.0, "Probability of erasing a rectangle (image files).", 0, 1)
    mixup: float = setting(0.0, "Alpha of Mixup; 0: none.", 0)
    cutmix: float = setting(0.0, "Alpha of CutMix; 0: none.", 0)
    mix_probability: float = setting(1.0, "Probability of mixing a batch.", 0, 1)
    cutmix_probability: float = setting(0.5, "Probability of CutMix where both are on.", 0, 1)
    repeats: int = setting(1, "Repeated augmentation: versions of an image in an epoch that is no longer.", 1)
    unreadable: str = setting(
        "skip", "Training images that cannot be read: leave out, count and list, or stop.", choices=("skip", "stop")
    )
    unreadable_test: str = setting(
        "stop", "Test images that cannot be read: stop, or leave out and count.", choices=("stop", "skip")
    )

    free_on_resume: ClassVar[tuple[str, ...]] = (*RunConfig.free_on_resume, "unreadable_test")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model_kwargs", as_json("model_kwargs", self.model_kwargs))
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.loss == "bce" and self.label_smoothing == 1:
            raise ValueError("label_smoothing=1 leaves nothing to learn with loss='bce'; use less")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even, since mixup and cutmix mix pairs")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return bool(self.mixup or self.cutmix)

    @property
    def batch_multiple(self) -> int:
        """What the size of a batch must be a multiple of: images are mixed in pairs."""
        return 2 if self.mixes else 1

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """Default (``dataclasses.MISSING`` where there is none) and meaning of every field, by name."""
        texts = super().describe()
        return {name: texts[name] for name in (*_FIRST, *(name for name in texts if name not in _FIRST))}

    def differences(self, other: RunConfig) -> list[str]:
        """Names of the fields in which two runs would differ in their result.

        Data on a disk may have moved: what is in them is compared elsewhere.
        """
        names = super().differences(other)
        return [name for name in names if name != "data"] if Path(self.data).exists() else names


def as_json(name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords as JSON holds them.

    Raises:
        TypeError: if a value is nothing that JSON holds.
    """
    try:
        return dict(json.loads(json.dumps(keywords)))
    except TypeError as error:
        raise TypeError(f"{name}={keywords!r} holds what is no number, text, list or truth value ({error})") from error
