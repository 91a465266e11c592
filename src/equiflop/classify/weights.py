"""Trained networks as files: weights with their description, read without running code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from equiflop.classify.config import TrainConfig
from equiflop.classify.model_spec import ModelSpec
from equiflop.models.pretrained import METADATA_KEY, WEIGHTS_FILE
from equiflop.training.errors import CheckpointError
from equiflop.training.run_folder import write_tensors
from equiflop.training.sharded_state import load_whole
from equiflop.training.state import (
    CHECKPOINT_FOLDER,
    STATE_FILE,
    load_state,
    load_weights,
    saved_states,
)


def save_weights(path: Path, weights: Mapping[str, Tensor], spec: ModelSpec, config: TrainConfig | None = None) -> None:
    """Write a network's weights with its description as a safetensors file.

    Args:
        path: the file.
        weights: the network's state dict.
        spec: what it is.
        config: how it was trained.

    Raises:
        OSError: if it cannot be written; what was there before is then intact.
    """
    write_tensors(path, weights, spec.to_json(), config)


#: In front of the names of a student's weights while it is distilled, beside those of what reads its features.
STUDENT_PREFIX = "student."


def bare_weights(state: Mapping[str, Any], config: TrainConfig | None) -> dict[str, Any]:
    """The network's own weights in the state of a training: of a distilled student without what read its features."""
    if config is None or not getattr(config, "distills", False):
        return dict(state)
    return {key.removeprefix(STUDENT_PREFIX): value for key, value in state.items() if key.startswith(STUDENT_PREFIX)}


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights.

    Attributes:
        model: in evaluation mode, on the CPU.
        spec: what it is.
        config: how it was trained, if that is known.
        path: the file it came from.
    """

    model: nn.Module
    spec: ModelSpec
    config: TrainConfig | None
    path: Path


def load_model(path: str | Path) -> TrainedModel:
    """Read a trained network.

    Args:
        path: a run's folder (its final weights, else its newest checkpoint), a ``.safetensors`` file or a checkpoint
            (its averaged weights, if it has any), be it a file or the folder of a sharded one.

    Raises:
        CheckpointError: if it is missing, damaged, not finite, or not written by equiflop.
    """
    path = _weights_in(Path(path))
    config: TrainConfig | None
    if path.suffix == ".safetensors":
        spec, config, state = _read_safetensors(path)
    else:
        saved = load_state(path)
        spec, config = _described(path, saved.about, saved.config)
        part, state = ("model", saved.model) if saved.ema is None else ("ema", saved.ema)
        state = bare_weights(state, config)
    try:
        model = spec.build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model cannot be made ({error})") from error
    if path.is_dir():
        state = load_whole(path, part, state, model.state_dict())
    load_weights(model, state, path)
    return TrainedModel(model.eval(), spec, config, path)


def _weights_in(path: Path) -> Path:
    if path.name == STATE_FILE:
        path = path.parent
    if path.is_file() or (path / STATE_FILE).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    candidates = [path / WEIGHTS_FILE, *saved_states(path / CHECKPOINT_FOLDER), *saved_states(path)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise CheckpointError(f"{path}: holds neither {WEIGHTS_FILE} nor a checkpoint")


def _read_safetensors(path: Path) -> tuple[ModelSpec, TrainConfig | None, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: does not say which model it belongs to (not written by equiflop train)")
    try:
        note = json.loads(metadata[METADATA_KEY])
        about, config = note["spec"], note["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of its model is damaged ({error})") from error
    return *_described(path, about, config), state


def _described(path: Path, about: str, config: dict[str, Any] | None) -> tuple[ModelSpec, TrainConfig | None]:
    """What a file says of its network and of the training."""
    if not about:
        raise CheckpointError(f"{path}: holds a network of your own, no classifier; load its tensors into it yourself")
    try:
        return ModelSpec.from_json(about), None if config is None else _configuration(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of its model is damaged ({error})") from error


def _configuration(values: dict[str, Any]) -> TrainConfig:
    """How a network was trained: by itself, or from a teacher."""
    if "teacher_checkpoint" not in values:
        return TrainConfig.from_dict(values)
    from equiflop.distill.config import DistillConfig

    return DistillConfig.from_dict(values)
