"""Shared set-up of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# The tensors are tiny, and pytest's workers share the cores: one thread here, and in what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from equiflop.kernels import layout_of

# Property tests draw the same examples in every run.
settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of exported files is measured as ever, but in short turns."""
    if "deploy" in request.path.parts:
        from equiflop.deploy import proof

        monkeypatch.setattr(proof, "SECONDS", 0.01)


@pytest.fixture
def float64_default() -> Iterator[None]:
    """Makes float64 the default dtype of a test."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(old)


@pytest.fixture
def transforms_by_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function from whose call on new layers make every group Fourier transform by a matrix product."""

    def switch() -> None:
        monkeypatch.setattr("equiflop.kernels.layout.fourier_plan", lambda _: None)
        for module in ("attention", "block", "dropout", "invariants", "linear", "mlp", "norm"):  # not the cached ones
            monkeypatch.setattr(f"equiflop.nn.{module}.layout_of", layout_of.__wrapped__, raising=False)

    return switch
