"""Everything that decides the outcome of a training run, in one place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

#: Fields that may change between an interrupted run and its continuation: they do not change the result, or (batches
#: shared out otherwise, such that a step has as many images) by rounding and by other random numbers alone.
_FREE_ON_RESUME = (
    "batch_size",
    "accumulate",
    "out",
    "compile",
    "device",
    "workers",
    "unreadable_test",
    "keep_checkpoints",
    "save_minutes",
    "tensorboard",
)


def _setting(
    default: Any, text: str, low: float | None = None, high: float = math.inf, choices: Iterable[str] = ()
) -> Any:
    """A field with its description, which is also the help of the command line, and the values that it may have."""
    notes = {"help": text, "low": low, "high": high, "choices": tuple(choices)}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=notes)
    return field(default=default, metadata=notes)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. :meth:`describe` lists what every field means; the command line shows the same text.

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
    out: str = field(metadata={"help": "Folder for checkpoints, logs and the final weights."})
    model_kwargs: dict[str, Any] = _setting({}, "Keywords of the model.")
    image_size: tuple[int, int] | None = _setting(None, "Height and width of the input.  [default: the data's]")
    channels: int | None = _setting(None, "1 (grey) or 3 (colour).  [default: the data's]", 1, 3)

    start_from: str = _setting("", "Fine-tune: a run, file or checkpoint of equiflop to take the weights from.")
    freeze_backbone: bool = _setting(False, "Train the classifier alone (linear probe).")
    grad_checkpointing: bool = _setting(False, "Save memory by computing the blocks once more backward.")

    epochs: int = _setting(10, "Passes over the training images.", 1)
    batch_size: int = _setting(128, "Images a step in every process.", 1)
    accumulate: int = _setting(1, "Batches whose gradients are averaged before a step.", 1)
    optimizer: str = _setting("adamw", "timm's name of the optimiser.")
    lr: float = _setting(1e-3, "Peak learning rate.", 0)
    min_lr: float = _setting(1e-6, "Learning rate at the end of the schedule.", 0)
    schedule: str = _setting("cosine", "Course of the learning rate.", choices=("cosine", "constant"))
    warmup_epochs: float = _setting(1.0, "Epochs of linear warm-up; may be a fraction.", 0)
    warmup_lr: float = _setting(1e-6, "Learning rate at which the warm-up begins.", 0)
    weight_decay: float = _setting(0.05, "Not applied to biases, norms and what the model exempts.", 0)
    clip_grad: float = _setting(1.0, "Largest norm of the gradient; 0 for any.", 0)
    ema_decay: float = _setting(0.0, "Decay of an average of the weights, kept and measured as well; 0: none.", 0, 1)
    precision: str = _setting(
        "float32", "Autocast in training; measurements are in float32.", choices=("float32", "bfloat16", "float16")
    )

    loss: str = _setting("ce", "Cross-entropy, or binary cross-entropy of every class.", choices=("ce", "bce"))
    label_smoothing: float = _setting(0.1, "Share of the target spread over all classes.", 0, 1)
    drop_path: float = _setting(0.0, "Stochastic depth: rate of the last block.", 0, 1)
    drop_path_schedule: str = _setting(
        "linear", "Rate of the other blocks: growing from 0, or all the same.", choices=("linear", "constant")
    )
    teacher: str = _setting("", "Distil from this: a run of equiflop, or a pretrained model of timm.")
    distillation: str = _setting("hard", "Learn the teacher's answers, or its probabilities.", choices=("hard", "soft"))
    distillation_weight: float = _setting(0.5, "Share of the loss that is distillation.", 0, 1)
    distillation_temperature: float = _setting(1.0, "Softens the probabilities of both networks.", 1e-6)

    mirror: float = _setting(0.5, "Probability of mirroring an image.", 0, 1)
    shift: int = _setting(2, "Largest shift in pixels (sets in memory).", 0)
    crop_scale: float = _setting(0.35, "Smallest share of the area that a random crop keeps (image files).", 0, 1)
    crop_mode: str = _setting(
        "rrc", "Random resized crop, or resize and crop at random (image files).", choices=("rrc", "rkrc")
    )
    auto_augment: str = _setting("", "timm's policy (image files), such as 3a (3-Augment) or rand-m9-mstd0.5-inc1.")
    color_jitter: float = _setting(0.0, "Strength of colour jitter (image files).", 0)
    random_erasing: float = _setting(0.0, "Probability of erasing a rectangle (image files).", 0, 1)
    mixup: float = _setting(0.0, "Alpha of Mixup; 0: none.", 0)
    cutmix: float = _setting(0.0, "Alpha of CutMix; 0: none.", 0)
    mix_probability: float = _setting(1.0, "Probability of mixing a batch.", 0, 1)
    cutmix_probability: float = _setting(0.5, "Probability of CutMix where both are on.", 0, 1)
    repeats: int = _setting(1, "Repeated augmentation: versions of an image in an epoch that is no longer.", 1)
    unreadable: str = _setting(
        "skip", "Training images that cannot be read: leave out, count and list, or stop.", choices=("skip", "stop")
    )
    unreadable_test: str = _setting(
        "stop", "Test images that cannot be read: stop, or leave out and count.", choices=("stop", "skip")
    )

    seed: int = _setting(0, "Decides everything random.", 0, 2**63 - 1)
    fsdp: bool = _setting(False, "Share parameters, gradients and optimiser out over the processes (FSDP2).")
    compile: bool = _setting(False, "Use torch.compile: a wait first, then faster.")
    device: str = _setting("auto", "auto, cpu, cuda or mps, or one of several such as cuda:1.")
    workers: int = _setting(0, "Processes that decode image files.", 0)
    keep_checkpoints: int = _setting(2, "Checkpoints to keep, beside the best.", 1)
    save_minutes: float = _setting(10.0, "Also save when this long has passed within an epoch; 0: never.", 0)
    tensorboard: bool = _setting(False, "Also write a log for TensorBoard.")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_value(item, getattr(self, item.name))
        object.__setattr__(self, "model_kwargs", json.loads(json.dumps(self.model_kwargs)))
        if self.image_size is not None:
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if not self.out:
            raise ValueError("out='' is not a folder; give one, such as runs/mine")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be between 0 and {self.epochs}, the epochs")
        if self.ema_decay == 1:
            raise ValueError("ema_decay=1 would never take up a weight; use less, such as 0.9999")
        if self.loss == "bce" and self.label_smoothing == 1:
            raise ValueError("label_smoothing=1 leaves nothing to learn with loss='bce'; use less")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even, since mixup and cutmix mix pairs")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return bool(self.mixup or self.cutmix)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        check_names(values)
        return cls(**values)

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """Default (``dataclasses.MISSING`` where there is none) and meaning of every field, by name."""
        return {item.name: (_default(item), _meaning(item)) for item in fields(cls)}

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the fields in which two runs would differ in their result.

        Data on a disk may have moved: what is in them is compared elsewhere.
        """
        free = (*_FREE_ON_RESUME, "data") if Path(self.data).exists() else _FREE_ON_RESUME
        return [
            item.name
            for item in fields(self)
            if item.name not in free and getattr(self, item.name) != getattr(other, item.name)
        ]


