"""Segmentation that mirrors and turns with the image: E(ViT) against its plain twin on drawn scenes.

Scenes of 64x64 pixels hold one to four overlapping shapes, all drawn by this script. A scene's mirror image is as
likely as the scene. Turned scenes are not: shapes stand upright within 20 degrees and light comes from above, as in
photographs. Three networks of one width, depth and patch size learn to name the shape at every pixel by one recipe:
E(ViT) of group flop, E(ViT) of group octic, and timm's plain ViT. They are then tried on the test scenes as they are,
mirrored, and turned.

    python examples/segmentation.py --output benchmarks/segmentation.json --figure docs/segmentation.png

``--quick`` runs everything in seconds on a few scenes; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import equiflop
from equiflop.files import write_atomically, write_text
from equiflop.models import EquivariantVisionTransformer
from equiflop.models.segmentation import Segmenter

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")
SIDE = 64
PATCH = 8
NETWORKS = ("E(ViT) flop", "E(ViT) octic", "plain ViT")
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda x: x.flip(-1),
    "turned": lambda x: x.rot90(1, (-2, -1)),
}
BACK: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda x: x.flip(-1),
    "turned": lambda x: x.rot90(-1, (-2, -1)),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(shared.Recipe):
    """What all networks share."""

    train_scenes: int
    test_scenes: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    depth: int = 4


FULL = Recipe(train_scenes=4000, test_scenes=1000, epochs=12)
QUICK = Recipe(train_scenes=64, test_scenes=16, epochs=1, batch_size=16, width=32, depth=2, heads=2)


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points in a shape's own coordinates (``v`` up, radius about 1) lie in it."""
    radius = np.hypot(u, v)
    if shape == "disc":
        return radius < 0.9
    if shape == "ring":
        return (radius > 0.5) & (radius < 1.0)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if shape == "triangle":
        return (v > -0.7) & (abs(u) < (1.1 - v) / math.sqrt(3))
    assert shape == "cross"
    return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1.0)


def texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Plain, striped or chequered brightness in [-1, 1]."""
    kind = rng.integers(3)
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(5, 9)
    a = np.sin(frequency * (u * math.cos(angle) + v * math.sin(angle)))
    b = np.sin(frequency * (v * math.cos(angle) - u * math.sin(angle)))
    return np.zeros_like(u) if kind == 0 else a if kind == 1 else a * b


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene.

    Returns:
        image, float32 ``(3, 64, 64)``, and the class of every pixel, int64 ``(64, 64)``.
    """
    y, x = np.mgrid[SIDE / 2 - 0.5 : -SIDE / 2 : -1, -SIDE / 2 + 0.5 : SIDE / 2]
    labels = np.zeros((SIDE, SIDE), dtype=np.int64)
    image = np.empty((3, SIDE, SIDE))
    image[:] = rng.uniform(0.0, 0.4, 3)[:, None, None]
    for _ in range(rng.integers(1, 5)):
        kind = int(rng.integers(1, len(CLASSES)))
        size, tilt = rng.uniform(10, 18), math.radians(rng.uniform(-20, 20))
        dx, dy = x - rng.uniform(-24, 24), y - rng.uniform(-24, 24)
        u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / size
        v = (dy * math.cos(tilt) - dx * math.sin(tilt)) / size
        mask = inside(CLASSES[kind], u, v)
        colour = rng.uniform(0.5, 1.0, 3)[:, None] + 0.1 * texture(rng, u, v)[mask]
        image[:, mask] = colour
        labels[mask] = kind
    slope = rng.uniform(-0.15, 0.15)
    image += rng.uniform(0.1, 0.3) * y / SIDE + slope * x / SIDE  # light from above, from either side
    image += rng.normal(0.0, 0.05, image.shape)
    return image.astype(np.float32), labels


