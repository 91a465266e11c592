"""What is said of GPU kernels without a GPU: registers, how many are started, predictions, and the queue."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


def run_script(words: list[str]) -> str:
    """As a user runs it: without Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_tile_that_is_tried_has_been_assembled_without_spills() -> None:
    registers = script("gpu_registers")
    known = json.loads((BENCHMARKS / "gpu_registers.json").read_text())["kernels"]
    assert not [entry for entry in known if entry["spilled_bytes"]]
    recorded = {(e["arch"], e["group"], e["kernel"], json.dumps(e["tile"])) for e in known}
    tried = {
        (arch, name, use, json.dumps(tile and asdict(tile)))
        for arch in (80, 90)
        for name, group in registers.GROUPS.items()
        for use, what, _, _ in registers.uses_of(registers.lanes_of(group), arch)
        for tile in registers.tiles_of(what, arch)
    }
    assert tried == recorded
    by_descriptors = [entry for entry in known if "descriptors" in entry["kernel"]]
    assert len(by_descriptors) > 50 and all(entry["tma"] for entry in by_descriptors)


@pytest.mark.slow
def test_a_compiled_block_starts_no_more_kernels_than_plain(tmp_path: Path) -> None:
    names = ["flop_deit3_small_patch16_224", "octic_deit3_small_patch16_224"]
    run_script([str(BENCHMARKS / "gpu_launches.py"), *names, "--batch", "4", "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["started"]
    plain = {step: sum(count.values()) for step, count in found["deit3_small_patch16_224"].items()}
    assert plain["forward"] > 4
    for name in names:
        started = {step: sum(count.values()) for step, count in found[name].items()}
        assert started["forward"] == started["training forward"] == 7  # two norms, four products, attention
        assert started["backward"] <= plain["backward"]
        assert any("product_" in kernel for kernel in found[name]["forward"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flop_deit3_small_patch16_224", "octic_deit3_small_patch16_224"])
@pytest.mark.parametrize("train", [True, False])
def test_blocks_are_one_graph_for_any_number_of_images(name: str, train: bool) -> None:
    code = f"""
import sys, timm, torch
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_launches
gpu_launches.triton.runtime.driver.set_active(gpu_launches.Driver())
model = timm.create_model({name!r}, depth=1)
block = model.blocks[0].requires_grad_({train})
x = torch.randn(3, 197, model.embed_dim, requires_grad={train})
with gpu_launches.branch.anywhere():
    for graph in gpu_launches.graphs_of(block, x, dynamic=True):
        print(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
"""
    assert [int(line) > 5 for line in run_script(["-c", code]).split()] == [True] * (1 + train)


def test_predictions() -> None:
    """The sums of a block of ViT-B by hand, and the profile that they have to agree with."""
    prediction = script("gpu_prediction")
    size = prediction.SIZES["base"]
    rows = 128 * 197
    plain = prediction.plain(size, 128, False, True)
    assert sum(k.operations for k in plain if k.kind == "product") == 2 * rows * 12 * 768**2
    halves = prediction.equivariant(size, 128, prediction.GROUPS["flop"], False)
    assert sum(k.operations for k in halves if k.kind == "product") == rows * 12 * 768**2
    octic = prediction.equivariant(size, 128, prediction.GROUPS["octic"], False)
    assert sum(k.operations for k in octic if k.kind == "product") == pytest.approx(2 * rows * 12 * 768**2 * 3 / 16)
    assert len(halves) == 7  # as many as tests above count
    for name, (said, measured, _, _) in prediction.checked().items():
        assert said == pytest.approx(measured, rel=0.25), name


@pytest.fixture
def queue() -> ModuleType:
    return script("gpu")


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return {name: entry["rc"] for name, entry in found.items()}


def test_the_queue_goes_on_where_it_was_cut_off(queue: ModuleType, tmp_path: Path) -> None:
    note = "from pathlib import Path; Path('{}').open('a').write('x')"
    tasks = [
        queue.Task("first", ("-c", note.format(tmp_path / "first")), 0),
        queue.Task("wrong", ("-c", "raise SystemExit(3)"), 0),
        queue.Task("long", ("-c", "import time; time.sleep(60)"), 0),
        queue.Task("last", ("-c", note.format(tmp_path / "last")), 0),
    ]
    start = time.monotonic()
    queue.run(tasks, tmp_path, 8.0, again=False)  # of which three starts of Python take a part
    assert time.monotonic() - start < 30
    assert state(tmp_path) == {"first": 0, "wrong": 3, "long": "cut off"}
    tasks[2] = queue.Task("long", ("-c", "pass"), 0)
    queue.run(tasks, tmp_path, 30.0, again=False)
    assert state(tmp_path) == {"first": 0, "wrong": 3, "long": 0, "last": 0}
    assert (tmp_path / "first").read_text() == "x"  # once
    tasks[1] = queue.Task("wrong", ("-c", "pass"), 0)
    queue.run(tasks, tmp_path, 30.0, again=False)
    assert "wrong: 3, see wrong.log" in queue.report(tasks, tmp_path)
    queue.run(tasks, tmp_path, 30.0, again=True)
    assert queue.report(tasks, tmp_path).startswith("4 of 4 tasks are done")


def test_the_queue_begins_nothing_that_cannot_end(queue: ModuleType, tmp_path: Path) -> None:
    tasks = [queue.Task("first", ("-c", "pass"), 0), queue.Task("second", ("-c", "pass"), 1000)]
    queue.run(tasks, tmp_path, 30.0, again=False)
    assert state(tmp_path) == {"first": 0}
    queue.run(tasks, tmp_path, 30.0, again=False)  # but a budget of its own it gets
    assert state(tmp_path) == {"first": 0, "second": 0}


@pytest.mark.slow
def test_the_queue_measures_and_reports(tmp_path: Path) -> None:
    words = [str(BENCHMARKS / "gpu.py"), "--quick", "--out", str(tmp_path), "--budget", "10m", "--only"]
    run_script([*words, "forward-flop"])
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("2 of 2 tasks are done")
    assert "| flop_deit3_base_patch16_224 | forward |" in text and "Figure: speedup.png" in text
    assert (tmp_path / "figures" / "speedup.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_queue_does_the_study_and_goes_on_with_it(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((32, 32), 40 + i).convert("RGB").save(folder / f"{i}.png")
    words = [str(BENCHMARKS / "gpu.py"), "--quick", "--cifar10", str(tmp_path / "images"), "--out", str(tmp_path)]
    for _ in range(2):  # the second time there is nothing left to do
        run_script([*words, "--only", "study"])
        text = (tmp_path / "report.md").read_text()
        assert text.startswith("1 of 1 tasks are done") and "| ViT E | " in text
    (line,) = (tmp_path / "study" / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["changed_when_mirrored"] == 0 and record["config"]["precision"] == "bfloat16"
    assert record["config"]["model_kwargs"]["heads"] == "coupled"
