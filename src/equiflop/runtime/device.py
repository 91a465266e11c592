"""Which device to compute on, and whether torch.compile works there."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device of a name; ``"auto"`` is the first of CUDA, MPS and CPU that exists.

    Raises:
        ValueError: if the name is not a device, or there is none of it here.
    """
    if name == "auto":
        for kind, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if available:
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} is not available here; use auto, cpu, cuda or mps") from error
    return device


def compile_problem(device: torch.device) -> str | None:
    """Why ``torch.compile`` does not work here, found by compiling one small function; None if it works."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) + 1

    try:
        torch.compile(probe)(torch.zeros(16, device=device))
    except Exception as error:  # a missing compiler shows as one of many exceptions, and any of them is the answer
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None
