"""Trainer with any network, any objective and any data: a small segmentation, and mistakes in one line each."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from equiflop.classify import load_model
from equiflop.training import CheckpointError, RunConfig, Trainer, TrainingInterrupted
from equiflop.training.state import load_state, saved_states
from test_processes import environment, free_port
from test_training import StopAfter


def scenes(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images of two brightnesses, ``(count, 1, 8, 8)``, and which of them every pixel has."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, 4, 4, generator=generator) > 0.5).long()
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return labels.unsqueeze(1) + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), labels


def network(seed: int = 0) -> nn.Module:
    """With batch norm and dropout, which have statistics and draw numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 2, 3, padding=1)
    )


def objective(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the pixels of images mirrored and brightened at random, by three generators."""
    images, labels = batch
    if torch.rand(()) < 0.5:
        images, labels = images.flip(-1), labels.flip(-1)
    logits = network(images + 0.1 * random.random() + 0.1 * np.random.rand())
    return F.cross_entropy(logits, labels), {"pixels": (logits.argmax(1) == labels).float().mean((1, 2))}


def measure(model: nn.Module) -> dict[str, float]:
    """Share of the pixels of other scenes that are right, and the loss."""
    assert not model.training and not torch.is_grad_enabled()
    images, labels = scenes(20, seed=1)
    logits = model(images)
    return {
        "pixels": float((logits.argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }


def config_for(out: Path, **changes: Any) -> RunConfig:
    options = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 0.5, "ema_decay": 0.9, "device": "cpu"}
    return RunConfig(out=str(out), **{**options, **changes})


def trainer_for(out: Path, **changes: Any) -> Trainer:
    data = TensorDataset(*scenes())
    return Trainer(network(), objective, data, config_for(out, **changes), measure=measure, best="pixels")


def fingerprint(trainer: Trainer) -> Iterator[Tensor]:
    for part in trainer.learner.networks:
        yield from part.state_dict().values()
    for entry in trainer.learner.optimizer.state_dict()["state"].values():
        yield from (torch.as_tensor(value) for value in entry.values())


def assert_same_outcome(one: Trainer, other: Trainer) -> None:
    for a, b in zip(fingerprint(one), fingerprint(other), strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert replace(mine, seconds=0.0, samples_per_second=0.0) == replace(
            theirs, seconds=0.0, samples_per_second=0.0
        )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.run()
    return trainer


def test_learns_and_notes_what_objective_and_measurement_give(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, epochs=12)
    first, *_, last = trainer.run()
    assert last.train_loss < 0.6 * first.train_loss
    assert last.metrics.keys() == {"train_pixels", "test_pixels", "test_loss", "ema_pixels", "ema_loss"}
    assert last.metrics["test_pixels"] > 0.9 and last.metrics["ema_pixels"] > 0.9
    rows = list(csv.DictReader((tmp_path / "log.csv").open(newline="")))
    assert [float(row["test_pixels"]) for row in rows] == [record.metrics["test_pixels"] for record in trainer.history]
    best = max(trainer.history, key=lambda record: record.metrics["ema_pixels"])
    assert load_state(tmp_path / "checkpoints" / "best.pt").epoch == best.epoch


class TestResume:
    @pytest.mark.parametrize("steps", [0, 3, 5, 9])
    def test_after_an_interruption_the_same_bits(self, uninterrupted: Trainer, tmp_path: Path, steps: int) -> None:
        first = trainer_for(tmp_path)
        stop = StopAfter(steps)
        with pytest.raises(TrainingInterrupted), first.session(stop):
            first.run()
        torch.manual_seed(99)
        second = trainer_for(tmp_path)
        assert second.resume() is not None
        assert second.epoch * second.plan.steps + second.step == first.epoch * first.plan.steps + first.step
        second.run()
        assert_same_outcome(second, uninterrupted)
        weights = load_file(tmp_path / "model.safetensors")
        expected = load_file(uninterrupted.out / "model.safetensors")
        assert all(torch.equal(weights[key], expected[key]) for key in expected)

    def test_the_weights_load_into_the_network(self, uninterrupted: Trainer) -> None:
        again = network(seed=5)
        again.load_state_dict(load_file(uninterrupted.out / "model.safetensors"))
        assert uninterrupted.ema is not None
        images, _ = scenes(3)
        assert torch.equal(again.eval()(images), uninterrupted.ema.eval()(images))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda out: trainer_for(out, lr=0.5), "lr=0.01 there, lr=0.5 here"),
            (lambda out: trainer_for(out, batch_size=4), "made 8 samples a step, here it would be 4"),
            (lambda out: Trainer(network(), objective, TensorDataset(*scenes(48)), config_for(out)), "40 .* 48 here"),
            (lambda out: Trainer(nn.Conv2d(1, 2, 1), objective, TensorDataset(*scenes()), config_for(out)), "missing"),
            (
                lambda out: Trainer(network(), objective, TensorDataset(*scenes()), config_for(out), about="another"),
                "another network",
            ),
        ],
    )
    def test_another_run_is_refused(
        self, uninterrupted: Trainer, make: Callable[[Path], Trainer], message: str
    ) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            make(uninterrupted.out).resume()
        assert "\n" not in str(error.value)

    def test_what_is_no_classifier_is_not_loaded_as_one(self, uninterrupted: Trainer) -> None:
        for path in (uninterrupted.out, uninterrupted.out / "checkpoints" / "best.pt"):
            with pytest.raises(CheckpointError, match="no classifier"):
                load_model(path)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Draws its augmentation where a sample is read."""

    def __init__(self) -> None:
        self.images, self.labels = scenes()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + 0.1 * torch.randn(1, 8, 8) + 0.1 * random.random(), self.labels[index]


class TestData:
    def test_workers_and_interruptions_change_nothing(self, tmp_path: Path) -> None:
        trainers = []
        for workers in (0, 2):
            trainer = Trainer(network(), objective, Noisy(), config_for(tmp_path / str(workers), workers=workers))
            trainer.run()
            trainers.append(trainer)
        assert_same_outcome(*trainers)
        with pytest.raises(TrainingInterrupted):
            Trainer(network(), objective, Noisy(), config_for(tmp_path / "c")).run_epoch(StopAfter(2))
        resumed = Trainer(network(), objective, Noisy(), config_for(tmp_path / "c"))
        resumed.resume()
        resumed.run()
        assert_same_outcome(resumed, trainers[0])

    def test_dictionaries_go_through(self, tmp_path: Path) -> None:
        class Dictionaries(Noisy):
            def __getitem__(self, index: int) -> Any:
                return {"image": self.images[index], "label": self.labels[index]}

        def loss(network: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(network(batch["image"]), batch["label"])

        (record,) = Trainer(network(), loss, Dictionaries(), config_for(tmp_path, epochs=1, warmup_epochs=0.0)).run()
        assert record.metrics == {} and record.train_loss < 1.5

    def test_a_stream_is_refused(self, tmp_path: Path) -> None:
        class Stream(IterableDataset[int]):
            def __iter__(self) -> Iterator[int]:
                return iter(range(9))

        for data in (Stream(), 7):
            with pytest.raises(
                TypeError, match=f"data={type(data).__name__} cannot be read by number; give a map-style"
            ):
                Trainer(network(), objective, data, config_for(tmp_path))  # type: ignore[arg-type]

    def test_too_few_samples_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="3 training samples are too few for 1 processes times accumulate=4"):
            Trainer(network(), objective, TensorDataset(*scenes(3)), config_for(tmp_path, accumulate=4))


def test_a_second_process_is_kept_out_of_the_folder_whatever_it_does(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_trainer import trainer_for\n"
        "trainer = trainer_for(Path(sys.argv[2]))\n"
        "for act in ('run', 'run_epoch', 'save', 'write_weights', 'remove_checkpoints'):\n"
        "    try: getattr(trainer, act)()\n"
        "    except ValueError as error: print(error)\n"
    )
    trainer = trainer_for(tmp_path)
    with trainer.session():
        trainer.run_epoch()
        kept = trainer.save()
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
        other = subprocess.run(command, capture_output=True, text=True, env=environment())
    lines = other.stdout.splitlines()
    assert len(lines) == 5 and all("another process is training there" in line for line in lines), other.stderr
    assert [kept] == saved_states(tmp_path / "checkpoints")
    assert not (tmp_path / "model.safetensors").exists()
    trainer.run()  # the folder is free again


def test_the_lowest_may_be_the_best(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0])
    data = TensorDataset(*scenes())
    measured = config_for(tmp_path, ema_decay=0.0)
    Trainer(network(), objective, data, measured, measure=lambda model: {"off": next(values)}, best="-off").run()
    assert load_state(tmp_path / "checkpoints" / "best.pt").epoch == 2


