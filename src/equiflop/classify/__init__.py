"""Classifiers: what one is, how it is trained on labelled images, measured and asked."""

from typing import TYPE_CHECKING

from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.classify.config import TrainConfig
    from equiflop.classify.evaluation import Evaluation, MirrorAveraged, evaluate
    from equiflop.classify.model_spec import ModelSpec, create_model
    from equiflop.classify.trainer import ClassifierTrainer
    from equiflop.classify.weights import TrainedModel, load_model

__all__ = [
    "ClassifierTrainer",
    "Evaluation",
    "MirrorAveraged",
    "ModelSpec",
    "TrainConfig",
    "TrainedModel",
    "create_model",
    "evaluate",
    "load_model",
]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.classify.config": ["TrainConfig"],
        "equiflop.classify.evaluation": ["Evaluation", "MirrorAveraged", "evaluate"],
        "equiflop.classify.model_spec": ["ModelSpec", "create_model"],
        "equiflop.classify.trainer": ["ClassifierTrainer"],
        "equiflop.classify.weights": ["TrainedModel", "load_model"],
    },
)
