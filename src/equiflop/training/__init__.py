"""Training any network on any objective, with a state on disk that goes on exactly."""

from typing import TYPE_CHECKING

from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.training.config import RunConfig
    from equiflop.training.errors import CheckpointError, NonFiniteLossError, TrainingInterrupted
    from equiflop.training.records import EpochRecord
    from equiflop.training.samples import DatasetSamples, Loaded, Samples
    from equiflop.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "DatasetSamples",
    "EpochRecord",
    "Loaded",
    "NonFiniteLossError",
    "RunConfig",
    "Samples",
    "Trainer",
    "TrainingInterrupted",
]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.training.config": ["RunConfig"],
        "equiflop.training.errors": ["CheckpointError", "NonFiniteLossError", "TrainingInterrupted"],
        "equiflop.training.records": ["EpochRecord"],
        "equiflop.training.samples": ["DatasetSamples", "Loaded", "Samples"],
        "equiflop.training.trainer": ["Trainer"],
    },
)
