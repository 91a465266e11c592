"""Everything that is worth measuring on a GPU, in order, within a budget of time; called again, it goes on.

    python benchmarks/gpu.py --budget 9m --out gpu-results

Tests come first, then a training with CUDA graphs, blocks (our kernels, TorchInductor's, plain) and whole networks,
forward and in training, all at plain's best options too, and in the end a study of accuracy on CIFAR-10, which takes
hours and goes on from where it was cut off. What is finished is kept in the folder and not done again;
what the budget cuts off comes again the next time. At the end, and with ``--report`` alone, a table is printed
(``report.md``) with what ``gpu_prediction.py`` says beside it, and the figures are drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_prediction import CARDS, predictions

from equiflop.benchmark.compare import Entry
from equiflop.benchmark.figures import write_figures
from equiflop.files import sole_user, write_text

HERE = Path(__file__).resolve().parent
VITS = {"small": "16", "base": "16", "large": "16", "huge": "14"}
#: Other networks of the comparison.
OTHERS: tuple[str, ...] = ("flop_resmlp_24_224", "flop_resmlp_big_24_224", "flop_convnext_tiny", "flop_convnext_base")
OTHERS += ("flop_convnext_isotropic_base", "flop_convnext_isotropic_large")


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: of its files.
        words: the command behind ``python``; ``OUTPUT`` stands for its JSON file and ``FOLDER`` for a folder.
        seconds: what it is thought to take; it is not begun where less is left, unless nothing was done before.
    """

    name: str
    words: tuple[str, ...]
    seconds: float = 150.0


def tasks(quick: bool, images: str | None = None) -> Iterator[Task]:
    """The queue.

    Args:
        quick: run everything once, as small as it can be, to see that it runs.
        images: CIFAR-10 as a folder, for the study; else torchvision downloads it.
    """
    of_blocks = ("--batch", "1", "--rounds", "1", "--seconds", "0.01") if quick else ()
    of_bench = ("--rounds", "1", "--seconds", "0.01", "--set", "depth=1") if quick else ("--rounds", "7")
    yield Task("tests", ("-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")), 240)
    yield Task("kernels", ("-m", "pytest", "-q", str(HERE.parent / "tests/kernels/test_gpu_kernels.py")), 300)
    train = ("-m", "equiflop", "train", "flop_deit3_small_patch16_224", "--data", "fashion-mnist-part")
    few = ("--out", "FOLDER", "--set", "patch_size=4", "--epochs", "2", "--batch-size", "256")
    graphs = ("--precision", "bfloat16", "--compile", "--compile-mode", "reduce-overhead")
    if not quick:
        yield Task("train-with-graphs", (*train, *few, *graphs), 120)
    names = [f"{group}_deit3_{size}_patch{patch}_224" for size, patch in VITS.items() for group in ("flop", "octic")]
    device = ("--device", "cpu") if quick else ("--device", "cuda")
    batches = (("forward", "128"), ("train", "64"))

    def blocks(step: str, batch: str, name: str) -> tuple[str, ...]:
        words = (str(HERE / "gpu_blocks.py"), name, "--step", step, "--batch", batch, *of_blocks, *device)
        return (*words, "--output", "OUTPUT")

    for step, batch in batches:
        for name in names[2:4] if quick else [*names[2:], *names[:2]]:  # what is asked for most comes first
            yield Task(f"blocks-{step}-{name}", blocks(step, batch, name), 90)
    for name in names[2:3] if quick else [*names[2:], *names[:2], *OTHERS]:
        for step, batch in batches:
            words = ("-m", "equiflop", "bench", name, "--step", step, "--batch-size", "1" if quick else batch)
            words += ("--mode", "reduce-overhead", "--mode", "max-autotune", "--dtype", "bfloat16", *of_bench)
            yield Task(f"bench-{step}-{name}", (*words, *device, "--memory", "--output", "OUTPUT"), 240)
    for step, batch in () if quick else batches:
        for name in names[2:6]:
            yield Task(f"descriptors-{step}-{name}", (*blocks(step, batch, name), "--descriptors"), 90)
    study: tuple[str, ...]
    study = (str(HERE.parent / "studies/cifar10.py"), "run", "--scale", "full", "--jobs", "1", "--out", "FOLDER")
    study += ("--data", images) if images else ()
    if images or not quick:
        one = ("--seeds", "1", "--name", "vit-E-seed0", "--epochs", "1") if quick else ()
        yield Task("study", (*study, *one), 60)


def run(queue: list[Task], folder: Path, budget: float, again: bool) -> None:
    """Do what is not done; the state is written after every task."""
    state_file = folder / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    end, did = time.monotonic() + budget, 0
    for task in queue:
        before = state.get(task.name)
        if before is not None and (before["rc"] == 0 or not (again or before["rc"] == "cut off")):
            continue
        left = end - time.monotonic()
        if left <= 0 or (did and left < task.seconds):
            print(f"{task.name}: left for the next call, {max(left, 0):.0f} s are too few")
            break
        print(f"{task.name}: running", flush=True)
        start = time.monotonic()
        output = folder / f"{task.name}.json"
        places = {"OUTPUT": str(output), "FOLDER": str(folder / task.name)}
        words = [places.get(word, word) for word in task.words]
        rc: int | str
        with (folder / f"{task.name}.log").open("w") as log:
            process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT)
            try:
                rc = process.wait(left)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
                process.terminate()  # what a shell has put into the background does not heed Ctrl-C
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                rc = "cut off"
                if isinstance(stopped, KeyboardInterrupt):
                    raise SystemExit(f"\nstopped in {task.name}; the same command goes on") from None
        did += 1
        state[task.name] = {"rc": rc, "seconds": round(time.monotonic() - start, 1)}
        write_text(state_file, json.dumps(state, indent=1) + "\n")
        print(f"{task.name}: {'done' if rc == 0 else rc} after {state[task.name]['seconds']} s", flush=True)
        if rc == "cut off":
            break


