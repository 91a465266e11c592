"""int8 for PyTorch's own files, by torchao."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from equiflop.deploy import export, proof
from equiflop.deploy.targets import TARGETS
from oracles import scramble
from small_models import KEYWORDS

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

VIT = "flop_deit3_small_patch16_224"
SMALL = {"num_classes": 7, **KEYWORDS[VIT], "embed_dim": 64, "num_heads": 8}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["equiflop.deploy.export"], "CALIBRATION_IMAGES", 24)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["flop", "octic"])
@pytest.mark.parametrize("to", ["torch-export", "aoti"])
def test_int8_mirrors(to: str, group: str, tmp_path: Path) -> None:
    model = scramble(timm.create_model(VIT, **{**SMALL, "group": group}).eval())
    made = export(model, tmp_path / "net.pt2", to, "int8", data="digits", dynamic_batch=True, images=16)
    assert made.proof.share is not None and made.proof.share > 0.8
    # all but attention and, for eight elements, the transforms, which are products with ones: 2 and 12 a block
    assert made.proof.share < 1.0
    assert 1e-4 < made.proof.difference < 0.2
    if to == "torch-export":
        weights = [value for value in torch.export.load(made.path).state_dict.values() if value.dtype == torch.int8]
        assert max(int(weight.abs().max()) for weight in weights) == 64
    runner = TARGETS[to].load(made.path, "int8")
    noise = torch.randn(20, 3, 32, 32)
    answers = [runner(images.numpy()) for images in (noise, noise.flip(-1))]
    # nearly all: where a value lies between two steps, the order of softmax's float sum moves it to either
    assert (answers[0] == answers[1]).all(axis=1).mean() > 0.8
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    together, apart = proof.run(runner, images, None), proof.run(runner, images, 1)
    assert np.abs(together - apart).max() < 0.1 * np.abs(apart).max()


def test_the_saved_program_needs_torch_and_torchao_alone(tmp_path: Path) -> None:
    model = scramble(timm.create_model(VIT, **{**SMALL, "depth": 1}).eval())
    made = export(model, tmp_path / "net.pt2", "torch-export", "int8", data="digits", images=4)
    images = torch.randn(1, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    script = """
import sys, torch, torchao.quantization.pt2e
network = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
assert "equiflop" not in sys.modules
"""
    words = [str(made.path), str(tmp_path / "images.pt"), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", script, *words], check=True)
    expected = TARGETS["torch-export"].load(made.path, "int8")(images.numpy())
    # sums of softmax in another order, with other threads, move values that lie between two steps
    assert np.abs(torch.load(words[2]).numpy() - expected).max() < 3e-2 * np.abs(expected).max()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    for to in ("torch-export", "aoti"):
        with pytest.raises(ImportError, match=r"needs torchao; install it with: pip install 'equiflop\[torchao\]'"):
            export(VIT, tmp_path / "net.pt2", to, "int8", settings=SMALL, data="digits")
