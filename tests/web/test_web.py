"""The page for browsers: its files by themselves, the command that makes them, and the page in a real browser."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from equiflop.demo import DemoSettings, run_demo
from test_data import write_fashion_mnist

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

WEB = Path(__file__).parents[2] / "web"
ABOUT = json.loads((WEB / "models" / "about.json").read_text())
INDEX = json.loads((WEB / "samples" / "index.json").read_text())
NETWORKS = ("equivariant", "plain")
SAME = 1e-5


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def answers(network: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and maps of images, one by one as the page does."""
    found = [network.run(["logits", "map"], {"images": image[None]}) for image in images]
    return softmax(np.concatenate([logits for logits, _ in found])), np.concatenate([where for _, where in found])


def samples() -> np.ndarray:
    pixels = [np.asarray(Image.open(WEB / "samples" / sample["file"])) for sample in INDEX["samples"]]
    mean, std = (np.float32(ABOUT[key][0]) for key in ("mean", "std"))
    return ((np.stack(pixels)[:, None].astype(np.float32) / np.float32(255) - mean) / std).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_says_what_it_is(name: str) -> None:
    path = WEB / "models" / f"{name}.onnx"
    figures = ABOUT["networks"][name]
    content = path.read_bytes()
    assert len(content) == figures["bytes"] and hashlib.sha256(content).hexdigest() == figures["sha256"]
    noted = session(path).get_modelmeta().custom_metadata_map
    assert noted["model"] == figures["model"] and noted["group"] == ("flop" if name == "equivariant" else "")
    assert int(noted["macs"]) == figures["macs"] and int(noted["parameters"]) == figures["parameters"]
    for key, own in (("labels", "classes"), ("mean", "mean"), ("std", "std"), ("input_size", "input_size")):
        assert json.loads(noted[key]) == ABOUT[own]
    graph = onnx.load(str(path)).graph
    assert not any(node.metadata_props or node.doc_string for node in graph.node), "nothing of the machine it came from"


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_stored_in_half_and_used_in_single_precision(name: str) -> None:
    graph = onnx.load(str(WEB / "models" / f"{name}.onnx")).graph
    numbers = dict.fromkeys((onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT), 0)
    for value in graph.initializer:
        if value.data_type in numbers:
            numbers[value.data_type] += int(np.prod(value.dims))
    assert numbers[onnx.TensorProto.FLOAT] < 100 < numbers[onnx.TensorProto.FLOAT16]
    assert {node.op_type for node in graph.node if any(i.endswith(".half") for i in node.input)} == {"Cast"}


def test_figures_hang_together() -> None:
    equivariant, plain = (ABOUT["networks"][name] for name in NETWORKS)
    assert equivariant["changed"] == 0 < plain["changed"]
    assert equivariant["accuracy"] == equivariant["accuracy_mirrored"]
    assert equivariant["largest_change_of_probability"] < SAME
    for figures in (equivariant, plain):
        assert abs(figures["accuracy"] - figures["accuracy_in_float32"]) < 0.001
    for key in ("macs", "parameters", "bytes"):
        assert 0.45 < equivariant[key] / plain[key] < 0.56


def test_the_equivariant_file_answers_the_same_both_ways_and_the_plain_one_does_not() -> None:
    images = samples()
    for name in NETWORKS:
        network = session(WEB / "models" / f"{name}.onnx")
        (here, where), (there, where_mirrored) = (
            answers(network, np.ascontiguousarray(view)) for view in (images, images[..., ::-1])
        )
        for view, found in enumerate((here, there)):
            noted = np.array([sample["probabilities"][name][view] for sample in INDEX["samples"]])
            assert np.abs(found - noted).max() < SAME
        same = np.abs(here - there).max() < SAME
        map_mirrors = np.abs(where[..., ::-1] - where_mirrored).max() < SAME * where.max()
        assert same == map_mirrors == (name == "equivariant")
        if name == "plain":
            changed = here.argmax(1) != there.argmax(1)
            assert changed[INDEX["first"] :].all()


def test_the_documentation_tells_the_same_figures() -> None:
    text = (WEB.parent / "docs" / "web.md").read_text()
    for figures in ABOUT["networks"].values():
        told = [f"{100 * figures[key]:.2f} %" for key in ("accuracy", "accuracy_mirrored")]
        told += [f"{figures['macs'] / 1e6:.1f} M", f"{figures['bytes'] / 1e6:.2f} MB", f"| {figures['changed']:,} |"]
        assert all(figure in text for figure in told)


def test_samples_have_texts_and_a_licence() -> None:
    assert {sample["class"] for sample in INDEX["samples"]} == set(ABOUT["classes"])
    assert all(sample["class"] in sample["alt"] for sample in INDEX["samples"])
    assert "Zalando SE" in (WEB / "samples" / "LICENSE.txt").read_text()


def the_command(name: str) -> ModuleType:
    sys.path.insert(0, str(WEB))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(WEB))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_files_can_be_made_anew(tmp_path: Path) -> None:
    data = str(write_fashion_mnist(tmp_path / "data", 640, 300))
    sizes = {"embed_dim": 32, "depth": 1}
    size: dict[str, Any] = {"epochs": 1, "model_kwargs": sizes, "rounds": 1, "seconds": 0.0}
    plainly: dict[str, Any] = {"compile": False, "full_size": False, "device": "cpu"}
    run_demo(DemoSettings(data=data, out=str(tmp_path / "demo"), **size, **plainly), lambda line: None)
    made = the_command("make_models").make(tmp_path / "demo", tmp_path / "models", None, lambda line: None)
    assert made["test_images"] == 300 and made["networks"]["equivariant"]["changed"] == 0
    assert made["networks"]["equivariant"]["largest_change_of_probability"] < SAME
    assert str(tmp_path) not in (tmp_path / "models" / "about.json").read_text()
    the_command("make_samples").make(tmp_path / "models", tmp_path / "samples", data)
    index = json.loads((tmp_path / "samples" / "index.json").read_text())
    assert len(index["samples"]) >= 10
    assert Image.open(tmp_path / "samples" / index["samples"][0]["file"]).size == (28, 28)


def test_a_missing_demo_gets_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(WEB / "make_models.py"), "--demo", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "results.json is missing; first run: equiflop demo" in found.stderr


def node_or_skip() -> str:
    """Node, once the page's packages are there."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        pytest.skip("node is not installed")
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        if npm is None:
            pytest.skip("web/node_modules is missing, and npm is not installed")
        command = [npm, "ci", "--prefix", str(WEB), "--ignore-scripts", "--no-audit", "--no-fund"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if found.returncode:
            pytest.skip("web/node_modules is missing, and npm ci could not fetch it")
    return node


def run_node_test(node: str, name: str) -> None:
    command = [node, "--test", f"test/{name}.test.mjs"]
    found = subprocess.run(command, cwd=WEB, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.mark.slow
def test_the_page_in_a_browser() -> None:
    node = node_or_skip()
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if not os.environ.get("CHROMIUM") and not any(map(shutil.which, names)):
        pytest.skip("chromium is not installed, and CHROMIUM names none")
    run_node_test(node, "page")
    run_node_test(node, "use")


def test_the_server() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    run_node_test(node, "serve")
