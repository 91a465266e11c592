"""Write the part of Fashion-MNIST that comes with equiflop, from the files of the whole set.

    python -m equiflop.data.fashion_mnist.make_part /usr/share/datasets/fashion-mnist

Raw pixels, class by class, in xz: 6.3 MB. Smaller than the same images as PNG, lossless WebP or JPEG 2000, bzip2, or
xz of the differences to neighbouring pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from equiflop.data.fashion_mnist import CLASSES, PART, PART_FILE, pack
from equiflop.data.idx import read_labelled_images
from equiflop.files import write_atomically


def first_of_each_class(folder: Path) -> tuple[Tensor, Tensor]:
    """The first images of every class, to train on and to test on.

    Args:
        folder: holds the four idx files.

    Returns:
        uint8 images, ``(10, PART[0], 28, 28)`` and ``(10, PART[1], 28, 28)``, in the order of the whole set.

    Raises:
        ValueError: if a file is missing or damaged, or holds fewer images of a class.
    """
    parts = []
    for prefix, count in zip(("train", "t10k"), PART, strict=True):
        images, labels = read_labelled_images(folder, prefix, len(CLASSES))
        chosen = [images[labels == label, 0][:count] for label in range(len(CLASSES))]
        if min(map(len, chosen)) < count:
            raise ValueError(f"{folder}: {prefix} holds fewer than {count} images of a class")
        parts.append(torch.stack(chosen))
    train, test = parts
    return train, test


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the part of Fashion-MNIST that comes with equiflop.")
    parser.add_argument("folder", type=Path, help="with the four idx files of the whole set")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name(PART_FILE))
    given = parser.parse_args()
    try:
        content = pack(*first_of_each_class(given.folder))
        write_atomically(given.output, lambda file: file.write(content))
    except (ValueError, OSError) as error:
        sys.exit(f"make_part.py: {error}")
    print(f"{given.output}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
