"""A run's folder: one process has it for itself, and what is written there is written whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from equiflop.files import remove_leftovers, sole_user, write_atomically, write_text
from equiflop.models.pretrained import METADATA_KEY, WEIGHTS_FILE
from equiflop.runtime.processes import Processes
from equiflop.training.config import RunConfig
from equiflop.training.records import (
    LOG_FILES,
    UNREADABLE_FILE,
    EpochRecord,
    add_lines,
    check_tensorboard,
    write_logs,
    write_tensorboard,
)
from equiflop.training.sharded_state import save_sharded_state
from equiflop.training.state import (
    BEST_NAME,
    CHECKPOINT_FOLDER,
    TrainState,
    remove_states,
    save_best,
    save_state,
    saved_states,
    state_path,
)


class RunFolder:
    """Where a run keeps its states, its best state, its logs and its weights; the first process alone writes there.

    Args:
        config: the run.
        processes: those that train together.

    Attributes:
        on_entry: what is done once, when this run first has the folder for itself.

    Raises:
        ValueError: if TensorBoard is wanted and its package is missing.
    """

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        if config.tensorboard:
            check_tensorboard()
        self.path = Path(config.out)
        self.config = config
        self.processes = processes
        self.on_entry: list[Callable[[], object]] = [self.write_config]
        self._on_first_step: list[Callable[[], object]] = []
        self._open = False

    @property
    def checkpoints(self) -> Path:
        """The folder of the states."""
        return self.path / CHECKPOINT_FOLDER

    @property
    def weights(self) -> Path:
        """The file of the final weights."""
        return self.path / WEIGHTS_FILE

    @property
    def best(self) -> Path:
        """Where the state after the best epoch is kept."""
        return self.checkpoints / f"{BEST_NAME}{'' if self.config.fsdp else '.pt'}"

    @property
    def unreadable(self) -> Path:
        """The list of samples that could not be read."""
        return self.path / UNREADABLE_FILE

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep other runs out, and remove what killed ones left half-written; within such a block it changes nothing.

        Yields:
            whether the folder was free until now, and not taken by a block around this one.

        Raises:
            ValueError: if another process trains there.
            OSError: if the folder cannot be made.
        """
        if self._open:
            yield False
            return
        with sole_user(self.path) if self.processes.first else contextlib.nullcontext():
            if self.processes.first:
                remove_leftovers(self.path)
                remove_leftovers(self.checkpoints)
            self._open = True
            try:
                _do_all(self.on_entry)
                yield True
            finally:
                self._open = False

    def start_anew(self) -> None:
        """Let :meth:`step_succeeded` remove what an earlier run left, before anything is written."""
        self.on_entry.remove(self.write_config)
        self._on_first_step = [self.clear, self.write_config]

    def step_succeeded(self) -> None:
        """Do what waits for the first step; all processes must call it."""
        _do_all(self._on_first_step)

    def states(self) -> list[Path]:
        """The states as the first process sees them, the newest first; all processes must call it."""
        return list(self.processes.broadcast(saved_states(self.checkpoints)))

    def path_of(self, total_steps: int) -> Path:
        """Where the state after so many steps is kept."""
        return state_path(self.checkpoints, total_steps, self.config.fsdp)

    def save(self, path: Path, make: Callable[[], TrainState]) -> None:
        """Write a state; all processes must call it.

        Args:
            path: where.
            make: gives the state; called where something is written.

        Raises:
            OSError: if it cannot be written; earlier states are then intact.
        """
        if self.config.fsdp:
            save_sharded_state(path, make(), self.config.keep_checkpoints, self.processes)
        elif self.processes.first:
            save_state(path, make(), self.config.keep_checkpoints)

    def keep_as_best(self, path: Path) -> None:
        """Keep a state that is there as the best."""
        if self.processes.first:
            save_best(path)

    def clear(self) -> None:
        """Remove what an earlier run left: states, weights and logs."""
        self.clear_states()
        if self.processes.first:
            for name in (WEIGHTS_FILE, UNREADABLE_FILE, *LOG_FILES):
                (self.path / name).unlink(missing_ok=True)
        self.processes.wait_for_first()

    def clear_states(self) -> None:
        """Remove all states, the best among them."""
        if self.processes.first:
            remove_states(self.checkpoints)
        self.processes.wait_for_first()

    def write_config(self) -> None:
        """Write the configuration as ``config.json``."""
        if self.processes.first:
            write_text(self.path / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def write_logs(self, history: Sequence[EpochRecord], epoch_ended: bool) -> None:
        """Write ``log.csv`` and ``log.jsonl``, and at an epoch's end the log for TensorBoard if there is one."""
        if self.processes.first:
            write_logs(self.path, history)
            if self.config.tensorboard and epoch_ended and history:
                write_tensorboard(self.path, history[-1])

    def note_unreadable(self, lines: list[str]) -> None:
        """Add what could not be read, in any process, to the list; all processes must call it."""
        found = self.processes.gathered(lines)
        if found and self.processes.first:
            add_lines(self.unreadable, found)

    def write_weights(self, weights: Mapping[str, Tensor], about: str) -> None:
        """Write the final weights as ``model.safetensors``.

        Args:
            weights: whole, in the first process.
            about: what the network is, see :class:`equiflop.training.state.TrainState`.
        """
        if self.processes.first:
            write_tensors(self.weights, weights, about, self.config)


def _do_all(waiting: list[Callable[[], object]]) -> None:
    """Do what waits in a list, each once."""
    while waiting:
        waiting[0]()
        waiting.pop(0)


def write_tensors(path: Path, weights: Mapping[str, Tensor], about: str, config: RunConfig | None) -> None:
    """Write a network's weights as a safetensors file that says what they are.

    Args:
        path: the file.
        weights: the network's state dict.
        about: what the network is.
        config: how it was trained.

    Raises:
        OSError: if it cannot be written; what was there before is then intact.
    """
    state: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        state[key] = tensor.clone() if place in places else tensor  # of weights that two layers share
        places.add(place)
    note = {"spec": about, "config": config.to_dict() if config is not None else None}
    content = safetensors.torch.save(state, metadata={METADATA_KEY: json.dumps(note)})
    write_atomically(path, lambda file: file.write(content))
