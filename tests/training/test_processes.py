"""Several processes train as one: the same losses, the same counts, and they stop together."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from equiflop.classify import load_model
from equiflop.files import remove, sole_user
from equiflop.training.state import load_state, saved_states

pytestmark = pytest.mark.slow
MODEL = ["flop_deit3_tiny_patch16_224", "--set", "patch_size=8", "--set", "embed_dim=16", "--set", "depth=1"]
MODEL += ["--set", "num_heads=2", "--set", "init_values=1.0", "--img-size", "16", "--device", "cpu", "--drop-path", "0"]


def write_images(folder: Path, train: int, test: int) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            place = folder / split / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 160, (16, 16, 3)) + 40 * (i % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 160, 47)


def command(count: int, *arguments: str, model: list[str] = MODEL) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
    return [sys.executable, *(launcher if count > 1 else []), "-m", "equiflop", "train", *model, *arguments]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(count: int, *arguments: str, model: list[str] = MODEL) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(count, *arguments, model=model), capture_output=True, text=True, timeout=240, env=environment()
    )


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_of_16_make_the_losses_of_one_of_32(images: Path, tmp_path: Path) -> None:
    for count, size, accumulate in ((1, 32, 1), (2, 16, 1), (2, 8, 2)):
        out = tmp_path / f"{count}x{size}"
        options = ["--epochs", "4", "--batch-size", str(size), "--accumulate", str(accumulate), "--out", str(out)]
        result = train(count, "--data", str(images), *options)
        assert result.returncode == 0, result.stderr
    one, two, accumulated = (rows(tmp_path / name) for name in ("1x32", "2x16", "2x8"))
    assert len(one) == 4  # of 5 steps
    for other in (two, accumulated):
        for mine, theirs in zip(one, other, strict=True):
            assert abs(float(mine["train_loss"]) - float(theirs["train_loss"])) < 1e-5
            assert mine["train_accuracy"] == theirs["train_accuracy"]
            assert mine["test_accuracy"] == theirs["test_accuracy"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("1x32", "2x16"))
    assert all((a[key] - b[key]).abs().max() < 1e-4 for key in a)


def test_three_processes_count_the_images_of_an_indivisible_set(images: Path, tmp_path: Path) -> None:
    """47 test images: every one once, whatever the number of processes that look at them."""
    first = train(1, "--data", str(images), "--epochs", "1", "--batch-size", "30", "--out", str(tmp_path / "run"))
    assert first.returncode == 0, first.stderr
    script = (
        "import sys, torch; from equiflop.data import open_data; from equiflop.classify import evaluate, load_model;"
        "from equiflop.runtime.processes import Processes, leave; p = Processes.join('cpu');"
        "t = load_model(sys.argv[1]); d = open_data(sys.argv[2], preprocessing=t.spec.preprocessing);"
        "r = evaluate(t.model, d.test, 7, p.device, processes=p); p.first and print('COUNTS', r); leave()"
    )
    (tmp_path / "count.py").write_text(script)
    found = []
    for count in (1, 2, 3):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
        result = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "count.py"), str(tmp_path / "run"), str(images)],
            capture_output=True,
            text=True,
            timeout=200,
            env=environment(),
        )
        assert result.returncode == 0, result.stderr
        found.append(next(line for line in result.stdout.splitlines() if line.startswith("COUNTS")))
    assert "images=47" in found[0] and len(set(found)) == 1, found


def test_a_signal_to_one_run_of_two_processes_stops_both_and_resumes_exactly(images: Path, tmp_path: Path) -> None:
    options = ["--data", str(images), "--epochs", "30", "--batch-size", "16", "--ema-decay", "0.9"]
    whole = train(2, *options, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "stopped"
    running = subprocess.Popen(
        command(2, *options, "--out", str(out)), stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 100
    while not saved_states(out / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=100)
    assert "stopped in epoch" in errors and running.returncode != 0
    again = train(2, *options, "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert (out / "model.safetensors").read_bytes() != b""
    a, b = (load_state(saved_states(tmp_path / name / "checkpoints")[0]) for name in ("whole", "stopped"))
    assert a.ema is not None and b.ema is not None
    for mine, theirs in ((a.model, b.model), (a.ema, b.ema)):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_loss_that_is_not_finite_on_one_process_stops_both_in_time(images: Path, tmp_path: Path) -> None:
    """The second process sees a poisoned batch in its seventh step."""
    (tmp_path / "poison.py").write_text(
        "from equiflop.training.step import Learner\n"
        "original, seen = Learner.gradients, []\n"
        "def poisoned(self, batches, epoch, step):\n"
        "    seen.append(1)\n"
        "    if self.processes.rank == 1 and len(seen) == 7: batches[0].content[0].fill_(float('nan'))\n"
        "    return original(self, batches, epoch, step)\n"
        "Learner.gradients = poisoned\n"
        "from equiflop.cli.main import main; main()\n"
    )
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    arguments = ["train", *MODEL, "--data", str(images), "--epochs", "4", "--batch-size", "16", "--out", str(out)]
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "poison.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert result.returncode != 0 and time.monotonic() - start < 60
    lines = [line for line in result.stderr.splitlines() if "the loss is not finite" in line]
    assert lines and all("epoch 2, step 2" in line for line in lines), result.stderr
    state = load_state(saved_states(out / "checkpoints")[0])
    assert state.epoch == 1 and all(torch.isfinite(value).all() for value in state.model.values())


def test_sharded_parameters_make_the_losses_of_whole_ones(images: Path, tmp_path: Path) -> None:
    """FSDP2 with 2 and 3 processes, gradients accumulated, averaged weights, against one process."""
    options = ["--data", str(images), "--epochs", "3", "--ema-decay", "0.9"]
    for count, size, accumulate in ((1, 36, 1), (2, 18, 1), (3, 6, 2)):
        more = ["--batch-size", str(size), "--accumulate", str(accumulate), "--out", str(tmp_path / str(count))]
        result = train(count, *options, *more, *(["--fsdp"] if count > 1 else []))
        assert result.returncode == 0, result.stderr
    whole, *sharded = (tmp_path / str(count) for count in (1, 2, 3))
    reference = load_file(whole / "model.safetensors")
    for out in sharded:
        for mine, theirs in zip(rows(whole), rows(out), strict=True):
            assert abs(float(mine["train_loss"]) - float(theirs["train_loss"])) < 1e-5
            assert mine["test_accuracy"] == theirs["test_accuracy"] and mine["ema_accuracy"] == theirs["ema_accuracy"]
        final = load_file(out / "model.safetensors")
        assert all((reference[key] - final[key]).abs().max() < 1e-4 for key in reference)
        newest, *_ = saved_states(out / "checkpoints")
        assert len(list(newest.glob("*.safetensors"))) == int(out.name)
        from_shards = load_model(newest).model.state_dict()  # the averaged weights, read by one process
        assert from_shards.keys() == final.keys()
        assert all(torch.equal(from_shards[key], final[key]) for key in final)


def test_a_damaged_share_is_named_and_any_number_of_processes_goes_on(images: Path, tmp_path: Path) -> None:
    options = ["--data", str(images), "--epochs", "3", "--fsdp", "--keep-checkpoints", "3"]
    out = tmp_path / "whole"
    whole = train(2, *options, "--batch-size", "24", "--out", str(out))
    assert whole.returncode == 0, whole.stderr
    final = load_file(out / "model.safetensors")
    for count, size, damage in ((2, 24, "short"), (3, 16, "garbled")):
        again = tmp_path / str(count)
        shutil.copytree(out, again)
        (again / "model.safetensors").unlink()
        newest, *_ = saved_states(again / "checkpoints")
        share = sorted(newest.glob("*.safetensors"))[1]
        content = share.read_bytes()
        share.write_bytes(content[: len(content) // 2] if damage == "short" else bytes(100) + content[100:])
        result = train(count, *options, "--batch-size", str(size), "--out", str(again))
        assert result.returncode == 0, result.stderr
        expected = f"{share}: missing or incomplete" if damage == "short" else f"{newest}: damaged or incomplete"
        assert expected in result.stderr + result.stdout
        found = load_file(again / "model.safetensors")
        for key, value in final.items():
            assert torch.equal(found[key], value) if count == 2 else (found[key] - value).abs().max() < 1e-4


@pytest.mark.parametrize("fsdp", [False, True])
def test_running_statistics_are_the_same_everywhere(images: Path, tmp_path: Path, fsdp: bool) -> None:
    """A ResNet's batch norms see other images in every process; measurements after a resume are those without."""
    out = tmp_path / "whole"
    options = ["--data", str(images), "--epochs", "2", "--batch-size", "8", "--ema-decay", "0.9"]
    options += ["--img-size", "32", "--device", "cpu", *(["--fsdp"] if fsdp else [])]
    whole = train(2, *options, "--out", str(out), model=["test_resnet"])
    assert whole.returncode == 0, whole.stderr
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "model.safetensors").unlink()
    remove(saved_states(again / "checkpoints")[0])
    resumed = train(2, *options, "--out", str(again), model=["test_resnet"])
    assert resumed.returncode == 0, resumed.stderr
    for mine, theirs in zip(rows(out), rows(again), strict=True):
        assert all(mine[name] == theirs[name] for name in mine if name not in ("seconds", "samples_per_second"))
    a, b = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert a["bn1.running_mean"].abs().max() > 0
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_sharded_state_is_where_another_run_starts_from(images: Path, tmp_path: Path) -> None:
    options = ["--data", str(images), "--epochs", "1", "--batch-size", "16", "--fsdp"]
    first = train(2, *options, "--out", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    state, *_ = saved_states(tmp_path / "first" / "checkpoints")
    probe = train(2, *options, "--start-from", str(state), "--freeze-backbone", "--out", str(tmp_path / "probe"))
    assert probe.returncode == 0, probe.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "probe"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("fsdp", [False, True])
def test_everything_at_once(images: Path, tmp_path: Path, fsdp: bool) -> None:
    """LAMB, Mixup, accumulation, recomputed blocks, float16, compiled; no NaN, and a state that loads."""
    options = ["--data", str(images), "--epochs", "2", "--batch-size", "8", "--accumulate", "2"]
    options += ["--fsdp"] if fsdp else []
    options += ["--optimizer", "lamb", "--mixup", "0.8", "--precision", "float16", "--grad-checkpointing"]
    first = train(2, *options, "--compile", "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    state = load_state(saved_states(tmp_path / "checkpoints")[0])
    assert state.epoch == 2 and all(math.isfinite(record["train_loss"]) for record in state.history)
    again = train(2, *options, "--out", str(tmp_path))
    assert again.returncode == 0 and "all epochs are done" in again.stderr + again.stdout


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_test_image_that_cannot_be_read_stops_both_and_loses_no_step(tmp_path: Path, fsdp: bool) -> None:
    images = write_images(tmp_path / "images", 64, 7)
    broken = images / "test" / "class1" / "004.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:40])
    options = ["--data", str(images), "--epochs", "2", "--batch-size", "16", "--out", str(tmp_path / "run")]
    options += ["--fsdp"] if fsdp else []
    failed = train(2, *options)
    assert failed.returncode != 0
    assert str(broken) in failed.stderr and "another process could not measure" in failed.stderr
    state = load_state(saved_states(tmp_path / "run" / "checkpoints")[0])
    assert (state.epoch, state.step) == (0, 2)
    broken.write_bytes(content)
    again = train(2, *options)
    assert again.returncode == 0, again.stderr
    assert "2 steps done" in again.stderr + again.stdout


def test_a_killed_run_with_loader_workers_goes_on_at_once(images: Path, tmp_path: Path) -> None:
    """Workers outlive their process for seconds and must not keep the folder."""
    options = ["--data", str(images), "--epochs", "300", "--batch-size", "16", "--workers", "2", "--out", str(tmp_path)]
    running = subprocess.Popen(command(1, *options), stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 100
    while not saved_states(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.wait()
    with sole_user(tmp_path):
        assert saved_states(tmp_path / "checkpoints")


def test_another_number_of_images_a_step_is_refused(images: Path, tmp_path: Path) -> None:
    options = ["--data", str(images), "--epochs", "1", "--batch-size", "16", "--out", str(tmp_path)]
    assert train(1, *options).returncode == 0
    result = train(2, *options)
    assert result.returncode != 0 and "made 16 images a step, here it would be 32" in result.stderr
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["epoch"] == 1
