"""Set-up of the tests of deployment."""

from __future__ import annotations

import pytest

from equiflop.deploy import proof


@pytest.fixture(autouse=True)
def _quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured as ever, but in short turns."""
    monkeypatch.setattr(proof, "SECONDS", 0.01)
