"""The two kinds of split: images that live in memory, and images in a folder that are decoded as they are needed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equiflop.data.decode import read_image
from equiflop.data.randomness import derive_seed, uniform

_IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image; a pure function of (seed, epoch, sample index).

    Attributes:
        mirror: probability of mirroring left to right.
        shift: largest shift in pixels, up, down, left and right, of images that live in memory.
        crop_scale: smallest share of the area that a random crop of an image file keeps.
        seed: seed of the run.
        epoch: number of the epoch.
    """

    mirror: float
    shift: int
    crop_scale: float
    seed: int
    epoch: int


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the network's input.

    Attributes:
        input_size: (channels, height, width).
        mean: subtracted, one per channel, for pixels between 0 and 1.
        std: divided by, one per channel.
        interpolation: how image files are resized ("bicubic", "bilinear", "nearest").
        crop_pct: share of the resized image that the centre crop of an evaluation keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


class Split(Protocol):
    """One part of a data set."""

    preprocessing: Preprocessing

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(
        self, samples: Tensor, batch_size: int, augmentation: Augmentation | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The given samples in the given order: images ``(B, C, H, W)``, normalised float32, and labels ``(B,)``."""
        ...


class MemorySplit:
    """Images that live in memory.

    Args:
        images: uint8, shape ``(N, C, H, W)``; resized once if the preprocessing asks for another size.
        labels: int64, shape ``(N,)``.
        preprocessing: size and normalisation.
    """

    def __init__(self, images: Tensor, labels: Tensor, preprocessing: Preprocessing) -> None:
        self.images = _resized(images, preprocessing.input_size[1:])
        self.labels = labels
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, samples: Tensor, batch_size: int, augmentation: Augmentation | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`Split`; nothing here is slow enough for worker processes, so ``workers`` has no effect."""
        mean = torch.tensor(self.preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, -1, 1, 1)
        for chosen in _chunks(samples, batch_size):
            images = self.images[chosen]
            if augmentation is not None:
                images = shift_and_mirror(images, chosen, augmentation)
            yield images.float().div_(255).sub_(mean).div_(std), self.labels[chosen]


def shift_and_mirror(images: Tensor, samples: Tensor, augmentation: Augmentation) -> Tensor:
    """Shift every image by a random number of pixels, zeros moving in, and mirror some of them.

    Args:
        images: shape ``(B, C, H, W)``.
        samples: index of each image in its data set, shape ``(B,)``; with seed and epoch it decides what happens.
        augmentation: how much.
    """
    height, width = images.shape[-2:]
    reach = augmentation.shift
    draws = [uniform(augmentation.seed, augmentation.epoch, samples.numpy(), stream) for stream in range(3)]
    down, right = (torch.from_numpy(np.floor(draw * (2 * reach + 1)).astype(np.int64)) for draw in draws[:2])
    mirrored = torch.from_numpy(draws[2] < augmentation.mirror)[:, None]
    rows = torch.arange(height) + down[:, None]
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + right[:, None]
    padded = torch.nn.functional.pad(images, (reach, reach, reach, reach)) if reach else images
    batch, channels = torch.arange(len(images))[:, None, None, None], torch.arange(images.shape[1])[:, None, None]
    return padded[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


class FolderSplit:
    """Image files in one sub-folder per class, decoded as they are needed.

    Args:
        root: the folder that holds a folder per class (images may lie in folders below it).
        preprocessing: size and normalisation.
        classes: names of the classes, in the order of their labels; by default the names of the sub-folders, sorted.

    Raises:
        ValueError: if there is no image, or a sub-folder is not among ``classes``.
    """

    def __init__(self, root: Path, preprocessing: Preprocessing, classes: Sequence[str] | None = None) -> None:
        self.preprocessing = preprocessing
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        self.classes = tuple(names if classes is None else classes)
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{root / unknown[0]}: {unknown[0]!r} is not a class of the training images")
        self.files = [(path, label) for label, name in enumerate(self.classes) for path in _image_files(root / name)]
        if not self.files:
            raise ValueError(f"{root}: holds no images (expected {root}/CLASS/*.jpg or other image files)")

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, samples: Tensor, batch_size: int, augmentation: Augmentation | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`Split`; an unreadable file is a ValueError that names it, never replaced by another."""
        loader: DataLoader[tuple[Tensor, int, str]] = DataLoader(
            _FolderItems(self, augmentation),
            batch_sampler=[chunk.tolist() for chunk in _chunks(samples, batch_size)],
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
        )
        for images, labels, problem in loader:
            if problem:
                raise ValueError(problem)
            yield images, labels


def _chunks(samples: Tensor, size: int) -> tuple[Tensor, ...]:
    return samples.split(size) if len(samples) else ()


def _image_files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in _IMAGE_EXTENSIONS
    )


class _FolderItems(Dataset[tuple[Tensor, int, str]]):
    """Decoded and transformed files; problems travel as text, since an exception would lose its type in a worker."""

    def __init__(self, split: FolderSplit, augmentation: Augmentation | None) -> None:
        self.files = split.files
        self.channels = split.preprocessing.input_size[0]
        self.augmentation = augmentation
        self.transform = image_transform(split.preprocessing, augmentation)
        self.blank = torch.zeros(split.preprocessing.input_size)

    def __getitem__(self, sample: int) -> tuple[Tensor, int, str]:
        path, label = self.files[sample]
        try:
            image = read_image(path, self.channels)
        except ValueError as error:
            return self.blank, label, str(error)
        if self.augmentation is not None:
            seed = derive_seed(self.augmentation.seed, self.augmentation.epoch, sample)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        return self.transform(image), label, ""


class _Transform(Protocol):
    def __call__(self, image: object) -> Tensor: ...


def image_transform(preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> _Transform:
    """timm's transform from a Pillow image to a normalised tensor ``(C, H, W)``."""
    from timm.data import create_transform

    settings = {
        "input_size": preprocessing.input_size,
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    if augmentation is None:
        return create_transform(**settings, is_training=False, crop_pct=preprocessing.crop_pct)
    return create_transform(
        **settings,
        is_training=True,
        hflip=augmentation.mirror,
        scale=(augmentation.crop_scale, 1.0),
        color_jitter=0.0,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collate(items: list[tuple[Tensor, int, str]]) -> tuple[Tensor, Tensor, str]:
    images, labels, problems = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), next(filter(None, problems), "")


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == torch.Size(size):
        return images
    resized = torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
