"""States of training whose tensors are shared out over processes (FSDP2), on disk.

Such a state is a folder: ``state.pt`` with all that every process knows, and one safetensors file of every process,
written and read by torch.distributed.checkpoint. Neither can hold code. Any number of processes can read it.
"""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from equiflop.files import failures_named, hidden, put_in_place, remove
from equiflop.runtime.processes import Processes
from equiflop.training.errors import CheckpointError
from equiflop.training.state import STATE_FILE, TrainState, remove_old_states, write_content

_LIBRARY = "torch.distributed.checkpoint"


def save_sharded_state(path: Path, state: TrainState, keep: int, processes: Processes) -> None:
    """Write a training state, every process its own share, and remove the oldest beside it, beyond ``keep``.

    Raises:
        OSError: if one process cannot write, or not where the first one sees it; earlier states are then intact.
    """
    tensors, rest = _take_apart(state)
    folder = Path(processes.broadcast(str(hidden(path))))
    if processes.first:
        remove(folder)
    processes.wait_for_first()
    problem: OSError | None = None
    try:
        with failures_named(path), _plain_failures():
            writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
        written = set(processes.gathered([file.name for file in folder.iterdir()]))
        if processes.first:
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            if written - sizes.keys():
                raise OSError(errno.EXDEV, "all processes must write to one disk, which they do not share", str(path))
            write_content(folder / STATE_FILE, rest, sizes)
            with failures_named(path):
                put_in_place(path)
                remove_old_states(path.parent, keep)
    except OSError as error:
        problem = error
    if processes.all_reduce_max(int(problem is not None)):
        if processes.first:
            remove(folder)
        raise problem or OSError(f"{path}: another process cannot write its share; what was there before is intact")


def load_shards(path: Path, state: TrainState, model: nn.Module, ema: nn.Module | None, optimizer: Any) -> TrainState:
    """Fill in the shares of this process; all processes must call it.

    Args:
        path: the state's folder.
        state: what :func:`equiflop.training.state.load_state` read there.
        model: a network with the names, shapes and sharding wanted.
        ema: likewise for the averaged weights.
        optimizer: of the network.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        slots = {
            number: {
                name: torch.zeros_like(parameters[number]) if value is None else value for name, value in values.items()
            }
            for number, values in state.optimizer["state"].items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the state of the optimiser does not fit ({error})") from error
    filled = replace(
        state,
        model=_fill(path, state.model, model.state_dict()),
        ema=None if ema is None or state.ema is None else _fill(path, state.ema, ema.state_dict()),
        optimizer={**state.optimizer, "state": slots},
    )
    tensors, _ = _take_apart(filled)
    _read(path, tensors)
    return filled


def load_whole(path: Path, part: str, state: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    """The whole tensors of one part of a state, read by one process alone.

    Args:
        path: the state's folder.
        part: "model" or "ema".
        state: the part as :func:`equiflop.training.state.load_state` read it.
        own: a state dict with the names and shapes wanted.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    filled = _fill(path, state, own)
    _read(path, {f"{part}.{name}": filled[name] for name, value in state.items() if value is None}, alone=True)
    return filled


def _fill(path: Path, state: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    try:
        return {name: torch.zeros_like(own[name]) if value is None else value for name, value in state.items()}
    except KeyError as error:
        raise CheckpointError(f"{path}: weights of another model: unexpected {error}") from error


def _read(path: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    try:
        with _plain_failures():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except Exception as error:
        raise CheckpointError(f"{path}: damaged or incomplete, or of another model ({error})") from error


def _take_apart(state: TrainState) -> tuple[dict[str, Tensor], TrainState]:
    """The tensors of which every process has a share, by name, and the state with None in their place."""
    tensors: dict[str, Tensor] = {}

    def without(prefix: str, values: dict[Any, Any]) -> dict[Any, Any]:
        kept: dict[Any, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                kept[name] = without(f"{prefix}.{name}", value)
            elif isinstance(value, DTensor):
                tensors[f"{prefix}.{name}"] = value
                kept[name] = None
            else:
                kept[name] = value
        return kept

    return tensors, replace(
        state,
        model=without("model", state.model),
        ema=None if state.ema is None else without("ema", state.ema),
        optimizer=without("optimizer", state.optimizer),
    )


@contextmanager
def _plain_failures() -> Iterator[None]:
    """Let the library raise what went wrong in the first process that failed, without remarks of its own."""
    logger = logging.getLogger(_LIBRARY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error
    finally:
        logger.setLevel(level)
