"""The training loop."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from equiflop.data import Augmentation, ImageData, open_data
from equiflop.data.randomness import derive_seed, epoch_order
from equiflop.training.checkpoint import (
    CHECKPOINT_FOLDER,
    WEIGHTS_FILE,
    CheckpointError,
    TrainState,
    load_state,
    load_weights,
    save_state,
    save_weights,
    saved_states,
    write_atomically,
)
from equiflop.training.config import TrainConfig
from equiflop.training.device import compile_problem, pick_device
from equiflop.training.evaluation import evaluate
from equiflop.training.interrupt import StopRequest
from equiflop.training.model_spec import ModelSpec, check_model_name, input_keywords
from equiflop.training.progress import Progress

_INITIALISATION = 0x1217  # what seeds the initial weights, apart from the seed itself
_WARMUP_START = 1e-6


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


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its last step.
        train_loss: mean over its steps, label smoothing included.
        train_accuracy: share of training images classified rightly as they came by.
        test_accuracy: share of test images classified rightly after it.
        test_top5: share of test images whose class is among the best five.
        seconds: training time, measuring not included.
        images_per_second: training images per second.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    test_top5: float
    seconds: float
    images_per_second: float

    def summary(self, epochs: int) -> str:
        """One line for people; ``epochs`` is how many there will be."""
        return (
            f"epoch {self.epoch}/{epochs}  loss {self.train_loss:.3f}  train {100 * self.train_accuracy:.2f} %  "
            f"test {100 * self.test_accuracy:.2f} %  {self.images_per_second:,.0f} images/s"
        )


@dataclass
class _Running:
    """Sums over the steps of the epoch under way."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains one network on one data set and keeps its state in a folder.

    Args:
        config: the run.
        data: the data, if it is open already.
        progress: the line that shows what happens.

    Raises:
        ValueError: if the model, the data or the device does not exist or they do not fit.
        TypeError: if the model does not take a keyword.
    """

    def __init__(self, config: TrainConfig, data: ImageData | None = None, progress: Progress | None = None) -> None:
        self.config = config
        self.progress = progress if progress is not None else Progress(config.model)
        self.out = Path(config.out)
        self.device = pick_device(config.device)
        check_model_name(config.model)
        self.data = data if data is not None else open_data(config.data, config.image_size, config.channels)
        self.spec = _spec_for(config, self.data)
        torch.manual_seed(derive_seed(config.seed, _INITIALISATION))
        self.model: nn.Module = self.spec.build().to(self.device)
        self.optimizer = create_optimizer_v2(
            self.model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
        )
        self.batch_size = min(config.batch_size, len(self.data.train))
        self.steps_per_epoch = len(self.data.train) // self.batch_size
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=_WARMUP_START,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.epoch = 0
        self.step = 0
        self.history: list[EpochRecord] = []
        self._running = _Running()
        self._compiled = False

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
        problems = []
        for path in saved_states(self.out / CHECKPOINT_FOLDER):
            try:
                state = load_state(path)
            except CheckpointError as error:
                problems.append(str(error))
                self.progress.print(f"{error}; trying the one before")
                continue
            self._take(state, path)
            return path
        if problems:
            raise CheckpointError(problems[0])
        return None

    def start_anew(self) -> None:
        """Remove the checkpoints of an earlier run from the run's folder."""
        for path in saved_states(self.out / CHECKPOINT_FOLDER):
            path.unlink()

    def run(self) -> list[EpochRecord]:
        """Train all epochs that are left, saving the state after each, and write the final weights.

        Raises:
            TrainingInterrupted: if SIGINT or SIGTERM asked for it; the state is then on disk.
            NonFiniteLossError: if the loss is NaN or infinite.
            OSError: if a file cannot be written; earlier ones are then intact.
        """
        self.write_config()
        with StopRequest() as stop:
            while not self.finished:
                record = self.run_epoch(stop)
                self.progress.print(record.summary(self.config.epochs))
                self.save()
        self.write_weights()
        return self.history

    def run_epoch(self, stop: StopRequest | None = None) -> EpochRecord:
        """Train the rest of one epoch, then measure on the test images.

        Raises:
            TrainingInterrupted: if ``stop`` holds a request; the state is then on disk.
            NonFiniteLossError: if the loss is NaN or infinite.
        """
        self._compile_once()
        self.model.train()
        order = epoch_order(self.config.seed, self.epoch, len(self.data.train))
        samples = order[self.step * self.batch_size : self.steps_per_epoch * self.batch_size]
        augmentation = Augmentation(
            self.config.mirror, self.config.shift, self.config.crop_scale, self.config.seed, self.epoch
        )
        last = time.perf_counter()
        for images, labels in self.data.train.batches(samples, self.batch_size, augmentation, self.config.workers):
            self._stop_if_asked(stop)
            try:
                self._train_step(images, labels)
            except RuntimeError:  # Ctrl-C in a terminal also ends a compiler that the first step waits for
                self._stop_if_asked(stop)
                raise
            now = time.perf_counter()
            self._running.seconds += now - last
            last = now
            self._show_progress()
        self._stop_if_asked(stop)
        return self._finish_epoch()

    def save(self) -> Path:
        """Write the state of the training and the log.

        Raises:
            OSError: if it cannot be written; earlier states are then intact.
        """
        state = TrainState(
            spec=self.spec,
            config=self.config,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            epoch=self.epoch,
            step=self.step,
            running=asdict(self._running),
            history=[asdict(record) for record in self.history],
        )
        total_steps = self.epoch * self.steps_per_epoch + self.step
        path = save_state(self.out / CHECKPOINT_FOLDER, state, total_steps)
        self._write_log()
        return path

    def write_config(self) -> None:
        """Write the configuration as ``config.json``."""
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write_atomically(self.out / "config.json", lambda file: file.write(text.encode()))

    def write_weights(self) -> Path:
        """Write the final weights as ``model.safetensors``."""
        path = self.out / WEIGHTS_FILE
        save_weights(path, self.model, self.spec, self.config)
        return path

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        update = self.epoch * self.steps_per_epoch + self.step
        self.scheduler.step_update(update)
        torch.manual_seed(derive_seed(self.config.seed, self.epoch, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp):
            logits = self.model(images)
        loss = self.criterion(logits.float(), labels)
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} in epoch {self.epoch + 1}, step {self.step + 1} (learning rate {self.lr:.2e}); "
                "try a lower lr, more warm-up or a smaller clip_grad"
            )
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self._running.loss += value
        self._running.correct += int((logits.detach().argmax(dim=1) == labels).sum())
        self._running.images += len(labels)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def _finish_epoch(self) -> EpochRecord:
        running = self._running
        measured = evaluate(
            self.model,
            self.data.test,
            max(self.batch_size, 250),
            self.device,
            mirrored=False,
            workers=self.config.workers,
            progress=self.progress,
        )
        record = EpochRecord(
            epoch=self.epoch + 1,
            lr=self.lr,
            train_loss=running.loss / self.steps_per_epoch,
            train_accuracy=running.correct / running.images,
            test_accuracy=measured.top1,
            test_top5=measured.top5,
            seconds=running.seconds,
            images_per_second=running.images / max(running.seconds, 1e-9),
        )
        self.history.append(record)
        self.epoch, self.step, self._running = self.epoch + 1, 0, _Running()
        return record

    def _stop_if_asked(self, stop: StopRequest | None) -> None:
        signal_number = stop.requested() if stop is not None else None
        if signal_number is not None:
            self.progress.clear()
            raise TrainingInterrupted(self.save(), self.epoch, self.step, signal_number)

    def _take(self, state: TrainState, path: Path) -> None:
        differences = self.config.differences(state.config)
        if differences:
            name = differences[0]
            raise CheckpointError(
                f"{path}: is of another run: {name}={getattr(state.config, name)!r} there, "
                f"{name}={getattr(self.config, name)!r} here; take another folder or start anew"
            )
        load_weights(self.model, state.model, path)
        try:
            self.optimizer.load_state_dict(state.optimizer)
            self.history = [EpochRecord(**record) for record in state.history]  # type: ignore[arg-type]
            self._running = _Running(**state.running)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the state of the optimiser does not fit ({error})") from error
        self.epoch, self.step = state.epoch, state.step

    def _compile_once(self) -> None:
        if not self.config.compile or self._compiled:
            return
        problem = compile_problem(self.device)
        if problem is None:
            self.progress.note("compiling, which takes up to a minute")
            self.model.compile(dynamic=False)
        else:
            self.progress.print(f"torch.compile does not work here ({problem}); going on without it")
        self._compiled = True

    def _show_progress(self) -> None:
        size = self.steps_per_epoch * self.batch_size
        done = self.epoch * size + self.step * self.batch_size
        running = self._running
        self.progress.update(
            done,
            self.config.epochs * size,
            f"epoch {self.epoch + 1}/{self.config.epochs}  loss {running.loss / self.step:.3f}  "
            f"{running.images / max(running.seconds, 1e-9):,.0f} images/s",
        )

    def _write_log(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(EpochRecord.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.history)
        write_atomically(self.out / "log.csv", lambda file: file.write(text.getvalue().encode()))


def _spec_for(config: TrainConfig, data: ImageData) -> ModelSpec:
    keywords = input_keywords(config.model, data.preprocessing.input_size)
    if config.drop_path:
        keywords["drop_path_rate"] = config.drop_path
    return ModelSpec(config.model, {**keywords, **config.model_kwargs}, data.classes, data.preprocessing)
