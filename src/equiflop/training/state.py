"""States of training: where a run stands, kept in its folder and read without running code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.files import remove, replace_folder, write_atomically
from equiflop.runtime.sharding import own_share
from equiflop.training.errors import CheckpointError

#: Name of the folder of training states in a run's folder.
CHECKPOINT_FOLDER = "checkpoints"
#: Name of the best training state in that folder, without ".pt".
BEST_NAME = "best"
#: In the folder of a state whose tensors are shared out: the file with all the rest.
STATE_FILE = "state.pt"
_FORMAT = "equiflop-checkpoint-3"

#: Parts of a training state that are kept as they are, and what they must be.
_PLAIN_PARTS: dict[str, Callable[[Any], Any]] = {
    "about": str,
    "model": dict,
    "optimizer": dict,
    "ema": lambda value: None if value is None else dict(value),
    "scaler": dict,
    "samples_per_step": int,
    "samples": int,
    "epoch": int,
    "step": int,
    "running": dict,
    "history": list,
}


@dataclass(frozen=True)
class TrainState:
    """Where a training run stands. Random numbers are a function of seed, epoch and step, so none are in here.

    Attributes:
        about: what the network is, as its maker describes it; of a classifier the JSON text of its ModelSpec.
        config: the run's configuration, as JSON holds it.
        model: the network's state dict.
        optimizer: the optimiser's state dict.
        ema: the state dict of the averaged weights, if there are any.
        scaler: state of the scaler of float16's gradients.
        samples_per_step: in all processes together.
        samples: how many there are to train on.
        epoch: epochs that are complete.
        step: steps taken in the epoch that is not.
        running: sums over those steps.
        history: one record per complete epoch.
    """

    about: str
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None
    scaler: dict[str, Any]
    samples_per_step: int
    samples: int
    epoch: int
    step: int
    running: dict[str, Any]
    history: list[dict[str, Any]]


def state_path(folder: Path, total_steps: int, sharded: bool = False) -> Path:
    """Where the state after so many steps is kept: a file, or a folder if its tensors are shared out over processes."""
    return folder / f"step-{total_steps:08d}{'' if sharded else '.pt'}"


def save_state(path: Path, state: TrainState, keep: int) -> None:
    """Write a training state and remove the oldest beside it, beyond ``keep``.

    Raises:
        OSError: if it cannot be written; earlier states are then intact.
    """
    write_content(path, state)
    remove_old_states(path.parent, keep)


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
        "config": json.dumps(state.config),
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
        raise CheckpointError(f"{file}: not a checkpoint of equiflop train (of this version)")
    try:
        for name, size in content.get("shards", {}).items():
            shard = file.with_name(name)
            if not shard.is_file() or shard.stat().st_size != size:
                raise CheckpointError(f"{shard}: missing or incomplete; it should have {size:,} bytes")
        return TrainState(
            config=dict(json.loads(content["config"])),
            **{name: kind(content[name]) for name, kind in _PLAIN_PARTS.items()},
        )
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: a checkpoint with a part missing or damaged ({error})") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: Path | str) -> None:
    """Load a state dict strictly.

    Args:
        model: the network.
        state: its weights.
        origin: where they come from, for messages.

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
        if value.is_floating_point() and not bool(torch.isfinite(own_share(value)).all()):
            raise CheckpointError(f"{origin}: {key} holds NaN or infinite numbers")
    model.load_state_dict(dict(state))
