"""The training of a classifier on labelled images, as a configuration describes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.classify.config import TrainConfig
from equiflop.classify.evaluation import evaluate
from equiflop.classify.model_spec import ModelSpec, check_model_name, check_takes, input_keywords
from equiflop.classify.objective import ClassifierObjective
from equiflop.classify.preparation import classifier_of, set_drop_path, start_from
from equiflop.data import Augmentation, ImageData, MemorySplit, Preprocessing, Split, open_data
from equiflop.data.randomness import derive_seed, epoch_order
from equiflop.runtime.processes import Processes
from equiflop.runtime.progress import Progress
from equiflop.training.records import EpochRecord
from equiflop.training.samples import Loaded
from equiflop.training.state import CHECKPOINT_FOLDER, TrainState, saved_states
from equiflop.training.step import Objective
from equiflop.training.trainer import Trainer

_INITIALISATION = 0x1217  # what seeds the initial weights, apart from the seed itself


class ClassifierTrainer(Trainer):
    """Trains one classifier on one data set.

    Args:
        config: the run.
        data: the data, if it is open already.
        progress: the line that shows what happens.
        processes: the processes that train together; by default those that torchrun started.

    Raises:
        ValueError: if the model, the data or the device does not exist or they do not fit.
        TypeError: if the model does not take a keyword.
    """

    unit = "images"
    #: Which of the numbers of :meth:`_measure` tells the best epoch.
    best = "accuracy"
    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | None = None,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:
        processes = processes if processes is not None else Processes.join(config.device, config.fsdp)
        self.processes = processes
        check_model_name(config.model)
        self.data = data if data is not None else self._open(config, processes)
        self.spec = self._describe(config)
        train = self.data.train
        if isinstance(train, MemorySplit) and processes.device.type == "cuda":
            train = train.on(processes.device)  # cut and mirrored there too
        images = AugmentedImages(train, config)
        torch.manual_seed(derive_seed(config.seed, _INITIALISATION))
        model, problem = _build(self.spec, config)
        check_takes(model, self.spec.name, self.data.preprocessing.input_size)
        model, objective = self._to_train(model, config)
        super().__init__(
            model,
            objective,
            images,
            config,
            measure=self._measure,
            best=self.best,
            about=self._about(),
            progress=progress if progress is not None else Progress(config.model),
            processes=processes,
        )
        if problem is not None:
            self.folder.on_entry.insert(0, lambda: _raise(problem))

    def _open(self, config: TrainConfig, processes: Processes) -> ImageData:
        """The data; the first process goes first, which may have to download."""
        if not processes.first:
            processes.wait_for_first()
        data = open_data(config.data, config.image_size, config.channels, self._preprocessing(config))
        if processes.first:
            processes.wait_for_first()
        return data

    def _preprocessing(self, config: TrainConfig) -> Preprocessing | None:
        """How pixels become the network's input, where neither the options nor the data decide it."""
        return None

    def _describe(self, config: TrainConfig) -> ModelSpec:
        """What the network is."""
        return _spec_for(config, self.data)

    def _about(self) -> str:
        """What a run's states and weights say of the network; they are of one run if it is the same."""
        return self.spec.to_json()

    def _to_train(self, model: nn.Module, config: TrainConfig) -> tuple[nn.Module, Objective]:
        """The module whose parameters are trained, given the network, and what is minimised."""
        return model, ClassifierObjective(config, self.data.classes, self.data.preprocessing)

    def _take(self, state: TrainState, path: Path) -> None:
        super()._take(state, path)
        if self.config.data != state.config["data"]:
            theirs = state.config["data"]
            self.progress.print(f"data={self.config.data!r} is taken for {theirs!r}, where this run began")

    def _set_training(self) -> None:
        self.model.train(not self.config.freeze_backbone)

    def _measure(self, model: nn.Module) -> dict[str, float]:
        try:
            found = evaluate(
                model,
                self.data.test,
                max(self.plan.batch_size, 250),
                self.device,
                mirrored=False,
                workers=self.config.workers,
                progress=self.progress,
                processes=self.processes,
                skip_unreadable=self.config.unreadable_test == "skip",
            )
        except ValueError as error:
            raise ValueError(f"{error} (images that cannot be read are left out by --unreadable-test skip)") from error
        return {"accuracy": found.top1, "top5": found.top5, "unreadable": found.unreadable}

    def results(self, metrics: dict[str, float]) -> list[str]:
        """What was measured last, in lines for people."""
        lines = [f"test accuracy {100 * metrics['test_accuracy']:.2f} % (top-5 {100 * metrics['test_top5']:.2f} %)"]
        if "ema_accuracy" in metrics:
            lines.append(f"test accuracy of the averaged weights {100 * metrics['ema_accuracy']:.2f} %")
        return lines

    def summary(self, record: EpochRecord) -> str:
        """See :meth:`equiflop.training.Trainer.summary`."""
        metrics = record.metrics
        average = f" (average {100 * metrics['ema_accuracy']:.2f} %)" if "ema_accuracy" in metrics else ""
        left_out = f"  {record.unreadable:,} unreadable images left out" if record.unreadable else ""
        if metrics["test_unreadable"]:
            left_out += f"  {metrics['test_unreadable']:,} unreadable test images left out"
        return (
            f"epoch {record.epoch}/{self.config.epochs}  loss {record.train_loss:.3f}  "
            f"train {100 * metrics['train_accuracy']:.2f} %  test {100 * metrics['test_accuracy']:.2f} %{average}  "
            f"{record.samples_per_second:,.0f} images/s{left_out}"
        )


