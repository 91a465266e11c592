"""Outlines of handwritten digits as periodic signals: a network that cannot tell where the signal starts.

Every digit of scikit-learn (1,797 images of 8x8 pixels) is looked at from the centroid of its ink in 64 directions. A
direction gives six channels: the radius of the outline, and the ink at five distances. Turning the digit about its
centroid by 360/64 degrees shifts the signal by one place. Compared are

* ``shift-invariant``: ``equiflop.models.signal_network.SignalNetwork``, made of ``CirculantLinear``;
* ``plain, same width``: the same blocks with dense matrices on all ``64 * width`` values in place of circulant ones;
* ``plain, same parameters``: likewise, narrower;
* ``plain, same parameters, shifted data``: the latter trained on randomly shifted signals.

Then the time of one ``CirculantLinear`` is measured against the product with its dense matrix as the period grows.

    python examples/signals.py --output benchmarks/signals.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from equiflop import macs
from equiflop.files import write_text
from equiflop.models.signal_network import SignalNetwork
from equiflop.nn.circulant import CirculantLinear

ANGLES = 64
#: Distances from the centroid in pixels: of the ink channels, and of the search for the outline.
RINGS = (0.75, 1.5, 2.25, 3.0, 3.75)
REACH = np.arange(0.0, 6.01, 0.1)
CHANNELS = 1 + len(RINGS)
#: A digit ends where no ink above this share of full ink lies farther out.
OUTLINE = 0.25
CLASSES = 10


def polar_signal(image: np.ndarray) -> np.ndarray:
    """An image of ink in 0..1 as a periodic signal, ``(ANGLES, CHANNELS)``: outline radius / 4, ink on five rings."""
    rows, columns = np.indices(image.shape)
    centre = [(image * axis).sum() / image.sum() for axis in (rows, columns)]
    angles = 2.0 * np.pi * np.arange(ANGLES) / ANGLES
    outward = interpolated(image, centre, angles, REACH)
    radius = (REACH * (outward > OUTLINE)).max(axis=1)
    rings = interpolated(image, centre, angles, np.array(RINGS))
    return np.concatenate([radius[:, None] / 4.0, rings], axis=1)


def interpolated(image: np.ndarray, centre: list[float], angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Bilinear values at the polar places around ``centre``, ``(len(angles), len(radii))``; 0 outside the image."""
    padded = np.pad(image, 8)
    row = centre[0] + 8 + np.outer(np.sin(angles), radii)
    column = centre[1] + 8 + np.outer(np.cos(angles), radii)
    r, c = np.floor(row).astype(int), np.floor(column).astype(int)
    down, right = row - r, column - c
    upper = (1 - right) * padded[r, c] + right * padded[r, c + 1]
    lower = (1 - right) * padded[r + 1, c] + right * padded[r + 1, c + 1]
    return (1 - down) * upper + down * lower


@cache
def all_signals() -> tuple[Tensor, Tensor]:
    """The signals of all digits, ``(1797, ANGLES, CHANNELS)``, and their labels."""
    digits = load_digits()
    signals = np.stack([polar_signal(image / 16.0) for image in digits.images])
    return torch.tensor(signals, dtype=torch.float32), torch.tensor(digits.target)


