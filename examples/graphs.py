"""Handwritten digits as graphs and sets: networks for which the order of the nodes does not exist.

A digit of scikit-learn (1,797 images of 8x8 pixels) becomes the graph of its dark pixels: a node carries the ink, an
edge the distance of two pixels as six Gaussians, weighted with the ink of both. As a set, or as a list, a node carries
row, column and ink. Compared are

* ``graph``: ``equiflop.models.graph_network.GraphNetwork``; it sees distances alone, so it is invariant to rotations
  and reflections of the image too;
* ``set``: ``SetNetwork`` on rows, columns and ink;
* ``list``: a plain MLP on the padded list of the same numbers in raster order;
* ``list, shuffled data``: the same trained on shuffled lists;

on the test digits as they are, with their nodes shuffled, and rotated by quarter turns and mirrored.

    python examples/graphs.py --output benchmarks/graphs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from equiflop import macs
from equiflop.benchmark.machine import describe_machine
from equiflop.files import write_text
from equiflop.models.graph_network import GraphNetwork, SetNetwork

SIDE = 8
CLASSES = 10
#: A pixel is a node if it has more ink than this, of 16.
THRESHOLD = 4.0
#: Nodes of the digit that has most of them; smaller sets are padded.
NODES = 34
#: Centres in pixels of the Gaussians of the distance on an edge, and their width.
DISTANCES = (0.0, 1.0, 2.0, 3.0, 4.5, 6.0)
WIDTH = 0.7

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def node_lists(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Dark pixels in raster order: (row, column, ink) within -1..1, ``(N, NODES, 3)``, and the mask ``(N, NODES)``."""
    nodes = np.zeros((len(images), NODES, 3))
    mask = np.zeros((len(images), NODES), dtype=bool)
    middle = (SIDE - 1) / 2.0
    for i, image in enumerate(images):
        rows, columns = np.nonzero(image > THRESHOLD)
        nodes[i, : len(rows)] = np.stack([rows / middle - 1, columns / middle - 1, image[rows, columns] / 8.0 - 1], 1)
        mask[i, : len(rows)] = True
    return torch.tensor(nodes, dtype=torch.float32), torch.tensor(mask)


@cache
def all_lists() -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Nodes and masks of all digits as they are and in seven rotated and mirrored forms, and their labels."""
    digits = load_digits()
    turned = [np.rot90(digits.images, turns, axes=(1, 2)) for turns in range(4)]
    views = [*turned, *[view[:, :, ::-1] for view in turned]]
    return [node_lists(view) for view in views], torch.tensor(digits.target)


def shuffled(nodes: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The nodes of every set in a random order, the padding still behind them."""
    keys = torch.rand(mask.shape, generator=generator).masked_fill(~mask, 2.0)
    return nodes.gather(1, keys.argsort(1).unsqueeze(-1).expand_as(nodes))


def edge_features(nodes: Tensor) -> Tensor:
    """Gaussians of the distance in pixels, times the ink of both ends: ``(B, n, n, len(DISTANCES))``."""
    places = nodes[..., :2] * (SIDE - 1) / 2.0
    ink = (nodes[..., 2:] + 1.0) / 2.0
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).square().sum(-1, keepdim=True).sqrt()
    gaussians = torch.exp(-((distance - distance.new_tensor(DISTANCES)) / WIDTH).square() / 2.0)
    return gaussians * (ink.unsqueeze(2) * ink.unsqueeze(1))


