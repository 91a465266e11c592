"""Whether somebody watches, wraps or replaces the modules that a kernel would pass by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is just what it was made as: a kernel may then compute what it computes without calling it.

    It is not where its class is another (adapters, parametrisations), it or all modules have hooks, its ``forward`` was
    replaced, or a parameter is no plain tensor (quantised weights).
    """
    return (
        _is_of(module, kind)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and (all(p is None or type(p) in _PLAIN_TENSORS for p in module._parameters.values()) or _is_traced())
        and not _modules._global_forward_hooks
        and not _modules._global_forward_pre_hooks
        and not _modules._global_backward_hooks
        and not _modules._global_backward_pre_hooks
    )


def _is_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the class is ``kind`` itself; an export may put a class of its own, of the same name, in front of it."""
    found = type(module)
    return found is kind or (_is_traced() and issubclass(found, kind) and _name(found) == _name(kind))


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _is_traced() -> bool:
    """Whether an export is at work: then parameters are stand-ins of other types."""
    return torch.compiler.is_exporting()
