"""What is wrong with an objective, a measurement or an option: one line, and no epoch is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from equiflop.training import NonFiniteLossError, Trainer
from equiflop.training.state import load_state, saved_states
from test_trainer import assert_same_outcome, config_for, network, objective, scenes, trainer_for


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x.mean((1, 2, 3)), r"loss of shape \(8,\); it must be one number"),
        (lambda x: None, r"objective gave None; it must give the loss, a tensor, or \(loss, \{name: metric\}\)"),
        (lambda x: float(x.detach().mean()), "objective gave .*; it must give the loss"),
        (lambda x: (x.mean(), 3), "a pair of Tensor and int"),
        (lambda x: x.detach().mean(), "loss without a gradient"),
        (lambda x: (x.mean(), {"share": torch.zeros(3)}), r"metric 'share' of shape \(3,\); give \(8,\)"),
        (lambda x: (x.mean(), {"share": "high"}), "metric share='high'; it must be a tensor or a number"),
        (lambda x: (x.mean(), {"loss": 1.0}), "metric called 'loss'"),
    ],
)
def test_an_objective(tmp_path: Path, result: Callable[[Tensor], Any], message: str) -> None:
    def wrong(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> Any:
        return result(network(batch[0]))

    trainer = Trainer(network(), wrong, TensorDataset(*scenes()), config_for(tmp_path))
    with pytest.raises((TypeError, ValueError), match=message) as error:
        trainer.run()
    assert "\n" not in str(error.value) and not saved_states(tmp_path / "checkpoints")


def test_metrics_that_come_and_go(tmp_path: Path) -> None:
    calls: list[int] = []

    def fickle(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> Any:
        calls.append(1)
        return network(batch[0]).mean(), {"a": 1.0} if len(calls) == 1 else {"b": 1.0}

    with pytest.raises(ValueError, match="objective gave metrics a, and in the next step b"):
        Trainer(network(), fickle, TensorDataset(*scenes()), config_for(tmp_path)).run()


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    calls: list[int] = []

    def diverging(network: Callable[[Tensor], Tensor], batch: list[Tensor]) -> Tensor:
        calls.append(1)
        return network(batch[0]).mean() * (float("nan") if len(calls) == 8 else 1.0)

    with pytest.raises(NonFiniteLossError, match="epoch 2, step 3 "):
        Trainer(network(), diverging, TensorDataset(*scenes()), config_for(tmp_path)).run()
    assert load_state(saved_states(tmp_path / "checkpoints")[0]).epoch == 1


@pytest.mark.parametrize(
    ("measured", "best", "message"),
    [
        (0.5, "", "measure gave 0.5; it must give numbers by name"),
        ({"share": "high"}, "", "measure gave share='high', which is not a number"),
        ({"share": 1.0}, "accuracy", "best='accuracy' is not what measure gives; choose from share"),
    ],
)
def test_a_measurement_that_fails_loses_no_epoch(tmp_path: Path, measured: Any, best: str, message: str) -> None:
    data = TensorDataset(*scenes())
    wrong = Trainer(
        network(), objective, data, config_for(tmp_path / "wrong"), measure=lambda model: measured, best=best
    )
    with pytest.raises(ValueError, match=f"{message}.*the state after training is saved in"):
        wrong.run()
    whole = trainer_for(tmp_path / "whole")
    whole.run()
    right = trainer_for(tmp_path / "wrong")
    right.resume()
    assert (right.epoch, right.step) == (0, 5)
    right.run()
    assert_same_outcome(right, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile_mode": "fast"}, "compile_mode='fast' is unknown; choose from default, reduce-overhead, max-"),
        ({"compile_mode": "reduce-overhead"}, "compile_mode='reduce-overhead' needs compile"),
        ({"compile_mode": "max-autotune", "compile": True, "fsdp": True}, "'max-autotune' does not go with fsdp"),
    ],
)
def test_the_compile_mode(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(tmp_path, **options)


def test_the_best_needs_a_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best='pixels' names what measure gives, and there is no measure"):
        Trainer(network(), objective, TensorDataset(*scenes()), config_for(tmp_path), best="pixels")
