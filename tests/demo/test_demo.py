"""The demo, at a size that takes seconds: all its files, and numbers that hang together."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from equiflop.benchmark.timing import throughput_in_turns
from equiflop.classify import load_model
from equiflop.data import DataNotFoundError, open_data
from equiflop.demo import DemoSettings, comparison, run_demo
from equiflop.demo.results import E_NAME, PLAIN_NAME, format_table
from equiflop.files import sole_user
from equiflop.runtime.progress import Progress
from equiflop.training import TrainingInterrupted
from test_data import write_fashion_mnist

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def quick(out: Path, **changes: object) -> DemoSettings:
    settings = {"epochs": 1, "width": 32, "depth": 1, "compile": False, "full_size": False, "device": "cpu"}
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
    assert Image.open(tmp_path / "demo.png").size[0] > 1500
    assert load_model(tmp_path / "equivariant").spec.name == "flop_deit3_tiny_patch16_224"
    assert load_model(tmp_path / "plain").spec.name == "deit3_tiny_patch16_224"
    assert format_table(results) in "\n".join(lines)


def test_both_networks_see_the_same_recipe(tmp_path: Path) -> None:
    equivariant, plain = comparison._trainers(quick(tmp_path), open_data("digits"))
    assert equivariant.config.differences(plain.config) == ["model"]


def test_without_fashion_mnist_it_says_so_and_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_digits_only(source: str) -> object:
        if source == "fashion-mnist":
            raise DataNotFoundError("Fashion-MNIST is nowhere")
        return open_data(source)

    monkeypatch.setattr(comparison, "open_data", open_digits_only)
    lines: list[str] = []
    results = run_demo(quick(tmp_path), lines.append)
    text = "\n".join(lines)
    assert results.data == "digits" and not results.symmetric
    assert "nowhere" in text and "smoke run" in text and "no claim about accuracy" in text


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
