"""``equiflop bench``: what it measures is what happens, and what it prints can be read by people and programs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result

import equiflop
from equiflop.benchmark.compare import BenchConfig, Entry, compare
from equiflop.benchmark.fractions import KINDS, split_time
from equiflop.benchmark.memory import peak_memory
from equiflop.benchmark.timing import Spread, time_in_turns
from equiflop.cli.main import main

CPU = torch.device("cpu")
SMALL = ["--set", "depth=1", "--set", "embed_dim=64", "--set", "num_heads=2", "--img-size", "32", "--batch-size", "2"]
SMALL += ["--rounds", "2", "--seconds", "0", "--device", "cpu"]
NAME = "flop_deit3_small_patch16_224"


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments], catch_exceptions=False)


def test_turns_are_taken_in_order() -> None:
    calls: list[str] = []
    times = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 0.0, CPU, warm_up=2)
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_peak_memory_counts_what_is_held_at_the_same_time() -> None:
    mebibyte = 2**18  # of float32 values

    def together() -> None:
        kept = [torch.ones(mebibyte) for _ in range(5)]
        assert len(kept) == 5

    def one_by_one() -> None:
        for _ in range(5):
            torch.ones(mebibyte)

    assert peak_memory(together, CPU) == pytest.approx(5 * 2**20, rel=0.01)
    assert peak_memory(one_by_one, CPU) == pytest.approx(2**20, rel=0.01)


def test_time_is_split_by_kind() -> None:
    weight, x = torch.randn(512, 512), torch.randn(512, 512)

    def products() -> None:
        for _ in range(20):
            x @ weight

    fractions = split_time(products, products)
    assert set(fractions.seconds) == set(KINDS)
    assert fractions.products_macs == 20 * 512**3
    assert fractions.seconds["matrix products"] > 0.8 * sum(fractions.seconds.values())

    def pointwise() -> None:
        for _ in range(20):
            x.exp()

    assert split_time(pointwise, pointwise).seconds["pointwise"] > 0


def test_entries_say_what_was_measured() -> None:
    settings = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    config = BenchConfig(
        modes=("eager",),
        steps=("forward", "train"),
        batch_sizes=(1, 2),
        image_size=(32, 32),
        rounds=3,  # of an odd number, the median of rates is the rate of the median
        seconds=0.0,
        mirrored=True,
        memory=True,
        settings=settings,
    )
    seen: list[Entry] = []
    entries = compare(NAME, config, CPU, report=seen.append)
    assert seen == entries
    names = [NAME, "deit3_small_patch16_224", "deit3_small_patch16_224 (both views)"]
    assert [(e.step, e.batch_size, e.name) for e in entries] == [
        (step, batch, name) for step in ("forward", "train") for batch in (1, 2) for name in names
    ]
    model = timm.create_model(NAME, img_size=32, **settings)
    assert entries[0].macs == equiflop.macs(model, (32, 32)) and entries[2].macs == 2 * entries[1].macs
    assert entries[0].parameters == sum(p.numel() for p in model.parameters())
    for entry in entries:
        assert 0 < entry.latency.lowest <= entry.latency.median <= entry.latency.highest
        assert entry.throughput.median == pytest.approx(entry.batch_size / entry.latency.median)
        assert entry.peak_bytes is not None and entry.peak_bytes > 0
        if entry.name == names[1]:
            assert entry.speedup == Spread(1.0, 1.0, 1.0)
    forward, train = entries[1], entries[7]
    assert train.peak_bytes is not None and forward.peak_bytes is not None
    assert train.peak_bytes > forward.peak_bytes  # activations and gradients


def test_a_model_of_timm_is_measured_alone() -> None:
    config = BenchConfig(("eager",), image_size=(32, 32), rounds=1, seconds=0.0, settings={"depth": 1})
    (entry,) = compare("deit3_tiny_patch16_224", config, CPU)
    assert entry.name == entry.model == "deit3_tiny_patch16_224" and entry.speedup.median == 1.0


def test_command_prints_a_table_and_writes_json_and_figures(tmp_path: Path) -> None:
    accuracy = tmp_path / "accuracy.json"
    accuracy.write_text(json.dumps({NAME: 80.0, "deit3_small_patch16_224": 79.5}))
    output, plots = tmp_path / "out.json", tmp_path / "plots"
    result = bench(NAME, *SMALL, "--mode", "eager", "--fraction", "--memory", "--mirrored", "--output", str(output),
                   "--plot", str(plots), "--accuracy", str(accuracy))  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in (NAME, "both views", "peak memory", "matrix products", "speedup"):
        assert text in result.output
    content: dict[str, Any] = json.loads(output.read_text())
    assert {"hardware", "versions", "command", "entries", "dtype"} <= set(content)
    assert len(content["entries"]) == 3 and content["entries"][0]["fractions"]["seconds"]["attention"] > 0
    assert sorted(path.name for path in plots.iterdir()) == ["accuracy.png", "macs.png", "speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())


def test_json_alone_on_standard_output() -> None:
    result = bench(NAME, *SMALL, "--mode", "eager", "--json", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["entries"]) == 2


@pytest.mark.slow
def test_compiled_and_optimized_modes() -> None:
    result = bench(
        NAME, *SMALL, "--mode", "compile", "--mode", "optimized", "--step", "forward", "--step", "train", "--json"
    )
    assert result.exit_code == 0, result.output
    settings = {(e["step"], e["mode"]) for e in json.loads(result.stdout)["entries"]}
    assert settings == {("forward", "compile"), ("forward", "optimized"), ("train", "compile")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flop_deit3_smal_patch16_224"], "did you mean"),
        ([NAME, "--mode", "fast"], "mode='fast' is unknown; choose from eager, compile, reduce-overhead"),
        ([NAME, "--step", "backward"], "step='backward' is unknown"),
        ([NAME, "--dtype", "int8"], "dtype='int8' is unknown"),
        ([NAME, "--mode", "optimized", "--step", "train"], "mode='optimized' is for inference"),
        ([NAME, "--accuracy", "nowhere.json"], "--accuracy=nowhere.json"),
        ([NAME, "--output", "no/such/folder/out.json"], "there is no folder"),
        ([NAME, "--device", "cuda:77"], "device='cuda:77' is not available"),
        ([NAME, "--set", "depht=2", "--mode", "eager"], "depht"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


def test_what_cannot_be_written_or_drawn_is_said_before_the_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equiflop.benchmark.compare._measure", lambda *args: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    for option, place in (("--output", "/proc/out.json"), ("--plot", str(tmp_path / "file" / "figures"))):
        result = bench(NAME, *SMALL, option, place)
        assert result.exit_code == 2 and "cannot write" in result.output and "Traceback" not in result.output
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    result = bench(NAME, *SMALL, "--plot", str(tmp_path / "figures"))
    assert result.exit_code == 2 and "a figure needs matplotlib; install it with: pip install" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_in_the_second_batch_size_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equiflop.benchmark import compare as module

    measure = module._measure

    def interrupted(*args: Any) -> list[Entry]:
        if args[5] == 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(module, "_measure", interrupted)
    path = tmp_path / "out.json"
    result = bench(NAME, *SMALL, "--mode", "eager", "--batch-size", "1", "--output", str(path))
    assert result.exit_code == 130
    assert f"wrote {path}, with what was measured until now" in result.output
    assert [entry["batch_size"] for entry in json.loads(path.read_text())["entries"]] == [2, 2]
