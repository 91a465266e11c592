"""How fast exported networks run beside their plain twins, in every runtime and precision, by ``equiflop.deploy``.

    python benchmarks/deploy.py --output benchmarks/deploy.json
    python benchmarks/deploy.py --only executorch:float32 --output benchmarks/deploy.json

Both files of a pair take turns in one process; a ratio is the median over turns of the ratio within a turn. Weights are
random and the images for the ranges of int8 the ones of ``--data``: neither changes what a runtime computes per second.
Memory is what a fresh process that holds nothing but the runtime grows by, at its peak, while it loads a file and runs
one image three times. The table is printed; the results say which processor and versions they were measured with.
Entries of the file that are not measured anew stay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from equiflop.deploy import TARGETS, export, read_notes
from equiflop.deploy.proof import beside_plain, sample_images
from equiflop.deploy.subject import Subject
from equiflop.files import write_text
from equiflop.models.entry_points import plain_twin
from equiflop.runtime.machine import describe_machine

MODELS = ("flop_deit3_base_patch16_224", "octic_deit3_base_patch16_224")
RUNTIMES = (
    ("onnx", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("onnx", "int8"),
)
PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "torchao", "executorch")

#: How a process that has the runtime alone loads a file and runs images of a shape; memory is read in between.
PROGRAMS = {
    "onnx": """
import onnxruntime
mark()
session = onnxruntime.InferenceSession(path)
kind = {"tensor(float)": "float32", "tensor(float16)": "float16"}[session.get_inputs()[0].type]
run = lambda images: session.run(None, {"images": images.astype(kind)})
""",
    "openvino": """
import openvino
mark()
request = openvino.Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
run = lambda images: request.infer({0: images})
""",
    "executorch": """
import torch
from executorch.runtime import Runtime
mark()
program = Runtime.get().load_program(path)
forward = program.load_method("forward")
run = lambda images: forward.execute([torch.from_numpy(images)])
""",
    "torch": """
import torch, torchao.quantization.pt2e, torch._inductor
mark()
kind = getattr(torch, precision, None) if precision != "int8" else torch.float32
network = torch._inductor.aoti_load_package(path) if to == "aoti" else torch.export.load(path).module()
run = lambda images: network(torch.from_numpy(images).to(kind))
""",
}
FRAME = """
import sys
import numpy as np
path, to, precision, shape = sys.argv[1], sys.argv[2], sys.argv[3], [int(size) for size in sys.argv[4].split(",")]
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
def mark():
    global before
    before = memory("VmRSS")
{program}
for _ in range(3):
    run(np.zeros(shape, np.float32))
print((memory("VmHWM") - before) * 1024)
"""


def memory_of(path: Path, to: str, precision: str, size: tuple[int, ...]) -> int | None:
    """Bytes by which a process grows that loads a file and runs it; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    program = FRAME.replace("{program}", PROGRAMS.get(to, PROGRAMS["torch"]))
    words = [sys.executable, "-c", program, str(path), to, precision, ",".join(map(str, (1, *size)))]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(name: str, to: str, precision: str, data: str) -> dict[str, Any]:
    """One network in one runtime, beside its plain twin, in files for batches of 8 and of 1."""
    target, subject = TARGETS[to], Subject.of(name)
    options: dict[str, Any] = {"data": data} if precision == "int8" else {}
    entry: dict[str, Any] = {"model": name, "to": to, "precision": precision}
    speeds: dict[str, dict[str, float | int | None]] = {"own": {}, "plain": {}}
    speedup: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1,) if to == "executorch" else (8, 1):
            own, plain = (
                export(model, Path(folder) / f"{which}{target.suffix}", to, precision, batch=batch, images=8, **options)
                for which, model in (("own", name), ("plain", plain_twin(name)[0]))
            )
            images = sample_images(subject, options.get("data"), 8).images
            runners = (target.load(own.path, precision), target.load(plain.path, precision))
            *found, ratios = beside_plain(*runners, images, batch)
            speedup[str(batch)] = vars(ratios[batch])
            for which, speed in zip(("own", "plain"), found, strict=True):
                speeds[which][f"images_per_second_{batch}"] = speed.images_per_second
        both = {"own": own, "plain": plain}
        entry |= own.proof.as_dict() | {"speed": speeds, "speedup": speedup}
        entry["plain_bytes"], entry["plain_share"] = plain.proof.size, plain.proof.share
        entry["memory"] = {key: memory_of(made.path, to, precision, subject.input_size) for key, made in both.items()}
        if to == "executorch":
            entry["delegated"] = {key: read_notes(made.path, "equiflop_delegated") for key, made in both.items()}
    return entry


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"`{entry['model']}`", entry["to"], entry["precision"]]
    for batch in ("8", "1"):
        ratio = entry["speedup"].get(batch)
        cells.append(f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" if ratio else "")
    own, plain = entry["speed"]["own"], entry["speed"]["plain"]
    for batch in ("8", "1"):
        pair = [speeds.get(f"images_per_second_{batch}") for speeds in (own, plain)]
        cells.append(" / ".join("" if value is None else f"{value:.1f}" for value in pair))
    cells.append(f"{entry['bytes'] / 1e6:.0f} / {entry['plain_bytes'] / 1e6:.0f}")
    cells.append(" / ".join("" if value is None else f"{value / 1e6:.0f}" for value in entry["memory"].values()))
    cells.append(f"{100 * entry['share']:.0f} / {100 * entry['plain_share']:.0f}")
    cells.append(f"{entry['equivariance']['max_error']:.0e}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="equivariant models")
    parser.add_argument("--only", help="runtimes and precisions, such as onnx:float32,openvino:int8")
    parser.add_argument("--data", default="digits", help="images for the ranges of int8")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = [tuple(pair.split(":")) for pair in options.only.split(",")] if options.only else RUNTIMES
    command = " ".join(["python benchmarks/deploy.py", *sys.argv[1:]])
    machine = describe_machine()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    found: dict[str, Any] = {**machine, "command": command, "runtimes": versions, "entries": []}
    if options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text())
    print("| network | runtime | precision | ratio, batch 8 | batch 1 | images/s, batch 8 | batch 1 | MB", end="")
    print(" | memory, MB | share, % | error |")
    print("| --- | --- | --- |" + " ---: |" * 8)
    for name in options.models:
        for to, precision in chosen:
            entry = measure(name, to, precision, options.data)
            entry |= {"command": command, "hardware": machine["hardware"], "runtimes": versions}
            same = ("model", "to", "precision")
            found["entries"] = [old for old in found["entries"] if any(old[key] != entry[key] for key in same)] + [
                entry
            ]
            print(row(entry), flush=True)
            if options.output is not None:
                write_text(options.output, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
