"""The training loop: epochs of steps, a measurement after each, and a state on disk that goes on exactly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from equiflop.runtime.interrupt import StopRequest
from equiflop.runtime.processes import Processes
from equiflop.runtime.progress import Progress, Silence
from equiflop.training.config import RunConfig
from equiflop.training.errors import CheckpointError, TrainingInterrupted
from equiflop.training.measure import Measure, Measurement
from equiflop.training.records import EpochRecord, Sums
from equiflop.training.resume import Identity, go_on
from equiflop.training.run_folder import RunFolder
from equiflop.training.samples import DatasetSamples, Loaded, Plan, Samples
from equiflop.training.state import TrainState
from equiflop.training.step import Learner, Objective


class Trainer:
    """Trains a network on an objective and keeps its state in a folder, in one process or in several.

    An interrupted run goes on with the same bits: batches follow from the seed and the epoch's number, and before every
    batch the generators of torch, numpy and Python are seeded, such that what the objective or the network draws
    follows from (seed, epoch, step, process).

    Args:
        model: any network; all processes take the first one's weights.
        objective: ``objective(network, batch)`` gives the loss of a batch, a scalar tensor, or ``(loss, metrics)`` with
            metrics by name, each one value per sample ``(B,)`` or their mean. ``network`` is the model as a function.
        data: a map-style dataset of torch, or an object with the methods of :class:`Samples`. An epoch leaves out what
            does not fill a last step.
        config: the run.
        measure: gives numbers by name after every epoch, in every process; it is given the model in evaluation mode,
            and once more that of the averaged weights.
        best: which of these numbers tells the best epoch: the highest, or with "-" before the name the lowest; by
            default it is the training loss, the lowest.
        about: what the network is, to be kept with its weights.
        progress: the line that shows what happens.
        processes: the processes that train together; by default those that torchrun started.

    Raises:
        ValueError: if there are too few samples for a step, the device does not exist or options do not fit.
        TypeError: if the data cannot be read by number.

    >>> import tempfile, torch
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    >>> def objective(network, batch):
    ...     x, y = batch
    ...     return (network(x) - y).square().mean()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = RunConfig(out=folder, epochs=2, batch_size=16, device="cpu")
    ...     trainer = Trainer(torch.nn.Linear(3, 1), objective, data, config)
    ...     trainer.resume()  # goes on from the newest checkpoint in the folder: there is none
    ...     history = trainer.run()
    >>> [record.epoch for record in history]
    [1, 2]
    """

    #: What a sample is called in messages.
    unit = "samples"

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Samples | Dataset[Any],
        config: RunConfig,
        *,
        measure: Measure | None = None,
        best: str = "",
        about: str = "",
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.processes = processes if processes is not None else Processes.join(config.device, config.fsdp)
        self.device = self.processes.device
        shown = progress if progress is not None else Progress(type(model).__name__)
        self.progress = shown if self.processes.first else Silence()
        self.folder = RunFolder(config, self.processes)
        self.samples = data if isinstance(data, Samples) else DatasetSamples(data, config.seed, config.workers)
        self.about = about
        self.plan = Plan.of(len(self.samples), config, self.processes, self.unit)
        self.model = model
        self.learner = Learner(model, objective, config, self.processes, self.plan.steps)
        self.measurement = Measurement(measure, best)
        self.epoch, self.step = 0, 0
        self.history: list[EpochRecord] = []
        self._running = Sums()
        self._unreadable: list[str] = []
        self._stop: StopRequest | None = None
        self._saved_at = time.monotonic()

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def ema(self) -> nn.Module | None:
        """The network of the averaged weights, if there is one."""
        return None if self.learner.ema is None else self.learner.ema.module

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    def resume(self) -> Path | None:
        """Go on from the newest readable checkpoint in the run's folder.

        Returns:
            the checkpoint, or None if there is none.

        Raises:
            CheckpointError: if there are checkpoints but none is readable, or it is of another run.
        """
        path = go_on(self.folder, self._identity(), self._take, self.progress.print)
        if path is not None:
            self.folder.on_entry = [self.folder.write_config, lambda: self._keep_if_best(path)]
        return path

    def start_anew(self) -> None:
        """Let training remove what an earlier run left in the run's folder: checkpoints, weights and logs.

        That happens when the first step has succeeded, so that a mistake in the options costs nothing.
        """
        self.folder.start_anew()

    @contextlib.contextmanager
    def session(self, stop: StopRequest | None = None) -> Iterator[None]:
        """Have the run's folder alone, cleaned up, and notice signals, as long as the block lasts.

        Training and saving open one by themselves; around several of them, it keeps others out in between.

        Args:
            stop: notes signals for several trainers; by default SIGINT and SIGTERM are noted for this one.

        Raises:
            ValueError: if another process trains there.
        """
        with self.folder.alone() as entered, contextlib.ExitStack() as stack:
            if entered:
                self._stop = stop if stop is not None else stack.enter_context(StopRequest())
                stack.callback(setattr, self, "_stop", None)
            yield

    def run(self) -> list[EpochRecord]:
        """Train all epochs that are left, saving the state after each, and write the final weights.

        Raises:
            TrainingInterrupted: if SIGINT or SIGTERM asked for it; the state is then on disk.
            NonFiniteLossError: if the loss is NaN or infinite.
            ValueError: if another process trains in the folder.
            OSError: if a file cannot be written; earlier ones are then intact.
        """
        with self.session():
            while not self.finished:
                record = self.run_epoch()
                self.progress.print(self.summary(record))
                self.save()
            self.write_weights()
        return self.history

    def run_epoch(self, stop: StopRequest | None = None) -> EpochRecord:
        """Train the rest of one epoch, then measure.

        Args:
            stop: as :meth:`session` takes it.

        Raises:
            TrainingInterrupted: if a signal asked for it; the state is then on disk.
            NonFiniteLossError: if the loss is NaN or infinite.
            TypeError: if the objective gives no loss.
            ValueError: if the loss is no scalar or has no gradient; if the measurement fails, after which the state is
                saved.
        """
        with self.session(stop):
            self.learner.compile(self.progress)
            self._set_training()
            last = time.perf_counter()
            batches: list[Loaded] = []
            for batch in self.samples.batches(self._samples(), self.plan.batch_size, self.epoch):
                if not batches:
                    self._stop_if_asked()
                batches.append(batch)
                if len(batches) < self.config.accumulate:
                    continue
                self._train_step(batches)
                self.folder.step_succeeded()
                batches = []
                now = time.perf_counter()
                self._running.seconds += now - last
                last = now
                self._show_progress()
                self._save_if_due()
            self._stop_if_asked()
            return self._finish_epoch()

    def _samples(self) -> Tensor:
        """What this process still has to read in this epoch, in order."""
        return self.plan.share(self.samples.order(self.epoch), self.step, self.processes.rank)

    def _set_training(self) -> None:
        self.model.train()

    def _train_step(self, batches: list[Loaded]) -> None:
        """One step on one or more batches, whose gradients are averaged."""
        self._unreadable += [problem for batch in batches for problem in batch.problems]
        try:
            sums = self.learner.gradients(batches, self.epoch, self.step)
        except RuntimeError:  # Ctrl-C in a terminal also ends a compiler that the first step waits for
            if self.processes.count == 1 and self.learner.compiling:
                self._stop_if_asked()
            raise
        running = self._running
        if running.metrics.keys() != sums.metrics.keys() and running.samples and sums.samples:
            names = (", ".join(found.metrics) or "none" for found in (running, sums))
            raise ValueError("objective gave metrics {}, and in the next step {}".format(*names))
        running.add(sums)
        self.step += 1
        if sums.samples:
            self.learner.update(self.epoch, self.step - 1)
        else:  # none could be read: no step, and the mean loss stays
            running.loss *= self.step / max(self.step - 1, 1)

    def _finish_epoch(self) -> EpochRecord:
        running = self._running
        if running.samples == 0:
            self.folder.note_unreadable(self._unreadable)
            raise ValueError(
                f"no training {self.unit.removesuffix('s')} can be read; they are listed in {self.folder.unreadable}"
            )
        try:
            self.learner.same_buffers()
            measured = self.measure()
        except (TypeError, ValueError) as error:  # what was trained is not lost with a mistake in measuring
            note = f"that was in measuring, the state after training is saved in {self.save()}"
            raise ValueError(f"{error}; {note}") from error
        record = EpochRecord.of(self.epoch, self.learner.lr, running, self.plan.steps, measured)
        self.history.append(record)
        self.epoch, self.step, self._running = self.epoch + 1, 0, Sums()
        return record

    def measure(self) -> dict[str, float]:
        """What :class:`Measurement` tells of the network as it is, and of the averaged weights."""
        return self.processes.broadcast(self.measurement.of(self.learner.networks))

    def summary(self, record: EpochRecord) -> str:
        """One line for people."""
        return f"{self.progress.label}  {record.summary(self.config.epochs, self.unit)}"

    def save(self) -> Path:
        """Write the state of the training and the logs.

        Raises:
            NonFiniteLossError: if a weight is NaN or infinite; nothing is written then.
            ValueError: if the optimiser cannot be shared out, or another process trains in the folder.
            OSError: if it cannot be written; earlier states are then intact.
        """
        with self.session():
            path = self.folder.path_of(self.epoch * self.plan.steps + self.step)
            self.learner.check_finite(self.epoch, self.step)
            self.folder.step_succeeded()
            self.learner.same_buffers()
            self.folder.note_unreadable(self._unreadable)
            self._unreadable = []
            self._saved_at = time.monotonic()
            self.folder.save(path, self._state)
            self._keep_if_best(path)
            self.folder.write_logs(self.history, epoch_ended=self.step == 0)
        return path

    def write_weights(self) -> Path:
        """Write the final weights as ``model.safetensors``, those averaged where there are any."""
        with self.session():
            self.folder.step_succeeded()
            self.folder.write_weights(self._final_weights(), self.about)
        return self.folder.weights

    def _final_weights(self) -> dict[str, Tensor]:
        return self.learner.final_weights()

    def remove_checkpoints(self) -> None:
        """Remove the training states in the run's folder, the best among them.

        Raises:
            ValueError: if another process trains there.
        """
        with self.session():
            self.folder.clear_states()

    def _state(self) -> TrainState:
        return TrainState(
            **self._identity().parts(),
            epoch=self.epoch,
            step=self.step,
            running=self._running.to_dict(),
            history=[record.to_dict() for record in self.history],
            **self.learner.state(),
        )

    def _identity(self) -> Identity:
        return Identity(self.config, self.about, len(self.samples), self.plan.samples_per_step, self.unit)

    def _take(self, state: TrainState, path: Path) -> None:
        self.learner.load(state, path)
        try:
            self.history = [EpochRecord.from_dict(record) for record in state.history]
            self._running = Sums(**state.running)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: what it notes of its epochs is damaged ({error})") from error
        self.epoch, self.step = state.epoch, state.step

    def _keep_if_best(self, path: Path) -> None:
        if not self.step and self.measurement.is_best(self.history):
            self.folder.keep_as_best(path)

    def _save_if_due(self) -> None:
        """The clock of the first process decides for all; the end of an epoch is saved anyhow."""
        minutes = self.config.save_minutes
        due = minutes > 0 and self.processes.first and time.monotonic() - self._saved_at >= 60 * minutes
        if self.processes.all_reduce_max(int(due)) and self.step < self.plan.steps:
            self.save()

    def _stop_if_asked(self) -> None:
        """All processes stop together, wherever the signal came."""
        own = self._stop.requested() if self._stop is not None else None
        signal_number = self.processes.all_reduce_max(int(own or 0))
        if signal_number:
            self.progress.clear()
            raise TrainingInterrupted(self.save(), self.epoch, self.step, signal_number)

    def _show_progress(self) -> None:
        size, running = self.plan.steps * self.plan.batch_size, self._running
        self.progress.update(
            self.epoch * size + self.step * self.plan.batch_size,
            self.config.epochs * size,
            f"epoch {self.epoch + 1}/{self.config.epochs}  loss {running.loss / self.step:.3f}  "
            f"{running.samples / max(running.seconds, 1e-9):,.0f} {self.unit}/s",
        )