def test_weights_that_two_layers_share_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight

    def loss(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> Tensor:
        return (network(batch[0]) - 1).square().mean()

    Trainer(model, loss, TensorDataset(torch.randn(16, 4)), config_for(tmp_path, epochs=1)).run()
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["0.weight"], weights["2.weight"])


@pytest.mark.slow
def test_reduce_overhead_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    """CUDA graphs exist on GPUs alone; the mode may change in a run that goes on."""
    whole = trainer_for(tmp_path / "a", compile=True)
    whole.run()
    first = trainer_for(tmp_path / "b", compile=True, compile_mode="reduce-overhead")
    first.run_epoch()
    first.save()
    second = trainer_for(tmp_path / "b", compile=True)
    assert second.resume() is not None
    second.run()
    assert_same_outcome(second, whole)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from torch.utils.data import TensorDataset
from equiflop.runtime import Processes, leave
from equiflop.training import RunConfig, Trainer
from test_trainer import scenes

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(8, 2, 1)
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)

def objective(network, batch):
    images, labels = batch
    logits = network(images)
    return nn.functional.cross_entropy(logits, labels), {"pixels": (logits.argmax(1) == labels).float().mean((1, 2))}

def measure(model):
    images, labels = scenes(16, seed=1)
    return {"pixels": float((model(images).argmax(1) == labels).float().mean())}

