"""How often a classifier is right, and how often it changes its mind when the image is mirrored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equiflop.data import Split
from equiflop.runtime.processes import Processes
from equiflop.runtime.progress import Progress
from equiflop.runtime.sharding import is_sharded

#: Bins of the expected calibration error (Guo et al., arXiv 1706.04599).
CALIBRATION_BINS = 15
#: A change of the predicted class counts only if the two best logits are at least this far apart: ties are not changes.
TIE = 1e-5


@dataclass(frozen=True)
class Evaluation:
    """Counts over a set of images.

    Attributes:
        images: number of images.
        correct: the best class is the right one.
        correct_top5: the right class is among the best five.
        changed: the best class of the mirrored image is another one, and the gap between the image's two best logits
            exceeds 1e-5; None if the mirrored images were not looked at.
        changed_with_ties: the same without regard to the gap.
        unreadable: images that could not be read and are not among the others.
        per_class: (images, of them correct) of every class; None if the classes were not asked for.
        calibration_error: expected calibration error over 15 bins, between 0 and 1; None likewise.
    """

    images: int
    correct: int
    correct_top5: int
    changed: int | None = None
    changed_with_ties: int | None = None
    unreadable: int = 0
    per_class: tuple[tuple[int, int], ...] | None = None
    calibration_error: float | None = None

    @property
    def top1(self) -> float:
        """Accuracy, between 0 and 1."""
        return self.correct / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five, between 0 and 1."""
        return self.correct_top5 / self.images

    @property
    def changed_share(self) -> float | None:
        """Share of predictions that change when the image is mirrored, between 0 and 1."""
        return None if self.changed is None else self.changed / self.images


class MirrorAveraged(nn.Module):
    """A classifier made mirror-invariant by averaging its logits over both mirrored views, at twice the cost.

    Args:
        model: any classifier of images ``(B, C, H, W)``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to logits ``(B, classes)``."""
        return (self.model(images) + self.model(images.flip(-1))) / 2


def evaluate(
    model: nn.Module,
    split: Split,
    batch_size: int,
    device: torch.device,
    mirrored: bool = True,
    workers: int = 0,
    progress: Progress | None = None,
    processes: Processes | None = None,
    skip_unreadable: bool = False,
    classes: int = 0,
) -> Evaluation:
    """Measure a classifier in evaluation mode, in the precision of its parameters.

    The last batch is filled up, so that a compiled model meets one shape only.

    Args:
        model: a classifier of images; its mode is restored afterwards.
        split: the images.
        batch_size: images at once.
        device: where the model is.
        mirrored: also classify every mirrored image.
        workers: processes that decode image files.
        progress: a line to keep up to date.
        processes: share the images among these; all of them get the counts of all images.
        skip_unreadable: leave out images that cannot be read, and count them.
        classes: number of classes, to count them one by one and to measure the calibration.

    Raises:
        ValueError: if an image cannot be read (unless told to skip it), none can, or a logit is not finite; in all
            processes.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(6, dtype=torch.float64)
    details = torch.zeros(2, classes, dtype=torch.float64), torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
    batch_size = min(batch_size, len(split))
    rank, count = (processes.rank, processes.count) if processes is not None else (0, 1)
    samples = torch.arange(rank, len(split), count)
    # A sharded network's parameters are gathered by all processes together, so all call it equally often.
    calls = math.ceil(math.ceil(len(split) / count) / batch_size) * (1 + mirrored) if is_sharded(model) else 0
    problem: ValueError | None = None

    def classify(images: Tensor, wanted: int) -> Tensor:
        nonlocal calls
        calls -= 1
        return _finite_logits(model, images)[:wanted]

    try:
        with torch.no_grad():
            try:
                for batch in split.batches(samples, batch_size, workers=workers, skip_unreadable=skip_unreadable):
                    wanted = len(batch.images)
                    counts[4:] += torch.tensor([wanted, len(batch.problems)])
                    if wanted:
                        images = _filled(batch.images, batch_size).to(device)
                        logits = classify(images, wanted)
                        other = classify(images.flip(-1), wanted) if mirrored else logits
                        counts[:4] += _count(logits, other, batch.labels)
                        if classes:
                            _add_details(*details, logits, batch.labels)
                    if progress is not None:
                        progress.note(f"measuring {int(counts[4:].sum()) * count:,} of {len(split):,} images")
            except ValueError as error:  # the other processes are told first
                problem = error
            for _ in range(calls):
                model(torch.zeros(batch_size, *split.preprocessing.input_size, device=device))
    finally:
        model.train(was_training)
    if processes is not None and processes.all_reduce_max(int(problem is not None)) and problem is None:
        problem = ValueError("another process could not measure its test images")
    if problem is not None:
        raise problem
    if processes is not None:
        counts = processes.total(counts)
        details = processes.total(details[0]), processes.total(details[1])
    correct, correct_top5, changed, changed_with_ties, done, unreadable = (int(count) for count in counts)
    if not done:
        raise ValueError(f"none of the {len(split):,} test images can be read")
    return Evaluation(
        done,
        correct,
        correct_top5,
        changed if mirrored else None,
        changed_with_ties if mirrored else None,
        unreadable,
        tuple((int(images), int(right)) for images, right in details[0].T) if classes else None,
        float((details[1][0] - details[1][1]).abs().sum() / done) if classes else None,
    )


def _add_details(per_class: Tensor, bins: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add images and correct ones to ``(2, classes)``; confidence, correctness and number to ``(3, bins)``."""
    confidence, answers = logits.double().softmax(dim=1).max(dim=1)
    right = (answers == labels).double()
    one = torch.ones_like(right)
    per_class[0].index_add_(0, labels, one)
    per_class[1].index_add_(0, labels, right)
    index = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    for row, values in zip(bins, (confidence, right, one), strict=True):
        row.index_add_(0, index, values)


def _filled(images: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(images)
    return torch.cat([images, images[:1].expand(missing, -1, -1, -1)]) if missing else images


def _finite_logits(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite: its weights are damaged or it diverged in training")
    return logits


def _count(logits: Tensor, mirrored: Tensor, labels: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1]), dim=1)
    changed = mirrored.argmax(dim=1) != logits.argmax(dim=1)
    gap = best.values[:, 0] - best.values[:, 1] if logits.shape[1] > 1 else torch.zeros(len(logits))
    return torch.stack(
        [
            (logits.argmax(dim=1) == labels).sum(),
            (best.indices == labels[:, None]).any(dim=1).sum(),
            (changed & (gap > TIE)).sum(),
            changed.sum(),
        ]
    )
