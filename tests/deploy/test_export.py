"""Files for runtimes: written, proven, and never half."""

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
from click.testing import CliRunner
from PIL import Image
from torch import nn

import equiflop
from equiflop.classify import ModelSpec
from equiflop.classify.weights import save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing, open_data
from equiflop.deploy import Exported, ExportError, export, proof
from equiflop.deploy.export import _plain_of
from equiflop.deploy.subject import Subject
from equiflop.deploy.targets import TARGETS, Target
from equiflop.models import PoseEstimator, Segmenter
from oracles import relative_error, scramble
from small_models import ALL, KEYWORDS, small_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

VIT = "flop_deit3_small_patch16_224"
SMALL = {"num_classes": 7, **KEYWORDS[VIT]}
has_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


def nodes(path: Path) -> list[Any]:
    return list(onnx.load(str(path)).graph.node)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in range(7):
            folder = tmp_path / "photos" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 36)).save(folder / f"{i}.png")
    return str(tmp_path / "photos")


def run(target: Target, made: Exported, images: torch.Tensor) -> torch.Tensor:
    runner = target.load(made.path, made.precision)
    return torch.from_numpy(proof.run(runner, images.numpy(), made.batch))


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=has_openvino), "torch-export"])
@pytest.mark.parametrize("name", ALL)
def test_every_family_goes_everywhere(name: str, to: str, tmp_path: Path) -> None:
    model = small_model(name)
    target = TARGETS[to]
    size = (32, 32)
    model.pretrained_cfg = {**(model.pretrained_cfg or {}), "input_size": (3, *size)}
    made = export(model, tmp_path / f"net{target.suffix}", to, dynamic_batch=True, images=4)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            assert relative_error(run(target, made, images), model(images)) < 1e-4
    report = made.proof.equivariance
    assert report is not None and report.passed == ("hybrid" not in name)
    assert made.proof.difference < 1e-4 and made.proof.share == 1.0
    assert made.proof.speed is not None and made.proof.speed.latency_ms


@pytest.mark.parametrize("wrap", [lambda b: PoseEstimator(b, 3, [(0, 1)]), lambda b: Segmenter(b, 4)])
def test_maps(wrap: Any, tmp_path: Path) -> None:
    model = scramble(wrap(timm.create_model(VIT, **SMALL)).eval())
    made = export(model, tmp_path / "map.onnx", images=3)
    assert made.proof.equivariance is not None and made.proof.equivariance.passed
    assert made.proof.agreement is None


def test_a_twin_and_a_plain_network(tmp_path: Path) -> None:
    settings = {**KEYWORDS[VIT], "img_size": 32}
    made = export("twin:vit_small_patch16_224", tmp_path / "twin.onnx", settings=settings, images=3, compare=True)
    assert made.proof.equivariance is not None and made.proof.equivariance.passed
    assert made.proof.plain is not None and set(made.proof.speedup) == {1}
    plain = export("vit_small_patch16_224", tmp_path / "plain.onnx", settings=settings, images=3)
    assert plain.proof.equivariance is None and plain.proof.agreement == 1.0


