"""``equiflop convert``: official files in, our files out; anything wrong is one line, exit code 2, and no output
file."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import official_networks as official
from equiflop.classify.weights import load_model
from equiflop.cli.main import main
from equiflop.convert.files import read_official

MODEL = "flop_convnext_isotropic_small"
SETTINGS = ["--set", "patch_size=8", "--set", "depth=2", "--set", "dim=16", "--set", "ls_init_value=1e-6"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = official.isotropic_convnext_state(8, 2, 16, 7, True, False)
    return {name: value.float() for name, value in made.items()}


def _convert(source: Path, output: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["convert", str(source), "-o", str(output), *arguments])


def _refused(result: Result, output: Path, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    for word in words:
        assert word in lines[0]
    assert not output.exists()
    assert list(output.parent.glob(".*")) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)},
        lambda state: {"model_ema": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"teacher": {f"backbone._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    ],
)
def test_wrapped_checkpoints_compute_the_official_function(
    wrap: Any, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    torch.save(wrap(state), source)
    result = _convert(source, output, "--model", MODEL, *SETTINGS)
    assert result.exit_code == 0, result.output
    assert str(len(state)) in result.output
    model = load_model(output).model.double()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    expected = official.isotropic_convnext({name: value.double() for name, value in state.items()}, x, 8, 2, False)[1]
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_safetensors_source(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "official.safetensors", tmp_path / "ours.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, source)
    assert _convert(source, output, "--model", MODEL, *SETTINGS).exit_code == 0
    assert "stem.proj.proj.A.weight" in load_file(output)


class _Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_a_payload_is_refused_and_not_run(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, output, trace = tmp_path / "evil.pth", tmp_path / "out" / "ours.safetensors", tmp_path / "trace"
    torch.save({"model": state, "extra": _Payload(trace)}, source)
    _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, "evil.pth", "run code")
    assert not trace.exists()
    source.write_bytes(pickle.dumps({"model": _Payload(trace)}))
    _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, "evil.pth")
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_files(keep: float, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        source, output = tmp_path / f"cut{suffix}", tmp_path / "out" / "ours.safetensors"
        save({name: value.contiguous() for name, value in state.items()}, source)
        content = source.read_bytes()
        source.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, source.name)


def test_what_does_not_fit_is_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors"
    torch.save(state, source)
    wrong_width = ["--set", "patch_size=8", "--set", "depth=2", "--set", "dim=32", "--set", "ls_init_value=1e-6"]
    _refused(_convert(source, output, "--model", MODEL, *wrong_width), output, "stem.proj_sym.weight", "(16, 3, 8, 4)")
    _refused(_convert(source, output, "--model", "flop_convnext_tiny"), output, "downsample_layers.0.0.proj_sym.weight")
    _refused(_convert(source, output, "--model", "flop_resmlp_12_224"), output, "patch_embed.proj_sym.weight")
    _refused(_convert(source, output, "--model", "flop_convnext_isotropic_smal"), output, "did you mean", MODEL)
    _refused(_convert(source, output, "--model", "resnet18"), output, "resnet18", "no official counterpart")
    _refused(_convert(tmp_path / "none.pth", output, "--model", MODEL), output, "none.pth", "no such file")
    torch.save({**state, "head.bias": torch.full((7,), float("nan"))}, source)
    _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, "head.bias", "NaN")
    torch.save([1, 2, 3], source)
    _refused(_convert(source, output, "--model", MODEL), output, "holds no state dict")
    source.write_text("this is not a checkpoint")
    _refused(_convert(source, output, "--model", MODEL), output, "official.pth")


def test_only_safetensors_are_written(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "ours.bin"
    torch.save(state, source)
    _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, "--output", ".safetensors")


def test_entries_that_are_no_tensors_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors"
    torch.save({**state, "head.bias": "seven"}, source)
    _refused(_convert(source, output, "--model", MODEL, *SETTINGS), output, "head.bias", "str")
    assert read_official(source).state_dict["head.weight"].shape == (7, 8)


@pytest.mark.parametrize("arguments", [[], ["--model", "flop_deit3_small_patch16_224"]], ids=["found", "named"])
@pytest.mark.parametrize("plain", ["deit3_small_patch16_224", "resmlp_12_224", "convnext_atto"])
def test_a_plain_network_is_named_as_such(plain: str, arguments: list[str], tmp_path: Path) -> None:
    """As the official repositories of DeiT and ConvNeXt write them."""
    source, output = tmp_path / "plain.pth", tmp_path / "out" / "ours.safetensors"
    output.parent.mkdir()
    torch.save({"model": timm.create_model(plain).state_dict()}, source)
    _refused(_convert(source, output, *arguments), output, "plain.pth", "holds weights of a plain network")