def draw_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` scenes: normalised images ``(count, 3, 64, 64)`` and classes ``(count, 64, 64)``."""
    rng = np.random.default_rng(seed)
    images, labels = zip(*(draw_scene(rng) for _ in range(count)), strict=True)
    return (torch.from_numpy(np.stack(images)) - 0.5) / 0.3, torch.from_numpy(np.stack(labels))


class PlainSegmenter(nn.Module):
    """timm's ViT and one linear map from every token to the logits of its pixels."""

    def __init__(self, backbone: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.head = nn.Linear(backbone.embed_dim, num_classes * PATCH**2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        tokens = self.backbone.forward_features(x)[:, self.backbone.num_prefix_tokens :]
        patches = self.head(tokens).unflatten(1, (rows, columns)).unflatten(-1, (self.num_classes, PATCH, PATCH))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def build(name: str, recipe: Recipe) -> nn.Module:
    """One of ``NETWORKS``, of the recipe's size."""
    options = recipe.vit(SIDE, PATCH)
    if name == "plain ViT":
        return PlainSegmenter(VisionTransformer(**options), len(CLASSES))
    return Segmenter(EquivariantVisionTransformer(**options, group=name.split()[1]), len(CLASSES))


def objective(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of all pixels, and the share of each scene's pixels that are right; no augmentation."""
    images, labels = batch
    logits = network(images)
    return F.cross_entropy(logits, labels), {"pixel_accuracy": (logits.argmax(1) == labels).float().mean((1, 2))}


def train(name: str, model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, folder: Path) -> float:
    """Train a network in place.

    Returns:
        images per second.
    """
    trainer = shared.train(
        name,
        model,
        objective,
        (images, labels),
        folder,
        **recipe.training(warmup=0.1),
    )
    return shared.training_rate(trainer)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every pixel, ``(B, 3, H, W)`` to ``(B, H, W)``."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(64)])


def scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Pixel accuracy and mean intersection over union of all classes."""
    n = len(CLASSES)
    confusion = torch.bincount((labels * n + predicted).flatten(), minlength=n * n).view(n, n).double()
    both = confusion.diag()
    return {
        "pixel_accuracy": float(both.sum() / confusion.sum()),
        "mean_iou": float((both / (confusion.sum(0) + confusion.sum(1) - both)).mean()),
    }


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores on the scenes as they are, mirrored and turned, and the share of pixels that change their class."""
    straight = predict(model, images)
    result: dict[str, Any] = {"straight": scores(straight, labels)}
    for view, move in VIEWS.items():
        predicted = predict(model, move(images))
        changed = (BACK[view](predicted) != straight).double().mean()
        result[view] = {**scores(predicted, move(labels)), "changed_pixels": float(changed)}
    return result


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| network | parameters | MACs | mIoU | mIoU mirrored | mIoU turned | pixel accuracy "
        "| changed if mirrored | changed if turned | im/s |",
        "| --- |" + " ---: |" * 9,
    ]
    for name, row in rows.items():
        straight, mirrored, turned = (row["scores"][view] for view in ("straight", "mirrored", "turned"))
        ious = " | ".join(f"{100 * part['mean_iou']:.2f} %" for part in (straight, mirrored, turned))
        changed = " | ".join(f"{100 * part['changed_pixels']:.3f} %" for part in (mirrored, turned))
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.3f} M | {row['macs'] / 1e6:.1f} M | {ious} "
            f"| {100 * straight['pixel_accuracy']:.2f} % | {changed} | {row['images_per_second']:.0f} |"
        )
    return "\n".join(lines)


def draw_figure(path: Path, models: dict[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    """Scenes on which plain changes most when they are mirrored: image, truth, predictions, differences.

    Raises:
        ImportError: if matplotlib is missing; it comes with the extra ``demo``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    equivariant, plain = models[NETWORKS[0]], models[NETWORKS[2]]
    mirror = VIEWS["mirrored"]
    ours, theirs = predict(equivariant, images), predict(plain, images)
    ours_back, theirs_back = mirror(predict(equivariant, mirror(images))), mirror(predict(plain, mirror(images)))
    order = (theirs != theirs_back).double().mean((1, 2)).argsort(descending=True, stable=True)
    chosen = order[len(order) // 4 :: max(1, len(order) // 4)][:3].tolist()  # at the quartiles, not the worst
    colours = ListedColormap(["#e8e8e8", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377"])
    columns = (
        "image", "truth", "E(ViT) flop", "mirrored\nand back", "changed", "plain", "mirrored\nand back", "changed"
    )  # fmt: skip
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * len(chosen) + 1.0), dpi=110, layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for row, i in zip(axes, chosen, strict=True):
        classes = (labels, ours, ours_back, None, theirs, theirs_back, None)
        pairs = iter(((ours, ours_back), (theirs, theirs_back)))
        row[0].imshow((images[i] * 0.3 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
        for axis, value in zip(row[1:], classes, strict=True):
            if value is None:
                before, after = next(pairs)
                different = before[i] != after[i]
                axis.imshow(~different.numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set_xlabel(f"{int(different.sum())} of {SIDE * SIDE} pixels", fontsize=8)
            else:
                axis.imshow(value[i].numpy(), cmap=colours, vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest")
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [Patch(color=colours(i)) for i in range(len(CLASSES))]
    figure.legend(handles, CLASSES, loc="outside lower center", ncols=len(CLASSES), fontsize=9, frameon=False)
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def main() -> None:
    """Train, evaluate, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and batches")
    parser.add_argument("--epochs", type=int, help="passes over the training scenes")
    parser.add_argument("--scenes", type=int, help="to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write; needs matplotlib")
    options = parser.parse_args()
    base = QUICK if options.quick else FULL
    given = {"seed": options.seed, "epochs": options.epochs, "train_scenes": options.scenes}
    recipe = replace(base, **{name: value for name, value in given.items() if value is not None})
    start = time.perf_counter()
    train_images, train_labels = draw_scenes(recipe.train_scenes, seed=2 * recipe.seed)
    test_images, test_labels = draw_scenes(recipe.test_scenes, seed=2 * recipe.seed + 1)
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        torch.manual_seed(recipe.seed)
        models[name] = build(name, recipe)
        with shared.folder_for(options.out, options.quick) as folder:
            speed = train(name, models[name], train_images, train_labels, recipe, folder)
        rows[name] = {
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "macs": equiflop.macs(models[name], (SIDE, SIDE)),
            "training_images_per_second": speed,
            "scores": evaluate(models[name], test_images, test_labels),
        }
    for name, rate in shared.throughput(models, test_images[:64], rounds=2 if options.quick else 15).items():
        rows[name]["images_per_second"] = rate
    print(table(rows))
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s in all, {torch.get_num_threads()} threads")
    if options.figure:
        draw_figure(options.figure, models, test_images, test_labels)
    if options.output:
        result = shared.record(seconds=seconds, recipe=asdict(recipe), classes=CLASSES, networks=rows)
        write_text(options.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
