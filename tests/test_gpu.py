"""The same code on a CUDA device, against the CPU. Counted as skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import equiflop
from equiflop.benchmark.compare import BenchConfig, compare
from equiflop.data import Augmentation, MemorySplit, Preprocessing
from equiflop.training import RunConfig, Trainer
from oracles import relative_error
from small_vits import DESIGNS, images_for, scrambled, small_vit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [*DESIGNS.values(), "octic_deit3_small_patch16_224"])
def test_logits_and_gradients_are_those_of_the_cpu(name: str, compiled: bool) -> None:
    model = scrambled(small_vit(name, dtype=torch.float32))
    images = images_for(model)
    there = copy.deepcopy(model).cuda()
    network = torch.compile(there) if compiled else there
    model(images).square().sum().backward()
    network(images.cuda()).square().sum().backward()
    with torch.no_grad():
        assert relative_error(network(images.cuda()).cpu(), model(images)) < 1e-4
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        if ours.grad is not None and theirs.grad is not None:
            assert relative_error(theirs.grad.cpu(), ours.grad) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equivariance(dtype: torch.dtype) -> None:
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    model = scrambled(small_vit()).to("cuda", dtype)
    images = images_for(model).to("cuda", dtype)
    with torch.no_grad():
        assert relative_error(model(images.flip(-1)), model(images)) < bound


def test_inference_form_and_benchmark() -> None:
    model = scrambled(small_vit()).cuda()
    images = images_for(model).cuda()
    fast = equiflop.optimize_for_inference(model)
    with torch.no_grad():
        first, second, one = fast(images), fast(images.flip(0)), fast(images[:1])
        expected = model(images)
    assert relative_error(first, expected) < 1e-4  # not overwritten by the later ones
    assert relative_error(second, expected.flip(0)) < 1e-4
    assert relative_error(one, expected[:1]) < 1e-4
    config = BenchConfig(modes=("eager",), batch_sizes=(2,), rounds=1, seconds=0.01, memory=True, settings={"depth": 1})
    entries = compare("flop_deit3_small_patch16_224", config, torch.device("cuda"))
    assert len(entries) == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_makes_the_losses_of_eager_training(mode: str, tmp_path: Path) -> None:
    """Recorded steps overwrite what the one before gave: gradients of two batches, metrics and averages survive it."""
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 7)

    def objective(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = network(batch[0])
        return F.cross_entropy(logits, batch[1]), {"accuracy": logits.argmax(1) == batch[1]}

    def measure(model: nn.Module) -> dict[str, float]:
        return {"size": float(model(data.tensors[0].cuda()).square().mean())}

    histories = []
    of_compiled: dict[str, Any] = {"compile": True, "compile_mode": mode}
    for name, options in (("eager", {}), ("compiled", of_compiled)):
        torch.manual_seed(0)
        common: dict[str, Any] = {"epochs": 2, "batch_size": 8, "accumulate": 2, "ema_decay": 0.9, "device": "cuda"}
        config = RunConfig(out=str(tmp_path / name), **common, **options)
        histories.append(
            Trainer(small_vit(dtype=torch.float32).train(), objective, data, config, measure=measure).run()
        )
    for ours, theirs in zip(*histories, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-2, abs=0.05)


def test_images_are_augmented_as_on_the_cpu() -> None:
    images = torch.randint(0, 256, (50, 3, 9, 12), dtype=torch.uint8)
    split = MemorySplit(images, torch.arange(50), Preprocessing((3, 9, 12), (0.5,) * 3, (0.25,) * 3))
    augmentation = Augmentation(0.5, 2, 0.5, seed=7, epoch=3)
    order = torch.randperm(50)
    here = next(split.batches(order, 20, augmentation))
    there = next(split.on(torch.device("cuda")).batches(order, 20, augmentation))
    torch.testing.assert_close(there.images.cpu(), here.images)
    assert torch.equal(there.labels.cpu(), here.labels)
