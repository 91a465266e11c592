"""The server that docs/deploy.md shows: its very text, with a file of ours."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiflop.classify import ModelSpec
from equiflop.classify.prediction import Classifier, predict
from equiflop.classify.weights import save_weights
from equiflop.data import Preprocessing
from equiflop.deploy import export
from small_models import KEYWORDS, small_model

pytest.importorskip("litserve")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

NAME = "flop_deit3_small_patch16_224"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, image: bytes, patience: float = 120.0) -> dict[str, float]:
    body = json.dumps({"image": base64.b64encode(image).decode()}).encode()
    address, kind = f"http://127.0.0.1:{port}/predict", {"Content-Type": "application/json"}
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body, kind), timeout=10) as answer:
                found: dict[str, float] = json.load(answer)
                return found
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def test_it_answers_as_the_network_does(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "litserve" in block]
    port = free_port()
    assert len(blocks) == 1 and blocks[0].count("8000") == 1
    (tmp_path / "serve.py").write_text(blocks[0].replace("8000", str(port)))
    size = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 0.9)
    spec = ModelSpec(NAME, KEYWORDS[NAME] | {"num_classes": 7}, tuple("abcdefg"), size)
    save_weights(tmp_path / "run.safetensors", small_model(NAME).state_dict(), spec)
    export(tmp_path / "run.safetensors", tmp_path / "net.onnx", dynamic_batch=True, images=2)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 44)).save(tmp_path / "image.png")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "serve.py"], cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        try:
            answer = ask(port, (tmp_path / "image.png").read_bytes())
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # its workers too
            server.wait(30)
    assert len(answer) == 5
    expected = predict(Classifier.from_file(tmp_path / "run.safetensors"), tmp_path / "image.png", torch.device("cpu"))
    assert list(answer) == [entry.name for entry in expected.best]
