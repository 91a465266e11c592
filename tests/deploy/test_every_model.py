"""Every registered model goes to ONNX Runtime and OpenVINO: at its width with few blocks, one per family whole."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import equiflop
from equiflop.deploy import export, proof
from equiflop.deploy.targets import TARGETS
from oracles import relative_error, scramble

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

WHOLE = (
    "flop_deit3_small_patch16_224",
    "octic_deit3_small_patch16_224",
    "flop_resmlp_12_224",
    "flop_convnext_tiny",
    "flop_convnext_isotropic_small",
)


@pytest.fixture(autouse=True)
def without_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast they are is not asked here."""
    monkeypatch.setattr(proof, "speed", lambda *args: None)


def few_blocks(name: str) -> dict[str, Any]:
    if "isotropic" in name:
        return {"depth": 1}
    if "convnext" in name:
        return {"depths": (1, 1, 1, 1)}
    if "resmlp" in name:
        return {"num_blocks": 1, "img_size": 64}
    return {"depth": 2 if "hybrid" in name or "inv" in name else 1, "img_size": 56 if "patch14" in name else 64}


@pytest.mark.parametrize(
    ("name", "to"), list(zip(equiflop.equivariant_models(), cycle(["onnx", "openvino"]), strict=False))
)
def test_few_blocks(name: str, to: str, tmp_path: Path) -> None:
    """Every other name to either; every family goes to both in ``test_export.py``."""
    settings = few_blocks(name)
    size = settings.get("img_size", 64)
    model = scramble(timm.create_model(name, num_classes=5, **settings).eval())
    made = export(model, tmp_path / f"net{TARGETS[to].suffix}", to, img_size=(size, size), images=2, batch=2)
    assert made.proof.faults == () and made.proof.share == 1.0 and made.proof.difference < 1e-4
    report = made.proof.equivariance
    assert report is not None and report.passed == ("hybrid" not in name)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str, to: str, tmp_path: Path) -> None:
    model = scramble(timm.create_model(name).eval())
    made = export(model, tmp_path / f"net{TARGETS[to].suffix}", to, dynamic_batch=True, images=3)
    report = made.proof.equivariance
    assert report is not None and report.passed and made.proof.agreement == 1.0 and made.proof.share == 1.0
    runner = TARGETS[to].load(made.path, made.precision)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            found = torch.from_numpy(proof.run(runner, np.asarray(images), None))
            assert relative_error(found, model(images)) < 1e-4
