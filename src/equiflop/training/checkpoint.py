"""Files of weights and training states: written atomically, read without running code, named when they are damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from equiflop.training.config import TrainConfig
from equiflop.training.model_spec import ModelSpec

#: Name of the final weights in a run's folder.
WEIGHTS_FILE = "model.safetensors"
#: Name of the folder of training states in a run's folder.
CHECKPOINT_FOLDER = "checkpoints"
#: Name of the best training state in that folder.
BEST_FILE = "best.pt"
_FORMAT = "equiflop-checkpoint-2"
_METADATA_KEY = "equiflop"


#: Parts of a training state that are kept as they are, and what they must be.
_PLAIN_PARTS: dict[str, Callable[[Any], Any]] = {
    "model": dict,
    "optimizer": dict,
    "ema": lambda value: None if value is None else dict(value),
    "scaler": dict,
    "images_per_step": int,
    "training_images": int,
    "epoch": int,
    "step": int,
    "running": dict,
    "history": list,
}


class CheckpointError(ValueError):
    """A file of weights cannot be used."""


@dataclass(frozen=True)
class TrainState:
    """Where a training run stands. Random numbers are a function of seed, epoch and step, so none are in here.

    Attributes:
        spec: the network.
        config: the run.
        model: the network's state dict.
        optimizer: the optimiser's state dict.
        ema: the state dict of the averaged weights, if there are any.
        scaler: state of the scaler of float16's gradients.
        images_per_step: in all processes together.
        training_images: how many there are.
        epoch: epochs that are complete.
        step: steps taken in the epoch that is not.
        running: sums over those steps.
        history: one record per complete epoch.
    """

    spec: ModelSpec
    config: TrainConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None
    scaler: dict[str, Any]
    images_per_step: int
    training_images: int
    epoch: int
    step: int
    running: dict[str, float]
    history: list[dict[str, float]]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file such that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: if it cannot be written; the old content is then intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        failure = _failure_of_the_disk(error)
        if failure is None:
            raise
        reason = f"cannot write ({failure.strerror}); what was there before is intact"
        raise OSError(failure.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what :func:`write_atomically` left half-written in a folder when its process was killed."""
    for path in folder.glob(".*.*"):
        process = path.name.rpartition(".")[2]
        if process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keep a second training out of a run's folder; a killed one lets go by itself.

    Raises:
        ValueError: if another process trains there.
        OSError: if the folder cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out={str(folder)!r}: another process is training there; take another folder") from error
        except OSError:  # a file system without locks
            pass
        yield


def _failure_of_the_disk(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save lets a RuntimeError of its own take the place of a failed write."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def state_path(folder: Path, total_steps: int) -> Path:
    """Where the state after so many steps is kept."""
    return folder / f"step-{total_steps:08d}.pt"


def save_state(path: Path, state: TrainState) -> None:
    """Write a training state and remove the oldest beside it, beyond ``keep_checkpoints``.

    Raises:
        OSError: if it cannot be written; earlier states are then intact.
    """
    content = {
        "format": _FORMAT,
        "spec": state.spec.to_json(),
        "config": json.dumps(state.config.to_dict()),
        **{name: getattr(state, name) for name in _PLAIN_PARTS},
    }
    write_atomically(path, lambda file: torch.save(content, file))
    for old in saved_states(path.parent)[state.config.keep_checkpoints :]:
        old.unlink()


def save_best(path: Path) -> None:
    """Keep a state as the best so far, until a better one comes.

    Raises:
        OSError: if it cannot be written; the best before is then intact.
    """
    with open(path, "rb") as state:
        write_atomically(path.with_name(BEST_FILE), lambda file: shutil.copyfileobj(state, file))


def saved_states(folder: Path) -> list[Path]:
    """The training states in a folder, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def load_state(path: Path) -> TrainState:
    """Read a training state.

    Raises:
        CheckpointError: if the file is missing, damaged or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: no permission to read it") from error
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        raise CheckpointError(f"{path}: not a checkpoint, or damaged or incomplete") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of equiflop train")
    try:
        return TrainState(
            spec=ModelSpec.from_json(content["spec"]),
            config=TrainConfig.from_dict(json.loads(content["config"])),
            **{name: kind(content[name]) for name, kind in _PLAIN_PARTS.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a checkpoint with a part missing or damaged ({error})") from error


def save_weights(path: Path, model: nn.Module, spec: ModelSpec, config: TrainConfig | None = None) -> None:
    """Write a network's weights with its description as a safetensors file.

    Raises:
        OSError: if it cannot be written; what was there before is then intact.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    note: dict[str, Any] = {"spec": spec.to_json(), "config": config.to_dict() if config is not None else None}
    content = safetensors.torch.save(state, metadata={_METADATA_KEY: json.dumps(note)})
    write_atomically(path, lambda file: file.write(content))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: Path | str) -> None:
    """Load a state dict strictly.

    Raises:
        CheckpointError: if keys or shapes do not fit the model, or a number is NaN or infinite.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise CheckpointError(f"{origin}: weights of another model: {', '.join(parts)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{origin}: {key} has shape {tuple(value.shape)}, the model needs {tuple(own[key].shape)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{origin}: {key} holds NaN or infinite numbers")
    model.load_state_dict(dict(state))


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights.

    Attributes:
        model: in evaluation mode, on the CPU.
        spec: what it is.
        config: how it was trained, if that is known.
        path: the file it came from.
    """

    model: nn.Module
    spec: ModelSpec
    config: TrainConfig | None
    path: Path


def load_model(path: str | Path) -> TrainedModel:
    """Read a trained network.

    Args:
        path: a run's folder (its final weights, else its newest checkpoint), a ``.safetensors`` file or a checkpoint
            (its averaged weights, if it has any).

    Raises:
        CheckpointError: if it is missing, damaged, not finite, or not written by equiflop.
    """
    path = _weights_in(Path(path))
    config: TrainConfig | None
    if path.suffix == ".safetensors":
        spec, config, state = _read_safetensors(path)
    else:
        saved = load_state(path)
        spec, config = saved.spec, saved.config
        state = saved.model if saved.ema is None else saved.ema
    try:
        model = spec.build()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model cannot be made ({error})") from error
    load_weights(model, state, path)
    return TrainedModel(model.eval(), spec, config, path)


def _weights_in(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    candidates = [path / WEIGHTS_FILE, *saved_states(path / CHECKPOINT_FOLDER), *saved_states(path)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{path}: holds neither {WEIGHTS_FILE} nor a checkpoint")


def _read_safetensors(path: Path) -> tuple[ModelSpec, TrainConfig | None, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if _METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: does not say which model it belongs to (not written by equiflop train)")
    try:
        note = json.loads(metadata[_METADATA_KEY])
        config = TrainConfig.from_dict(note["config"]) if note["config"] is not None else None
        return ModelSpec.from_json(note["spec"]), config, state
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of its model is damaged ({error})") from error
