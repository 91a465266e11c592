"""States of training: where a run stands, kept in its folder and read without running code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiflop.files import remove, replace_folder, write_atomically
from equiflop.training.config import TrainConfig
from equiflop.training.model_spec import ModelSpec

#: Name of the folder of training states in a run's folder.
CHECKPOINT_FOLDER = "checkpoints"
#: Name of the best training state in that folder, without ".pt".
BEST_NAME = "best"
#: In the folder of a state whose tensors are shared out: the file with all the rest.
STATE_FILE = "state.pt"
_FORMAT = "equiflop-checkpoint-2"

#: Parts of a training state that are kept as they are, and what they must be.
_PLAIN_PARTS: dict[str, Callable[[Any], Any]] = {
    "model": dict,
    "optimizer": dict,
    "ema": lambda value: None if value is None else dict(value),
    "scaler": dict,
    "images_per_step": int,
    "training_images": int,
    "epoch": int,
    "step": int,
    "running": dict,
    "history": list,
}


class CheckpointError(ValueError):
    """A file of weights cannot be used."""


@dataclass(frozen=True)
class TrainState:
    """Where a training run stands. Random numbers are a function of seed, epoch and step, so none are in here.

    Attributes:
        spec: the network.
        config: the run.
        model: the network's state dict.
        optimizer: the optimiser's state dict.
        ema: the state dict of the averaged weights, if there are any.
        scaler: state of the scaler of float16's gradients.
        images_per_step: in all processes together.
        training_images: how many there are.
        epoch: epochs that are complete.
        step: steps taken in the epoch that is not.
        running: sums over those steps.
        history: one record per complete epoch.
    """

    spec: ModelSpec
    config: TrainConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None
    scaler: dict[str, Any]
    images_per_step: int
    training_images: int
    epoch: int
    step: int
    running: dict[str, float]
    history: list[dict[str, float]]


def state_path(folder: Path, total_steps: int, sharded: bool = False) -> Path:
    """Where the state after so many steps is kept: a file, or a folder if its tensors are shared out over processes."""
    return folder / f"step-{total_steps:08d}{'' if sharded else '.pt'}"


def save_state(path: Path, state: TrainState) -> None:
    """Write a training state and remove the oldest beside it, beyond ``keep_checkpoints``.

    Raises:
        OSError: if it cannot be written; earlier states are then intact.
    """
    write_content(path, state)
    remove_old_states(path.parent, state.config.keep_checkpoints)


def write_content(path: Path, state: TrainState, shards: dict[str, int] | None = None) -> None:
    """Write a state as one file.

    Args:
        path: the file.
        state: what is in it.
        shards: name and size in bytes of the files beside it that hold its other tensors.

    Raises:
        OSError: if it cannot be written.
    """
    content = {
        "format": _FORMAT,
        "spec": state.spec.to_json(),
        "config": json.dumps(state.config.to_dict()),
        "shards": shards or {},
        **{name: getattr(state, name) for name in _PLAIN_PARTS},
    }
    write_atomically(path, lambda file: torch.save(content, file))


def save_best(path: Path) -> None:
    """Keep a state as the best so far, until a better one comes.

    Raises:
        OSError: if it cannot be written; the best before is then intact.
    """
    if path.is_dir():
        replace_folder(path.with_name(BEST_NAME), lambda place: _copy_files(path, place))
        return
    with open(path, "rb") as state:
        write_atomically(path.with_name(f"{BEST_NAME}.pt"), lambda file: shutil.copyfileobj(state, file))


def _copy_files(source: Path, target: Path) -> None:
    """Copy a folder of files that are never changed: as further names of the same files, where the disk has such."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            with open(file, "rb") as content, open(target / file.name, "wb") as copy:
                shutil.copyfileobj(content, copy)
                copy.flush()
                os.fsync(copy.fileno())


def saved_states(folder: Path) -> list[Path]:
    """The training states in a folder, the newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: path.stem, reverse=True)


def remove_old_states(folder: Path, keep: int) -> None:
    """Remove all but the newest states."""
    for old in saved_states(folder)[keep:]:
        remove(old)


def remove_states(folder: Path) -> None:
    """Remove all states, the best among them."""
    for path in [*saved_states(folder), *folder.glob(BEST_NAME), *folder.glob(f"{BEST_NAME}.pt")]:
        remove(path)


def load_state(path: Path) -> TrainState:
    """Read a training state; of one whose tensors are shared out, all but those, which are None.

    Raises:
        CheckpointError: if it is missing, damaged, incomplete or something else.
    """
    file = path / STATE_FILE if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except PermissionError as error:
        raise CheckpointError(f"{file}: no permission to read it") from error
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        raise CheckpointError(f"{file}: not a checkpoint, or damaged or incomplete") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{file}: not a checkpoint of equiflop train")
    try:
        for name, size in content.get("shards", {}).items():
            shard = file.with_name(name)
            if not shard.is_file() or shard.stat().st_size != size:
                raise CheckpointError(f"{shard}: missing or incomplete; it should have {size:,} bytes")
        return TrainState(
            spec=ModelSpec.from_json(content["spec"]),
            config=TrainConfig.from_dict(json.loads(content["config"])),
            **{name: kind(content[name]) for name, kind in _PLAIN_PARTS.items()},
        )
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: a checkpoint with a part missing or damaged ({error})") from error
