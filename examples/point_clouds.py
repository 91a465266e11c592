"""Point clouds of solids: a transformer invariant to the symmetries of a cube, and its plain twin.

Twelve classes of solids with random proportions are sampled on their surface, with noise, and a quarter of every cloud
hidden. All networks are trained on upright solids; one plain network also sees them turned by the 24 rotations of a
cube. They are tested on upright solids, on solids turned by those 24 rotations, and on solids turned any way. Two of
the classes are a left and a right screw: the rotations keep them apart, and a network invariant to reflections cannot.

    python examples/point_clouds.py --output benchmarks/point_clouds.json   # minutes
    python examples/point_clouds.py --quick                                 # seconds, a smoke test
    python examples/point_clouds.py --networks "E(24)" "E(48)"              # some of the networks
    python examples/point_clouds.py --throughput                            # speed by width, no training
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop import macs
from equiflop.benchmark.machine import describe_machine
from equiflop.files import write_text
from equiflop.groups import octahedral_rotations
from equiflop.models.point_transformer import PlainPointTransformer, PointTransformer

Sampler = Callable[[np.random.Generator, int], np.ndarray]

CUBE = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
CUBE_FACES = [
    (0, 1, 3), (0, 3, 2), (4, 5, 7), (4, 7, 6), (0, 1, 5), (0, 5, 4),
    (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 3, 7), (1, 7, 5),
]  # fmt: skip
PYRAMID = np.array([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, -1], [0, 0, 1]])
PYRAMID_FACES = [(0, 1, 2), (0, 2, 3), (0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)]
TETRAHEDRON = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
TETRAHEDRON_FACES = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
OCTAHEDRON = 1.4 * np.concatenate([np.eye(3), -np.eye(3)])
OCTAHEDRON_FACES = [(x, y, z) for x in (0, 3) for y in (1, 4) for z in (2, 5)]
PRISM = np.array([[-1.0, -1, -1], [1, -1, -1], [0, -1, 1], [-1, 1, -1], [1, 1, -1], [0, 1, 1]])
PRISM_FACES = [(0, 1, 2), (3, 4, 5), (0, 1, 4), (0, 4, 3), (1, 2, 5), (1, 5, 4), (2, 0, 3), (2, 3, 5)]


def on_triangles(
    generator: np.random.Generator, count: int, vertices: np.ndarray, faces: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """Points spread evenly over the triangles of a mesh, shape ``(count, 3)``."""
    corners = vertices[np.array(faces)]
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    chosen = generator.choice(len(faces), size=count, p=areas / areas.sum())
    along = generator.random((count, 2))
    along = np.where(along.sum(axis=1, keepdims=True) > 1.0, 1.0 - along, along)
    return corners[chosen, 0] + np.einsum("ni,nij->nj", along, edges[chosen])


def mesh(vertices: np.ndarray, faces: Sequence[tuple[int, int, int]]) -> Sampler:
    """A sampler of a solid with flat faces."""
    return lambda generator, count: on_triangles(generator, count, vertices, faces)


def ellipsoid(generator: np.random.Generator, count: int) -> np.ndarray:
    """A sphere; the random proportions make it an ellipsoid."""
    directions = generator.normal(size=(count, 3))
    return 1.2 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def round_column(top: float) -> Sampler:
    """A cylinder (``top=1``) or cone (``top=0``): mantle between radius 1 below and ``top`` above, and its ends."""

    def sample(generator: np.random.Generator, count: int) -> np.ndarray:
        mantle = (1.0 + top) * np.hypot(2.0, 1.0 - top)  # areas over pi
        areas = np.array([mantle, 1.0, top**2])
        part = generator.choice(3, size=count, p=areas / areas.sum())
        share = generator.random(count)
        # Radii: the square is uniform where the area grows with the radius.
        low, high = top**2, 1.0
        on_mantle = np.sqrt(low + (high - low) * share) if top < 1.0 else np.ones(count)
        height = 1.0 - 2.0 * (on_mantle - top) / (1.0 - top) if top < 1.0 else 2.0 * share - 1.0
        radius = np.choose(part, [on_mantle, np.sqrt(share), top * np.sqrt(share)])
        angle = generator.uniform(0.0, 2.0 * np.pi, count)
        z = np.choose(part, [height, np.full(count, -1.0), np.full(count, 1.0)])
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=-1)

    return sample


def torus(generator: np.random.Generator, count: int) -> np.ndarray:
    """A ring around the vertical axis."""
    thickness = generator.uniform(0.25, 0.45)
    around, across = generator.uniform(0.0, 2.0 * np.pi, (2, count))
    radius = 1.0 + thickness * np.cos(across)
    return np.stack([radius * np.cos(around), radius * np.sin(around), thickness * np.sin(across)], axis=-1)


def corner_piece(generator: np.random.Generator, count: int) -> np.ndarray:
    """Two boxes joined to an L."""
    width = generator.uniform(0.3, 0.5)
    upright = CUBE * [width, 0.5, 1.0] - [1.0 - width, 0.0, 0.0]
    foot = CUBE * [1.0, 0.5, width] - [0.0, 0.0, 1.0 - width]
    vertices = np.concatenate([upright, foot])
    faces = CUBE_FACES + [(a + 8, b + 8, c + 8) for a, b, c in CUBE_FACES]
    return on_triangles(generator, count, vertices, faces)


def screw(hand: float) -> Sampler:
    """A thin tube along a helix around the vertical axis; ``hand`` is +1 for a right and -1 for a left screw."""

    def sample(generator: np.random.Generator, count: int) -> np.ndarray:
        turns, start = generator.uniform(1.25, 2.25), generator.uniform(0.0, 2.0 * np.pi)
        share = generator.random(count)
        angle = hand * (start + 2.0 * np.pi * turns * share)
        centre = np.stack([np.cos(angle), np.sin(angle), 2.4 * share - 1.2], axis=-1)
        return centre + 0.06 * generator.normal(size=(count, 3))

    return sample


SOLIDS: dict[str, Sampler] = {
    "ellipsoid": ellipsoid,
    "box": mesh(CUBE, CUBE_FACES),
    "cylinder": round_column(1.0),
    "cone": round_column(0.0),
    "torus": torus,
    "pyramid": mesh(PYRAMID, PYRAMID_FACES),
    "tetrahedron": mesh(TETRAHEDRON, TETRAHEDRON_FACES),
    "octahedron": mesh(OCTAHEDRON, OCTAHEDRON_FACES),
    "prism": mesh(PRISM, PRISM_FACES),
    "L-shape": corner_piece,
    "left screw": screw(-1.0),
    "right screw": screw(1.0),
}
#: What is trained: name in the tables, and how many times the number of epochs.
NETWORKS = {"plain": 1, "plain, augmented": 1, "plain, augmented, 4x epochs": 4, "E(24)": 1, "E(48)": 1}
SCREWS = (list(SOLIDS).index("left screw"), list(SOLIDS).index("right screw"))


def make_clouds(count: int, points: int, seed: int, noise: float = 0.04) -> tuple[Tensor, Tensor]:
    """Upright clouds ``(count, points, 3)`` and their classes, the classes in turn.

    Every cloud has proportions of its own, a random quarter hidden (what lies furthest along a random direction),
    and noise.
    """
    generator = np.random.default_rng(seed)
    samplers = list(SOLIDS.values())
    clouds = np.empty((count, points, 3))
    for i in range(count):
        proportions = generator.uniform(0.7, 1.3, 3)
        surface = samplers[i % len(samplers)](generator, 2 * points) * proportions
        direction = generator.normal(size=3)
        seen = np.argsort(surface @ direction)[: 2 * points * 3 // 4]
        chosen = generator.choice(seen, size=points, replace=False)
        clouds[i] = surface[chosen] + noise * generator.normal(size=(points, 3))
    return torch.from_numpy(clouds).float(), torch.arange(count) % len(samplers)


def turned(clouds: Tensor, matrices: Tensor) -> Tensor:
    """Every cloud by its own matrix: ``(B, N, 3)`` and ``(B, 3, 3)`` to ``(B, N, 3)``."""
    return clouds @ matrices.mT


def cube_turns(count: int, generator: torch.Generator) -> Tensor:
    """Random rotations of a cube, ``(count, 3, 3)``."""
    matrices = torch.from_numpy(octahedral_rotations()).float()
    return matrices[torch.randint(len(matrices), (count,), generator=generator)]


def any_turns(count: int, generator: torch.Generator) -> Tensor:
    """Uniform random rotations, ``(count, 3, 3)``, from uniform unit quaternions."""
    w, x, y, z = F.normalize(torch.randn(count, 4, generator=generator), dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def build(network: str, width: int, depth: int, heads: int) -> nn.Module:
    """A network by its name in the tables."""
    options: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads}
    if network.startswith("plain"):
        return PlainPointTransformer(len(SOLIDS), **options)
    return PointTransformer(len(SOLIDS), group="rotations" if network == "E(24)" else "full", **options)


def train(network: str, model: nn.Module, clouds: Tensor, labels: Tensor, arguments: argparse.Namespace) -> float:
    """AdamW with one cycle of the learning rate; the median of the seconds per epoch."""
    epochs = arguments.epochs * NETWORKS[network]
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    batches = len(clouds) // arguments.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=epochs * batches)
    seconds = []
    model.train()
    for _ in range(epochs):
        start = time.perf_counter()
        order = torch.randperm(len(clouds), generator=generator)[: batches * arguments.batch]
        for chosen in order.split(arguments.batch):
            batch = clouds[chosen]
            if "augmented" in network:
                batch = turned(batch, cube_turns(len(batch), generator))
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds.append(time.perf_counter() - start)
        print(f"  epoch {len(seconds):3d}/{epochs}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return statistics.median(seconds)


@torch.inference_mode()
def predict(model: nn.Module, clouds: Tensor, batch: int) -> Tensor:
    """The class of every cloud."""
    model.eval()
    return torch.cat([model(part).argmax(dim=-1) for part in clouds.split(batch)])


@torch.inference_mode()
def clouds_per_second(models: dict[str, nn.Module], clouds: Tensor, rounds: int = 7) -> dict[str, float]:
    """Throughput in evaluation mode on one batch: networks in turns, median of the rounds after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            model.eval()
            start = time.perf_counter()
            model(clouds)
            times[name].append(time.perf_counter() - start)
    return {name: len(clouds) / statistics.median(values[2:]) for name, values in times.items()}


