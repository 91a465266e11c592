"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equiflop.data import Augmentation, Batch, ImageData, open_data
from equiflop.data.randomness import derive_seed, epoch_order
from equiflop.files import remove_leftovers, sole_user, write_text
from equiflop.training.checkpoint import WEIGHTS_FILE, load_weights, save_weights
from equiflop.training.config import TrainConfig
from equiflop.training.device import compile_problem
from equiflop.training.evaluation import Evaluation, evaluate
from equiflop.training.interrupt import StopRequest
from equiflop.training.model_spec import ModelSpec, check_model_name, check_takes, input_keywords
from equiflop.training.objective import Objective
from equiflop.training.preparation import classifier_of, set_drop_path, start_from
from equiflop.training.processes import Processes
from equiflop.training.progress import Progress, Silence
from equiflop.training.records import (
    LOG_FILES,
    UNREADABLE_FILE,
    EpochRecord,
    add_lines,
    check_tensorboard,
    write_logs,
    write_tensorboard,
)
from equiflop.training.sharding import check_optimizer, gathered, load_shards, save_sharded_state, shard, units
from equiflop.training.state import (
    BEST_NAME,
    CHECKPOINT_FOLDER,
    CheckpointError,
    TrainState,
    load_state,
    remove_states,
    save_best,
    save_state,
    saved_states,
    state_path,
)

