"""What a network is trained on: samples by number, in an order that seed and epoch decide."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from equiflop.data.randomness import derive_seed, epoch_order
from equiflop.runtime.interrupt import leave_signals_to_the_parent
from equiflop.runtime.processes import Processes
from equiflop.training.config import RunConfig


@dataclass(frozen=True)
class Loaded:
    """A batch as it was read.

    Attributes:
        content: what the objective is given, of tensors in lists, tuples and dictionaries.
        count: samples in it; if none could be read, the content is a stand-in that weighs nothing.
        problems: one line for every sample that could not be read and is not in the batch.
    """

    content: Any
    count: int
    problems: list[str] = field(default_factory=list)


@runtime_checkable
class Samples(Protocol):
    """Training data that deliver the same epochs again, whoever asks and from whatever batch on."""

    def __len__(self) -> int:
        """Number of samples that an epoch visits."""
        ...

    def order(self, epoch: int) -> Tensor:
        """Numbers of the samples in the order of an epoch, shape ``(len(self),)``."""
        ...

    def batches(self, samples: Tensor, batch_size: int, epoch: int) -> Iterator[Loaded]:
        """The given samples in the given order, in batches; a function of the arguments alone.

        Args:
            samples: numbers that :meth:`order` gave, shape ``(n,)``.
            batch_size: samples at once; fewer in the last batch.
            epoch: number of the epoch, from 0.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """How an epoch's samples are shared out over steps, batches and processes; what does not fill a step is left out.

    Attributes:
        batch_size: samples a batch.
        steps: of an epoch.
        accumulate: batches a step in every process.
        processes: how many there are.
    """

    batch_size: int
    steps: int
    accumulate: int
    processes: int

    @classmethod
    def of(cls, samples: int, config: RunConfig, processes: Processes, unit: str) -> Plan:
        """For a run on so many samples, called ``unit``.

        Raises:
            ValueError: if they are too few for one step.
        """
        shares = processes.count * config.accumulate
        size = min(config.batch_size, samples // shares)
        size -= size % config.batch_multiple
        if size == 0:
            pairs = f" and pairs of {unit}" if config.batch_multiple == 2 else ""
            raise ValueError(
                f"{samples} training {unit} are too few for {processes.count} processes times "
                f"accumulate={config.accumulate}{pairs}"
            )
        return cls(size, samples // (size * shares), config.accumulate, processes.count)

    @property
    def samples_per_step(self) -> int:
        """In all processes together."""
        return self.batch_size * self.accumulate * self.processes

    def share(self, order: Tensor, step: int, rank: int) -> Tensor:
        """What a process reads from a step on, in order; of all samples in the order of the epoch."""
        used = order[: self.steps * self.samples_per_step]
        return used.view(-1, self.accumulate, self.processes, self.batch_size)[step:, :, rank].flatten()


class DatasetSamples:
    """The samples of a map-style dataset of torch.

    Before a sample is read, the generators of torch, numpy and Python are seeded by (seed, epoch, sample): augmentation
    in ``__getitem__`` is the same with any number of workers, and when a run goes on. A ``TensorDataset`` is read by
    whole batches.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        seed: of the run; decides the order too.
        workers: processes that read.
        collate: makes a batch of a list of samples; by default torch's own way.

    Raises:
        TypeError: if the dataset has no length or cannot be read by number.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int = 0,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not all(
            hasattr(dataset, name) for name in ("__len__", "__getitem__")
        ):
            raise TypeError(
                f"data={type(dataset).__name__} cannot be read by number; give a map-style dataset (__len__ and "
                "__getitem__), or an object with the methods of equiflop.training.Samples"
            )
        self.dataset: Any = dataset
        self.seed = seed
        self.workers = workers
        self.collate = collate

    def __len__(self) -> int:
        return len(self.dataset)

    def order(self, epoch: int) -> Tensor:
        """See :class:`Samples`."""
        return epoch_order(self.seed, epoch, len(self))

    def batches(self, samples: Tensor, batch_size: int, epoch: int) -> Iterator[Loaded]:
        """See :class:`Samples`."""
        chunks = samples.split(batch_size) if len(samples) else ()
        if isinstance(self.dataset, TensorDataset) and self.collate is default_collate:
            for chunk in chunks:
                yield Loaded(list(self.dataset[chunk]), len(chunk))
            return
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.dataset, self.seed, epoch),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self.workers,
            collate_fn=self.collate,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
        )
        for chunk, content in zip(chunks, loader, strict=True):
            yield Loaded(content, len(chunk))


class _Seeded(Dataset[Any]):
    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset = dataset
        self.place = (seed, epoch)

    def __getitem__(self, sample: int) -> Any:
        seed_everything(derive_seed(*self.place, sample))
        return self.dataset[sample]


def seed_everything(seed: int, other: int | None = None) -> None:
    """Seed torch's generators, and those of numpy and Python by the same seed or another."""
    torch.manual_seed(seed)
    seed = seed if other is None else other
    random.seed(seed)
    np.random.seed(seed % 2**32)
