"""The command line: train and eval from start to end, and a user's mistakes as one line with exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from equiflop.cli.main import COMMANDS, main
from test_data import write_fashion_mnist, write_image_folder

SMALL = [
    "flop_deit3_tiny_patch16_224",
    *("--set", "patch_size=7", "--set", "embed_dim=16", "--set", "depth=1", "--set", "num_heads=2"),
    *("--batch-size", "8", "--device", "cpu"),
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def assert_one_line(result: Result, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds the words."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/cat/1.png", b"")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_fashion_mnist(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = run("train", *SMALL, "--data", data, "--epochs", "2", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["epoch"] == 2 and Path(summary["weights"]).is_file()
    return out


def test_train_writes_what_it_promises(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "log.csv",
        "log.jsonl",
        "model.safetensors",
    }
    assert json.loads((trained / "config.json").read_text())["model_kwargs"]["patch_size"] == 7


def test_the_same_command_again_finds_everything_done(data: str, trained: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    result = run("train", *SMALL, "--data", data, "--epochs", "2", "--out", str(trained))
    assert result.exit_code == 0 and "all epochs are done" in result.stderr
    assert (trained / "model.safetensors").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused_until_told(data: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    for path in trained.rglob("*"):
        if path.is_file():
            (out / path.relative_to(trained)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(trained)).write_bytes(path.read_bytes())
    other = ["train", *SMALL, "--data", data, "--epochs", "1", "--out", str(out)]
    result = run(*other)
    assert_one_line(result, "epochs=2 there, epochs=1 here", "another --out, or --resume never")
    result = run(*other, "--resume", "never")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000005.pt", "best.pt"}


@pytest.mark.slow
def test_the_mode_of_compilation(data: str, tmp_path: Path) -> None:
    """On a CPU there are no CUDA graphs to record, and training is that of the default."""
    options = ["--data", data, "--epochs", "1", "--out", str(tmp_path)]
    assert_one_line(run("train", *SMALL, *options, "--compile-mode", "fast"), "compile_mode='fast'", "reduce-overhead")
    assert_one_line(run("train", *SMALL, *options, "--compile-mode", "max-autotune"), "max-autotune", "--compile")
    result = run("train", *SMALL, *options, "--compile", "--compile-mode", "reduce-overhead")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "config.json").read_text())["compile_mode"] == "reduce-overhead"


def test_eval_reports_mirrored_changes(data: str, trained: Path) -> None:
    result = run("eval", str(trained), "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["images"] == 20 and values["changed"] == 0 and 0 <= values["top1"] <= values["top5"] <= 1
    shown = run("eval", str(next((trained / "checkpoints").iterdir())), "--data", data)
    assert shown.exit_code == 0 and "answers that change if mirrored" in shown.stdout


def test_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    folder = str(write_image_folder(tmp_path / "photos", "val"))
    options = (
        "--epochs 1 --batch-size 4 --workers 1 --img-size 32x48 --set embed_dim=16 --set depth=1 --set num_heads=2"
    )
    out = str(tmp_path / "out")
    result = run("train", "flop_deit3_tiny_patch16_224", "--data", folder, "--out", out, *options.split())
    assert result.exit_code == 0, result.output
    measured = run("eval", out, "--json")
    assert json.loads(measured.stdout)["images"] == 6


def test_mistakes_are_one_line(data: str, trained: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert_one_line(run("train", "flop_deit3_smal_patch16_224", "--data", data, *out), "flop_deit3_small_patch16_224")
    assert_one_line(run("train", *SMALL, "--data", "nowhere", *out), "nowhere", "fashion-mnist")
    for source in ("tfds/cifar10", str(write_zip(tmp_path / "photos.zip"))):
        result = run("train", *SMALL, "--data", source, *out)
        assert_one_line(result, source, "torch/NAME", "hfds/NAME", "wds/FOLDER", "fashion-mnist-part")
        assert ("Unpack the file" in result.stderr) == source.endswith("zip")
    assert_one_line(run("train", *SMALL, "--data", data, "--set", "embed_dimm=3", *out), "embed_dimm")
    assert_one_line(run("train", *SMALL, "--data", data, "--set", "embed_dim=15", *out), "embed_dim")
    assert_one_line(run("train", *SMALL, "--data", data, "--lr", "-1", *out), "lr=-1.0")
    assert_one_line(run("train", *SMALL, "--data", data, "--optimizer", "sgdd", *out), "sgdd")
    assert_one_line(run("eval", str(tmp_path / "none")), "none", "no such file")
    assert_one_line(run("eval", str(trained), "--data", "digits", "--device", "tpu9"), "tpu9")
    (tmp_path / "broken.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:100])
    assert_one_line(run("eval", str(tmp_path / "broken.safetensors")), "broken.safetensors")


def test_a_file_in_the_way_of_the_output_folder(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("train", *SMALL, "--data", data, "--epochs", "1", "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2 and "Traceback" not in result.output and str(tmp_path / "file") in result.stderr


@pytest.mark.parametrize("arguments", ["trian", "train --epoch", "train", "eval", "train m --set x", "predict"])
def test_bad_flags_exit_with_2(arguments: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_unknown_command_suggests_the_nearest() -> None:
    assert "did you mean 'train'?" in run("trian").stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIFLOP_DEBUG", "1")
    assert isinstance(run("eval", "none").exception, ValueError)


def test_bugs_are_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("equiflop.classify.load_model", broken)
    assert isinstance(run("eval", "none").exception, RuntimeError)


@pytest.mark.parametrize("name", ["train", "eval", "predict", "demo"])
def test_help_has_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and f"equiflop {name} " in result.stdout


def test_main_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0 and all(f"  {name} " in result.stdout for name in COMMANDS)


def test_every_command_can_be_imported() -> None:
    with click.Context(main) as context:
        assert all(main.get_command(context, name) is not None for name in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_ends_with_a_checkpoint_and_a_line(data: str, tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "equiflop", "train", *SMALL, "--data", data, "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.csv").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "state saved in" in errors.strip().splitlines()[-1]
    assert run("eval", str(tmp_path)).exit_code == 0


@pytest.mark.slow
def test_closing_the_pipe_is_quiet(tmp_path: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} -m equiflop train --help | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in process.stderr
