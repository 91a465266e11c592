"""ExecuTorch: programs that XNNPACK takes whole, with their metadata in them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from equiflop.deploy import Exported, ExportError, export, proof, read_notes
from equiflop.deploy.subject import Subject
from equiflop.deploy.targets import TARGETS, Settings
from equiflop.deploy.targets.base import torch_program
from equiflop.models import PoseEstimator
from oracles import relative_error, scramble
from small_models import ALL, KEYWORDS, VIT, small_model

pytest.importorskip("executorch")
from equiflop.deploy.targets.executorch import folded
from equiflop.deploy.targets.xnnpack_spelling import SPELLINGS, Spelled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SMALL = {"num_classes": 7, **KEYWORDS[VIT], "depth": 1}
#: What XNNPACK does not take: tokens that a constant index picks, once in a network.
LEFT = {"flop_resmlp_12_224": {"aten.index_select.default": 1}}


def shallow(name: str) -> Any:
    """Lowering takes seconds a block."""
    if name == "flop_convnext_tiny":
        return small_model(name, depths=(1, 1, 1, 1))
    if "resmlp" in name:
        return small_model(name, num_blocks=1)
    return small_model(name, depth=2 if "hybrid" in name or "inv" in name else 1)


def described(model: Any) -> Any:
    model.pretrained_cfg = {**(model.pretrained_cfg or {}), "input_size": (3, 32, 32)}
    return model


def changes_when_mirrored(made: Exported, model: Any) -> np.ndarray:
    """Of every image the largest change of the output when it is mirrored, over the largest output."""
    runner = TARGETS[made.to].load(made.path, made.precision)
    images = proof.sample_images(Subject.of(model), "digits", 20, training=True).images
    mirrored = np.ascontiguousarray(images[..., ::-1])
    one, other = (proof.run(runner, part, made.batch) for part in (images, mirrored))
    changes: np.ndarray = np.abs(one - other).max(axis=1) / np.abs(one).max()
    return changes


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["equiflop.deploy.export"], "CALIBRATION_IMAGES", 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str, tmp_path: Path) -> None:
    model = described(shallow(name))
    made = export(model, tmp_path / "net.pte", "executorch", batch=2, images=3)
    report, found = made.proof.equivariance, read_notes(made.path, "equiflop_delegated")
    assert report is not None and report.passed == ("hybrid" not in name)
    assert report.max_error < 1e-5 or "hybrid" in name
    assert made.proof.difference < 1e-5 and made.proof.share == 1.0
    assert found["left"] == LEFT.get(name, {})
    assert found["operators"]["all"] - found["operators"]["taken"] == sum(found["left"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if "hybrid" not in name and "_inv_" not in name])
def test_every_family_in_int8(name: str, few_images: None, tmp_path: Path) -> None:
    """Hybrid and invariant networks are made of the same layers."""
    model = described(shallow(name))
    made = export(model, tmp_path / "net.pte", "executorch", "int8", images=8, data="digits")
    found = read_notes(made.path, "equiflop_delegated")
    assert found["left"] == LEFT.get(name, {}) and made.proof.share == pytest.approx(
        found["products"]["taken"] / found["products"]["all"]
    )
    # all but attention and, for eight elements, the transforms, which are products with ones
    floats = found["products"]["all"] - found["products"]["taken"]
    assert floats <= {"flop": 2, "octi": 8}[name[:4]] * len(getattr(model, "blocks", []))
    assert 1e-4 < made.proof.difference < 0.2
    # Most answers stay the same to the last bit. Where a value lies between two steps, the order of a float sum
    # moves it to either; where it is beyond the range that was found, XNNPACK counts to -128, but to 127.
    changes = changes_when_mirrored(made, model)
    assert np.median(changes) < 1e-6 and changes.max() < 3e-2


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    made = export(VIT, tmp_path / "net.pte", "executorch", settings=SMALL, images=2)
    assert read_notes(made.path) == made.metadata and made.metadata["group"] == "flop"
    script = f"""
