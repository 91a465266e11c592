"""A trained network written as a folder for the hub, and sent there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi
from torch import nn

from equiflop.checksums import checksum_file, write_checksum
from equiflop.classify.config import TrainConfig
from equiflop.classify.weights import TrainedModel, load_model, save_weights
from equiflop.files import replace_folder, workshop
from equiflop.hub.card import Facts, Measured, data_name, model_card
from equiflop.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from equiflop.timm_compat import save_config_for_hf

CARD_FILE = "README.md"
#: All that a published folder holds.
FILES = (CONFIG_FILE, WEIGHTS_FILE, checksum_file(Path(WEIGHTS_FILE)).name, CARD_FILE)


@dataclass(frozen=True)
class Published:
    """A folder for the hub.

    Attributes:
        path: the folder.
        facts: what its card says.
    """

    path: Path
    facts: Facts


def publish(
    source: str | Path,
    output: str | Path,
    *,
    licence: str | None = None,
    repository: str | None = None,
    measure: Callable[[TrainedModel], Measured] | None = None,
) -> Published:
    """Write a trained network as a folder for the hub: configuration, weights with their checksum, and a model card.

    timm makes the network again from the folder, and it computes the same, before the folder gets its name.

    Args:
        source: what ``equiflop train``, ``convert`` or this wrote: a run's folder, its weights or a checkpoint.
        output: the folder; one that is there must be empty or hold nothing but what this writes.
        licence: of the weights, by its identifier on the hub such as ``"apache-2.0"``.
        repository: where it will be on the hub, for the card; by default OWNER and the model's name.
        measure: measures the network; by default the accuracy is what training noted in its log, if it did.

    Raises:
        CheckpointError: if the source is missing or damaged.
        ValueError: if the output holds something else, or the network cannot be made again from what was written.
        OSError: if the folder cannot be written; what was there before is then intact.
    """
    output = Path(output)
    trained = load_model(source)
    _check_free(output)
    measured = measure(trained) if measure is not None else _noted(trained)
    facts = Facts.of(trained, measured, licence)
    card = model_card(facts, repository or f"OWNER/{facts.name.replace(':', '_')}")
    config = None if trained.config is None else _without_places(trained.config)

    def fill(folder: Path) -> None:
        folder.mkdir()
        save_weights(folder / WEIGHTS_FILE, trained.model.state_dict(), trained.spec, config)
        write_checksum(folder / WEIGHTS_FILE)
        _write_config(trained, licence, folder / CONFIG_FILE)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        _check_loads(trained, folder)

    replace_folder(output, fill)
    return Published(output, facts)


def push(folder: str | Path, repository: str) -> str:
    """Upload a published folder to the hub, into a repository that is made if it is not there.

    Args:
        folder: the folder.
        repository: ``OWNER/NAME``.

    Returns:
        the address of the repository.

    Raises:
        ValueError: if the hub refuses; what it says.
    """
    api = HfApi(library_name="equiflop")
    try:
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Add model"
        )
    except Exception as error:  # the hub, the network and what is between them raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"push={repository!r}: {reason}; the folder {folder} is complete") from error
    return str(made.url)


def _check_free(output: Path) -> None:
    """See that a folder may be written there.

    Raises:
        ValueError: if something else is there.
        OSError: if none can be made.
    """
    if output.is_dir():
        others = sorted(path.name for path in output.iterdir() if path.name not in FILES)
        if others:
            raise ValueError(
                f"output={str(output)!r} holds {others[0]!r}, which is none of what publish writes; take another folder"
            )
    elif output.exists():
        raise ValueError(f"output={str(output)!r} is a file; give a folder")
    with workshop(output):  # before the work: can there be one?
        pass


def _noted(trained: TrainedModel) -> Measured | None:
    """What training noted about final weights in the log beside them."""
    log = trained.path.parent / "log.jsonl"
    if trained.config is None or trained.path.name != WEIGHTS_FILE or not log.is_file():
        return None
    try:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        last = next((record for record in records if record["epoch"] == trained.config.epochs), None)
        if last is None or ("train_loss" in last and "test_accuracy" not in last):  # distilled without labels
            return None
        averaged = last.get("ema_accuracy") is not None
        top1 = last["ema_accuracy"] if averaged else last["test_accuracy"]
        top5 = None if averaged or "test_error" in last else float(last["test_top5"])
        return Measured(data_name(trained.config.data), None, float(top1), top5)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{log}: a damaged log ({error!r})") from error


def _without_places(config: TrainConfig) -> TrainConfig:
    """The configuration of a training without the places on a disk that it names."""
    names = ("data", "out", "start_from", "teacher", "teacher_checkpoint")
    places: dict[str, Any] = {name: data_name(getattr(config, name)) for name in names if hasattr(config, name)}
    return replace(config, **places)


def _write_config(trained: TrainedModel, licence: str | None, path: Path) -> None:
    about = trained.spec.preprocessing
    model_config: dict[str, Any] = {"pretrained_cfg": {"license": licence}}
    if trained.spec.classes:
        model_config["label_names"] = list(trained.spec.classes)
    data_config = {
        "input_size": about.input_size,
        "mean": about.mean,
        "std": about.std,
        "interpolation": about.interpolation,
        "crop_pct": about.crop_pct,
    }
    save_config_for_hf(trained.model, str(path), model_config=model_config, data_config=data_config)
    written = json.loads(path.read_text(encoding="utf-8"))
    # timm has it from pretrained_cfg; transformers would pass it twice
    written["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _check_loads(trained: TrainedModel, folder: Path) -> None:
    """See that timm makes the same network from a folder.

    Raises:
        ValueError: if not.
    """
    try:
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{trained.path}: timm cannot make its model from a folder ({error})") from error
    images = torch.randn(2, *trained.spec.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    expected, found = _outputs(trained.model, images), _outputs(again, images)
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max())):
        raise ValueError(f"{trained.path}: what timm makes of its model from a folder computes something else")


def _outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        outputs: torch.Tensor = model(images.to(next(model.parameters()).dtype))
    return outputs
