"""The demo, at a size that takes seconds: all its files, and numbers that hang together."""

import json
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from equiflop.benchmark.timing import throughput_in_turns
from equiflop.classify import ClassifierTrainer, TrainConfig, load_model
from equiflop.classify.recipe import load_recipe
from equiflop.data import fashion_mnist, open_data
from equiflop.demo import DemoSettings, comparison, run_demo
from equiflop.demo.results import E_NAME, PLAIN_NAME, format_table
from equiflop.files import sole_user
from equiflop.runtime.progress import Progress
from equiflop.training import TrainingInterrupted
from test_data import write_fashion_mnist

pytest.importorskip("matplotlib")


def quick(out: Path, **changes: object) -> DemoSettings:
    sizes = {"embed_dim": 32, "depth": 1}
    settings = {"epochs": 1, "model_kwargs": sizes, "compile": False, "full_size": False, "device": "cpu"}
    return DemoSettings(out=str(out), rounds=1, seconds=0.0, **{**settings, **changes})  # type: ignore[arg-type]


def test_whole_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    results = run_demo(quick(tmp_path, data=str(write_fashion_mnist(tmp_path / "data", 640, 300))), lines.append)
    equivariant, plain, averaged = results.rows
    assert equivariant.evaluation.images == 300
    assert equivariant.evaluation.changed == averaged.evaluation.changed == 0
    assert 0.49 < equivariant.parameters / plain.parameters < 0.56
    assert 0.49 < equivariant.macs / plain.macs < 0.56
    assert averaged.macs == 2 * plain.macs and averaged.parameters == plain.parameters

    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"][0]["macs"] == equivariant.macs
    assert written["hardware"]["cores"] and written["versions"]["torch"] == torch.__version__
    assert written["settings"]["seed"] == 0 and written["command"].startswith("equiflop")
    with Image.open(tmp_path / "demo.png") as plot:
        assert plot.size[0] > 1500
    assert load_model(tmp_path / "equivariant").spec.name == "flop_deit3_tiny_patch16_224"
    assert load_model(tmp_path / "plain").spec.name == "deit3_tiny_patch16_224"
    assert format_table(results) in "\n".join(lines)


def test_both_networks_see_the_same_recipe(tmp_path: Path) -> None:
    settings = quick(tmp_path, data="fashion-mnist-part")
    equivariant, plain = comparison._trainers(settings, load_recipe("demo"), open_data("fashion-mnist-part"))
    assert equivariant.config.differences(plain.config) == ["model"]


def test_the_recipe_is_what_the_demo_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """equiflop train --recipe demo trains the same: nothing that decides the result differs."""
    nowhere(monkeypatch, tmp_path)
    found: list[TrainConfig] = []

    def stop(equivariant: ClassifierTrainer, plain: ClassifierTrainer, say: object) -> None:
        found.append(equivariant.config)
        raise TrainingInterrupted(tmp_path, 0, 0, 2)

    monkeypatch.setattr(comparison, "_train_in_turns", stop)
    with pytest.raises(TrainingInterrupted):
        run_demo(DemoSettings(out=str(tmp_path), device="cpu"), str)
    recipe = TrainConfig.from_dict({**load_recipe("demo"), "out": str(tmp_path), "device": "cpu"})
    assert found[0].differences(recipe) == [] and recipe.data == "fashion-mnist-part"


def nowhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without the whole set, and without a network."""
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", folder / "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "nothing"))
    monkeypatch.setattr(socket, "socket", None)


@pytest.mark.slow
def test_without_data_and_network_it_trains_on_what_comes_with_equiflop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere(monkeypatch, tmp_path)
    lines: list[str] = []
    results = run_demo(quick(tmp_path), lines.append)
    assert results.data == "Fashion-MNIST (part)" and results.rows[0].evaluation.images == 5000
    assert results.rows[0].evaluation.top1 > 0.3 and results.rows[0].evaluation.changed == 0
    assert "from equiflop, 12,000 images to train on, 5,000 to test on" in lines[0]


def test_the_whole_set_is_used_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_fashion_mnist(tmp_path / "equiflop" / "FashionMNIST" / "raw", 640, 50, suffix="")
    monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "nothing")
    results = run_demo(quick(tmp_path / "out"), str)
    assert results.data == "Fashion-MNIST" and results.settings["data"] == "fashion-mnist"


@pytest.mark.parametrize(("size", "epochs"), [(100, 16), (12_000, 16), (60_000, 3), (10**7, 1)])
def test_a_larger_set_takes_fewer_epochs(size: int, epochs: int) -> None:
    class Images:
        train = range(size)

    recipe = {"epochs": 16, "data": "fashion-mnist-part"}
    assert comparison._epochs(recipe, Images) == epochs  # type: ignore[arg-type]


def test_an_interrupted_demo_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(write_fashion_mnist(tmp_path / "data", 640, 50))
    settings = quick(tmp_path / "out", data=data, epochs=2)
    whole = run_demo(quick(tmp_path / "whole", data=data, epochs=2), str)

    lines: list[str] = []

    def stop_after_one_epoch(line: str) -> None:
        lines.append(line)
        if "epoch 1/2" in line and PLAIN_NAME in line:
            raise TrainingInterrupted(tmp_path, 1, 0, 2)

    with pytest.raises(TrainingInterrupted):
        run_demo(settings, stop_after_one_epoch)
    again: list[str] = []
    results = run_demo(settings, again.append)
    assert not any("epoch 1/2" in line for line in again)
    assert sum("epoch 2/2" in line for line in again) == 2
    assert [row.evaluation for row in results.rows] == [row.evaluation for row in whole.rows]


def test_two_demos_do_not_train_in_one_folder(tmp_path: Path) -> None:
    data = str(write_fashion_mnist(tmp_path / "data", 640, 50))
    with sole_user(tmp_path / "plain"), pytest.raises(ValueError, match="another process is training there"):
        run_demo(quick(tmp_path, data=data), str)
    assert not (tmp_path / "equivariant" / "checkpoints").exists()


def test_throughput_takes_turns_and_reports_the_median() -> None:
    calls = []

    class Model(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            return images

    models = {name: Model(name) for name in (E_NAME, PLAIN_NAME)}
    rates = throughput_in_turns(models, torch.zeros(4, 1, 2, 2), rounds=3, seconds=0.0, progress=Progress("test"))
    assert calls == [E_NAME, PLAIN_NAME] * 4
    assert all(rate.lowest <= rate.median <= rate.highest for rate in rates.values())
