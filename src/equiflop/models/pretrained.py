"""Where ``pretrained=True`` finds weights of our models: a folder, or the hub, that the user names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg

from equiflop.checksums import checksum_file, verify
from equiflop.timm_compat import load_model_config_from_path

#: Environment variable: a folder, ``hf-hub:OWNER`` or ``hf-hub:OWNER/REPOSITORY``, with ``@REVISION`` behind it or not.
WEIGHTS_VARIABLE = "EQUIFLOP_WEIGHTS"
#: Names of the weights and of their description in a published folder.
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
#: Under which key a file of weights describes its model.
METADATA_KEY = "equiflop"
_HUB = "hf-hub:"


@dataclass(frozen=True)
class Found:
    """Weights of a model.

    Attributes:
        cfg: timm's description of them; its ``file`` is one whose checksum is right.
        model_args: keywords that the model was made with.
    """

    cfg: dict[str, Any]
    model_args: dict[str, Any]


def find_pretrained(name: str, tag: str | None = None, cache_dir: str | Path | None = None) -> Found | None:
    """Look for weights of a model where ``EQUIFLOP_WEIGHTS`` points to.

    In a folder that is ``NAME/``, as ``equiflop publish`` writes it, or ``NAME.safetensors``, as ``equiflop convert``
    does; for an owner the repository ``OWNER/NAME``. With a tag it is ``NAME.TAG``.

    Args:
        name: of a registered model.
        tag: behind the name.
        cache_dir: where downloads are kept; by default the hub's own cache.

    Returns:
        what was found, or None if the variable is not set.

    Raises:
        ValueError: if there are none, they are those of another model, or their checksum is missing or another.
    """
    place = os.environ.get(WEIGHTS_VARIABLE, "").strip()
    if not place:
        return None
    label = f"{name}.{tag}" if tag else name
    try:
        if place.startswith(_HUB):
            return _published(_downloaded(place.removeprefix(_HUB), label, cache_dir), name)
        root = Path(place).expanduser()
        if not root.is_dir():
            raise ValueError("no such folder; give a folder, hf-hub:OWNER or hf-hub:OWNER/REPOSITORY")
        if (root / label).is_dir():
            return _published(root / label, name)
        file = root / f"{label}.safetensors"
        if file.is_file():
            return _single(file, name)
        raise ValueError(f"holds neither {label}/ nor {file.name}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{WEIGHTS_VARIABLE}={place}: {error}") from error


def _downloaded(place: str, label: str, cache_dir: str | Path | None) -> Path:
    """The local copy of a repository's folder."""
    repository, _, revision = place.partition("@")
    repository = repository if "/" in repository else f"{repository}/{label}"
    config = _file_of(repository, CONFIG_FILE, revision or None, cache_dir)
    for file in (WEIGHTS_FILE, checksum_file(Path(WEIGHTS_FILE)).name):
        _file_of(repository, file, config.parent.name, cache_dir)  # of the same commit
    return config.parent


def _file_of(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    try:
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
    except RepositoryNotFoundError as error:
        raise ValueError(f"{repository}: no such repository on the hub, or a private one") from error
    except (EntryNotFoundError, OSError, ValueError) as error:  # the hub's other errors are of these classes
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{repository}: holds no {file}; equiflop publish writes it") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{repository}: cannot be downloaded from the hub: {reason}") from error


def _published(folder: Path, name: str) -> Found:
    """The contents of a folder that ``equiflop publish`` wrote."""
    path = folder / CONFIG_FILE
    try:
        cfg, architecture, model_args = load_model_config_from_path(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: holds no {CONFIG_FILE}; equiflop publish writes such folders") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not the description of a model ({error!r})") from error
    if architecture != name:
        raise ValueError(f"{path}: describes {architecture}, not {name}")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(f"{folder}: holds no {WEIGHTS_FILE}")
    verify(weights)
    return Found({**cfg, "architecture": name, "file": str(weights), "source": None}, model_args)


def _single(path: Path, name: str) -> Found:
    """A file of weights that describes its model."""
    verify(path)
    try:
        with safe_open(path, framework="pt") as file:
            spec = json.loads(json.loads((file.metadata() or {})[METADATA_KEY])["spec"])
        about, classes, keywords = spec["preprocessing"], spec["classes"], dict(spec["kwargs"])
        if spec["name"] != name:
            raise ValueError(f"{path}: holds weights of {spec['name']}, not of {name}")
        cfg = {
            **get_pretrained_cfg(name).to_dict(),
            **{key: about[key] for key in ("mean", "std", "interpolation", "crop_pct")},
            "input_size": tuple(about["input_size"]),
            "num_classes": len(classes),
            "label_names": tuple(classes),
            "file": str(path),
        }
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: does not say which model it belongs to; equiflop convert writes such files"
        ) from error
    return Found(cfg, keywords)
