"""What studies share: runs in processes of their own, resumable, and finished ones as lines of a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equiflop.files import write_text


class Results:
    """The lines of finished runs.

    Args:
        file: where they stand, one JSON object a line, whose ``run`` is its name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def records(self) -> list[dict[str, Any]]:
        """All of them."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []

    def add(self, record: dict[str, Any]) -> None:
        """One more, in the place of an older one of that name."""
        lines = [line for line in self.records() if line["run"] != record["run"]]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in [*lines, record]))
        print(f"{record['run']}: {100 * record['accuracy']:.2f} %, {record['train_seconds']:.0f} s", flush=True)


def options_of(description: str | None, folder: str, jobs: int = 2) -> argparse.ArgumentParser:
    """The options that every study has.

    Args:
        description: what the study is.
        folder: where checkpoints go if nothing is said.
        jobs: runs at a time.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "report"))
    parser.add_argument("--data", help="folder with train/CLASS/* and test/CLASS/*; default: torchvision's CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder for checkpoints")
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time, which share the processor's cores")
    parser.add_argument("--name", help="of the run that 'one' makes, or of the only one that 'run' makes")
    return parser


def run_one(name: str, folder: Path, execute: Callable[[], dict[str, Any]]) -> None:
    """Make one run; its line goes into ``result.json`` in its folder."""
    write_text(folder / name / "result.json", json.dumps(execute()))


def run_all(
    script: str,
    names: list[str],
    arguments: list[str],
    folder: Path,
    jobs: int,
    results: Results,
    ready: Callable[[str], bool] = lambda name: True,
) -> None:
    """Make runs, so many at a time, each by the command ``script one --name NAME`` in a process of its own.

    Args:
        script: the study's file.
        names: of the runs, in order.
        arguments: what else the command is given.
        folder: where every run has a folder of its name, with what it printed in ``output.txt``.
        jobs: runs at a time, which share the processor's cores.
        results: where their lines are added.
        ready: whether what a run needs is there; it waits for its turn as long as others are running.

    Raises:
        SystemExit: if a run failed or could not begin; the others were finished.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    waiting, running, failed = list(names), dict[str, subprocess.Popen[bytes]](), list[str]()

    def begin(name: str) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, script, "one", "--name", name, "--out", str(folder), *arguments]
        with open(folder / name / "output.txt", "ab") as output:
            running[name] = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        waiting.remove(name)

    def end(name: str, code: int) -> None:
        del running[name]
        if code:
            failed.append(f"{name}: exit code {code}, see {folder / name / 'output.txt'}")
        else:
            results.add(json.loads((folder / name / "result.json").read_text()))

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for name in [name for name in waiting if ready(name)][: jobs - len(running)]:
                begin(name)
            if not running:
                failed += [f"{name}: could not begin" for name in waiting]
                break
            time.sleep(0.5)
            for name, code in [(name, child.poll()) for name, child in running.items()]:
                if code is not None:
                    end(name, code)
    except KeyboardInterrupt:  # what runs saves its state and stops, what waits does not begin
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
        raise SystemExit("stopped; the same command goes on") from None
    if failed:
        raise SystemExit("\n".join(failed))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def put_table(page: Path, name: str, table: str) -> None:
    """Put a table between its two marks in a page."""
    head, _, rest = page.read_text().partition(f"<!-- {name} -->")
    _, _, tail = rest.partition(f"<!-- end of {name} -->")
    write_text(page, f"{head}<!-- {name} -->\n{table}\n<!-- end of {name} -->{tail}")