class ListNetwork(nn.Module):
    """MLP on the padded list of nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * NODES, width),
            nn.GELU(),
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width),
            nn.Linear(width, CLASSES),
        )

    def forward(self, nodes: Tensor) -> Tensor:
        return self.layers(nodes)


def graph_forward(model: nn.Module, nodes: Tensor, mask: Tensor) -> Tensor:
    """Ink on the nodes, distances on the edges; no padding beyond the largest graph of the batch."""
    n = int(mask.sum(1).max())
    return model(nodes[:, :n, 2:], edge_features(nodes[:, :n]), mask[:, :n])


def set_forward(model: nn.Module, nodes: Tensor, mask: Tensor) -> Tensor:
    """Row, column and ink on the nodes."""
    return model(nodes, mask)


def list_forward(model: nn.Module, nodes: Tensor, mask: Tensor) -> Tensor:
    """Row, column and ink one after the other; the padding is zero."""
    return model(nodes)


def train(
    model: nn.Module, forward: Forward, data: tuple[Tensor, Tensor, Tensor], epochs: int, seed: int, shuffle: bool
) -> float:
    """AdamW with a one-cycle schedule; returns the seconds that it took."""
    nodes, mask, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = epochs * -(-len(labels) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(32):
            inputs = shuffled(nodes[batch], mask[batch], generator) if shuffle else nodes[batch]
            loss = F.cross_entropy(forward(model, inputs, mask[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


@torch.inference_mode()
def predictions(model: nn.Module, forward: Forward, nodes: Tensor, mask: Tensor) -> Tensor:
    """The predicted class of every digit."""
    pairs = zip(nodes.split(60), mask.split(60), strict=True)
    return torch.cat([forward(model, *pair).argmax(-1) for pair in pairs])


def evaluate(model: nn.Module, forward: Forward, views: list[tuple[Tensor, Tensor]], labels: Tensor) -> dict[str, Any]:
    """Accuracy as they are, over five shuffles and over seven turned and mirrored views; graphs per second."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    nodes, mask = views[0]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        plain = predictions(model, forward, nodes, mask)
        seconds.append(time.perf_counter() - start)
    mixed = torch.stack([predictions(model, forward, shuffled(nodes, mask, generator), mask) for _ in range(5)])
    turned = torch.stack([predictions(model, forward, *view) for view in views[1:]])
    wrong: dict[str, int] = {}
    for true, found in zip(labels.tolist(), plain.tolist(), strict=True):
        if true != found:
            wrong[f"{true} as {found}"] = wrong.get(f"{true} as {found}", 0) + 1
    return {
        "accuracy": float((plain == labels).double().mean()),
        "accuracy_shuffled": float((mixed == labels).double().mean()),
        "changed_by_shuffling": float((mixed != plain).double().mean()),
        "accuracy_turned": float((turned == labels).double().mean()),
        "changed_by_turning": float((turned != plain).double().mean()),
        "digits_per_second": len(labels) / statistics.median(seconds),
        "confusions": dict(sorted(wrong.items(), key=lambda item: -item[1])),
    }


def compare(quick: bool, seeds: int) -> list[dict[str, Any]]:
    """Train and test all networks, once per seed; the rows of the table, one per network, runs inside."""
    epochs = {"graph": 1 if quick else 30, "others": 2 if quick else 60}
    node_width, edge_width, depth = (8, 4, 1) if quick else (32, 12, 2)
    set_width, list_width = (16, 16) if quick else (60, 102)
    points = ((NODES, 3),)
    networks: dict[str, tuple[Callable[[], nn.Module], Forward, bool, tuple[tuple[int, ...], ...]]] = {
        "graph": (
            lambda: GraphNetwork(1, len(DISTANCES), CLASSES, node_width=node_width, edge_width=edge_width, depth=depth),
            graph_forward,
            False,
            ((NODES, 1), (NODES, NODES, len(DISTANCES))),
        ),
        "set": (lambda: SetNetwork(3, CLASSES, width=set_width, depth=3), set_forward, False, points),
        "list": (lambda: ListNetwork(list_width), list_forward, False, points),
        "list, shuffled data": (lambda: ListNetwork(list_width), list_forward, True, points),
    }
    views, labels = all_lists()
    rows = []
    print(f"{'network':<21}{'parameters':>11}{'MACs':>12}{'accuracy':>10}{'shuffled':>10}{'turned':>10}{'train s':>9}"
          f"{'digits/s':>10}")  # fmt: skip
    for name, (make, forward, shuffle, shapes) in networks.items():
        runs = []
        for seed in range(seeds):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            first, test = order[:1437], order[1437:]
            torch.manual_seed(seed)
            model = make()
            data = (views[0][0][first], views[0][1][first], labels[first])
            seconds = train(model, forward, data, epochs["graph" if name == "graph" else "others"], seed, shuffle)
            test_views = [(nodes[test], mask[test]) for nodes, mask in views]
            runs.append({"seed": seed, "train_seconds": seconds, **evaluate(model, forward, test_views, labels[test])})
        row = {
            "network": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": macs(model, shapes),
            **{key: statistics.mean(run[key] for run in runs) for key in runs[0] if key not in ("seed", "confusions")},
            "runs": runs,
        }
        rows.append(row)
        print(f"{name:<21}{row['parameters']:>11,}{row['macs']:>12,}{row['accuracy']:>10.2%}"
              f"{row['accuracy_shuffled']:>10.2%}{row['accuracy_turned']:>10.2%}{row['train_seconds']:>9.1f}"
              f"{row['digits_per_second']:>10,.0f}", flush=True)  # fmt: skip
    confusions: dict[str, int] = {}
    for run in rows[0]["runs"]:
        for pair, count in run["confusions"].items():
            confusions[pair] = confusions.get(pair, 0) + count
    worst = sorted(confusions.items(), key=lambda item: -item[1])[:6]
    print("The graph network, which knows distances alone, most often took "
          + ", ".join(f"{pair} ({count})" for pair, count in worst) + ".")  # fmt: skip
    return rows


def main() -> None:
    """Train, measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks, hardly trained: seconds, no result")
    parser.add_argument("--seeds", type=int, default=2, help="runs with different splits and weights")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows = compare(arguments.quick, 1 if arguments.quick else arguments.seeds)
    if arguments.output:
        result = {
            **describe_machine(),
            "nodes": NODES,
            "networks": rows,
        }
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
