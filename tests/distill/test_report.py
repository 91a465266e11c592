"""How equivariant a plain network already is: exactly so for one that hides an equivariant one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from hidden_networks import hidden
from timm.models.vision_transformer import VisionTransformer

from equiflop.classify import ModelSpec
from equiflop.classify.weights import save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing
from equiflop.distill import PlainTeacher
from equiflop.distill.report import draw_report, mirror_report
from equiflop.grids import named_image_group
from equiflop.models import EquivariantVisionTransformer
from oracles import scramble

SETTINGS: dict[str, Any] = {
    "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10,
    "init_values": 0.1,
}  # fmt: skip
SPEC = ModelSpec("deit3_tiny_patch16_224", {}, tuple("abcdefghij"), Preprocessing((1, 28, 28), (0.0,), (1.0,)))
FLOP = named_image_group("flop")


def images() -> list[torch.Tensor]:
    return list(torch.randn(40, 1, 28, 28, dtype=torch.float64).split(20))


def test_of_a_hidden_equivariant_network() -> None:
    made = scramble(EquivariantVisionTransformer(**SETTINGS).double().eval())
    plain = hidden(made, {**SETTINGS, "no_embed_class": True})
    report = mirror_report(PlainTeacher(SPEC, plain, "it").double(), images(), FLOP)
    assert [layer.place for layer in report.layers] == ["patches", "block 0", "block 1"] and report.images == 40
    for layer in report.layers:
        assert layer.best == pytest.approx(1, abs=1e-9) and layer.common == pytest.approx(1, abs=1e-9)
        assert layer.unchanged < 0.9


def test_of_a_network_that_is_not() -> None:
    plain: Any = scramble(VisionTransformer(**{**SETTINGS, "no_embed_class": True}).double().eval())
    report = mirror_report(PlainTeacher(SPEC, plain, "it").double(), images(), FLOP)
    for layer in report.layers:
        assert layer.unchanged <= layer.best + 1e-12 and layer.common <= layer.best + 1e-12 < 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_a_convnext(symmetric: bool) -> None:
    """One whose kernels are their own mirror images mirrors without any involution; the reductions are mirrored too."""
    settings = {"depths": [1, 2, 1, 1], "dims": [4, 4, 8, 8], "num_classes": 10, "ls_init_value": 1.0}
    plain: Any = scramble(timm.create_model("convnext_tiny", **settings).double().eval())
    if symmetric:
        for name, weight in plain.named_parameters():
            if weight.ndim == 4 and not name.startswith("head"):
                weight.data = (weight.data + weight.data.flip(3)) / 2
    batches = list(torch.randn(20, 3, 64, 64, dtype=torch.float64).split(10))
    report = mirror_report(PlainTeacher(SPEC, plain, "it").double(), batches, FLOP)
    assert [layer.place for layer in report.layers][:5] == [
        "stage 0", "stage 0 block 0", "stage 1", "stage 1 block 0", "stage 1 block 1",
    ]  # fmt: skip
    assert len(report.layers) == 9
    shares = [layer.unchanged for layer in report.layers]
    assert min(shares) == pytest.approx(1, abs=1e-9) if symmetric else max(shares) < 0.95
    assert all(layer.unchanged <= layer.best + 1e-12 and layer.common <= layer.best + 1e-12 for layer in report.layers)


def test_of_nothing_and_of_larger_groups() -> None:
    plain: Any = VisionTransformer(**SETTINGS).double().eval()
    teacher = PlainTeacher(SPEC, plain, "it").double()
    with pytest.raises(ValueError, match="there are none"):
        mirror_report(teacher, [], FLOP)
    with pytest.raises(ValueError, match=r"group='octic'.*flop or updown"):
        mirror_report(teacher, images(), named_image_group("octic"))


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain: Any = VisionTransformer(**SETTINGS).double().eval()
    report = mirror_report(PlainTeacher(SPEC, plain, "it").double(), images(), FLOP)
    draw_report(report, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"plot='.*layers.txt' must end with .png"):
        draw_report(report, tmp_path / "layers.txt")


def test_command(tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "num_classes"}
    spec = ModelSpec("vit_tiny_patch16_224", settings, SPEC.classes, SPEC.preprocessing)
    save_weights(tmp_path / "net.safetensors", spec.build().state_dict(), spec)

    def run(*more: str) -> Result:
        arguments = ["--teacher", str(tmp_path / "net.safetensors"), "--data", "fashion-mnist-part", "--device", "cpu"]
        return CliRunner().invoke(main, ["distill", *arguments, "--init-images", "30", *more])

    table, found = run("--report"), run("--report", "--json")
    assert table.exit_code == 0, table.output
    assert "vit_tiny_patch16_224, 30 images" in table.stdout and len(table.stdout.splitlines()) == 5
    report = json.loads(found.stdout)
    assert len(report["layers"]) == 3 and report["group"] == "flop"
    wrong = run("--plot", "x.png")
    assert wrong.exit_code == 2 and "give --report" in wrong.stderr
    assert not (tmp_path / "runs").exists()