import json
from executorch.runtime import Runtime
program = Runtime.get().load_program({str(made.path)!r})
print(json.loads(program.load_method("equiflop").execute([])[0])["group"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "flop"
    assert [path.name for path in tmp_path.iterdir()] == ["net.pte"] and made.proof.size == made.path.stat().st_size


def test_a_plain_network_and_maps(tmp_path: Path) -> None:
    keywords = {key: value for key, value in SMALL.items() if key != "num_classes"}
    plain = export("deit3_small_patch16_224", tmp_path / "plain.pte", "executorch", settings=keywords, images=2)
    assert plain.proof.equivariance is None and read_notes(plain.path, "equiflop_delegated")["left"] == {}
    model = scramble(PoseEstimator(timm.create_model(VIT, **SMALL), 3, [(0, 1)]).eval())
    made = export(model, tmp_path / "map.pte", "executorch", images=2)
    assert made.proof.equivariance is not None and made.proof.equivariance.passed and made.proof.agreement is None


class Everything(nn.Module):
    """The operators that are spelled otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.norm = nn.LayerNorm((4, 6), dtype=torch.float64)
        self.mask = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:  # 2, 3, 4, 6
        x = self.norm(x)
        x = x + torch.matmul(self.matrix.sin(), x) + torch.ones(6, dtype=x.dtype).cumsum(0)
        a, b = x.split(3, dim=-1)
        c, d, e = x.split([1, 2, 3], dim=-1)
        f = torch.cat([*x.chunk(4, dim=-1)][::-1], dim=-1) + torch.stack(x.unbind(1), dim=1)
        attended = nn.functional.scaled_dot_product_attention(f, x, x, attn_mask=self.mask)
        causal = nn.functional.scaled_dot_product_attention(f, x, x, is_causal=True)
        sums = x.mean((1, 2), keepdim=True) + x.sum((0, 1)) + x.mean() + x[:, -1:].expand(-1, 3, -1, -1)
        lengths = torch.linalg.vector_norm(x, dim=-2, keepdim=True) + torch.linalg.vector_norm(x, 1, dim=-2).unsqueeze(
            2
        )
        sums = sums + nn.functional.rms_norm(x, (6,), self.weight, 1e-6)
        cut = (a * b).mean(-1, keepdim=True).squeeze(-1).unsqueeze(-1) + c * d.sum(-1, True) + e.sum((-2, -1), True)
        return attended + causal + sums + lengths + cut + x.select(1, 0).unsqueeze(1).detach().squeeze()[:, None]


def test_the_spelling_computes_the_same() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    network = Everything().eval()
    program = torch_program(network, images, Settings("float32", False, False, None, {}))
    graph = folded(program.module())
    assert not {torch.ops.aten.sin.default, torch.ops.aten.cumsum.default} & {node.target for node in graph.graph.nodes}
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            assert relative_error(Spelled(graph, images)(images), network(images)) < 1e-12
        finally:
            torch.set_default_dtype(torch.float32)
    used = {node.target for node in program.graph.nodes}
    assert set(SPELLINGS) - used <= {
        torch.ops.aten.alias.default,
        torch.ops.aten.dropout.default,
        torch.ops.aten.split.sizes,
        torch.ops.aten.squeeze.dims,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamic_batch": True}, "dynamic_batch=True: to='executorch' takes fixed sizes alone"),
        ({"dynamic_size": True}, "dynamic_size=True: to='executorch' takes fixed sizes alone"),
        ({"precision": "float16"}, "precision='float16' is not one of executorch's; choose from float32, int8"),
        ({"path": "net.pt2"}, r"path='.*net.pt2' must end in .pte"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = arguments.pop("path", "net.pte")
    with pytest.raises(ValueError, match=message) as error:
        export(VIT, tmp_path / name, "executorch", settings=SMALL, images=2, **arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["executorch"]
    path = tmp_path / "net.pte"
    path.write_text("what was there before")
    monkeypatch.setattr(type(target), "load", lambda *_: lambda images: images.mean((2, 3)))
    with pytest.raises(ExportError, match="nothing was written"):
        export(VIT, path, "executorch", settings=SMALL, images=2)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name))
    with pytest.raises(ImportError, match=r"needs executorch; install it with: pip install 'equiflop\[executorch\]'"):
        export(VIT, tmp_path / "net.pte", "executorch", settings=SMALL)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    words = ["export", VIT, *small, "--to", "executorch", "-o", str(tmp_path / "net.pte"), "--images", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "equiflop", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["proof"]["share"] == 1.0
