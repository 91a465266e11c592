"""``twin:NAME``: twins of timm's networks in the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import equiflop
from equiflop.classify.weights import load_model
from test_malformed import assert_one_line, run

SMALL = ["--set", "depth=1", "--set", "embed_dim=16", "--set", "num_heads=4", "--img-size", "32"]


@pytest.mark.parametrize("group", ["flop", "octic"])
def test_check_of_a_twin(group: str) -> None:
    settings = [*SMALL, "--set", "num_heads=8"] if group == "octic" else SMALL
    result = run("check", "twin:vit_small_patch16_224", *settings, "--set", f"group={group}", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    assert result.output.count("mirror") >= (1 if group == "flop" else 4)


def test_training_a_twin_and_what_comes_of_it(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    data = ["--data", "digits", "--epochs", "1", "--device", "cpu", "--out", out]
    result = run("train", "twin:vit_small_patch16_224", *SMALL, *data)
    assert result.exit_code == 0, result.output
    loaded = load_model(out)
    assert loaded.spec.name == "twin:vit_small_patch16_224"
    model = loaded.model.eval()
    images = torch.randn(2, *loaded.spec.preprocessing.input_size)
    assert torch.equal(model(images).argmax(1), model(images.flip(-1)).argmax(1))
    ways = ([out], ["twin:vit_small_patch16_224", "--checkpoint", out], ["twin:vit_small_patch16_224", *SMALL])
    checked = [run("check", *arguments, "--json") for arguments in ways]
    assert [result.exit_code for result in checked] == [0, 0, 0], [result.output for result in checked]
    by_run, by_name, random_weights = (json.loads(result.stdout) for result in checked)
    assert by_run == by_name
    assert by_run["model"] == random_weights["model"] and by_run["elements"] != random_weights["elements"]
    refused = run("check", out, "--set", "depth=2")
    assert refused.exit_code == 2 and "--set does not apply to" in refused.output
    other = run("check", "twin:vit_tiny_patch16_224", "--checkpoint", out)
    assert other.exit_code == 2 and "holds weights of twin:vit_small_patch16_224" in other.output


def test_a_twin_is_timed_beside_its_plain_network(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    timed = ["--mode", "eager", "--rounds", "1", "--seconds", "0.01", "--device", "cpu", "--output", str(file)]
    result = run("bench", "twin:vit_small_patch16_224", *SMALL, *timed)
    assert result.exit_code == 0, result.output
    names = [entry["name"] for entry in json.loads(file.read_text())["entries"]]
    assert names == ["twin:vit_small_patch16_224", "vit_small_patch16_224"]


def test_list_of_twins() -> None:
    result = run("models", "twin:vit_small_patch16_2*", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert "twin:vit_small_patch16_224" in rows
    row = run("models", "twin:convnext_tiny", "--json")
    assert json.loads(row.stdout)[0]["macs"] == equiflop.macs(timm.create_model("flop_convnext_tiny"), (224, 224))


@pytest.mark.parametrize("command", ["check", "bench", "models"])
@pytest.mark.parametrize("name", ["twin:vit_small_patch16_225", "twin:resnet18", "twin:"])
def test_names_without_a_twin_are_refused_in_one_line(command: str, name: str) -> None:
    assert_one_line(run(command, name), name.removeprefix("twin:"))