@pytest.mark.parametrize(
    ("name", "plain", "limit"),
    [
        (VIT, "deit3_small_patch16_224", 1.5),
        ("octic_deit3_small_patch16_224", "deit3_small_patch16_224", 3.0),
        ("flop_resmlp_12_224", "resmlp_12_224", 1.5),
    ],
)
def test_the_graph_is_not_much_larger_than_the_plain_one(name: str, plain: str, limit: float, tmp_path: Path) -> None:
    settings = {"img_size": 32, "num_classes": 7}
    settings |= {} if "resmlp" in name else {"embed_dim": 64, "depth": 4, "num_heads": 8}
    export(name, tmp_path / "own.onnx", settings=settings, images=2)
    export(plain, tmp_path / "plain.onnx", settings=settings, images=2)
    own, other = (nodes(tmp_path / f"{which}.onnx") for which in ("own", "plain"))
    assert len(own) <= limit * len(other)
    kinds = [node.op_type for node in own]
    assert kinds.count("Conv") == 1 and kinds.count("Gather") <= 1 and not {"Pow", "Sqrt"} & set(kinds)
    if "resmlp" not in name:
        assert kinds.count("LayerNormalization") == kinds.count("Attention") * 2 + 1 == 9


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    made = export(VIT, tmp_path / "net.onnx", settings=SMALL, images=2)
    found = {entry.key: entry.value for entry in onnx.load(str(made.path)).metadata_props}
    assert found == made.metadata
    assert found["group"] == "flop" and json.loads(found["input_size"]) == [3, 32, 32]
    assert json.loads(found["mean"]) == pytest.approx([0.485, 0.456, 0.406]) and len(json.loads(found["labels"])) == 7
    assert int(found["macs"]) > 0 and found["precision"] == "float32" and found["interpolation"] == "bicubic"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]  # one file, nothing beside it
    assert b".py" not in made.path.read_bytes()  # nothing of the machine that it was written on


@has_openvino
def test_what_stands_in_an_openvino_file(tmp_path: Path) -> None:
    import openvino

    made = export(VIT, tmp_path / "net.xml", "openvino", "bfloat16", settings=SMALL, images=2)
    model = openvino.Core().read_model(str(made.path))
    assert model.get_rt_info(["equiflop", "group"]).value == "flop"
    assert model.get_rt_info(["model_info", "model_type"]).value == "Classification"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert made.proof.size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision(precision: str, tmp_path: Path) -> None:
    to, name = ("onnx", "net.onnx") if precision == "float16" else ("torch-export", "net.pt2")
    made = export(small_model(VIT), tmp_path / name, to, precision, images=4)
    assert 1e-6 < made.proof.difference < 6e-2
    assert made.proof.equivariance is not None and made.proof.equivariance.max_error < 1e-2


def subject_block() -> Any:
    """The first block of a network with random weights."""
    model: Any = Subject.of(VIT, SMALL).model
    return model.blocks[0]


def test_random_weights_are_worth_a_proof(tmp_path: Path) -> None:
    """DeiT III's class token of 1e-6 is noise in float16, and its layer scales hide the blocks."""
    plain = {"num_classes": 7, "depth": 2}
    made = export("deit3_small_patch16_224", tmp_path / "net.onnx", "onnx", "float16", settings=plain, images=4)
    assert made.proof.difference < 5e-3
    block, again = (subject_block() for _ in range(2))
    x = torch.randn(1, 5, block.rep.dim)
    assert (block(x) - x).std() > 0.1
    assert torch.equal(block.attn.qkv.A.weight, again.attn.qkv.A.weight)


def test_weights_of_timm_are_kept(tmp_path: Path) -> None:
    network = timm.create_model(VIT, **SMALL)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    found = Subject.of(VIT, {**SMALL, "checkpoint_path": str(tmp_path / "weights.pth")})
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), found.model.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="there are no weights of flop_deit3_small_patch16_224 to download"):
        Subject.of(VIT, {"pretrained": True})


