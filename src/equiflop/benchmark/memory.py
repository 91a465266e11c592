"""The most memory that a computation holds at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that a computation allocates and holds at the same time, beyond those held before.

    On CUDA from the allocator's statistics; on the CPU from the allocations and releases that torch's profiler records,
    in eager and in compiled code.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        call()
    result = recording.profiler.kineto_results if recording.profiler is not None else None
    if result is None:
        raise RuntimeError("torch's profiler recorded nothing")
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        highest = max(highest, held)
    return highest
