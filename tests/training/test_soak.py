"""A few of the kills of ``make soak`` in every test run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits() -> None:
    """In a process of its own, which may fork: torch's threads have not started there."""
    script = Path(__file__).with_name("soak.py")
    result = subprocess.run([sys.executable, str(script), "--kills", "5"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("all with the same sha256") == 3
