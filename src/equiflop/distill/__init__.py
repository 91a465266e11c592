"""The half-cost twin of a network that is already trained: an equivariant student of a plain teacher."""

from typing import TYPE_CHECKING

from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.distill.config import DistillConfig
    from equiflop.distill.report import MirrorReport, mirror_report
    from equiflop.distill.teacher import PlainTeacher
    from equiflop.distill.trainer import DistillTrainer

__all__ = ["DistillConfig", "DistillTrainer", "MirrorReport", "PlainTeacher", "mirror_report"]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.distill.config": ["DistillConfig"],
        "equiflop.distill.report": ["MirrorReport", "mirror_report"],
        "equiflop.distill.teacher": ["PlainTeacher"],
        "equiflop.distill.trainer": ["DistillTrainer"],
    },
)