class AugmentedImages:
    """The training images of a classifier, see :class:`equiflop.training.Samples`.

    Args:
        split: the images.
        config: what is done to them, and in which order they come.

    Raises:
        ValueError: if such images cannot be augmented so.
    """

    def __init__(self, split: Split, config: TrainConfig) -> None:
        self.split = split
        self.config = config
        split.check(self._augmentation(epoch=0))

    def __len__(self) -> int:
        return len(self.split)

    def order(self, epoch: int) -> Tensor:
        """Every image once; with repeated augmentation, several versions of a part of them."""
        size, repeats = len(self.split), self.config.repeats
        order = epoch_order(self.config.seed, epoch, size)
        if repeats > 1:
            order = (order[: -(-size // repeats), None] + torch.arange(repeats) * size).flatten()[:size]
        return order

    def batches(self, samples: Tensor, batch_size: int, epoch: int) -> Iterator[Loaded]:
        """Images and labels; those that cannot be read are left out, or an error."""
        for images, labels, problems in self.split.batches(
            samples,
            batch_size,
            self._augmentation(epoch),
            self.config.workers,
            skip_unreadable=self.config.unreadable == "skip",
        ):
            count = len(images)
            if count == 0:  # the other processes wait for this one's gradient
                images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
            yield Loaded((images, labels), count, problems)

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


def _spec_for(config: TrainConfig, data: ImageData) -> ModelSpec:
    keywords: dict[str, Any] = input_keywords(config.model, data.preprocessing.input_size)
    if config.drop_path:
        keywords["drop_path_rate"] = config.drop_path
    count = config.model_kwargs.get("num_classes", len(data.classes))
    if count != len(data.classes):
        raise ValueError(f"num_classes={count}: {data.name} has {len(data.classes)} classes, which decides it")
    return ModelSpec(config.model, {**keywords, **config.model_kwargs}, data.classes, data.preprocessing)


def _build(spec: ModelSpec, config: TrainConfig) -> tuple[nn.Module, Exception | None]:
    """The network, and why it does not start from the weights it should, which a run that goes on does not need."""
    model = spec.build()
    problem: Exception | None = None
    if config.start_from:
        try:
            start_from(model, config.start_from, spec.preprocessing.input_size)
        except (OSError, ValueError) as error:
            if not saved_states(Path(config.out) / CHECKPOINT_FOLDER):
                raise
            problem = error
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
    return model, problem


def _raise(problem: Exception) -> None:
    raise problem