def report(queue: list[Task], folder: Path) -> str:
    """Tables of what is there, in Markdown."""
    state_file = folder / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    lines = [f"{sum(state.get(t.name, {}).get('rc') == 0 for t in queue)} of {len(queue)} tasks are done.\n"]
    for task in queue:
        outcome = state.get(task.name, {}).get("rc", 0)
        if outcome != 0:
            lines.append(f"* {task.name}: {outcome}, see {task.name}.log")
    predicted = _predictions()
    blocks = [block for task in queue for block in _read(folder, task, "blocks")]
    if blocks:
        lines += [
            "",
            "| block | step | Triton | Inductor | predicted | error |",
            "| --- | --- | ---: | ---: | --- | ---: |",
        ]
    for block in blocks:
        ratios, error = block["times_as_fast_as_plain"], block["largest_relative_error"]
        cells = [_spread(ratios.get(form)) for form in ("Triton", "Inductor")]
        said = predicted.get(_key(block["name"], block["step"]), "")
        error = "" if error is None else f"{error:.1e}"
        name = block["name"] + (", descriptors" if block.get("descriptors") else "")
        lines.append(f"| {name} | {block['step']} | {' | '.join(cells)} | {said} | {error} |")
    study = folder / "study" / "table.md"
    if study.exists():
        lines += ["", study.read_text().rstrip()]
    entries = [Entry.from_dict(entry) for task in queue for entry in _read(folder, task, "entries")]
    best: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        key = (entry.model, entry.step, entry.name)
        if key not in best or entry.latency.median < best[key].latency.median:
            best[key] = entry
    ours = {key: entry for key, entry in best.items() if key[0] == key[2]}
    if ours:
        head = (
            "| network | step | times as fast as plain, each at its best | modes | images/s, E / plain | memory, MiB |"
        )
        lines += ["", head, "| --- | --- | ---: | --- | ---: | ---: |"]
    for (model, step, _), entry in ours.items():
        plain = min((e for (m, s, n), e in best.items() if (m, s) == (model, step) and n != m), key=_median)
        memory = [f"{(e.peak_bytes or 0) / 2**20:,.0f}" for e in (entry, plain)]
        rates = [f"{e.throughput.median:,.0f}" for e in (entry, plain)]
        ratio = plain.latency.median / entry.latency.median
        cells = [f"{ratio:.2f}", f"{entry.mode} / {plain.mode}", " / ".join(rates), " / ".join(memory)]
        lines.append(f"| {model} | {step} | {' | '.join(cells)} |")
    if entries:
        lines += ["", *(f"Figure: {path.name}" for path in write_figures(folder / "figures", entries, {}))]
    return "\n".join(lines) + "\n"


def _median(entry: Entry) -> float:
    return entry.latency.median


def _read(folder: Path, task: Task, what: str) -> list[dict[str, Any]]:
    path = folder / f"{task.name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()).get(what, []) if path.exists() else []
    return found


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.2f} ({values['lowest']:.2f} to {values['highest']:.2f})"


def _key(name: str, step: str) -> tuple[str, str, str]:
    group, _, size, *_ = name.split("_")
    return group, size, step


def _predictions() -> dict[tuple[str, str, str], str]:
    """What is predicted for the card that is here, if anything is."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    card = next((name for name in CARDS if name in here), None)
    return {
        (str(p["group"]), str(p["size"]), str(p["step"])): " to ".join(f"{ratio:.2f}" for ratio in p["ratio"])  # type: ignore[attr-defined]
        for p in predictions()
        if p["card"] == card
    }


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 9m or 1h")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[match.group(2)]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=_seconds, default=540.0, help="time for this call: 90s, 9m, 1h")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--cifar10", help="folder with train/CLASS/*, test/CLASS/*; default: torchvision downloads it")
    parser.add_argument("--only", default="", help="part of the names of tasks, such as blocks-train")
    parser.add_argument("--again", action="store_true", help="what failed is tried again")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="on the CPU, everything small: to see that it runs")
    options = parser.parse_args()
    queue = [task for task in tasks(options.quick, options.cifar10) if options.only in task.name]
    if not queue:
        names = ", ".join(task.name for task in tasks(options.quick, options.cifar10))
        parser.error(f"--only={options.only}: no task has that in its name; they are {names}")
    if not (options.report or options.quick or torch.cuda.is_available()):
        parser.error("there is no GPU that PyTorch could use; --quick runs everything small on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with sole_user(options.out):
            if not options.report:
                run(queue, options.out, options.budget, options.again)
            text = report(queue, options.out)
            write_text(options.out / "report.md", text)
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{text}")


if __name__ == "__main__":
    main()
