"""Classification by the nearest neighbours of features: what a backbone knows without training a classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equiflop.data import Split
from equiflop.runtime.progress import Progress

_QUERIES = 512


def nearest_neighbour_accuracy(
    model: Any,
    train: Split,
    test: Split,
    neighbours: int,
    device: torch.device,
    batch_size: int = 250,
    workers: int = 0,
    temperature: float = 0.07,
    progress: Progress | None = None,
    skip_unreadable: bool = False,
) -> float:
    """Share of test images whose nearest training images vote for the right class, between 0 and 1.

    Features are what the classifier would see, of length 1; a neighbour at cosine ``s`` has ``exp(s / temperature)``
    votes (Wu et al., arXiv 1805.01978).

    Args:
        model: a model of timm or ours (``forward_features`` and ``forward_head``), on the device.
        train: images whose labels are known.
        test: images to classify.
        neighbours: how many vote.
        device: where to compute.
        batch_size: images at once.
        workers: processes that decode image files.
        temperature: the smaller, the more the nearest count.
        progress: a line to keep up to date.
        skip_unreadable: leave out images that cannot be read.

    Raises:
        ValueError: if an image cannot be read, or ``neighbours`` is not between 1 and the number of training images.
    """
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"neighbours={neighbours} must be between 1 and {len(train)}, the training images")
    model.eval()
    known, labels = _features(model, train, device, batch_size, workers, progress, skip_unreadable)
    if neighbours > len(known):
        raise ValueError(f"neighbours={neighbours}: only {len(known)} of the training images can be read")
    asked, expected = _features(model, test, device, batch_size, workers, progress, skip_unreadable)
    classes = int(max(labels.max(), expected.max())) + 1
    correct = 0
    for queries, truth in zip(asked.split(_QUERIES), expected.split(_QUERIES), strict=True):
        closeness, index = (queries @ known.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[index], (closeness / temperature).exp())
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(expected)


@torch.no_grad()
def _features(
    model: Any,
    split: Split,
    device: torch.device,
    batch_size: int,
    workers: int,
    progress: Progress | None,
    skip_unreadable: bool,
) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    done = 0
    samples = torch.arange(len(split))
    for batch in split.batches(samples, batch_size, workers=workers, skip_unreadable=skip_unreadable):
        if not len(batch.images):
            continue
        found = model.forward_head(model.forward_features(batch.images.to(device)), pre_logits=True)
        features.append(F.normalize(found.float().cpu(), dim=1))
        labels.append(batch.labels)
        done += len(batch.labels)
        if progress is not None:
            progress.note(f"features of {done:,} of {len(split):,} images")
    if not features:
        raise ValueError(f"none of the {len(split):,} images can be read")
    return torch.cat(features), torch.cat(labels)