def load_signals(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training signals and labels, test signals and labels: 1,437 and 360 digits, drawn by ``seed``."""
    signals, labels = all_signals()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    signals = (signals - signals[train].mean((0, 1))) / signals[train].std((0, 1))
    return signals[train], labels[train], signals[test], labels[test]


def shifted(signals: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Every signal rolled by a random number of places."""
    offsets = torch.randint(ANGLES, (len(signals), 1), generator=generator)
    places = (torch.arange(ANGLES) - offsets) % ANGLES
    return signals.gather(1, places.unsqueeze(-1).expand_as(signals))


class PlainBlock(nn.Module):
    """Residual block of a dense map of all values, GELU and a second dense map or one of the channels."""

    def __init__(self, features: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(features, features)
        self.drop = nn.Dropout(dropout)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(-1, (-1, self.channels))
        mixed = self.drop(F.gelu(self.mix(self.norm(rows).flatten(-2)))).unflatten(-1, (-1, self.channels))
        return x + self.proj(mixed).flatten(-2)


class PlainNetwork(nn.Module):
    """MLP on the flattened signal: the blocks of ``SignalNetwork`` with dense matrices in place of circulant ones."""

    def __init__(self, features: int, channels: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(ANGLES * CHANNELS, features)
        self.blocks = nn.Sequential(*[PlainBlock(features, channels, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x.flatten(-2)))))


def train(name: str, model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, folder: Path) -> float:
    """Train a network in place; returns the seconds that it took."""

    def objective(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        signals, labels = batch
        logits = network(shifted(signals) if name.endswith("shifted data") else signals)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        return loss, {"accuracy": logits.argmax(1) == labels}

    settings = {"epochs": epochs, "batch_size": 64, "lr": 2e-3, "warmup_epochs": 0.1 * epochs, "clip_grad": 0.0}
    trainer = shared.train(f"{name} {seed}", model, objective, (x, y), folder, seed=seed, **settings)
    return shared.training_seconds(trainer)


@torch.inference_mode()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Accuracy on the test signals as they are and over five random shifts of each, and signals per second."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    straight = model(x).argmax(-1)
    rolled = torch.stack([model(shifted(x, generator)).argmax(-1) for _ in range(5)])
    seconds = shared.median_seconds({"all": lambda: model(x)}, 5)["all"]
    wrong: dict[str, int] = {}
    for true, found in zip(y.tolist(), straight.tolist(), strict=True):
        if true != found:
            wrong[f"{true} as {found}"] = wrong.get(f"{true} as {found}", 0) + 1
    return {
        "accuracy": float((straight == y).double().mean()),
        "accuracy_shifted": float((rolled == y).double().mean()),
        "changed_by_shift": float((rolled != straight).double().mean()),
        "signals_per_second": len(x) / seconds,
        "confusions": dict(sorted(wrong.items(), key=lambda item: -item[1])),
    }


def compare_networks(quick: bool, seeds: int, out: Path) -> list[dict[str, Any]]:
    """Train and test all networks, once per seed; the rows of the table, one per network, runs inside."""
    width, depth, dropout, epochs = (8, 1, 0.0, 2) if quick else (24, 3, 0.2, 40)
    wide = (ANGLES * width, width)
    narrow = (64, 8) if quick else (144, 8)
    networks: dict[str, Callable[[], nn.Module]] = {
        "shift-invariant": lambda: SignalNetwork(ANGLES, CHANNELS, CLASSES, width=width, depth=depth, dropout=dropout),
        "plain, same width": lambda: PlainNetwork(*wide, depth, dropout),
        "plain, same parameters": lambda: PlainNetwork(*narrow, depth, dropout),
        "plain, same parameters, shifted data": lambda: PlainNetwork(*narrow, depth, dropout),
    }
    rows = []
    print(f"{'network':<38}{'parameters':>12}{'MACs':>13}{'accuracy':>10}{'shifted':>10}{'changed':>10}"
          f"{'train s':>9}{'signals/s':>11}")  # fmt: skip
    for name, make in networks.items():
        runs = []
        for seed in range(seeds):
            x, y, test_x, test_y = load_signals(seed)
            torch.manual_seed(seed)
            model = make()
            with shared.folder_for(out, quick) as folder:
                seconds = train(name, model, x, y, epochs, seed, folder)
            runs.append({"seed": seed, "train_seconds": seconds, **evaluate(model, test_x, test_y)})
        row = {
            "network": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": macs(model, ((ANGLES, CHANNELS),)),
            **{key: statistics.mean(run[key] for run in runs) for key in runs[0] if key not in ("seed", "confusions")},
            "runs": runs,
        }
        rows.append(row)
        print(f"{name:<38}{row['parameters']:>12,}{row['macs']:>13,}{row['accuracy']:>10.2%}"
              f"{row['accuracy_shifted']:>10.2%}{row['changed_by_shift']:>10.2%}{row['train_seconds']:>9.1f}"
              f"{row['signals_per_second']:>11,.0f}", flush=True)  # fmt: skip
    return rows


@torch.no_grad()
def compare_paths(quick: bool, channels: int = 16, batch: int = 16) -> dict[str, Any]:
    """Milliseconds of ``CirculantLinear`` and of the product with its dense matrix as the period grows."""
    lengths = (16, 32, 64) if quick else (16, 32, 64, 128, 256, 512, 1024, 2048)
    rows: list[dict[str, Any]] = []
    print(f"\n{'n':>6}{'FFT MACs':>14}{'dense MACs':>16}{'FFT ms':>10}{'dense ms':>10}{'speedup':>9}")
    for n in lengths:
        layer = CirculantLinear(n, channels, channels, bias=False)
        x = torch.randn(batch, n, channels)
        # Long periods: any matrix of that size (4 GiB at n = 2048) costs the same product and takes less time to make.
        matrix = layer.matrix() if n <= 256 else torch.ones(n * channels, n * channels)
        ways: dict[str, Callable[[], object]] = {
            "fft": partial(layer, x),
            "dense": partial(F.linear, x.flatten(1), matrix),
        }
        seconds = shared.median_seconds(ways, 5 if n > 512 else 15)
        count = macs(layer, ((n, channels),))
        dense, speedup = (n * channels) ** 2, seconds["dense"] / seconds["fft"]
        rows.append({"n": n, "fft_macs": count, "dense_macs": dense, "seconds": seconds, "speedup": speedup})
        times = f"{1e3 * seconds['fft']:>10.3f}{1e3 * seconds['dense']:>10.3f}"
        print(f"{n:>6}{count:>14,}{dense:>16,}{times}{speedup:>9.2f}", flush=True)
        del matrix, ways
    crossing = next((row["n"] for row in rows if all(r["speedup"] > 1 for r in rows if r["n"] >= row["n"])), None)
    print(f"The FFT is faster from n = {crossing} on ({channels} channels, batch {batch}).")
    return {"channels": channels, "batch": batch, "rows": rows, "faster_from_n": crossing}


def main() -> None:
    """Train, measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and few lengths: seconds, no result")
    parser.add_argument("--seeds", type=int, default=3, help="runs with different splits and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/signals"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    networks = compare_networks(arguments.quick, 1 if arguments.quick else arguments.seeds, arguments.out)
    paths = compare_paths(arguments.quick)
    if arguments.output:
        result = shared.record(angles=ANGLES, channels=CHANNELS, networks=networks, paths=paths)
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
