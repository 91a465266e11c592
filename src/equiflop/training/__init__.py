"""Training a classifier, keeping its state safe on disk, and measuring it."""

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
