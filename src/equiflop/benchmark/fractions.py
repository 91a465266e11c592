"""Where the time of a network goes, by kind of work, and how fast its matrix products could be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("matrix products", "attention", "pointwise", "copies")

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "_convolution", "mkldnn_convolution")
_COPIES = ("copy_", "cat", "stack", "clone", "contiguous", "index_select", "index", "pad", "constant_pad_nd", "flip")


@dataclass(frozen=True)
class Fractions:
    """Seconds of one computation by kind of work.

    Attributes:
        seconds: by kind, see ``KINDS``; in compiled code a fused loop that computes anything counts as pointwise.
        products_peak_seconds: what the matrix products alone take at these shapes, measured by themselves.
        products_macs: their MACs.
    """

    seconds: dict[str, float]
    products_peak_seconds: float
    products_macs: int


def split_time(call: Callable[[], object], eager: Callable[[], object], repeats: int = 3) -> Fractions:
    """Split the time of a computation on the CPU.

    Args:
        call: the computation, compiled or not; already warmed up.
        eager: the same, not compiled; tells the shapes of the matrix products.
        repeats: how often it is computed.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        for _ in range(repeats):
            call()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in recording.key_averages():
        kind = _kind(event.key)
        if kind is not None:
            seconds[kind] += event.self_cpu_time_total * 1e-6 / repeats
    shapes = _Shapes()
    with shapes:
        eager()
    peak, macs = 0.0, 0
    for (rows, inner, columns), count in shapes.found.items():
        peak += count * _product_seconds(rows, inner, columns, shapes.dtype)
        macs += count * rows * inner * columns
    return Fractions(seconds, peak, macs)


def _kind(name: str) -> str | None:
    if name.startswith(("graph_", "cpp_", "triton_")) or "_fused_" in name:
        return "pointwise"
    if not name.startswith(("aten::", "mkl::", "mkldnn::")):
        return None
    operator = name.partition("::")[2]
    if "attention" in operator:
        return "attention"
    if operator in _PRODUCTS or operator.startswith(("_mkl_linear", "_linear_pointwise", "_convolution_pointwise")):
        return "matrix products"
    if operator in _COPIES:
        return "copies"
    return "pointwise"


class _Shapes(TorchDispatchMode):
    """Notes rows, inner and outer length of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, int, int], int] = {}
        self.dtype = torch.float32

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default):
            left, right = args[-2:] if func is aten.addmm.default else args[:2]
            self._note(left.shape[0], left.shape[1], right.shape[1], 1)
            self.dtype = left.dtype
        elif func is aten.bmm.default:
            left, right = args[:2]
            self._note(left.shape[1], left.shape[2], right.shape[2], left.shape[0])
        return output

    def _note(self, rows: int, inner: int, columns: int, count: int) -> None:
        key = (rows, inner, columns)
        self.found[key] = self.found.get(key, 0) + count


def _product_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, least: float = 0.05) -> float:
    """The best time of one product of contiguous matrices, as ``nn.Linear`` makes it."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < least:
        before = time.perf_counter()
        nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - before)
    return best