_INITIALISATION = 0x1217  # what seeds the initial weights, apart from the seed itself
_MIXING = 0x313  # likewise what seeds Mixup and CutMix
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@dataclass
class _Running:
    """Sums over the steps of the epoch under way."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    unreadable: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains one network on one data set and keeps its state in a folder, in one process or in several.

    Args:
        config: the run.
        data: the data, if it is open already.
        progress: the line that shows what happens.
        processes: the processes that train together; by default those that torchrun started.

    Raises:
        ValueError: if the model, the data or the device does not exist or they do not fit.
        TypeError: if the model does not take a keyword.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | None = None,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        if config.tensorboard:
            check_tensorboard()
        self.processes = processes if processes is not None else Processes.join(config.device)
        if config.fsdp and self.processes.count == 1:
            raise ValueError("fsdp: there is only one process to share out to; start several with torchrun")
        self.device = self.processes.device
        talks = self.processes.first
        self.progress = (progress if progress is not None else Progress(config.model)) if talks else Silence()
        self.out = Path(config.out)
        check_model_name(config.model)
        self.data = data if data is not None else self._open_data()
        self.spec = _spec_for(config, self.data)
        torch.manual_seed(derive_seed(config.seed, _INITIALISATION))
        self.data.train.check(self._augmentation(epoch=0))
        self._start_problem: Exception | None = None
        self.model: nn.Module = self._build()
        check_takes(self.model, config.model, self.data.preprocessing.input_size)
        if not config.fsdp:
            self.model.to(self.device)
        self.ema: ModelEmaV3 | None = None
        if config.ema_decay:  # one by one if sharded, as running statistics are not
            self.ema = ModelEmaV3(self.model, decay=config.ema_decay, foreach=not config.fsdp)
        self.objective = Objective(config, self.data.classes, self.data.preprocessing).to(self.device)
        if config.fsdp:
            for network in self._networks():
                shard(network, self.processes)
        self.network = self.processes.wrap(self.model)
        self.optimizer = create_optimizer_v2(
            self.model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.batch_size, self.steps_per_epoch = self._batches()
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine" if config.schedule == "cosine" else "step",
            decay_epochs=config.epochs + 1,  # of "step", which thus stays where it is
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.epoch = 0
        self.step = 0
        self.history: list[EpochRecord] = []
        self._running = _Running()
        self._unreadable: list[str] = []
        self._compiled = self._stepped = self._starts_anew = False
        self._resumed_from: Path | None = None
        self._saved_at = time.monotonic()

    def _open_data(self) -> ImageData:
        """The first process goes first: it may have to download."""
        if not self.processes.first:
            self.processes.wait_for_first()
        data = open_data(self.config.data, self.config.image_size, self.config.channels)
        if self.processes.first:
            self.processes.wait_for_first()
        return data

    def _networks(self) -> list[nn.Module]:
        """The network and, if there is one, that of the averaged weights."""
        return [self.model] if self.ema is None else [self.model, self.ema.module]

    def _build(self) -> nn.Module:
        config = self.config
        model = self.spec.build()
        if config.start_from:
            try:
                start_from(model, config.start_from, self.data.preprocessing.input_size)
            except (OSError, ValueError) as error:  # a run that goes on does not need it
                if not saved_states(self.out / CHECKPOINT_FOLDER):
                    raise
                self._start_problem = error
        if config.drop_path and config.drop_path_schedule == "constant":
            set_drop_path(model, config.drop_path)
        if config.grad_checkpointing:
            set_grad_checkpointing = getattr(model, "set_grad_checkpointing", None)
            if set_grad_checkpointing is None:
                raise ValueError(f"grad_checkpointing: model {config.model!r} has none")
            set_grad_checkpointing()
        if config.freeze_backbone:
            model.requires_grad_(False)
            classifier = classifier_of(model)
            if classifier is None or not list(classifier.parameters()):
                raise ValueError(f"freeze_backbone: model {config.model!r} has no classifier to train")
            classifier.requires_grad_(True)
        return model

    def _batches(self) -> tuple[int, int]:
        """Images a batch and steps an epoch."""
        shares = self.processes.count * self.config.accumulate
        size = min(self.config.batch_size, len(self.data.train) // shares)
        if self.config.mixes:
            size -= size % 2
        if size == 0:
            raise ValueError(
                f"{len(self.data.train)} training images are too few for {self.processes.count} processes times "
                f"accumulate={self.config.accumulate}" + (" and pairs of images" if self.config.mixes else "")
            )
        return size, len(self.data.train) // (size * shares)

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
        problems: list[str] = []
        for path in self.processes.broadcast(saved_states(self.out / CHECKPOINT_FOLDER)):
            state, problem = self._read(path)
            failed = self.processes.all_reduce_max(int(state is None))  # all processes take the same one
            if state is not None and not failed:
                self._check_same_run(state, path)
                try:
                    self._take(state, path)
                except CheckpointError as error:
                    problem = str(error)
                    state = None
                failed = self.processes.all_reduce_max(int(state is None))
            if not failed:
                self._resumed_from = path
                self._start_problem = None
                return path
            problems.append(problem)
            self.progress.print(f"{problem}; trying the one before")
        if problems:
            raise CheckpointError(problems[0])
        return None

    def _read(self, path: Path) -> tuple[TrainState | None, str]:
        """A state, or None and why it cannot be read."""
        try:
            return load_state(path), f"{path}: cannot be read by another process"
        except CheckpointError as error:
            return None, str(error)

    def start_anew(self) -> None:
        """Let :meth:`run` remove what an earlier run left in the run's folder: checkpoints, weights and logs.

        That happens when the first step has succeeded, so that a mistake in the options costs nothing.
        """
        self._starts_anew = True

    def remove_checkpoints(self) -> None:
        """Remove the training states in the run's folder, the best among them.

        Raises:
            ValueError: if another process trains there.
        """
        if self.processes.first:
            with sole_user(self.out):
                remove_states(self.out / CHECKPOINT_FOLDER)
        self.processes.wait_for_first()

    def _remove_earlier_run(self) -> None:
        if not self._starts_anew:
            return
        if self.processes.first:
            remove_states(self.out / CHECKPOINT_FOLDER)
            for name in (WEIGHTS_FILE, UNREADABLE_FILE, *LOG_FILES):
                (self.out / name).unlink(missing_ok=True)
        self.processes.wait_for_first()
        self._starts_anew = False
        self.write_config()

    def run(self) -> list[EpochRecord]:
        """Train all epochs that are left, saving the state after each, and write the final weights.

        Raises:
            TrainingInterrupted: if SIGINT or SIGTERM asked for it; the state is then on disk.
            NonFiniteLossError: if the loss is NaN or infinite.
            OSError: if a file cannot be written; earlier ones are then intact.
        """
        alone = sole_user(self.out) if self.processes.first else contextlib.nullcontext()
        with alone, StopRequest() as stop:
            if self.processes.first:
                remove_leftovers(self.out)
                remove_leftovers(self.out / CHECKPOINT_FOLDER)
            if self._start_problem is not None:
                raise self._start_problem
            if not self._starts_anew:
                self.write_config()
            if self._resumed_from is not None:
                self._keep_if_best(self._resumed_from)
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
        self._set_training()
        loader = self.data.train.batches(
            self._samples(),
            self.batch_size,
            self._augmentation(self.epoch),
            self.config.workers,
            skip_unreadable=self.config.unreadable == "skip",
        )
        last = time.perf_counter()
        batches: list[Batch] = []
        for batch in loader:
            if not batches:
                self._stop_if_asked(stop)
            batches.append(batch)
            if len(batches) < self.config.accumulate:
                continue
            try:
                self._train_step(batches)
            except RuntimeError:  # Ctrl-C in a terminal also ends a compiler that the first step waits for
                if not self._stepped and self.processes.count == 1:
                    self._stop_if_asked(stop)
                raise
            self._stepped = True
            self._remove_earlier_run()
            batches = []
            now = time.perf_counter()
            self._running.seconds += now - last
            last = now
            self._show_progress()
            self._save_if_due()
        self._stop_if_asked(stop)
        return self._finish_epoch()

    def _samples(self) -> Tensor:
        """What this process still has to read in this epoch, in order."""
        size, count, accumulate = len(self.data.train), self.processes.count, self.config.accumulate
        order = epoch_order(self.config.seed, self.epoch, size)
        if self.config.repeats > 1:
            versions = torch.arange(self.config.repeats) * size
            order = (order[: -(-size // self.config.repeats), None] + versions).flatten()[:size]
        used = self.steps_per_epoch * accumulate * count * self.batch_size
        return order[:used].view(-1, accumulate, count, self.batch_size)[self.step :, :, self.processes.rank].flatten()

    def _augmentation(self, epoch: int) -> Augmentation:
        config = self.config
        return Augmentation(
            config.mirror,
            config.shift,
            config.crop_scale,
            config.seed,
            epoch,
            config.crop_mode,
            config.auto_augment,
            config.color_jitter,
            config.random_erasing,
        )

    def _set_training(self) -> None:
        self.model.train()
        if self.config.freeze_backbone:
            self.model.eval()

    def save(self) -> Path:
        """Write the state of the training and the logs.

        Raises:
            NonFiniteLossError: if a weight is NaN or infinite; nothing is written then.
            ValueError: if the optimiser cannot be shared out.
            OSError: if it cannot be written; earlier states are then intact.
        """
        total_steps = self.epoch * self.steps_per_epoch + self.step
        path = state_path(self.out / CHECKPOINT_FOLDER, total_steps, self.config.fsdp)
        self._check_weights()
        self._remove_earlier_run()
        for network in self._networks():
            self.processes.same_buffers(network)
        self._note_unreadable()
        self._saved_at = time.monotonic()
        if not self.processes.first and not self.config.fsdp:
            return path
        state = TrainState(
            spec=self.spec,
            config=self.config,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=None if self.ema is None else self.ema.module.state_dict(),
            scaler=self.scaler.state_dict(),
            images_per_step=self._images_per_step(),
            training_images=len(self.data.train),
            epoch=self.epoch,
            step=self.step,
            running=asdict(self._running),
            history=[asdict(record) for record in self.history],
        )
        if self.config.fsdp:
            save_sharded_state(path, state, self.processes)
        else:
            save_state(path, state)
        if not self.processes.first:
            return path
        self._keep_if_best(path)
        write_logs(self.out, self.history)
        if self.config.tensorboard and self.step == 0 and self.history:
            write_tensorboard(self.out, self.history[-1])
        return path

    def _check_weights(self) -> None:
        local = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        broken = not bool(torch.stack([torch.isfinite(p).all() for p in local]).all())
        if self.processes.all_reduce_max(int(broken)):
            raise NonFiniteLossError(
                f"a weight is not finite after epoch {self.epoch + 1}, step {self.step}; try a lower lr, more warm-up "
                "or a smaller clip_grad; the last checkpoint is intact"
            )
        if self.config.fsdp:
            check_optimizer(self.config.optimizer, self.optimizer)

    def _keep_if_best(self, path: Path) -> None:
        if not self.processes.first or self.step or not self.history:
            return
        if all(record.best_accuracy < self.history[-1].best_accuracy for record in self.history[:-1]):
            save_best(path)

    @property
    def best_state(self) -> Path:
        """Where the state after the best epoch is kept."""
        return self.out / CHECKPOINT_FOLDER / f"{BEST_NAME}{'' if self.config.fsdp else '.pt'}"

    def _images_per_step(self) -> int:
        return self.batch_size * self.processes.count * self.config.accumulate

    def _save_if_due(self) -> None:
        """The clock of the first process decides for all; the end of an epoch is saved anyhow."""
        minutes = self.config.save_minutes
        due = minutes > 0 and self.processes.first and time.monotonic() - self._saved_at >= 60 * minutes
        if self.processes.all_reduce_max(int(due)) and self.step < self.steps_per_epoch:
            self.save()

    def write_config(self) -> None:
        """Write the configuration as ``config.json``."""
        if not self.processes.first:
            return
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write_text(self.out / "config.json", text)

    def write_weights(self) -> Path:
        """Write the final weights as ``model.safetensors``, those averaged where there are any."""
        path = self.out / WEIGHTS_FILE
        weights = gathered(self._networks()[-1].state_dict(), self.processes)
        if self.processes.first:
            save_weights(path, weights, self.spec, self.config)
        return path

    def _train_step(self, batches: list[Batch]) -> None:
        """One step on one or more batches, whose gradients are averaged."""
        update = self.epoch * self.steps_per_epoch + self.step
        self.scheduler.step_update(update)
        self.optimizer.zero_grad(set_to_none=True)
        images_before = self._running.images
        for number, batch in enumerate(batches):
            with self.processes.averaging(self.network, last=number == len(batches) - 1):
                self._accumulate(number, batch)
        self.step += 1
        if self._running.images == images_before:  # none could be read: no step, and the mean loss stays
            self._running.loss *= self.step / max(self.step - 1, 1)
            return
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=update + 1)

    def _accumulate(self, number: int, batch: Batch) -> None:
        """Add one batch's share to the gradient; every image of all processes weighs the same."""
        images, labels = (part.to(self.device, non_blocking=True) for part in (batch.images, batch.labels))
        own = len(images)
        if own == 0:  # nothing could be read, but the other processes wait for this one's gradient
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
        place = (self.config.seed, self.epoch, self.step, number, self.processes.rank)
        images, targets = self.objective.mix(images, labels, derive_seed(*place, _MIXING))
        torch.manual_seed(derive_seed(*place))
        precision = _PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not torch.float32):
            logits = self.network(images)
        loss = self.objective(logits.float(), targets, images)
        value = float(loss.detach())
        correct = int((logits.detach().argmax(dim=1) == labels).sum()) if own else 0
        finite = math.isfinite(value)
        counts = [value * own if finite else 0.0, correct, own, len(batch.problems), 0.0 if finite else 1.0]
        total_loss, total_correct, seen, unreadable, diverged = self.processes.total(
            torch.tensor(counts, dtype=torch.float64)
        ).tolist()
        if diverged:
            raise NonFiniteLossError(
                f"the loss is not finite ({value} here) in epoch {self.epoch + 1}, step {self.step + 1} (learning rate "
                f"{self.lr:.2e}); try a lower lr, more warm-up or a smaller clip_grad; the last checkpoint is intact"
            )
        total_images = max(seen, 1)  # of no image, nothing is added
        share = own * self.processes.count / total_images / self.config.accumulate
        self.scaler.scale(loss * share).backward()
        running = self._running
        running.loss += total_loss / total_images / self.config.accumulate
        running.correct += int(total_correct)
        running.images += int(seen)
        running.unreadable += int(unreadable)
        self._unreadable += batch.problems

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def _finish_epoch(self) -> EpochRecord:
        running = self._running
        if running.images == 0:
            self._note_unreadable()
            raise ValueError(f"no training image can be read; they are listed in {self.out / UNREADABLE_FILE}")
        try:
            for network in self._networks():
                self.processes.same_buffers(network)
            measured = self._measure(self.model)
            averaged = self._measure(self.ema.module) if self.ema is not None else None
        except ValueError as error:  # what was trained is not lost with a test image that cannot be read
            raise ValueError(
                f"{error}; that was in measuring on the test images, the state after training is saved in "
                f"{self.save()} (images that cannot be read are left out by --unreadable-test skip)"
            ) from error
        record = EpochRecord(
            epoch=self.epoch + 1,
            lr=self.lr,
            train_loss=running.loss / self.steps_per_epoch,
            train_accuracy=running.correct / max(running.images, 1),
            test_accuracy=measured.top1,
            test_top5=measured.top5,
            ema_accuracy=None if averaged is None else averaged.top1,
            unreadable=running.unreadable,
            seconds=running.seconds,
            images_per_second=running.images / max(running.seconds, 1e-9),
            test_unreadable=measured.unreadable,
        )
        self.history.append(record)
        self.epoch, self.step, self._running = self.epoch + 1, 0, _Running()
        return record

    def _measure(self, model: nn.Module) -> Evaluation:
        return evaluate(
            model,
            self.data.test,
            max(self.batch_size, 250),
            self.device,
            mirrored=False,
            workers=self.config.workers,
            progress=self.progress,
            processes=self.processes,
            skip_unreadable=self.config.unreadable_test == "skip",
        )

    def _stop_if_asked(self, stop: StopRequest | None) -> None:
        """All processes stop together, wherever the signal came."""
        own = stop.requested() if stop is not None else None
        signal_number = self.processes.all_reduce_max(int(own or 0))
        if signal_number:
            self.progress.clear()
            raise TrainingInterrupted(self.save(), self.epoch, self.step, signal_number)

    def _check_same_run(self, state: TrainState, path: Path) -> None:
        differences = self.config.differences(state.config)
        if differences:
            name = differences[0]
            raise CheckpointError(
                f"{path}: is of another run: {name}={getattr(state.config, name)!r} there, "
                f"{name}={getattr(self.config, name)!r} here; take another --out, or --resume never to start anew"
            )
        if state.images_per_step != self._images_per_step():
            raise CheckpointError(
                f"{path}: made {state.images_per_step} images a step, here it would be {self._images_per_step()} "
                f"({self.processes.count} processes times batch_size times accumulate); choose them so that it is equal"
            )
        if state.training_images != len(self.data.train) or state.spec.to_json() != self.spec.to_json():
            raise CheckpointError(
                f"{path}: is of other data ({state.training_images:,} training images in {len(state.spec.classes)} "
                f"classes there, {len(self.data.train):,} in {len(self.data.classes)} here); take another folder"
            )
        if self.config.data != state.config.data:
            self.progress.print(f"data={self.config.data!r} is taken for {state.config.data!r}, where this run began")

    def _take(self, state: TrainState, path: Path) -> None:
        if self.config.fsdp:
            state = load_shards(path, state, self.model, None if self.ema is None else self.ema.module, self.optimizer)
        load_weights(self.model, state.model, path)
        try:
            if self.ema is not None:
                load_weights(self.ema.module, state.ema or {}, path)
            self.scaler.load_state_dict(state.scaler)
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
            for part in (units(self.model) if self.config.fsdp else []) or [self.model]:
                part.compile(dynamic=False)
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

    def _note_unreadable(self) -> None:
        found = self.processes.gathered(self._unreadable)
        self._unreadable = []
        if found and self.processes.first:
            add_lines(self.out / UNREADABLE_FILE, found)


def _spec_for(config: TrainConfig, data: ImageData) -> ModelSpec:
    keywords = input_keywords(config.model, data.preprocessing.input_size)
    if config.drop_path:
        keywords["drop_path_rate"] = config.drop_path
    count = config.model_kwargs.get("num_classes", len(data.classes))
    if count != len(data.classes):
        raise ValueError(f"num_classes={count}: {data.name} has {len(data.classes)} classes, which decides it")
    return ModelSpec(config.model, {**keywords, **config.model_kwargs}, data.classes, data.preprocessing)
