"""The idx files of MNIST and its kin, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch

_UINT8 = 0x08


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file ``stem`` or ``stem.gz`` in ``folder``, or None."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path) -> torch.Tensor:
    """Read an idx file of unsigned bytes.

    Returns:
        a uint8 tensor of the shape that the file declares.

    Raises:
        ValueError: if the file cannot be read, is not such a file, or holds less or more than it declares.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the file is damaged or incomplete") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8 or content[3] == 0:
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    rank = content[3]
    header = 4 + 4 * rank
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist() if len(content) >= header else []
    if len(shape) != rank or len(content) - header != prod(shape):
        raise ValueError(f"{path}: declares shape {tuple(shape)} but holds {max(0, len(content) - header)} bytes of it")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def read_labelled_images(folder: Path, prefix: str, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read ``{prefix}-images-idx3-ubyte`` and ``{prefix}-labels-idx1-ubyte`` (plain or ``.gz``) from a folder.

    Returns:
        uint8 images, shape ``(N, 1, H, W)``, and int64 labels, shape ``(N,)``.

    Raises:
        ValueError: if a file is missing, damaged, or the two do not fit together.
    """
    paths = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = find_idx(folder, stem)
        if path is None:
            raise ValueError(f"{folder / stem}.gz: no such file")
        paths.append(path)
    images, labels = read_idx(paths[0]), read_idx(paths[1])
    if images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"{paths[0]}: has shape {tuple(images.shape)}; images have shape (N, height, width)")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{paths[1]}: has shape {tuple(labels.shape)}, but there are {len(images)} images")
    if int(labels.max()) >= classes:
        raise ValueError(f"{paths[1]}: holds label {int(labels.max())}; labels go from 0 to {classes - 1}")
    return images.unsqueeze(1), labels.long()
