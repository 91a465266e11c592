"""Shared set-up of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Property tests draw the same examples in every run.
settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

torch.set_num_threads(1)  # the tensors are tiny, and pytest's workers share the cores


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def float64_default() -> Iterator[None]:
    """Makes float64 the default dtype of a test."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(old)
