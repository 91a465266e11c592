"""The distillation of a plain teacher into an equivariant student, as a configuration describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from equiflop.classify.model_spec import ModelSpec
from equiflop.classify.trainer import ClassifierTrainer
from equiflop.classify.weights import bare_weights
from equiflop.data import ImageData, Preprocessing
from equiflop.distill.config import DistillConfig
from equiflop.distill.features import Features
from equiflop.distill.loading import load_teacher
from equiflop.distill.objective import DistillObjective, Student
from equiflop.distill.steer import Steering, check_steerable, check_tokens, steer
from equiflop.distill.teacher import numerical_device, sample_images
from equiflop.files import check_writable
from equiflop.grids import as_image_group
from equiflop.models.entry_points import TWIN
from equiflop.runtime.processes import Processes
from equiflop.runtime.progress import Progress
from equiflop.training.records import EpochRecord
from equiflop.training.state import CHECKPOINT_FOLDER, saved_states
from equiflop.training.step import Objective

#: How the names of keywords end that a teacher needed in its training alone.
_REGULARISERS = ("drop_rate", "drop_path_rate")


class DistillTrainer(ClassifierTrainer):
    """Trains the equivariant twin of a trained plain network to give what that gives, averaged over a group's views.

    The student is ``twin:NAME`` with the teacher's keywords, those of ``config.model_kwargs`` on top. Its classes are
    the teacher's. After every epoch it is measured on the test images: ``error``, the weighted sum of the terms that
    need no labels (the lowest is the best epoch; where labels alone teach there is none, and the highest accuracy is);
    ``agreement``, how often its class is that of the teacher's averaged answers; and ``accuracy``, where the data have
    the teacher's classes.

    Args:
        config: the run.
        data: the data, if it is open already.
        progress: the line that shows what happens.
        processes: the processes that train together; by default those that torchrun started.

    Raises:
        ValueError: if the teacher cannot be one or does not fit the data, or a student cannot be made.
        TypeError: if the student does not take a keyword.
    """

    best = "-error"
    config: DistillConfig

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData | None = None,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.teacher = load_teacher(config)
        self.steering: Steering | None = None
        super().__init__(config, data, progress, processes)
        if config.init == "steer" and self.steering is None:
            self.folder.on_entry.insert(0, self._steer_after_all)

    def _preprocessing(self, config: Any) -> Preprocessing | None:
        """The teacher's own, unless the options say how large images are."""
        asked = config.image_size is not None or config.channels is not None
        return None if asked else self.teacher.spec.preprocessing

    def _describe(self, config: Any) -> ModelSpec:
        self.teacher.take(self.data.preprocessing, config.image_size is not None)
        teacher, data = self.teacher.spec, self.data
        self.knows_labels = self.teacher.knows(data.classes)
        if config.label_weight and not self.knows_labels:
            what = f"knows {len(teacher.classes)} classes, other ones than the {len(data.classes)} of {data.name}"
            what = what if teacher.classes else "gives an embedding, no classes"
            raise ValueError(
                f"label_weight={config.label_weight}: {self.teacher.source} {what}; leave label_weight at 0"
            )
        classes = data.classes if self.knows_labels else teacher.classes
        keywords = {key: value for key, value in teacher.kwargs.items() if not key.endswith(_REGULARISERS)}
        outputs = self.teacher.outputs
        count = config.model_kwargs.get("num_classes", outputs)
        if count != outputs:
            what = "classes" if classes else "channels in its embedding"
            raise ValueError(f"num_classes={count}: {self.teacher.source} has {outputs} {what}, which decides it")
        if not classes:
            keywords["num_classes"] = outputs
        if config.model_kwargs.get("patch_drop_rate"):
            rate = config.model_kwargs["patch_drop_rate"]
            raise ValueError(f"patch_drop_rate={rate}: a student has to give the features of every patch; leave it out")
        others = (config.patch_weight, config.middle_weight, config.logits_weight, config.label_weight)
        if not (self.teacher.class_tokens or any(others)):
            raise ValueError(
                f"class_weight={config.class_weight}: {self.teacher.source} has no class token; let one of "
                "patch_weight, middle_weight, logits_weight and label_weight be above 0"
            )
        if not any((self.teacher.class_tokens and config.class_weight, *others[:3])):
            self.best = "accuracy"  # labels alone teach
        if config.drop_path:
            keywords["drop_path_rate"] = config.drop_path
        keywords = {**keywords, **config.model_kwargs}
        keywords.setdefault("group", "flop")
        if config.init == "steer":
            check_steerable(self.teacher.model, as_image_group(keywords["group"]), self.teacher.source)
        if config.init == "steer" and "heads" not in keywords and self._heads_can_be_coupled(keywords):
            keywords["heads"] = "coupled"
        return ModelSpec(TWIN + teacher.name.split(".")[0], keywords, classes, data.preprocessing)

    def _about(self) -> str:
        """The student, and a mark of the teacher's weights, by which a run that goes on knows its teacher again."""
        return json.dumps({**json.loads(super()._about()), "teacher": self.teacher.fingerprint()})

    def _heads_can_be_coupled(self, keywords: dict[str, Any]) -> bool:
        """Whether every head has a share of the invariant and of the flipping channels, in what steering can read."""
        if type(self.teacher.model) is not VisionTransformer or as_image_group(keywords["group"]).order != 2:
            return False
        width = keywords.get("embed_dim", self.teacher.model.embed_dim)
        heads = keywords.get("num_heads", self.teacher.model.blocks[0].attn.num_heads)
        if not (isinstance(width, int) and isinstance(heads, int) and heads > 0):
            return False  # what is wrong with them is said where the student is made
        return all(share % heads == 0 for share in keywords.get("multiplicities") or (width // 2, width - width // 2))

    def _to_train(self, model: nn.Module, config: Any) -> tuple[nn.Module, Objective]:
        check_tokens(model, self.teacher.model, self.teacher.source)
        student = Student(model, self.teacher.widths)
        if config.init == "steer" and not saved_states(Path(config.out) / CHECKPOINT_FOLDER):
            self.steering = self._steer(student, config)
        self.objective = DistillObjective(
            config, self.teacher, student.group, self.data.classes, self.data.preprocessing
        )
        return student, self.objective

    def _steer(self, student: Student, config: DistillConfig) -> Steering:
        """Project the teacher's weights onto the student."""
        source = self.teacher.source
        device = numerical_device(self.processes.device)
        check_writable(Path(config.out) / "model.safetensors")
        home = self.teacher.scale.device
        teacher = self.teacher.to(device)
        images = [teacher.normalised(batch) for batch in sample_images(self.data.train, config, device)]
        if not images:
            raise ValueError(f"data={config.data!r}: none of the {config.init_images} images to steer by can be read")
        found = steer(student.student, teacher.model, images, source)
        student.steer_readers(found.stream, teacher.model)
        teacher.to(home)
        return found

    def _steer_after_all(self) -> None:
        """Steer in a folder with states that this run does not go on from; one that does needs no first weights."""
        self.steering = self._steer(cast(Student, self.model), self.config)
        self.processes.same_weights(self.model)
        if self.ema is not None:
            self.ema.load_state_dict(self.model.state_dict())
        self.progress.print(str(self.steering))

    def _measure(self, model: nn.Module) -> dict[str, float]:
        sums = torch.zeros(5, dtype=torch.float64)  # error, agreement, right answers, images, unreadable ones
        problem: ValueError | None = None
        try:
            rank, count, test = self.processes.rank, self.processes.count, self.data.test
            skip = self.config.unreadable_test == "skip"
            own = torch.arange(rank, len(test), count)
            for batch in test.batches(own, self.plan.batch_size, workers=self.config.workers, skip_unreadable=skip):
                sums[4] += len(batch.problems)
                if len(batch.images):
                    sums[:4] += self._sums(model, batch.images.to(self.device), batch.labels.to(self.device))
                self.progress.note(f"measuring {int(sums[3]) * count:,} of {len(test):,} images")
        except ValueError as error:  # the other processes are told first
            problem = error
        if self.processes.all_reduce_max(int(problem is not None)):
            raise problem or ValueError("another process could not measure its test images")
        weighted, agreed, correct, images, unreadable = self.processes.total(sums).tolist()
        if not images:
            raise ValueError(f"none of the {len(self.data.test):,} test images can be read")
        found: dict[str, float] = {} if self.best == "accuracy" else {"error": weighted / images}
        found["unreadable"] = int(unreadable)
        if self.spec.classes:
            found["agreement"] = agreed / images
        if self.spec.classes and self.knows_labels:
            found["accuracy"] = correct / images
        return found

    def _sums(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Over a batch: of the error, of agreement, of right answers, of images."""
        count, size = len(images), self.plan.batch_size
        if count < size:  # filled up, so that compiled networks meet one shape only
            images = images[torch.arange(size, device=images.device) % count]
        found, wanted = Features(*model(images)), self.teacher.views(images, self.objective.group)
        found, wanted, images = found.first(count), wanted.first(count), images[:count]
        terms = self.objective.terms(found, wanted)
        weights = self.objective.weights(terms)
        error = sum(weights[name] * float(term) for name, term in terms.items())
        agreed = float(self.objective.agreement(found, wanted).get("agreement", torch.zeros(1)).sum())
        correct = float((found.logits.argmax(dim=1) == labels).sum()) if self.knows_labels else 0.0
        return torch.tensor([error * len(images), agreed, correct, len(images)], dtype=torch.float64)

    def _final_weights(self) -> dict[str, Tensor]:
        """The student's, without what read its features."""
        return cast(dict[str, Tensor], bare_weights(super()._final_weights(), self.config))

    def results(self, metrics: dict[str, float]) -> list[str]:
        """See :meth:`equiflop.classify.ClassifierTrainer.results`."""
        networks = [("test", ""), ("ema", " of the averaged weights")]
        return [
            f"test: {_in_words(metrics, prefix)}{whose}"
            for prefix, whose in networks
            if f"{prefix}_unreadable" in metrics
        ]

    def summary(self, record: EpochRecord) -> str:
        """See :meth:`equiflop.training.Trainer.summary`."""
        left_out = record.unreadable + int(record.metrics["test_unreadable"])
        note = f"  {left_out:,} unreadable images left out" if left_out else ""
        return (
            f"epoch {record.epoch}/{self.config.epochs}  loss {record.train_loss:.4f}  "
            f"test {_in_words(record.metrics, 'test')}  {record.samples_per_second:,.0f} images/s{note}"
        )


def _in_words(metrics: dict[str, float], prefix: str) -> str:
    shares = [name for name in ("agreement", "accuracy") if f"{prefix}_{name}" in metrics]
    error = metrics.get(f"{prefix}_error")
    parts = [] if error is None else [f"error {error:.4f}"]
    return ", ".join([*parts, *(f"{name} {100 * metrics[f'{prefix}_{name}']:.2f} %" for name in shares)])
