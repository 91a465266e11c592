"""Write the page's sample pictures: test images of Fashion-MNIST by a fixed rule, and what the networks say of them.

python web/make_samples.py --models web/models --output web/samples
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_models import NETWORKS, logits_of, softmax, test_batches
from PIL import Image

from equiflop.data import ImageData, open_data
from equiflop.files import write_atomically, write_text

#: Further images, on which plain's answer changes.
CHANGED = 5


def chosen(data: ImageData, plain: Any) -> list[int]:
    """The first test image of every class, then the first others on which plain's answer changes."""
    labels = np.concatenate([labels for _, labels in test_batches(data)])
    places = [int(np.flatnonzero(labels == label)[0]) for label in range(len(data.classes))]
    start = 0
    for images, _ in test_batches(data):
        changes = plain(images).argmax(1) != plain(np.ascontiguousarray(images[..., ::-1])).argmax(1)
        new = [start + int(i) for i in np.flatnonzero(changes) if start + int(i) not in places]
        places += new[: len(data.classes) + CHANGED - len(places)]
        if len(places) == len(data.classes) + CHANGED:
            break
        start += len(images)
    return places


def make(models: Path, output: Path, source: str) -> None:
    """Write the pictures and ``index.json``."""
    data = open_data(source)
    files = {name: (models / f"{name}.onnx").read_bytes() for name in NETWORKS}
    runs = {name: logits_of(file) for name, file in files.items()}
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in (data.preprocessing.mean, data.preprocessing.std)
    )
    samples: list[dict[str, Any]] = []
    for place in chosen(data, runs["plain"]):
        images, labels, _ = next(data.test.batches(torch.tensor([place]), 1))
        pixels = np.rint((images[0].numpy() * std + mean) * 255).astype(np.uint8)[0]
        views = np.stack([images[0].numpy(), images[0].numpy()[..., ::-1]])
        name = data.classes[int(labels[0])]
        number = len(samples)
        file = f"{number:02}.png"
        write_atomically(output / file, partial(Image.fromarray(pixels).save, format="PNG"))
        also = "" if number < len(data.classes) else ", on which the plain network changes its mind"
        samples.append(
            {
                "file": file,
                "test_image": place,
                "class": name,
                "alt": f"{name}, light grey on black{also}",
                "probabilities": {
                    network: [[round(float(p), 7) for p in row] for row in softmax(run(views))]
                    for network, run in runs.items()
                },
            }
        )
    content = {
        "rule": f"The first test image of each of the {len(data.classes)} classes; then the first {CHANGED} others on "
        "which the plain network changes its mind when they are mirrored.",
        "first": len(data.classes),
        "samples": samples,
    }
    write_text(output / "index.json", json.dumps(content, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the page's sample pictures.")
    parser.add_argument("--models", type=Path, default=Path("web/models"), help="folder of both ONNX files")
    parser.add_argument("--output", type=Path, default=Path("web/samples"), help="folder of the pictures")
    parser.add_argument("--data", default="fashion-mnist", help="Fashion-MNIST, or its folder")
    given = parser.parse_args()
    try:
        make(given.models, given.output, given.data)
    except (ValueError, OSError) as error:
        sys.exit(f"make_samples.py: {error}")


if __name__ == "__main__":
    main()
