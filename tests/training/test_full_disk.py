"""A disk that fills up while something is being written: a real one, in memory, of two megabytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equiflop.training.state import load_state, saved_states
from test_processes import train, write_images

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_run_says_so_and_goes_on_when_there_is_room(processes: int, small_disk: Path, tmp_path: Path) -> None:
    """One process writes files, two with FSDP2 a folder each time."""
    options = ["--data", str(write_images(tmp_path / "images", 64, 16)), "--epochs", "12", "--batch-size", "16"]
    options += ["--keep-checkpoints", "100", *(["--fsdp"] if processes == 2 else [])]
    undisturbed = train(processes, *options, "--out", str(tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    failed = train(processes, *options, "--out", str(out))
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "No space left on device" in line]
    assert lines and all("cannot write" in line and "intact" in line for line in lines), failed.stderr
    states = saved_states(out / "checkpoints")
    assert len(states) > 2
    assert [load_state(state).epoch for state in states] == list(range(len(states), 0, -1))
    assert not list((out / "checkpoints").glob(".*"))  # nothing half-written is left
    filler.unlink()
    for state in states[2:]:
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    again = train(processes, *[option if option != "100" else "2" for option in options], "--out", str(out))
    assert again.returncode == 0, again.stderr
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("to", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml"), ("torch-export", ".pt2")])
def test_an_export_leaves_what_was_there(to: str, suffix: str, small_disk: Path) -> None:
    path = small_disk / f"net{suffix}"
    path.write_text("what was there before")
    settings = {"img_size": 32, "depth": 4}  # 3.7 M parameters
    command = [sys.executable, "-m", "equiflop", "export", "flop_deit3_small_patch16_224", "--to", to, "-o", str(path)]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"equiflop: {path}: cannot write") and last.endswith("intact"), done.stderr
    assert [file.name for file in small_disk.iterdir()] == [path.name]
    assert path.read_text() == "what was there before"
