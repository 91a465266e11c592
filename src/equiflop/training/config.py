"""How any network is trained, in one place, and what every setting may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Self


def setting(
    default: Any, text: str, low: float | None = None, high: float = math.inf, choices: Iterable[str] = ()
) -> Any:
    """A field with its description, which is also the help of the command line, and the values that it may have."""
    notes = {"help": text, "low": low, "high": high, "choices": tuple(choices)}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=notes)
    return field(default=default, metadata=notes)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run of any network. :meth:`describe` lists what every field means.

    Raises:
        ValueError: if a value is out of range or unknown, or two values contradict each other.
        TypeError: if a value is of the wrong type.

    >>> RunConfig(out="runs/mine", epochs=5).lr
    0.001
    """

    out: str = field(metadata={"help": "Folder for checkpoints, logs and the final weights."})

    epochs: int = setting(10, "Passes over the training images.", 1)
    batch_size: int = setting(128, "Images a step in every process.", 1)
    accumulate: int = setting(1, "Batches whose gradients are averaged before a step.", 1)
    optimizer: str = setting("adamw", "timm's name of the optimiser.")
    lr: float = setting(1e-3, "Peak learning rate.", 0)
    min_lr: float = setting(1e-6, "Learning rate at the end of the schedule.", 0)
    schedule: str = setting("cosine", "Course of the learning rate.", choices=("cosine", "constant"))
    warmup_epochs: float = setting(1.0, "Epochs of linear warm-up; may be a fraction.", 0)
    warmup_lr: float = setting(1e-6, "Learning rate at which the warm-up begins.", 0)
    weight_decay: float = setting(0.05, "Not applied to biases, norms and what the model exempts.", 0)
    clip_grad: float = setting(1.0, "Largest norm of the gradient; 0 for any.", 0)
    ema_decay: float = setting(0.0, "Decay of an average of the weights, kept and measured as well; 0: none.", 0, 1)
    precision: str = setting(
        "float32", "Autocast in training; measurements are in float32.", choices=("float32", "bfloat16", "float16")
    )

    seed: int = setting(0, "Decides everything random.", 0, 2**63 - 1)
    fsdp: bool = setting(False, "Share parameters, gradients and optimiser out over the processes (FSDP2).")
    compile: bool = setting(False, "Use torch.compile: a wait first, then faster.")
    compile_mode: str = setting(
        "default",
        "Of torch.compile; reduce-overhead records CUDA graphs, max-autotune tries kernels too, for minutes.",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
    device: str = setting("auto", "auto, cpu, cuda or mps, or one of several such as cuda:1.")
    workers: int = setting(0, "Processes that decode image files.", 0)
    keep_checkpoints: int = setting(2, "Checkpoints to keep, beside the best.", 1)
    save_minutes: float = setting(10.0, "Also save when this long has passed within an epoch; 0: never.", 0)
    tensorboard: bool = setting(False, "Also write a log for TensorBoard.")

    #: Fields that may change between an interrupted run and its continuation: they do not change the result, or
    #: (batches shared out otherwise, such that a step has as many samples) by rounding and other random numbers alone.
    free_on_resume: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "accumulate",
        "out",
        "compile",
        "compile_mode",
        "device",
        "workers",
        "keep_checkpoints",
        "save_minutes",
        "tensorboard",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_value(item, getattr(self, item.name))
        if not self.out:
            raise ValueError("out='' is not a folder; give one, such as runs/mine")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be between 0 and {self.epochs}, the epochs")
        if self.ema_decay == 1:
            raise ValueError("ema_decay=1 would never take up a weight; use less, such as 0.9999")
        if self.compile_mode != "default" and not self.compile:
            raise ValueError(f"compile_mode={self.compile_mode!r} needs compile (--compile)")
        if self.compile_mode != "default" and self.fsdp:
            raise ValueError(
                f"compile_mode={self.compile_mode!r} does not go with fsdp, whose gathered weights a CUDA graph would "
                "have to copy; leave it at default"
            )

    @property
    def batch_multiple(self) -> int:
        """What the size of a batch must be a multiple of."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        cls.check_names(values)
        return cls(**values)

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """Default (``dataclasses.MISSING`` where there is none) and meaning of every field, by name."""
        return {item.name: (_default(item), _meaning(item)) for item in fields(cls)}

    @classmethod
    def check_names(cls, values: Iterable[str]) -> None:
        """See that all names are fields.

        Raises:
            ValueError: if one is not; it names the closest.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
                raise ValueError(f"unknown training option {name!r}; {hint}")

    @classmethod
    def number_names(cls) -> set[str]:
        """Names of the fields that are numbers and may have a fraction."""
        return {item.name for item in fields(cls) if item.type == "float"}

    def differences(self, other: RunConfig) -> list[str]:
        """Names of the fields in which two runs would differ in their result."""
        return [
            item.name
            for item in fields(self)
            if item.name not in self.free_on_resume and getattr(self, item.name) != getattr(other, item.name)
        ]


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
