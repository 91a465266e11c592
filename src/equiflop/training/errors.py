"""What stops a training."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A file of weights cannot be used."""


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


class TrainingInterrupted(Exception):  # noqa: N818 (not an error)
    """A signal asked the training to stop, and its state is on disk.

    Attributes:
        checkpoint: where.
        signal_number: which signal it was.
    """

    def __init__(self, checkpoint: Path, epoch: int, step: int, signal_number: int) -> None:
        super().__init__(f"stopped in epoch {epoch + 1} after step {step}; state saved in {checkpoint}")
        self.checkpoint = checkpoint
        self.signal_number = signal_number
