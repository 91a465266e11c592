"""Keywords of models on the command line: a mistake is named, with the model and what it takes, in one line."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from equiflop.cli.main import main

E_VIT, VIT, TWIN = "flop_deit3_small_patch16_224", "deit3_small_patch16_224", "twin:vit_small_patch16_224"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def assert_one_line(result: Result, *words: str) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1, result.output
    assert all(word in lines[0] for word in words), lines[0]


def of_every_command(model: str, folder: Path) -> dict[str, list[str]]:
    out = str(folder / "out")
    return {
        "check": ["check", model],
        "bench": ["bench", model, "--mode", "eager", "--rounds", "1"],
        "export": ["export", model, "-o", f"{out}.onnx"],
        "train": ["train", model, "--data", "fashion-mnist-part", "--out", out, "--device", "cpu"],
    }


@pytest.mark.parametrize("command", ["check", "bench", "export", "train"])
@pytest.mark.parametrize("model", [E_VIT, VIT, TWIN])
def test_an_unknown_one_is_named_with_the_nearest(command: str, model: str, tmp_path: Path) -> None:
    if command == "export":
        pytest.importorskip("onnxruntime")
    result = run(*of_every_command(model, tmp_path)[command], "--set", "embed_dimm=192")
    assert_one_line(result, f"model={model!r} takes no embed_dimm=192; did you mean embed_dim?")


def test_convert_too(tmp_path: Path) -> None:
    torch.save({"model": {"head.weight": torch.zeros(3, 4)}}, tmp_path / "net.pth")
    out = ["-o", str(tmp_path / "net.safetensors")]
    result = run("convert", str(tmp_path / "net.pth"), "--model", E_VIT, *out, "--set", "num_headss=2")
    assert_one_line(result, f"model={E_VIT!r} takes no num_headss=2; did you mean num_heads")


@pytest.mark.parametrize(
    ("model", "known"), [(E_VIT, "group, "), (VIT, "drop_rate, "), ("convnext_tiny", "dims, "), (TWIN, "invariants, ")]
)
def test_without_a_near_one_all_are_named(model: str, known: str) -> None:
    assert_one_line(run("check", model, "--set", "zzz=1"), f"model={model!r} takes no zzz=1; it takes ", known)


@pytest.mark.parametrize("model", ["resmlp_12_224", "mixer_s16_224"])
def test_one_that_the_name_decides(model: str) -> None:
    """Where timm's own function takes it twice."""
    result = run("check", model, "--set", "patch_size=8")
    assert_one_line(result, f"model={model!r} takes no patch_size=8: the name alone says what patch_size is")
