"""Which variant of an operation is taken, and the switch that forces the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

_forced = os.environ.get("EQUIFLOP_KERNELS", "") == "reference"
_form: Form | None = None
_subtracts_means = True

#: How features are joined in the form made for runtimes: along their last axis, or lanes stacked along a first one.
Form = Literal["joined", "stacked"]


@dataclass(frozen=True)
class Variant:
    """One way to execute an operation.

    Attributes:
        name: what it is called.
        applies: whether it can be taken for these arguments, which are those of ``run``.
        run: the function; it computes what the reference computes.
        when: the condition in words.
    """

    name: str
    applies: Callable[..., bool]
    run: Callable[..., Any]
    when: str


#: Operation to its variants, in the order in which they are tried.
TABLE: dict[str, tuple[Variant, ...]] = {}


def choose(operation: str, *args: Any) -> Callable[..., Any] | None:
    """The first variant that applies to the arguments, or None for the reference."""
    if _forced:
        return None
    for variant in TABLE[operation]:
        if variant.applies(*args):
            return variant.run
    return None


@contextmanager
def reference() -> Iterator[None]:
    """Within this context every operation runs its reference; compiled functions are compiled anew for it."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


@contextmanager
def for_runtimes(form: Form = "joined", subtract_means: bool = True) -> Iterator[None]:
    """Within this context operations take the form made for runtimes, which is meant to be traced by an export.

    Args:
        form: ``"joined"``, for every runtime, or ``"stacked"``, for those that join tensors along their first axis
            without copying.
        subtract_means: whether norms of centred rows are plain layer norms, which runtimes know best, or divide by the
            root mean square alone. That is equivariant even where weights in int8 leave rows not quite centred.
    """
    global _form, _subtracts_means
    before, (_form, _subtracts_means) = (_form, _subtracts_means), (form, subtract_means)
    try:
        yield
    finally:
        _form, _subtracts_means = before


def is_made_for_runtimes(form: Form | None = None) -> bool:
    """Whether the form made for runtimes is asked for, or this one."""
    return _form is not None if form is None else _form == form


def subtracts_means() -> bool:
    """Whether norms of centred rows may subtract their mean."""
    return _subtracts_means


def is_traced_for_kernels() -> bool:
    """Whether ``torch.compile`` is at work: pointwise steps become few loops. An export keeps plain operators."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_eager(x: object) -> bool:
    """Whether operations run one by one, on tensors with numbers: no compiler, export, or symbolic trace."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def may_overwrite(x: Tensor) -> bool:
    """Whether intermediate results may be overwritten."""
    return not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def is_constant(size: int) -> bool:
    """Whether a compiler takes a size for a number, not a symbol: then it knows its bounds and its parity."""
    odd = statically_known_true(size % 2 == 1)
    return statically_known_true(size < 2**31) and (odd or statically_known_true(size % 2 == 0))
