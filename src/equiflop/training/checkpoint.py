"""Trained networks as files: weights with their description, read without running code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equiflop.files import write_atomically
from equiflop.models.pretrained import METADATA_KEY, WEIGHTS_FILE
from equiflop.training.config import TrainConfig
from equiflop.training.model_spec import ModelSpec
from equiflop.training.sharding import load_whole
from equiflop.training.state import CHECKPOINT_FOLDER, STATE_FILE, CheckpointError, load_state, saved_states


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
    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    note: dict[str, Any] = {"spec": spec.to_json(), "config": config.to_dict() if config is not None else None}
    content = safetensors.torch.save(state, metadata={METADATA_KEY: json.dumps(note)})
    write_atomically(path, lambda file: file.write(content))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: Path | str) -> None:
    """Load a state dict strictly.

    Raises:
        CheckpointError: if keys or shapes do not fit the model, or a number is NaN or infinite.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise CheckpointError(f"{origin}: weights of another model: {', '.join(parts)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{origin}: {key} has shape {tuple(value.shape)}, the model needs {tuple(own[key].shape)}"
            )
        own_share = value.to_local() if isinstance(value, DTensor) else value
        if value.is_floating_point() and not bool(torch.isfinite(own_share).all()):
            raise CheckpointError(f"{origin}: {key} holds NaN or infinite numbers")
    model.load_state_dict(dict(state))


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
        spec, config = saved.spec, saved.config
        part, state = ("model", saved.model) if saved.ema is None else ("ema", saved.ema)
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
        config = TrainConfig.from_dict(note["config"]) if note["config"] is not None else None
        return ModelSpec.from_json(note["spec"]), config, state
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of its model is damaged ({error})") from error