fsdp = sys.argv[4] == "fsdp"
size = int(sys.argv[3])
config = RunConfig(out=sys.argv[2], epochs=3, batch_size=size, lr=1e-2, ema_decay=0.9, device="cpu", fsdp=fsdp)
processes = Processes.join("cpu", fsdp)
torch.manual_seed(processes.rank)  # the first one's weights are everybody's
data = TensorDataset(*scenes(48))
trainer = Trainer(Net(), objective, data, config, measure=measure, best="pixels", processes=processes)
trainer.resume()
trainer.run()
leave()
"""


@pytest.mark.slow
def test_two_processes_make_the_losses_of_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for name, count, size in (("one", 1, 16), ("two", 2, 8), ("fsdp", 2, 8)):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
        arguments = [str(tmp_path / "train.py"), str(Path(__file__).parent), str(tmp_path / name), str(size), name]
        command = [sys.executable, *(launcher if count > 1 else []), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
        assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two", "fsdp")]
    one, *others = (list(csv.DictReader(log)) for log in logs)
    reference = load_file(tmp_path / "one" / "model.safetensors")
    for name, other in zip(("two", "fsdp"), others, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert abs(float(mine["train_loss"]) - float(theirs["train_loss"])) < 1e-5
            assert float(mine["ema_pixels"]) == pytest.approx(float(theirs["ema_pixels"]), abs=2 / (16 * 64))
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights.keys() == reference.keys()
        assert all((weights[key] - reference[key]).abs().max() < 1e-4 for key in reference)
