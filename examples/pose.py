"""Pose estimation without the second pass: E(ViT) against its plain twin, with and without flip test.

Drawn figures stand, walk and wave, seen from anywhere around: from the front, the back and the side, so that left and
right follow from the way a figure faces, as with people, and from nothing that a mirror would contradict (both sides of
a figure look alike). Clutter lies behind them, and things in front hide some of their joints. Two networks of one
width, depth and patch size learn to mark 13 joints by one recipe, both with mirrored training images: timm's ViT and
E(ViT) of group flop, each with ViTPose's simple decoder. Plain is tried with one pass and with two (flip test: the mean
over the image and its mirror image), E with one.

    python examples/pose.py --output benchmarks/pose.json --figure docs/pose.png

``--quick`` runs everything in seconds on a few figures; its numbers mean nothing. A long file, since it draws its data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from PIL import Image, ImageDraw
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import equiflop
from equiflop.files import write_atomically, write_text
from equiflop.models import EquivariantVisionTransformer
from equiflop.models.pose import (
    PoseEstimator,
    average_precision,
    correct_keypoints,
    flip_test,
    joints_of_heatmaps,
    object_keypoint_similarity,
    target_heatmaps,
)

SIZE = (64, 48)
PATCH = 8
JOINTS = (
    "nose",
    *(
        f"{side} {joint}"
        for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ),
)
FLIP_PAIRS = tuple((i, i + 1) for i in range(1, 13, 2))
PARTNERS = torch.tensor([0, *(j for left, right in FLIP_PAIRS for j in (right, left))])
BONES = ((1, 2), (7, 8), (1, 7), (2, 8), (1, 3), (3, 5), (2, 4), (4, 6), (7, 9), (9, 11), (8, 10), (10, 12))
#: Heatmap pixels per image pixel: four values for every patch.
SCALE = 4 / PATCH
#: COCO's fall-off constants of these joints (2 sigma).
FALLOFF = torch.tensor([0.052, *(k for k in (0.158, 0.144, 0.124, 0.214, 0.174, 0.178) for _ in range(2))])
NETWORKS = ("plain ViT", "E(ViT) flop")


@dataclass(frozen=True, kw_only=True)
class Recipe(shared.Recipe):
    """What both networks share."""

    train_figures: int
    test_figures: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    depth: int = 6
    sigma: float = 1.0


FULL = Recipe(train_figures=20000, test_figures=2000, epochs=15)
QUICK = Recipe(train_figures=64, test_figures=16, epochs=1, batch_size=16, width=32, depth=2, heads=2)


def limb(rng: np.random.Generator, side: int, swing: tuple[float, float], out: float, bend: tuple[float, float]) -> Any:
    """Directions of the upper and lower half of an arm or leg; forward swing and bend in degrees, both sides alike."""
    angle, spread = math.radians(rng.uniform(*swing)), math.radians(rng.uniform(0, out))
    bent = angle + math.radians(rng.uniform(*bend))
    return [
        np.array([side * math.sin(s), -math.cos(s) * math.cos(a), math.cos(s) * math.sin(a)])
        for a, s in ((angle, spread), (bent, 0.6 * spread))
    ]


def pose(rng: np.random.Generator) -> np.ndarray:
    """Joints of a figure of height 1 in its own coordinates, its left, up, forward; shape ``(13, 3)``."""
    joints = np.zeros((13, 3))
    joints[0] = (0.0, 0.91, 0.085)
    for k, side in enumerate((1, -1)):
        joints[1 + k], joints[7 + k] = (0.13 * side, 0.80, 0.0), (0.08 * side, 0.49, 0.0)
        upper, lower = limb(rng, side, (-50, 150), 80, (0, 110))
        joints[3 + k] = joints[1 + k] + 0.17 * upper
        joints[5 + k] = joints[3 + k] + 0.16 * lower
        thigh, shin = limb(rng, side, (-25, 60), 18, (-70, 0))
        joints[9 + k] = joints[7 + k] + 0.25 * thigh
        joints[11 + k] = joints[9 + k] + 0.24 * shin
    return joints


def draw_figure_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """One figure.

    Returns:
        image, uint8 ``(64, 48, 3)``; its joints in pixels (x, y), float32 ``(13, 2)``; its height in pixels.
    """
    fine = 4
    height, width = (fine * side for side in SIZE)
    colours = rng.integers(30, 230, (16, 3))
    picture = Image.new("RGB", (width, height), tuple(colours[0].tolist()))
    pen = ImageDraw.Draw(picture)

    def clutter(count: int, first: int, largest: float) -> None:
        for k in range(count):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            a, b = rng.uniform(4, largest, 2) * fine
            shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            shape((x - a, y - b, x + a, y + b), fill=tuple(colours[first + k % 6].tolist()))

    clutter(6, 1, 14)
    tall = rng.uniform(44, 54) * fine
    yaw, roll = rng.uniform(-math.pi, math.pi), math.radians(rng.uniform(-12, 12))
    centre = np.array([width / 2 + rng.uniform(-4, 4) * fine, height / 2 + rng.uniform(-3, 3) * fine])

    def seen(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels, and how near they are."""
        x = points[..., 0] * math.cos(yaw) + points[..., 2] * math.sin(yaw)
        near = points[..., 2] * math.cos(yaw) - points[..., 0] * math.sin(yaw)
        y = points[..., 1] - 0.47
        across, up = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
        return centre + tall * np.stack([across, -up], axis=-1), near

    joints = pose(rng)
    shirt, trousers, skin, hair = (colours[k].astype(float) for k in range(8, 12))
    parts: list[tuple[float, Callable[[], None]]] = []

    def shade(colour: np.ndarray, near: float) -> tuple[int, ...]:
        return tuple(np.clip(colour * (1.0 + 0.9 * near), 0, 255).astype(int).tolist())

    def ball(point: Any, radius: float, colour: np.ndarray) -> None:
        (x, y), near = seen(np.asarray(point))
        r, depth = radius * tall, float(near)
        parts.append((depth, lambda: pen.ellipse((x - r, y - r, x + r, y + r), fill=shade(colour, depth))))

    def bone(a: np.ndarray, b: np.ndarray, thick: float, colour: np.ndarray) -> None:
        ends, near = seen(np.stack([a, b]))
        r = thick * tall

        def draw() -> None:
            fill = shade(colour, float(near.mean()))
            pen.line([tuple(end) for end in ends], fill=fill, width=int(2 * r))
            for x, y in ends:
                pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)

        parts.append((float(near.mean()), draw))

    ball((0.0, 0.925, -0.02), 0.078, hair)
    ball((0.0, 0.905, 0.02), 0.066, skin)
    ball(joints[0], 0.016, 0.7 * skin)
    for side in (1, -1):
        ball((0.03 * side, 0.925, 0.082), 0.014, np.zeros(3))
    torso, _ = seen(joints[[1, 2, 8, 7]])
    parts.append((0.0, lambda: pen.polygon([tuple(p) for p in torso], fill=shade(shirt, 0.0))))
    for k in (0, 1):
        bone(joints[1 + k], joints[7 + k], 0.035, shirt)
        bone(joints[1 + k], joints[3 + k], 0.034, shirt)
        bone(joints[3 + k], joints[5 + k], 0.026, skin)
        bone(joints[7 + k], joints[9 + k], 0.042, trousers)
        bone(joints[9 + k], joints[11 + k], 0.034, trousers)
        bone(joints[11 + k], joints[11 + k] + np.array([0.0, -0.02, 0.07]), 0.022, hair)
    for _, draw in sorted(parts, key=lambda part: part[0]):
        draw()
    if rng.random() < 0.5:
        clutter(1, 12, 9)
    image = np.asarray(picture.resize((SIZE[1], SIZE[0]), Image.Resampling.BOX))
    return image, (seen(joints)[0] / fine).astype(np.float32), tall / fine


