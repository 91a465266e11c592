"""Fashion-MNIST: a part of it that comes with equiflop, and the whole set where it is found or downloaded."""

from __future__ import annotations

import lzma
import socket
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from equiflop.data.idx import find_idx
from equiflop.data.names import DataNotFoundError
from equiflop.files import cache_folder

#: Names of the classes, in the order of the labels.
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
#: Mean and standard deviation of the pixels of the whole set, between 0 and 1.
MEAN, STD = 0.2860, 0.3530
#: Images of every class in the part, to train on and to test on: the first ones of the whole set's.
PART = (1200, 500)
#: The file that holds them, within this package; ``make_part.py`` writes it.
PART_FILE = "images.xz"

_SIZE = (28, 28)
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_TRAIN_FILE = "train-images-idx3-ubyte"
_DOWNLOAD_TIMEOUT_S = 20.0


def pack(train: Tensor, test: Tensor) -> bytes:
    """The content of the file: all pixels, class by class, training images before test images.

    Args:
        train: uint8, ``(10, PART[0], 28, 28)``.
        test: uint8, ``(10, PART[1], 28, 28)``.
    """
    pixels = torch.cat([train.flatten(), test.flatten()]).numpy().tobytes()
    return lzma.compress(pixels, preset=9 | lzma.PRESET_EXTREME)


def read_part() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The part, to train on and to test on.

    Returns:
        twice: uint8 images, shape ``(N, 1, 28, 28)``, and int64 labels, shape ``(N,)``; labels go 0, 1, ..., 9, 0, ...

    Raises:
        ValueError: if the file is damaged.
    """
    file = files(__name__) / PART_FILE
    shapes = [(len(CLASSES), count, *_SIZE) for count in PART]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    try:
        pixels = bytearray(lzma.decompress(file.read_bytes()))
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); install equiflop anew") from error
    if len(pixels) != sum(sizes):
        raise ValueError(f"{file}: holds {len(pixels):,} pixels, not {sum(sizes):,}; install equiflop anew")
    parts = torch.frombuffer(pixels, dtype=torch.uint8).split(sizes)
    train, test = (_in_turns(part.reshape(shape)) for part, shape in zip(parts, shapes, strict=True))
    return train, test


def _in_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images sorted by class, ``(classes, count, H, W)``, as one list in which classes take turns, and its labels."""
    classes, count = images.shape[:2]
    return images.transpose(0, 1).reshape(-1, 1, *images.shape[2:]), torch.arange(classes).repeat(count)


def idx_folder(folder: Path) -> Path | None:
    """The folder itself or the place where torchvision puts the files below it, whichever holds the idx files."""
    places = (folder, folder / "raw", folder / "FashionMNIST" / "raw")
    return next((place for place in places if find_idx(place, _TRAIN_FILE)), None)


def find_whole() -> Path | None:
    """Where the whole set lies: Debian's package ``dataset-fashion-mnist``, else an earlier download; or None."""
    return next((found for place in (_DEBIAN, cache_folder()) if (found := idx_folder(place)) is not None), None)


def fetch_whole() -> Path:
    """Where the whole set lies, after torchvision's download (once, into the user's cache) if need be.

    Raises:
        DataNotFoundError: if it is not there and cannot be downloaded.
    """
    found = find_whole()
    if found is not None:
        return found
    from torchvision.datasets import FashionMNIST

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        FashionMNIST(str(cache_folder()), download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise DataNotFoundError(
            f"Fashion-MNIST is neither in {_DEBIAN} (Debian's package dataset-fashion-mnist) nor in "
            f"{cache_folder()}, and could not be downloaded ({error}); give its folder, or take the part "
            "that comes with equiflop: fashion-mnist-part"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
    found = find_whole()
    if found is None:
        raise DataNotFoundError(f"torchvision's download left no Fashion-MNIST in {cache_folder()}")
    return found