def check_names(values: Iterable[str]) -> None:
    """See that all names are fields of a configuration.

    Raises:
        ValueError: if one is not; it names the closest.
    """
    known = [item.name for item in fields(TrainConfig)]
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"unknown training option {name!r}; {hint}")


def number_names() -> set[str]:
    """Names of the fields that are numbers and may have a fraction."""
    return {item.name for item in fields(TrainConfig) if item.type == "float"}


def _meaning(item: Field[Any]) -> str:
    text, choices = item.metadata["help"], item.metadata.get("choices")
    return f"{text} One of {', '.join(choices)}." if choices else str(text)


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _check_value(item: Field[Any], value: Any) -> None:
    name, notes = item.name, item.metadata
    kind = str(item.type).removesuffix(" | None")
    if value is None and str(item.type).endswith("None"):
        return
    if kind.startswith("tuple"):
        if not isinstance(value, (tuple, list)) or [type(part) for part in value] != [int, int] or min(value) < 1:
            raise TypeError(f"{name}={value!r} is not (height, width)")
        return
    expected: Any = {"str": str, "bool": bool, "int": int, "float": (int, float)}.get(kind, dict)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
        words = {"str": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"}
        raise TypeError(f"{name}={value!r} is not {words.get(kind, 'a dictionary')}")
    if notes.get("choices") and value not in notes["choices"]:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(notes['choices'])}")
    low, high = notes.get("low"), notes.get("high", math.inf)
    if low is not None and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name}={value} must be {limits}")
