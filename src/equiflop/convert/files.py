"""Files of official weights, read without running any code that they may carry."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

#: Keys under which training scripts store the state dict, in the order in which they are tried.
WRAPPERS = ("model", "model_ema", "state_dict", "state_dict_ema", "teacher", "student")
#: What compiled, distributed and DINO training put in front of the names.
PREFIXES = ("_orig_mod.", "module.", "backbone.")
#: Paths as pickles name them, read as paths that touch no disk and exist on every system.
_PATHS = [(PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]


@dataclass(frozen=True)
class OfficialFile:
    """What a file of official weights holds.

    Attributes:
        state_dict: the weights, taken out of their wrappers and freed from prefixes.
        trained_as: the official name of the model, where training noted its arguments in the file.
    """

    state_dict: dict[str, Tensor]
    trained_as: str | None


def read_official(path: str | Path) -> OfficialFile:
    """Read a ``.safetensors`` or PyTorch file.

    PyTorch files are read with ``weights_only``: a pickle that would run code is refused. The only classes beside
    tensors and containers that are allowed are ``argparse.Namespace``, in which the official training scripts leave
    their arguments, and paths, which are among these.

    Raises:
        ValueError: if the file is missing, damaged, would run code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    state = {_without_prefix(name): tensor for name, tensor in _unwrapped(content, path).items()}
    arguments = content.get("args")
    trained_as = arguments.get("model") if isinstance(arguments, Mapping) else getattr(arguments, "model", None)
    return OfficialFile(state, trained_as if isinstance(trained_as, str) else None)


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_PATHS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and refused pickles raise almost anything
        if "Unsupported" in str(error) or "weights_only" in str(error):
            raise ValueError(f"{path}: refused, since reading it would run code that it carries") from error
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable PyTorch file ({reason})") from error


def _unwrapped(content: Any, path: Path) -> Mapping[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: holds no state dict, nor one under {', '.join(WRAPPERS)} (found: {keys})")
    return content


def _without_prefix(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name