def test_accuracy_before_and_after(photos: str, tmp_path: Path) -> None:
    model = small_model(VIT)
    classes = tuple(f"class{label}" for label in range(7))
    spec = ModelSpec(VIT, SMALL, classes, Preprocessing((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    save_weights(tmp_path / "net.safetensors", model.state_dict(), spec)
    made = export(tmp_path / "net.safetensors", tmp_path / "net.onnx", data=photos, dynamic_batch=True)
    data = open_data(photos, preprocessing=spec.preprocessing)
    batch = next(iter(data.test.batches(torch.arange(21), 21)))
    for network, accuracy in (
        (model, made.proof.network_accuracy),
        (lambda x: run(TARGETS["onnx"], made, x), made.proof.accuracy),
    ):
        with torch.no_grad():
            assert accuracy == pytest.approx((network(batch.images).argmax(1) == batch.labels).float().mean().item())
    assert export(VIT, tmp_path / "net.onnx", settings=SMALL, data=photos).proof.accuracy is None  # other classes


def test_the_plain_twin_of_a_run_has_its_sizes(tmp_path: Path) -> None:
    """Grey images, two blocks: not the full network of the registry."""
    keywords = {**SMALL, "in_chans": 1}
    model = timm.create_model(VIT, **keywords)
    kept = {key: value for key, value in keywords.items() if key != "num_classes"}
    spec = ModelSpec(VIT, kept, tuple("abcdefg"), Preprocessing((1, 32, 32), (0.5,), (0.25,)))
    save_weights(tmp_path / "grey.safetensors", model.state_dict(), spec)
    made = export(tmp_path / "grey.safetensors", tmp_path / "net.onnx", images=3, compare=True)
    small = sum(p.numel() for p in timm.create_model("deit3_small_patch16_224", **keywords).parameters())
    assert made.proof.speedup and made.proof.plain is not None
    assert sum(p.numel() for p in _plain_of(Subject.of(tmp_path / "grey.safetensors")).model.parameters()) == small


def _int8_weights(path: Path) -> list[np.ndarray]:
    """Matrices and kernels of a file for ONNX Runtime or OpenVINO that are stored as int8."""
    if path.suffix == ".onnx":
        import onnx

        tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    else:
        import openvino

        nodes = openvino.Core().read_model(path).get_ops()
        tensors = [node.get_data() for node in nodes if node.get_type_name() == "Constant"]
    return [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=has_openvino)])
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_int8_mirrors(to: str, group: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = scramble(timm.create_model(VIT, **{**SMALL, "group": group, "embed_dim": 64, "num_heads": 8}).eval())
    path = tmp_path / f"net{TARGETS[to].suffix}"
    with pytest.warns(equiflop.EquiflopWarning, match=r"int8 finds its ranges from 42 images of .*; 300 are better"):
        made = export(model, path, to, "int8", data=photos, dynamic_batch=True)
    assert capsys.readouterr().out == ""  # quantisers show their progress on standard output
    assert made.proof.share is not None and made.proof.share > 0.9
    assert max(int(np.abs(weight.astype(int)).max()) for weight in _int8_weights(path)) == 64
    # To the last bit, but for values that lie between two steps, which the order of softmax's float sum moves to one or
    # the other, and in ONNX Runtime for those beyond the range that was found: it counts to -128, but to 127.
    images = proof.sample_images(Subject.of(model), photos, 21).images
    runner = TARGETS[to].load(path, "int8")
    mirrored = runner(np.ascontiguousarray(images[..., ::-1]))
    changes = np.abs(runner(images) - mirrored).max(axis=1) / np.abs(mirrored).max()
    assert (changes < 1e-6).mean() > 0.8 and changes.max() < 3e-2
    assert made.proof.source == "test images of photos" and made.proof.images == 21
    assert made.proof.agreement is not None and made.proof.agreement > 0.7
    assert 1e-4 < made.proof.difference < 0.2


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = small_model(VIT)
    made = export(model, tmp_path / "net.pt2", "aoti", dynamic_batch=True, images=4)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(run(TARGETS["aoti"], made, images), model(images)) < 1e-4


def test_images_of_any_size(tmp_path: Path) -> None:
    model = scramble(timm.create_model(VIT, **SMALL, dynamic_img_size=True).eval())
    made = export(model, tmp_path / "net.onnx", dynamic_size=True, dynamic_batch=True, images=2)
    for size in ((32, 32), (40, 24), (64, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert relative_error(run(TARGETS["onnx"], made, images), model(images)) < 1e-3


class WrongTarget(type(TARGETS["onnx"])):  # type: ignore[misc]
    """A runtime that looks to the left."""

    def load(self, path: Path, precision: str, threads: int | None = None) -> Any:
        runner = super().load(path, precision, threads)
        return lambda images: runner(np.ascontiguousarray(images * np.linspace(0, 1, 32, dtype=np.float32)))


def test_a_file_that_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "onnx", WrongTarget())
    path = tmp_path / "net.onnx"
    path.write_text("what was there before")
    with pytest.raises(ExportError, match=r"differs from the network by .* nothing was written"):
        export(small_model(VIT), path, images=2)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setitem(proof.DIFFERENCES, "float32", 1e9)
    with pytest.raises(ExportError, match="moved images change the answer"):
        export(small_model(VIT), path, images=2)
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_export_left_goes_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".net.onnx.new.{dead.pid}", f".other.onnx.new.{dead.pid}", ".net.onnx.new.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.onnx").touch()
    export(VIT, tmp_path / "net.onnx", settings=SMALL, images=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"net.onnx", f".other.onnx.new.{dead.pid}", ".net.onnx.new.1"}


class Unexportable(nn.Module):
    img_size = (8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.mean((2, 3)) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "tensorrt"}, "to='tensorrt' is unknown; choose from onnx, openvino"),
        ({"precision": "bfloat16"}, "precision='bfloat16' is not one of onnx's; choose from float32, float16, int8"),
        ({"path": "net.pt"}, r"path='.*net.pt' must end in .onnx"),
        ({"precision": "int8"}, "finds its ranges from images; give data"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"model": "flop_deit3_smal_patch16_224"}, "is unknown; did you mean flop_deit3_small_patch16_224"),
        ({"model": "resnet18", "settings": None, "compare": True}, "resnet18 is a plain network itself"),
        ({"model": Unexportable(), "settings": None}, "Unexportable cannot be exported: .*; nothing was written"),
        ({"data": "nowhere"}, "neither a folder nor a built-in set"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = arguments.pop("path", "net.onnx")
    options: dict[str, Any] = {"model": VIT, "settings": SMALL, "images": 2, **arguments}
    with pytest.raises(ValueError, match=message) as error:
        export(path=tmp_path / name, **options)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fails", "word"), [("load", "read"), ("run", "run")])
def test_what_the_runtime_raises_is_one_line(
    fails: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its class: runtimes have exceptions of their own."""

    class OtherError(Exception):
        pass

    def fail(*arguments: object) -> None:
        raise OtherError("no kernel for Attention(23)\nat node 7")

    target = type(TARGETS["onnx"])
    monkeypatch.setattr(target, "load", fail if fails == "load" else lambda *arguments: fail)
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(main, ["export", VIT, *small, "-o", str(tmp_path / "net.onnx"), "--images", "2"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"the runtime cannot {word} the file: no kernel for Attention(23); nothing was written" in result.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("EQUIFLOP_DEBUG", "1")
    raised = CliRunner().invoke(main, ["export", VIT, *small, "-o", str(tmp_path / "net.onnx"), "--images", "2"])
    assert isinstance(raised.exception, ValueError) and isinstance(raised.exception.__cause__, OtherError)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(ImportError, match=r"needs openvino; install it with: pip install 'equiflop\[openvino\]'"):
        export(VIT, tmp_path / "net.xml", "openvino", settings=SMALL)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "equiflop", "export", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


def test_it_is_a_function_of_the_package() -> None:
    assert equiflop.export is export
    with pytest.raises(AttributeError, match="has no attribute 'exprt'"):
        equiflop.exprt  # noqa: B018


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    path = tmp_path / "net.onnx"
    done = command(VIT, *small, "-o", str(path), "--images", "4", "--json")
    assert done.returncode == 0 and "Skipping" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["proof"]["equivariance"]["max_error"] < 1e-5 and found["proof"]["faults"] == [] and path.is_file()
    assert found["proof"]["bytes"] == path.stat().st_size
    text = command(VIT, *small, "-o", str(path), "--images", "4").stdout
    assert "error under mirror left-right" in text and "same likeliest class" in text
    blocker = tmp_path / "file"
    blocker.touch()
    wrong = command(VIT, *small, "-o", str(blocker / "net.onnx"))
    assert wrong.returncode == 2 and wrong.stderr.strip().splitlines()[-1].startswith("equiflop: ")