def experiment(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and test the chosen networks."""
    clouds, labels = make_clouds(arguments.clouds, arguments.points, 2 * arguments.seed)
    upright, classes = make_clouds(arguments.tests, arguments.points, 2 * arguments.seed + 1)
    generator = torch.Generator().manual_seed(arguments.seed)
    tests = {
        "upright": upright,
        "turned by the cube's 24 rotations": turned(upright, cube_turns(len(upright), generator)),
        "turned any way": turned(upright, any_turns(len(upright), generator)),
    }
    is_screw = (classes == SCREWS[0]) | (classes == SCREWS[1])
    rows: list[dict[str, Any]] = []
    for network in arguments.networks:
        torch.manual_seed(arguments.seed)
        model = build(network, arguments.width, arguments.depth, arguments.heads)
        print(network, file=sys.stderr)
        seconds = train(network, model, clouds, labels, arguments)
        predictions = {name: predict(model, test, arguments.batch) for name, test in tests.items()}
        called_a_screw = (predictions["upright"] == SCREWS[0]) | (predictions["upright"] == SCREWS[1])
        row: dict[str, Any] = {
            "network": network,
            "macs": macs(model, ((arguments.points, 3),)),
            "parameters": sum(p.numel() for p in model.parameters()),
            "accuracy": {name: (found == classes).double().mean().item() for name, found in predictions.items()},
            "screws right": (predictions["upright"] == classes)[is_screw].double().mean().item(),
            "screws called a screw": called_a_screw[is_screw].double().mean().item(),
            "seconds per epoch": seconds,
        }
        rows.append(row)
    return rows


def throughput_by_width(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """MACs and clouds per second of untrained networks of several widths."""
    clouds, _ = make_clouds(32, arguments.points, arguments.seed)
    rows: list[dict[str, Any]] = []
    for width in (96, 192, 384, 768):
        models = {name: build(name, width, arguments.depth, width // 48) for name in ("plain", "E(24)", "E(48)")}
        speed = clouds_per_second(models, clouds)
        counts = {name: macs(model, ((arguments.points, 3),)) for name, model in models.items()}
        rows.append({"width": width, "macs": counts, "clouds per second": speed})
    return rows


def print_experiment(rows: list[dict[str, Any]]) -> None:
    """The results as a table."""
    columns = ("MACs (M)", "params (k)", "upright", "24 turns", "any turn", "screws", "s/epoch")
    print(f"{'network':<27}" + "".join(f" {column:>10}" for column in columns))
    for row in rows:
        percent = [100.0 * value for value in (*row["accuracy"].values(), row["screws right"])]
        cells = [f"{row['macs'] / 1e6:.2f}", f"{row['parameters'] / 1e3:.1f}", *(f"{value:.1f}" for value in percent)]
        cells += [f"{row['seconds per epoch']:.1f}"]
        print(f"{row['network']:<27}" + "".join(f" {cell:>10}" for cell in cells))


def print_throughput(rows: list[dict[str, Any]]) -> None:
    """The speed by width as a table."""
    columns = [f"{name} {unit}" for unit in ("MACs (M)", "clouds/s") for name in rows[0]["macs"]]
    print(f"{'width':>5}" + "".join(f" {column:>15}" for column in columns))
    for row in rows:
        cells = [f"{value / 1e6:.2f}" for value in row["macs"].values()]
        cells += [f"{value:.0f}" for value in row["clouds per second"].values()]
        print(f"{row['width']:>5}" + "".join(f" {cell:>15}" for cell in cells))


def write_json(path: Path, update: dict[str, Any]) -> None:
    """Put results into a file, beside what other runs wrote there; at no moment is the file incomplete."""
    result = json.loads(path.read_text()) if path.exists() else {}
    for part, entries in update.items():
        result[part] = {**result.get(part, {}), **entries}
    write_text(path, json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and data, to see that it runs")
    parser.add_argument("--throughput", action="store_true", help="measure speed by width instead of training")
    parser.add_argument(
        "--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="what to train (default all)"
    )
    parser.add_argument("--width", type=int, default=96, help="channels; a multiple of 48 (default 96)")
    parser.add_argument("--depth", type=int, default=2, help="blocks (default 2)")
    parser.add_argument("--heads", type=int, default=2, help="attention heads; a divisor of width / 48 (default 2)")
    parser.add_argument("--points", type=int, default=64, help="points per cloud (default 64)")
    parser.add_argument("--clouds", type=int, default=1920, help="training clouds (default 1920)")
    parser.add_argument("--tests", type=int, default=1200, help="test clouds (default 1200)")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training clouds (default 16)")
    parser.add_argument("--batch", type=int, default=32, help="clouds per step (default 32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, parameters and order (default 0)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.width, arguments.depth, arguments.heads = 48, 1, 1
        arguments.points, arguments.clouds, arguments.tests, arguments.epochs = 24, 96, 48, 1
    return arguments


def main() -> None:
    """Run, print the table, write the file."""
    arguments = parse()
    name = "throughput" if arguments.throughput else "experiment"
    if arguments.throughput:
        rows = throughput_by_width(arguments)
        print_throughput(rows)
        key = "width"
    else:
        rows = experiment(arguments)
        print_experiment(rows)
        key = "network"
    if arguments.output:
        run = {
            **describe_machine(),
            "settings": {option: value for option, value in vars(arguments).items() if option != "output"},
        }
        write_json(arguments.output, {name: {str(row[key]): {**row, "run": run} for row in rows}})


if __name__ == "__main__":
    main()
