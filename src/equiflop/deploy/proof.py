"""What a written file does in its runtime: the same as the network, the same for moved images, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equiflop.benchmark.timing import Spread, time_in_turns
from equiflop.checking import CheckReport, check
from equiflop.data import open_data
from equiflop.deploy.subject import Subject
from equiflop.deploy.targets import Runner, Target

#: Largest difference to the network, relative to its largest output; int8 is told and not judged.
DIFFERENCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
#: Largest difference between the answer to a moved image and the moved answer.
EQUIVARIANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2, "int8": 6e-2}

#: Least length of a turn in which a file's speed is measured; half as long again beside the plain one.
SECONDS = 0.2


@dataclass(frozen=True)
class Speed:
    """How fast a file runs.

    Attributes:
        latency_ms: milliseconds for one image by itself; None where the file takes larger batches alone.
        images_per_second: in batches.
        batch: their size.
    """

    latency_ms: float | None
    images_per_second: float
    batch: int


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        difference: largest difference to PyTorch's output in float32, relative to its largest value.
        equivariance: the report over all group elements; None for a plain network.
        agreement: share of images for which the likeliest class is PyTorch's; None without classes.
        accuracy: share of images that the file classifies rightly; None where their classes are not the network's.
        network_accuracy: the same of the network in PyTorch.
        images: how many.
        source: where they come from.
        share: of products that run in the asked precision; None where the runtime does not tell.
        size: of the file in bytes, with what lies beside it.
        faults: why the file is not what it should be; empty if it is.
        speed: of the file.
        plain: of the plain twin exported the same way, if it was asked for.
        speedup: how many times as many images a second as plain, by batch size.
    """

    difference: float
    equivariance: CheckReport | None
    agreement: float | None
    accuracy: float | None
    network_accuracy: float | None
    images: int
    source: str
    share: float | None
    size: int
    faults: tuple[str, ...]
    speed: Speed | None = None
    plain: Speed | None = None
    speedup: Mapping[int, Spread] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        speed = {
            key: None if value is None else vars(value) for key, value in (("own", self.speed), ("plain", self.plain))
        }
        return {
            "difference": self.difference,
            "equivariance": None if self.equivariance is None else self.equivariance.as_dict(),
            "agreement": self.agreement,
            "accuracy": self.accuracy,
            "network_accuracy": self.network_accuracy,
            "images": self.images,
            "source": self.source,
            "share": self.share,
            "bytes": self.size,
            "speed": speed,
            "speedup": {str(batch): vars(spread) for batch, spread in self.speedup.items()},
            "faults": list(self.faults),
        }