@dataclass(frozen=True)
class Figures:
    """Drawn figures.

    Attributes:
        images: normalised, ``(N, 3, 64, 48)``.
        joints: in pixels of the image (x, y), ``(N, 13, 2)``.
        heights: of the figures in pixels, ``(N,)``.
    """

    images: Tensor
    joints: Tensor
    heights: Tensor

    def mirrored(self, which: Tensor) -> Figures:
        """Those of ``which`` mirrored, left and right joints exchanged."""
        swapped = self.joints[:, PARTNERS] * torch.tensor([-1.0, 1.0]) + torch.tensor([float(SIZE[1]), 0.0])
        return Figures(
            torch.where(which[:, None, None, None], self.images.flip(-1), self.images),
            torch.where(which[:, None, None], swapped, self.joints),
            self.heights,
        )


def draw_figures(count: int, seed: int) -> Figures:
    """``count`` figures."""
    rng = np.random.default_rng(seed)
    images, joints, heights = zip(*(draw_figure_image(rng) for _ in range(count)), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return Figures((pixels - 0.5) / 0.25, torch.from_numpy(np.stack(joints)), torch.tensor(heights))


class PlainEstimator(nn.Module):
    """timm's ViT and the simple decoder of ViTPose."""

    def __init__(self, backbone: VisionTransformer, num_joints: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
            nn.Conv2d(backbone.embed_dim, num_joints, 3, padding=1),
        )
        last: Any = self.head[-1]
        nn.init.normal_(last.weight, std=0.001)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)[:, self.backbone.num_prefix_tokens :]
        return self.head(tokens.transpose(1, 2).unflatten(-1, (x.shape[-2] // PATCH, x.shape[-1] // PATCH)))


def build(name: str, recipe: Recipe) -> nn.Module:
    """One of ``NETWORKS``, of the recipe's size."""
    options = recipe.vit(SIZE, PATCH)
    if name == "plain ViT":
        return PlainEstimator(VisionTransformer(**options), len(JOINTS))
    return PoseEstimator(EquivariantVisionTransformer(**options, group="flop"), len(JOINTS), FLIP_PAIRS)


def train(name: str, model: nn.Module, figures: Figures, recipe: Recipe, folder: Path) -> float:
    """Train a network in place, every image mirrored half of the time.

    Returns:
        images per second.
    """
    height, width = (round(SCALE * side) for side in SIZE)

    def objective(network: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> Tensor:
        batch = Figures(*tensors).mirrored(torch.rand(len(tensors[0])) < 0.5)
        visible = torch.ones(batch.joints.shape[:2], dtype=torch.bool)
        wanted = target_heatmaps(SCALE * batch.joints - 0.5, visible, (height, width), recipe.sigma)
        return 100 * (network(batch.images) - wanted).square().mean()

    trainer = shared.train(
        name,
        model,
        objective,
        (figures.images, figures.joints, figures.heights),
        folder,
        **recipe.training(warmup=0.05),
    )
    return shared.training_rate(trainer)


def two_passes(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The flip test."""
    return lambda images: flip_test(model, images, FLIP_PAIRS)


@torch.no_grad()
def find(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Joints in pixels of the image, ``(B, 3, H, W)`` to ``(B, 13, 2)``."""
    parts = [joints_of_heatmaps(model(part))[0] for part in images.split(64)]
    return (torch.cat(parts) + 0.5) / SCALE


def evaluate(model: Callable[[Tensor], Tensor], figures: Figures) -> dict[str, float]:
    """PCK, AP, and how far joints move where the image is mirrored and the answer mirrored back."""
    found = find(model, figures.images)
    everything = torch.ones(len(figures.images), dtype=torch.bool)
    turned = figures.mirrored(everything)
    back = Figures(figures.images, find(model, turned.images), figures.heights).mirrored(everything).joints
    visible = torch.ones(found.shape[:2], dtype=torch.bool)
    area = 0.3 * figures.heights**2  # as tall as it is, and 0.3 of that wide
    moved = (found - back).norm(dim=-1)
    exchanged = (found - figures.joints[:, PARTNERS]).norm(dim=-1) < (found - figures.joints).norm(dim=-1)
    return {
        "pck": correct_keypoints(found, figures.joints, visible, figures.heights, share=0.05),
        "ap": average_precision(object_keypoint_similarity(found, figures.joints, visible, area, FALLOFF)),
        "nearer_to_the_other_side": float(exchanged[:, 1:].double().mean()),
        "pixels_moved_by_mirroring": float(moved.mean()),
        "largest_move": float(moved.max()),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| network | parameters | MACs | PCK | OKS-AP | nearer to the other side | pixels moved by mirroring | im/s |",
        "| --- |" + " ---: |" * 7,
    ]
    for name, row in rows.items():
        got = row["scores"]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.3f} M | {row['macs'] / 1e6:.1f} M | {100 * got['pck']:.1f} % "
            f"| {100 * got['ap']:.1f} % | {100 * got['nearer_to_the_other_side']:.1f} % "
            f"| {got['pixels_moved_by_mirroring']:.4f} | {row['images_per_second']:.0f} |"
        )
    return "\n".join(lines)


def draw_figure(path: Path, models: dict[str, Callable[[Tensor], Tensor]], figures: Figures) -> None:
    """Figures on which plain is unsure: what is true, and what each network says of the image and of its mirror image.

    Raises:
        ImportError: if matplotlib is missing; it comes with the extra ``demo``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    everything = torch.ones(len(figures.images), dtype=torch.bool)
    turned = figures.mirrored(everything)
    answers = {}
    for name, model in models.items():
        mirrored = Figures(figures.images, find(model, turned.images), figures.heights).mirrored(everything).joints
        answers[name] = find(model, figures.images), mirrored
    plain = answers[NETWORKS[0]]
    order = (plain[0] - plain[1]).norm(dim=-1).mean(-1).argsort(descending=True, stable=True)
    chosen = order[len(order) // 20 :: max(1, len(order) // 5)][:4].tolist()
    columns = ["image and truth"]
    columns += [text for name in NETWORKS for text in (f"{name}", f"{name}, mirrored\nand back")]
    canvas = Figure(figsize=(1.9 * len(columns), 2.5 * len(chosen) + 0.7), dpi=110, layout="constrained")
    axes = canvas.subplots(len(chosen), len(columns), squeeze=False)
    colours = {"left": "#ee6677", "right": "#4477aa", "": "#ccbb44"}
    for row, i in zip(axes, chosen, strict=True):
        shown = [figures.joints[i], *(joints[i] for name in NETWORKS for joints in answers[name])]
        for axis, joints in zip(row, shown, strict=True):
            axis.imshow((figures.images[i] * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), extent=(0, 48, 64, 0))
            for a, b in BONES:
                side = "left" if a % 2 and b % 2 else "right" if not a % 2 and not b % 2 else ""
                axis.plot(*joints[[a, b]].T.numpy(), color=colours[side], linewidth=2)
            axis.plot(*joints[0].numpy(), "o", color=colours[""], markersize=4)
            axis.set_xlim(0, 48)
            axis.set_ylim(64, 0)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [Line2D([], [], color=colours[side], linewidth=2) for side in ("left", "right")]
    labels = ["the figure's left arm and leg", "its right arm and leg"]
    canvas.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    FigureCanvasAgg(canvas)
    write_atomically(path, lambda file: canvas.savefig(file, format="png"))


def main() -> None:
    """Train, evaluate, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of figures, weights and batches")
    parser.add_argument("--epochs", type=int, help="passes over the training figures")
    parser.add_argument("--out", type=Path, default=Path("runs/pose"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write; needs matplotlib")
    options = parser.parse_args()
    base = QUICK if options.quick else FULL
    recipe = Recipe(**{**asdict(base), "seed": options.seed, "epochs": options.epochs or base.epochs})
    start = time.perf_counter()
    training = draw_figures(recipe.train_figures, seed=2 * recipe.seed)
    test = draw_figures(recipe.test_figures, seed=2 * recipe.seed + 1)
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        torch.manual_seed(recipe.seed)
        model = build(name, recipe)
        with shared.folder_for(options.out, options.quick) as folder:
            speed = train(name, model, training, recipe, folder)
        models[name] = model
        row = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": equiflop.macs(model, SIZE),
            "training_images_per_second": speed,
        }
        rows[name] = {**row, "scores": evaluate(model, test)}
        if name == NETWORKS[0]:
            twice = f"{name}, flip test"
            models[twice] = two_passes(model)
            rows[twice] = {**row, "macs": 2 * row["macs"], "scores": evaluate(models[twice], test)}
    for name, rate in shared.throughput(models, test.images[:64], rounds=2 if options.quick else 15).items():
        rows[name]["images_per_second"] = rate
    print(table(rows))
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s in all, {torch.get_num_threads()} threads")
    if options.figure:
        draw_figure(options.figure, models, test)
    if options.output:
        result = shared.record(
            seconds=seconds, recipe=asdict(recipe), joints=JOINTS, flip_pairs=FLIP_PAIRS, networks=rows
        )
        write_text(options.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
