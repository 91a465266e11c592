"""The two kinds of split: images that live in memory, and images that are decoded as they are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equiflop.data.randomness import derive_seed, uniform
from equiflop.data.sources import ImageSource
from equiflop.runtime.interrupt import leave_signals_to_the_parent


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image; a pure function of (seed, epoch, sample index).

    Attributes:
        mirror: probability of mirroring left to right.
        shift: largest shift in pixels, up, down, left and right, of images that live in memory.
        crop_scale: smallest share of the area that a random crop of an image file keeps.
        seed: seed of the run.
        epoch: number of the epoch.
        crop_mode: of image files: "rrc", random resized crop, or "rkrc", resize and crop at random.
        auto_augment: of image files: timm's policy.
        color_jitter: of image files: strength.
        random_erasing: of image files: probability.
    """

    mirror: float
    shift: int
    crop_scale: float
    seed: int
    epoch: int
    crop_mode: str = "rrc"
    auto_augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    @property
    def needs_files(self) -> str:
        """The first of the settings in use that images in memory do not have; empty if there is none."""
        return next((name for name in ("auto_augment", "color_jitter", "random_erasing") if getattr(self, name)), "")


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        images: normalised float32, shape ``(B, C, H, W)``.
        labels: int64, shape ``(B,)``.
        problems: one line for every image that could not be read and is not in the batch.
    """

    images: Tensor
    labels: Tensor
    problems: list[str]


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

    def check(self, augmentation: Augmentation) -> None:
        """See that images of this kind can be augmented so.

        Raises:
            ValueError: if not.
        """
        ...

    def batches(
        self,
        samples: Tensor,
        batch_size: int,
        augmentation: Augmentation | None = None,
        workers: int = 0,
        skip_unreadable: bool = False,
    ) -> Iterator[Batch]:
        """The given samples in the given order.

        Args:
            samples: what to read, shape ``(n,)``: ``i``, or for another version of the same image ``i + k len(self)``.
            batch_size: images at once; fewer in the last batch.
            augmentation: what to do to them; None for a measurement.
            workers: processes that decode image files.
            skip_unreadable: leave out what cannot be read and name it in the batch.

        Raises:
            ValueError: if an image cannot be read (it names it) and ``skip_unreadable`` is not set.
        """
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

    def on(self, device: torch.device) -> MemorySplit:
        """The same images in the memory of a device, where they are augmented as well, in the same way."""
        placed = copy(self)
        placed.images, placed.labels = self.images.to(device), self.labels.to(device)
        return placed

    def check(self, augmentation: Augmentation) -> None:
        """See :class:`Split`."""
        name = augmentation.needs_files
        if name:
            raise ValueError(f"{name}={getattr(augmentation, name)!r} needs image files; this set lives in memory")

    def batches(
        self,
        samples: Tensor,
        batch_size: int,
        augmentation: Augmentation | None = None,
        workers: int = 0,
        skip_unreadable: bool = False,
    ) -> Iterator[Batch]:
        """See :class:`Split`; nothing here is slow enough for worker processes, so ``workers`` has no effect.

        Raises:
            ValueError: if the augmentation is one for image files.
        """
        if augmentation is not None:
            self.check(augmentation)
        device = self.images.device
        mean = torch.tensor(self.preprocessing.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std, device=device).view(1, -1, 1, 1)
        for chosen in _chunks(samples, batch_size):
            index = (chosen % len(self)).to(device)
            images = self.images[index]
            if augmentation is not None:
                images = shift_and_mirror(images, chosen, augmentation)
            yield Batch(images.float().div_(255).sub_(mean).div_(std), self.labels[index], [])


def shift_and_mirror(images: Tensor, samples: Tensor, augmentation: Augmentation) -> Tensor:
    """Shift every image by a random number of pixels, zeros moving in, and mirror some of them.

    Args:
        images: shape ``(B, C, H, W)``.
        samples: index of each image in its data set, shape ``(B,)``, on the CPU; with seed and epoch it decides what
            happens.
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
    index = (batch, channels, rows[:, None, :, None], columns[:, None, None, :])
    return padded[tuple(part.to(images.device) for part in index)]


class ImageSplit:
    """Images that are decoded as they are needed.

    Args:
        source: the images.
        preprocessing: size and normalisation.
    """

    def __init__(self, source: ImageSource, preprocessing: Preprocessing) -> None:
        self.source = source
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def check(self, augmentation: Augmentation) -> None:
        """See :class:`Split`."""
        try:
            image_transform(self.preprocessing, augmentation)
        except Exception as error:  # timm asserts, indexes and converts as it reads a policy
            policy = augmentation.auto_augment
            raise ValueError(f"auto_augment={policy!r} is not a policy that timm can read ({error})") from error

    def batches(
        self,
        samples: Tensor,
        batch_size: int,
        augmentation: Augmentation | None = None,
        workers: int = 0,
        skip_unreadable: bool = False,
    ) -> Iterator[Batch]:
        """See :class:`Split`."""
        loader: DataLoader[_Item] = DataLoader(
            _Items(self, augmentation),
            batch_sampler=[chunk.tolist() for chunk in _chunks(samples, batch_size)],
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if batch.problems and not skip_unreadable:
                raise ValueError(batch.problems[0])
            yield batch


def _chunks(samples: Tensor, size: int) -> tuple[Tensor, ...]:
    return samples.split(size) if len(samples) else ()


#: Image, label and "", or a blank, the label and what is wrong: an exception would lose its type in a worker.
_Item = tuple[Tensor, int, str]


class _Items(Dataset[_Item]):
    """Decoded and transformed images."""

    def __init__(self, split: ImageSplit, augmentation: Augmentation | None) -> None:
        self.source = split.source
        self.channels = split.preprocessing.input_size[0]
        self.augmentation = augmentation
        self.transform = image_transform(split.preprocessing, augmentation)
        self.blank = torch.zeros(split.preprocessing.input_size)

    def __getitem__(self, sample: int) -> _Item:
        index = sample % len(self.source)
        label = int(self.source.labels[index])
        try:
            image = self.source.read(index, self.channels)
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
        train_crop_mode=augmentation.crop_mode,
        hflip=augmentation.mirror,
        scale=(augmentation.crop_scale, 1.0),
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment or None,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )


def _collate(items: list[_Item]) -> Batch:
    readable = [(image, label) for image, label, problem in items if not problem]
    images = torch.stack([image for image, _ in readable]) if readable else items[0][0].new_empty(0, *items[0][0].shape)
    labels = torch.tensor([label for _, label in readable], dtype=torch.int64)
    return Batch(images, labels, [problem for _, _, problem in items if problem])


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == torch.Size(size):
        return images
    resized = torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
