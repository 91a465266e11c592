"""Everything that decides the outcome of a distillation, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from equiflop.classify.config import TrainConfig, as_json
from equiflop.training.config import setting

#: Settings of ordinary training that have another form here, and what to use in their place.
_OTHERWISE = {
    "distillation": "choose --logits-loss",
    "distillation_weight": "choose --label-weight and the weights of the other terms",
    "freeze_backbone": "the whole student learns",
    "start_from": "choose --init",
    "fsdp": "several processes share batches instead, by torchrun",
}
#: What the help says otherwise than that of ordinary training.
_TEXTS = {
    "model_kwargs": "Keywords of the student, such as depth=6.",
    "image_size": "Height and width of the input, which must be the teacher's; of a ConvNeXt any.  "
    "[default: the teacher's]",
    "channels": "1 (grey) or 3 (colour), as the teacher takes.  [default: the teacher's]",
    "distillation_temperature": "Softens the probabilities of both networks (--logits-loss kl).",
    "loss": "On labels, where they are used: cross-entropy, or binary cross-entropy of every class. One of ce, bce.",
}
_FIRST = ("model", "teacher", "teacher_checkpoint", "teacher_kwargs", "data", "out", "init", "init_images")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """The training of one equivariant student from one plain teacher; ``model`` is timm's name of the teacher.

    :meth:`describe` lists what every field means. ``model_kwargs`` are keywords of the student, ``group`` among them.

    Raises:
        ValueError: if a value is out of range or unknown, a setting of ordinary training does not apply, no term of the
            loss has a weight, or the teacher is given twice.
        TypeError: if a value is of the wrong type.
    """

    epochs: int = setting(10, "Passes over the training images; 0 with --init steer: the steered student as it is.", 0)
    teacher: str = setting("", "Folder or file of a run of equiflop: the teacher, in place of timm's weights of NAME.")
    teacher_checkpoint: str = setting("", "File of weights of NAME, .safetensors or .pth: the teacher.")
    teacher_kwargs: dict[str, Any] = setting(
        {}, "Keywords of the teacher, such as img_size=384; num_classes=0: its embedding teaches."
    )
    init: str = setting(
        "random",
        "Student's first weights: random, or steered from a ViT's (flop, updown).",
        choices=("random", "steer"),
    )
    init_images: int = setting(256, "Training images that steering, or --report, looks at.", 1)

    class_weight: float = setting(1.0, "Weight of the error of the class token behind the last norm.", 0)
    patch_weight: float = setting(1.0, "Weight of the error of the patch tokens behind the last norm.", 0)
    middle_weight: float = setting(1.0, "Weight of the error of the patch tokens in the middle of the blocks.", 0)
    logits_weight: float = setting(1.0, "Weight of the teacher's answers.", 0)
    logits_loss: str = setting(
        "kl", "Divergence of the probabilities, or mean squared error of the logits.", choices=("kl", "mse")
    )
    label_weight: float = setting(0.0, "Weight of the loss on the data's own labels; 0: labels are not used.", 0)

    #: A teacher is known again by its weights, wherever they lie.
    free_on_resume: ClassVar[tuple[str, ...]] = (*TrainConfig.free_on_resume, "teacher", "teacher_checkpoint")
    #: Says that a training state holds more than the network.
    distills: ClassVar[bool] = True
    #: Fields that the command line leaves out.
    hidden: ClassVar[tuple[str, ...]] = tuple(_OTHERWISE)

    def __post_init__(self) -> None:
        if self.epochs == 0:
            object.__setattr__(self, "warmup_epochs", 0.0)
        super().__post_init__()
        object.__setattr__(self, "teacher_kwargs", as_json("teacher_kwargs", self.teacher_kwargs))
        defaults = TrainConfig.describe()
        for name, instead in _OTHERWISE.items():
            if getattr(self, name) != defaults[name][0]:
                raise ValueError(f"{name}={getattr(self, name)!r} does not apply to a distillation; {instead}")
        if self.teacher and self.teacher_checkpoint:
            raise ValueError(
                f"teacher={self.teacher!r} and teacher_checkpoint={self.teacher_checkpoint!r} exclude each other"
            )
        if self.epochs == 0 and self.init != "steer":
            raise ValueError(
                f"epochs=0 trains nothing, and init={self.init!r} gives no weights worth keeping; say steer"
            )
        if self.teacher and self.teacher_kwargs:
            raise ValueError(
                f"teacher_kwargs={self.teacher_kwargs!r} and teacher={self.teacher!r} exclude each other: a run has "
                "keywords of its own"
            )
        terms = ("class_weight", "patch_weight", "middle_weight", "logits_weight", "label_weight")
        if not any(getattr(self, name) for name in terms):
            raise ValueError(f"{terms[0]}=0 and so on: one of {', '.join(terms)} must be above 0")

    @classmethod
    def describe(cls) -> dict[str, tuple[Any, str]]:
        """Default and meaning of every field that applies, by name."""
        texts = {name: text for name, text in super().describe().items() if name not in cls.hidden}
        texts |= {name: (texts[name][0], text) for name, text in _TEXTS.items()}
        return {name: texts[name] for name in (*_FIRST, *(name for name in texts if name not in _FIRST))}
