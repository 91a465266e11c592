"""Where teachers come from: timm's weights of a name, a file of weights, or a run of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import infer_imagenet_subset
from timm.models import load_state_dict

from equiflop.classify.model_spec import ModelSpec, check_model_name, create_model, preprocessing_of
from equiflop.classify.prediction import published_classes
from equiflop.classify.weights import load_model
from equiflop.distill.config import DistillConfig
from equiflop.distill.teacher import PlainTeacher
from equiflop.models.entry_points import TWIN

#: Keywords of a network that say nothing of a teacher, and what to do in their place.
_NOT_OF_TEACHERS = {
    "in_chans": "its weights show its colours, and --channels makes the data's the same",
    "pretrained": "its weights are timm's, or those of --teacher-checkpoint FILE",
    "checkpoint_path": "say --teacher-checkpoint FILE",
    "pretrained_cfg": "name the weights by their tag, as in NAME.TAG",
    "pretrained_cfg_overlay": "say --teacher-checkpoint FILE",
}
#: Image towers, whose "classes" are the channels of an embedding.
_TOWERS = re.compile(r"clip|_pe_")


def load_teacher(config: DistillConfig) -> PlainTeacher:
    """The teacher of a configuration.

    Raises:
        ValueError: if there is none, its weights do not fit, or it cannot be one.
        TypeError: if it does not take a keyword.
        OSError: if its weights cannot be read or downloaded.
    """
    if config.teacher:
        trained = load_model(config.teacher)
        if trained.spec.name != config.model:
            raise ValueError(
                f"teacher={config.teacher!r} is a run of {trained.spec.name}, not of {config.model}; leave out NAME"
            )
        return PlainTeacher(trained.spec, trained.model, f"teacher={config.teacher!r}")
    if config.model.startswith(TWIN):
        raise ValueError(f"{config.model} is equivariant already; the teacher must be a plain network of timm")
    check_model_name(config.model)
    keywords = config.teacher_kwargs
    _check_keywords(keywords)
    if config.teacher_checkpoint:
        model, keywords = _from_file(config.model, config.teacher_checkpoint, keywords)
        source = f"teacher_checkpoint={config.teacher_checkpoint!r}"
        classes = tuple(map(str, range(model.num_classes)))
    else:
        model = _pretrained(config.model, keywords)
        source = f"model={config.model!r}"
        classes = published_classes(model)
    if _embeds(config.model, len(classes)):
        keywords, classes = {**keywords, "num_classes": len(classes)}, ()
    return PlainTeacher(
        ModelSpec(config.model, keywords, classes, preprocessing_of(model)), model, source, names_classes=False
    )


def _check_keywords(keywords: Mapping[str, Any]) -> None:
    for name, instead in _NOT_OF_TEACHERS.items():
        if name in keywords:
            raise ValueError(f"teacher_kwargs: {name}={keywords[name]!r} is nothing that a teacher takes; {instead}")
    if keywords.get("num_classes"):
        raise ValueError(
            f"teacher_kwargs: num_classes={keywords['num_classes']!r}: the teacher's weights decide it; 0 leaves its "
            "classifier out, and its embedding teaches"
        )


def _embeds(name: str, outputs: int) -> bool:
    """Whether a network's outputs are an embedding, though timm calls them classes: an image tower's own number."""
    noted: Any = timm.get_pretrained_cfg(name)
    if noted is None or outputs != noted.num_classes or noted.label_names:
        return False
    return infer_imagenet_subset(noted) is None and bool(_TOWERS.search(name))


def _pretrained(name: str, keywords: Mapping[str, Any]) -> Any:
    from equiflop.models import equivariant_models

    if name.split(".")[0] in equivariant_models():
        raise ValueError(f"model={name!r} is equivariant already; the teacher must be a plain network of timm")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ValueError(
            f"model={name!r}: timm knows no weights of this tag; of this network it has {known}"
        ) from error
    if config is None or not config.has_weights:
        raise ValueError(
            f"model={name!r}: timm has no weights of it, so it cannot teach; give --teacher-checkpoint FILE or "
            "--teacher RUN"
        )
    try:
        return create_model(name, keywords, pretrained=True)
    except (OSError, RuntimeError) as error:  # whatever lies between here and the weights
        raise ValueError(
            f"model={name!r}: its weights cannot be had ({' '.join(str(error).split()):.300}); give "
            "--teacher-checkpoint FILE or --teacher RUN"
        ) from error


def _from_file(name: str, file: str, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A network with the weights of a file, adapted as timm adapts published ones, without running code in the file.

    Args:
        name: timm's name of the network.
        file: of its weights.
        given: keywords that go before what the weights show.

    Returns:
        the network, and timm's keywords for what is otherwise than by default.
    """
    source = f"teacher_checkpoint={file!r}"
    if not Path(file).is_file():
        raise ValueError(f"{source}: no such file")
    given = dict(given)
    classifies = given.pop("num_classes", None) is None
    plain = create_model(name, {key: value for key, value in given.items() if key != "img_size"})
    try:
        shown = _keywords_of(plain, load_state_dict(file))
        keywords = {**shown, **given}
        noted = {key: shown[key] for key in ("num_classes",) if key in shown}
        overlay = {"file": file, "custom_load": False, **noted, **_input_of(name, shown)}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **keywords)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source}: holds no weights of {name} ({reason:.300})") from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ValueError(f"{source}: holds NaN or infinite numbers")
    if not classifies:
        model.reset_classifier(0)
        keywords["num_classes"] = 0
    return model, keywords


