"""CIFAR-10 in memory, from JPEG files or from torchvision, and what is measured on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equiflop.classify import MirrorAveraged, evaluate
from equiflop.data import ImageData, MemorySplit, Preprocessing
from equiflop.data.decode import decode_image, read_image
from equiflop.files import write_atomically

TEST_BATCH = 250  # that of the trainer, so that nothing is compiled again
NORMALISATION = Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def load_images(source: str | None, folder: Path) -> ImageData:
    """Read once, then kept in ``folder``.

    Args:
        source: a folder with ``train/CLASS/*`` and ``test/CLASS/*``; None: torchvision, which downloads.
        folder: where what was read is kept.
    """
    kept = folder / "images.pt"
    content = torch.load(kept, weights_only=True) if kept.is_file() else {}
    if content.get("source") != str(source):
        content = _read(source) | {"source": str(source)}
        write_atomically(kept, lambda file: torch.save(content, file))
    train, test = (MemorySplit(images, labels, NORMALISATION) for images, labels in (content["train"], content["test"]))
    return ImageData("CIFAR-10", source or "torchvision", tuple(content["classes"]), train, test)


def _read(source: str | None) -> dict[str, Any]:
    """Per split the images as bytes, shape ``(N, 3, 32, 32)``, and the labels; and the names of the classes."""
    content: dict[str, Any] = {}
    for part in ("train", "test"):
        if source is None:
            from torchvision.datasets import CIFAR10

            data = CIFAR10(str(Path.home() / ".cache" / "equiflop"), train=part == "train", download=True)
            classes = list(data.classes)
            pictures = [(decode_image(image, 3, part), label) for image, label in data]
        else:
            folder = Path(source) / part
            classes = sorted(place.name for place in folder.iterdir() if place.is_dir())
            pictures = [
                (read_image(path), label)
                for label, name in enumerate(classes)
                for path in sorted((folder / name).iterdir())
            ]
        images = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image, _ in pictures])
        images = images.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        content |= {part: (images, torch.tensor([label for _, label in pictures])), "classes": classes}
    return content


def measure(model: nn.Module, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Test accuracy, alone and averaged over both views, calibration error and changes, and how long it took."""
    start = time.perf_counter()
    alone = evaluate(model, data.test, TEST_BATCH, device, classes=len(data.classes))
    return {
        "test_seconds_both_views": time.perf_counter() - start,
        "accuracy": alone.top1,
        "accuracy_both_views": evaluate(MirrorAveraged(model), data.test, TEST_BATCH, device).top1,
        "calibration_error": alone.calibration_error,
        "changed_when_mirrored": alone.changed_share,
    }