class RuntimeNetwork(nn.Module):
    """A file in its runtime in the place of the network, so that ``check`` can ask it.

    Args:
        runner: the file.
        subject: what it was made from.
        batch: the only size of a batch that it takes, or None for any.
    """

    def __init__(self, runner: Runner, subject: Subject, batch: int | None) -> None:
        super().__init__()
        self.runner, self.batch = runner, batch
        if subject.group is not None:
            self.group = subject.group
        self.in_chans = subject.input_size[0]
        for name in ("output_rep", "invariant_output"):
            if hasattr(subject.model, name):
                setattr(self, name, getattr(subject.model, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeNetwork:
        return self  # a runtime cannot be copied, and nothing changes it

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(run(self.runner, images.numpy(), self.batch))


def run(runner: Runner, images: np.ndarray, batch: int | None) -> np.ndarray:
    """Run a file on any number of images, in batches of the size that it takes."""
    if batch is None:
        return runner(images)
    outputs = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        outputs.append(runner(np.ascontiguousarray(padded))[: len(part)])
    return np.concatenate(outputs)


@dataclass(frozen=True)
class Samples:
    """Images on which files are compared with networks.

    Attributes:
        images: ``(N, C, H, W)``, normalised.
        source: where they come from.
        labels: ``(N,)``; None for images without.
        classes: what the labels mean.
    """

    images: np.ndarray
    source: str
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def accuracy(self, output: np.ndarray, classes: tuple[str, ...]) -> float | None:
        """The share of right answers of a network for these classes; None where they are others."""
        if self.labels is None or self.classes != classes:
            return None
        return float((output.argmax(1) == self.labels).mean())


def sample_images(subject: Subject, data: str | None, count: int, training: bool = False) -> Samples:
    """Images of a data set, from all over it, or smooth random ones.

    Args:
        subject: what is exported.
        data: the data set, or None.
        count: how many; fewer where there are no more.
        training: its training images in place of its test images.
    """
    if data is not None:
        found = open_data(data, preprocessing=subject.preprocessing)
        split = found.train if training else found.test
        places = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
        batches = list(split.batches(places, 64))
        images = torch.cat([batch.images for batch in batches]).numpy()
        labels = torch.cat([batch.labels for batch in batches]).numpy()
        source = f"{'training' if training else 'test'} images of {found.name}"
        return Samples(images, source, labels, tuple(found.classes))
    generator = torch.Generator().manual_seed(1)
    channels, height, width = subject.input_size
    coarse = torch.randn(count, channels, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return Samples(smooth.numpy(), "smooth random images")


def prove(
    subject: Subject,
    target: Target,
    path: Path,
    runner: Runner,
    precision: str,
    batch: int | None,
    samples: Samples,
) -> Proof:
    """Run a file and compare it with the network.

    Args:
        subject: what was exported.
        target: its runtime.
        path: the file.
        runner: the file, loaded.
        precision: the asked precision.
        batch: the only size of a batch that the file takes, or None for any.
        samples: what to compare on.
    """
    images = samples.images
    found = np.concatenate([run(runner, part, batch) for part in np.array_split(images, -(-len(images) // 64))])
    with torch.no_grad():
        expected = torch.cat([subject.model(part) for part in torch.from_numpy(images).split(batch or 8)]).numpy()
    faults: list[str] = []
    difference = float("inf")
    if found.shape != expected.shape:
        faults.append(f"the output is {found.shape} and must be {expected.shape}")
    elif not np.isfinite(found).all():
        faults.append("the output is not finite")
    else:
        difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    limit = DIFFERENCES.get(precision)
    if limit is not None and np.isfinite(difference) and difference > limit:
        faults.append(f"it differs from the network by {difference:.1e} of the largest output, more than {limit:.0e}")
    agreement = accuracy = network_accuracy = None
    if expected.ndim == 2 and subject.classes and found.shape == expected.shape:
        agreement = float((found.argmax(1) == expected.argmax(1)).mean())
        accuracy, network_accuracy = (samples.accuracy(output, subject.classes) for output in (found, expected))
    report = None
    if subject.group is not None and not faults:
        report = check(
            RuntimeNetwork(runner, subject, batch),
            input_size=subject.input_size,
            randomize=False,
            tolerance=EQUIVARIANCE[precision],
        )
        if report.verdict == "not equivariant":
            faults.append(f"moved images change the answer by {report.max_error:.1e}, more than {report.tolerance:.0e}")
    beside = [path, *(p for p in path.parent.glob(f"{path.stem}.*") if p != path and p.suffix in (".bin", ".data"))]
    return Proof(
        difference=difference,
        equivariance=report,
        agreement=agreement,
        accuracy=accuracy,
        network_accuracy=network_accuracy,
        images=len(images),
        source=samples.source,
        share=target.share(path, precision),
        size=sum(p.stat().st_size for p in beside),
        faults=tuple(faults),
    )


def speed(runner: Runner, images: np.ndarray, batch: int | None) -> Speed:
    """How fast a file runs."""
    return _speeds({"own": runner}, images, batch, 3, SECONDS)["own"][0]


def _speeds(
    runners: Mapping[str, Runner], images: np.ndarray, batch: int | None, rounds: int, seconds: float
) -> dict[str, tuple[Speed, dict[int, list[float]]]]:
    """Speeds of files in turns, and the seconds of every turn by batch size."""
    sizes = [1, 8] if batch is None else [batch]
    seconds_of: dict[str, dict[int, list[float]]] = {name: {} for name in runners}
    for size in sizes:
        some = np.ascontiguousarray(np.resize(images, (size, *images.shape[1:])))
        calls = {name: (lambda runner=runner, some=some: runner(some)) for name, runner in runners.items()}
        for name, times in time_in_turns(calls, rounds, seconds, torch.device("cpu")).items():
            seconds_of[name][size] = times
    speeds = {}
    for name, by_size in seconds_of.items():
        largest = sizes[-1]
        latency = 1e3 * Spread.of(by_size[1]).median if 1 in by_size else None
        speeds[name] = (Speed(latency, largest / Spread.of(by_size[largest]).median, largest), by_size)
    return speeds


def beside_plain(
    own: Runner, plain: Runner, images: np.ndarray, batch: int | None, rounds: int = 7
) -> tuple[Speed, Speed, dict[int, Spread]]:
    """Both files in turns: their speeds, and the ratio within a turn by batch size."""
    speeds = _speeds({"own": own, "plain": plain}, images, batch, rounds, 1.5 * SECONDS)
    (mine, my_times), (theirs, their_times) = speeds["own"], speeds["plain"]
    ratios = {
        size: Spread.of([b / a for a, b in zip(my_times[size], their_times[size], strict=True)]) for size in my_times
    }
    return mine, theirs, ratios