def _keywords_of(plain: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What weights show of their network: classes, colours, image size (a square one), pooling.

    Args:
        plain: such a network with what is usual.
        weights: as the file has them.
    """
    noted: Any = getattr(plain, "pretrained_cfg", None)
    if not noted:
        return {}
    own = plain.state_dict()
    found: dict[str, Any] = {}
    classifier = noted.get("classifier")
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    keys = [f"{head}.weight" for head in (*heads, "head") if head]
    head = next((weights[key] for key in keys if key in weights), None)
    if head is not None and len(head) != noted["num_classes"]:
        found["num_classes"] = len(head)
    elif head is None and {key for key in weights if not key.startswith("fc_norm.")} < own.keys():
        found["num_classes"] = 0
    pixels = weights.get(f"{noted.get('first_conv')}.weight")
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] != noted["input_size"][0]:
        found["in_chans"] = int(pixels.shape[1])
    if "fc_norm.weight" in weights and "norm.weight" in own and "norm.weight" not in weights:
        found["global_pool"] = "avg"
    places, usual = (state.get("pos_embed") for state in (weights, own))
    if places is not None and usual is not None and pixels is not None and places.shape[1] != usual.shape[1]:
        patches = places.shape[1] - (usual.shape[1] - plain.patch_embed.num_patches)
        side = math.isqrt(max(patches, 0))
        if side**2 != patches:
            raise ValueError(f"its position embedding has {places.shape[1]} places, which make no square")
        found["img_size"] = [side * patch for patch in pixels.shape[2:]]
    return found


def _input_of(name: str, shown: Mapping[str, Any]) -> dict[str, Any]:
    """What timm notes of the input that weights were trained with, where it is another than usual."""
    if not {"in_chans", "img_size"} & shown.keys():
        return {}
    noted: Any = timm.get_pretrained_cfg(name)
    colours = shown.get("in_chans", noted.input_size[0])
    found: dict[str, Any] = {"input_size": (colours, *shown.get("img_size", noted.input_size[1:]))}
    if colours != noted.input_size[0]:
        mean, std = ((sum(values) / len(values),) * colours for values in (noted.mean, noted.std))
        found |= {"mean": mean, "std": std, "first_conv": None}  # the weights are not to be adapted
    return found
