"""The plain network of a twin, without memory: by name, or a copy of a network, and the keywords that make it again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn

from equiflop.models.entry_points import TWIN
from equiflop.models.keywords import keyword_problem
from equiflop.models.twin_keywords import (
    OWN,
    OWN_OF_VIT,
)


def plain_network(name: str, keywords: dict[str, Any]) -> nn.Module:
    """The plain network of a name, without memory.

    Raises:
        ValueError: if timm does not make it.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, **keywords)
    except TypeError as error:

        def known() -> list[str]:
            return [*inspect.signature(type(plain_network(name, {}))).parameters, *OWN, *OWN_OF_VIT]

        problem = keyword_problem(TWIN + name, keywords, error, known)
        raise ValueError(problem or f"{name} cannot be made with {keywords}: {error}") from error
    except (AssertionError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be made with {keywords}: {error}") from error
    except RuntimeError as error:  # timm's answer to an unknown tag
        raise ValueError(f"model={name!r} cannot be made by timm: {error}") from error


def without_memory(network: nn.Module) -> Any:
    """A copy whose parameters and buffers are on the meta device."""
    tensors = (*network.parameters(), *network.buffers())
    memo: dict[int, Any] = {id(t): t.to("meta") for t in tensors if not isinstance(t, nn.Parameter)}
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def made_by_timm(network: Any, name: str | None) -> dict[str, Any] | None:
    """The keywords with which timm makes this very architecture; None where it was changed since or is not timm's."""
    if name is None or not timm.is_model(name) or not hasattr(network, "_model_args"):
        return None
    made_with = {key: value for key, value in network._model_args.items() if value is not None}
    args = {**made_with, **get_model_args(network)}  # the latter leaves out what acts in training alone
    args.pop("pretrained_cfg", None)
    try:
        again = plain_network(name, args)
    except ValueError:
        return None
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (network, again)]
    same = repr(network) == repr(again) and shapes[0] == shapes[1] and _settings(network) == _settings(again)
    return args if same else None


def _settings(network: nn.Module) -> list[dict[str, Any]]:
    """Numbers, words and truth values that modules hold, of those that change what a network computes."""
    plain = (bool, int, float, str)
    ignored = ("training", "fused_attn", "grad_checkpointing")
    return [
        {key: value for key, value in vars(module).items() if isinstance(value, plain) and key not in ignored}
        for module in network.modules()
    ]
