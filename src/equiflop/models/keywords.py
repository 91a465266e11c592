"""What is wrong with the keywords of a model, in one line that names the key, the model and what it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import timm
import torch

_UNKNOWN = re.compile(r"unexpected keyword argument(?:\(s\): \[)? ?'(\w+)'")
_TWICE = re.compile(r"multiple values for (?:keyword )?argument '(\w+)'")
#: Of timm's factory, which stand in every signature but are not for callers.
_NOT_FOR_CALLERS = {"self", "args", "kwargs"}


def keyword_problem(
    name: str, keywords: Mapping[str, Any], error: TypeError, known: Callable[[], Iterable[str]] | None = None
) -> str | None:
    """The problem behind a TypeError that a model's construction raised, if a keyword is it.

    Args:
        name: of the model.
        keywords: it was to be made with.
        error: what that raised.
        known: gives the keywords that it takes; by default those of the class that timm makes by this name.
    """
    twice = _TWICE.search(str(error))
    if twice is not None and twice[1] in keywords:
        key = twice[1]
        return f"model={name!r} takes no {key}={keywords[key]!r}: the name alone says what {key} is"
    unknown = _UNKNOWN.search(str(error))
    if unknown is None or unknown[1] not in keywords:
        return None
    key = unknown[1]
    valid = sorted(set(known() if known is not None else known_keywords(name)) - _NOT_FOR_CALLERS - {key})
    close = get_close_matches(key, valid, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it takes {', '.join(valid)}"
    return f"model={name!r} takes no {key}={keywords[key]!r}; {hint}"


def known_keywords(name: str) -> Iterable[str]:
    """Keywords of the class that timm makes by a name."""
    with torch.device("meta"):
        return inspect.signature(type(timm.create_model(name))).parameters
