"""Every example runs, and leaves nothing behind but what it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from test_processes import environment

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "shared"))
def test_a_smoke_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--output", "result.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    machine = next(iter(written["experiment"].values()))["run"] if "experiment" in written else written
    assert machine["hardware"]["threads"] == 1 and machine["versions"]["torch"]
    assert machine["command"].startswith(f"python examples/{name}.py --quick")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_was_stopped_goes_on(tmp_path: Path) -> None:
    """An example that is run again takes the trained networks from its folder."""
    command = [sys.executable, str(EXAMPLES / "point_clouds.py"), "--epochs", "1", "--out", "runs", "--width", "48"]
    command += ["--depth", "1", "--heads", "1", "--points", "16", "--clouds", "64", "--tests", "32"]
    for again in (False, True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment())
        assert done.returncode == 0, done.stderr
        assert ("epoch 1/1" in done.stderr) is not again
