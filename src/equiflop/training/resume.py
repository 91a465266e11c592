"""Going on from a state: the newest that can be read, if it is one of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equiflop.training.config import RunConfig
from equiflop.training.run_folder import RunFolder
from equiflop.training.state import CheckpointError, TrainState, load_state


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on.

    Attributes:
        config: of the run; some of its fields are free.
        about: what the network is.
        samples: how many there are to train on.
        samples_per_step: in all processes together.
        unit: what a sample is called.
    """

    config: RunConfig
    about: str
    samples: int
    samples_per_step: int
    unit: str

    def parts(self) -> dict[str, Any]:
        """As a state keeps them."""
        return {
            "config": self.config.to_dict(),
            "about": self.about,
            "samples": self.samples,
            "samples_per_step": self.samples_per_step,
        }

    def check(self, state: TrainState, path: Path) -> None:
        """See that a state is of this run.

        Raises:
            CheckpointError: if not; it says in what they differ.
        """
        try:
            theirs = self.config.from_dict(state.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is of another kind of run ({error})") from error
        differences = self.config.differences(theirs)
        if differences:
            name = differences[0]
            raise CheckpointError(
                f"{path}: is of another run: {name}={getattr(theirs, name)!r} there, "
                f"{name}={getattr(self.config, name)!r} here; take another --out, or --resume never to start anew"
            )
        if state.samples_per_step != self.samples_per_step:
            raise CheckpointError(
                f"{path}: made {state.samples_per_step} {self.unit} a step, here it would be {self.samples_per_step} "
                "(processes times batch_size times accumulate); choose them so that it is equal"
            )
        if state.samples != self.samples:
            raise CheckpointError(
                f"{path}: is of other data ({state.samples:,} training {self.unit} there, {self.samples:,} here); "
                "take another folder"
            )
        if state.about != self.about:
            raise CheckpointError(
                f"{path}: is of another network, or of one with other classes, another input or another teacher; "
                "take another folder"
            )


def go_on(
    folder: RunFolder,
    identity: Identity,
    take: Callable[[TrainState, Path], None],
    say: Callable[[str], object],
) -> Path | None:
    """Take the newest readable state in a run's folder, the same one in all processes.

    Args:
        folder: the run's.
        identity: of the run.
        take: takes a state that was read; a CheckpointError means that it cannot be used.
        say: tells what cannot be read.

    Returns:
        the state, or None if there is none.

    Raises:
        CheckpointError: if there are states but none can be used, or it is of another run.
    """
    problems: list[str] = []
    for path in folder.states():
        problem = ""
        state: TrainState | None = None
        try:
            state = load_state(path)
        except CheckpointError as error:
            problem = str(error)
        all_read = not folder.processes.all_reduce_max(int(state is None))
        if state is not None and all_read:
            identity.check(state, path)
            try:
                take(state, path)
            except CheckpointError as error:
                problem = str(error)
        if not folder.processes.all_reduce_max(int(bool(problem) or not all_read)):
            return path
        problems.append(problem or f"{path}: cannot be read by another process")
        say(f"{problems[-1]}; trying the one before")
    if problems:
        raise CheckpointError(problems[0])
    return None
