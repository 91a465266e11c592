"""How fast exported networks run beside their plain twins, in every runtime and precision, by ``equiflop.deploy``.

    python benchmarks/deploy.py --output benchmarks/deploy.json

Both files of a pair take turns in one process; a ratio is the median over turns of the ratio within a turn. Weights are
random and the images for the ranges of int8 the ones of ``--data``: neither changes what a runtime computes per second.
The table is printed; the results say which processor and versions they were measured with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from equiflop.benchmark.machine import describe_machine
from equiflop.deploy import TARGETS, export
from equiflop.files import write_text

MODELS = ("flop_deit3_base_patch16_224", "octic_deit3_base_patch16_224")
RUNTIMES = (
    ("onnx", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("onnx", "int8"),
)


def measure(name: str, to: str, precision: str, data: str) -> dict[str, Any]:
    """One network in one runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net{TARGETS[to].suffix}"
        options: dict[str, Any] = {"data": data} if precision == "int8" else {}
        made = export(name, path, to, precision, dynamic_batch=True, compare=True, images=16, **options)
        return {"model": name, "to": to, "precision": precision, **made.proof.as_dict()}


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"`{entry['model']}`", entry["to"], entry["precision"]]
    for batch in ("8", "1"):
        ratio = entry["speedup"][batch]
        cells.append(f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    own, plain = entry["speed"]["own"], entry["speed"]["plain"]
    cells.append(f"{own['images_per_second']:.1f} / {plain['images_per_second']:.1f}")
    cells.append(f"{own['latency_ms']:.1f} / {plain['latency_ms']:.1f}")
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
    packages = ("onnx", "onnxruntime", "openvino", "nncf")
    found: dict[str, Any] = {
        **describe_machine(),
        "command": "python benchmarks/deploy.py",
        "runtimes": {name: importlib.metadata.version(name) for name in packages},
        "entries": [],
    }
    print("| network | runtime | precision | ratio, batch 8 | batch 1 | images/s, E / plain | ms, E / plain | error |")
    print("| --- | --- | --- |" + " ---: |" * 5)
    for name in options.models:
        for to, precision in chosen:
            entry = measure(name, to, precision, options.data)
            found["entries"].append(entry)
            print(row(entry), flush=True)
            if options.output is not None:
                write_text(options.output, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
