"""Training a classifier, keeping its state safe on disk, and measuring it."""

from typing import TYPE_CHECKING

from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.training.checkpoint import load_model
    from equiflop.training.config import TrainConfig
    from equiflop.training.evaluation import Evaluation, MirrorAveraged, evaluate
    from equiflop.training.model_spec import ModelSpec, create_model
    from equiflop.training.state import CheckpointError
    from equiflop.training.trainer import EpochRecord, NonFiniteLossError, Trainer, TrainingInterrupted

__all__ = [
    "CheckpointError",
    "EpochRecord",
    "Evaluation",
    "MirrorAveraged",
    "ModelSpec",
    "NonFiniteLossError",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "create_model",
    "evaluate",
    "load_model",
]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.training.checkpoint": ["load_model"],
        "equiflop.training.config": ["TrainConfig"],
        "equiflop.training.evaluation": ["Evaluation", "MirrorAveraged", "evaluate"],
        "equiflop.training.model_spec": ["ModelSpec", "create_model"],
        "equiflop.training.state": ["CheckpointError"],
        "equiflop.training.trainer": ["EpochRecord", "NonFiniteLossError", "Trainer", "TrainingInterrupted"],
    },
)
