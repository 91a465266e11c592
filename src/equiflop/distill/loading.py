"""Where teachers come from: timm's weights of a name, a file of weights, or a run of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
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
from equiflop.models import equivariant_models
from equiflop.models.entry_points import TWIN
from equiflop.models.keywords import known_keywords

#: Keywords of a network that say nothing of a teacher, and what to do in their place.
_NOT_OF_TEACHERS = {
    "in_chans": "its weights show its colours, and --channels makes the data's the same",
    "pretrained": "its weights are timm's, or those of --teacher-checkpoint FILE",
    "checkpoint_path": "say --teacher-checkpoint FILE",
    "device": "say --device",
    "dtype": "say --precision",
}
#: Image towers, whose "classes" are the channels of an embedding.
_TOWERS = re.compile(r"clip|_pe_")


def load_teacher(config: DistillConfig) -> PlainTeacher:
    """The teacher of a configuration.

    Raises:
        ValueError: if there is none, its weights do not fit, or it cannot be one.
        OSError: if its weights cannot be read or downloaded.
    """
    name = config.model
    if config.teacher:
        trained = load_model(config.teacher)
        if trained.spec.name != name:
            raise ValueError(
                f"teacher={config.teacher!r} is a run of {trained.spec.name}, not of {name}; leave out NAME"
            )
        return PlainTeacher(trained.spec, trained.model, f"teacher={config.teacher!r}")
    if name.startswith(TWIN) or name.split(".")[0] in equivariant_models():
        raise ValueError(f"model={name!r} is equivariant already; the teacher must be a plain network of timm")
    check_model_name(name)
    _check_tag(name)
    keywords = {key: value for key, value in config.teacher_kwargs.items() if value is not None or key == "init_values"}
    if keywords:
        _check_keywords(name, keywords)
    if config.teacher_checkpoint:
        model, keywords = _from_file(name, config.teacher_checkpoint, keywords)
        source = f"teacher_checkpoint={config.teacher_checkpoint!r}"
        classes = tuple(map(str, range(model.num_classes)))
    else:
        model = _pretrained(name, keywords)
        source = f"model={name!r}"
        classes = published_classes(model)
    if _embeds(name, len(classes)):
        keywords, classes = {**keywords, "num_classes": len(classes)}, ()
    teacher = PlainTeacher(
        ModelSpec(name, keywords, classes, preprocessing_of(model)), model, source, names_classes=False
    )
    if config.teacher_kwargs:
        _check_answers(teacher, config.teacher_kwargs)
    return teacher


def _check_tag(name: str) -> None:
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ValueError(
            f"model={name!r}: timm knows no weights of this tag; of this network it has {known}"
        ) from error


def _check_keywords(name: str, keywords: Mapping[str, Any]) -> None:
    """See that a network can be made with what the user says of a teacher, before its weights are read."""
    if keywords.get("num_classes", 0) != 0 or isinstance(keywords.get("num_classes"), bool):
        raise ValueError(
            f"teacher_kwargs: num_classes={keywords['num_classes']!r}: the teacher's weights decide it; 0 leaves its "
            "classifier out, and its embedding teaches"
        )
    known = set(known_keywords(name)) - _NOT_OF_TEACHERS.keys()
    for key in keywords.keys() - known:
        close = get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known))}"
        if key == "img_size":
            hint = "say --img-size"
        raise ValueError(
            f"teacher_kwargs: {key}={keywords[key]!r} is nothing that {name} takes; {_NOT_OF_TEACHERS.get(key, hint)}"
        )
    try:
        create_model(name, keywords)
    except Exception as error:  # timm and torch raise almost anything
        raise ValueError(f"teacher_kwargs: {name} cannot be made with {dict(keywords)} ({_reason(error)})") from error


def _check_answers(teacher: PlainTeacher, keywords: Mapping[str, Any]) -> None:
    size = teacher.spec.preprocessing.input_size
    try:
        with torch.no_grad():
            shape = tuple(teacher.model(torch.zeros(1, *size)).shape)
    except Exception as error:
        raise ValueError(f"teacher_kwargs={dict(keywords)}: such a network does not take images ({error})") from error
    if shape != (1, teacher.outputs):
        raise ValueError(
            f"teacher_kwargs={dict(keywords)}: such a network answers an image with numbers of shape {shape[1:]}; "
            f"a teacher gives {teacher.outputs} in a row"
        )


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def _embeds(name: str, outputs: int) -> bool:
    """Whether a network's outputs are an embedding, though timm calls them classes: an image tower's own number."""
    for tagged in [name] if "." in name else timm.list_pretrained(f"{name}.*"):
        noted: Any = timm.get_pretrained_cfg(tagged)
        if _TOWERS.search(tagged) and noted.num_classes == outputs > 0 and infer_imagenet_subset(noted) is None:
            return True
    return False


def _pretrained(name: str, keywords: Mapping[str, Any]) -> Any:
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(
            f"model={name!r}: timm has no weights of it, so it cannot teach; give --teacher-checkpoint FILE or "
            "--teacher RUN"
        )
    try:
        return create_model(name, keywords, pretrained=True)
    except (OSError, RuntimeError) as error:  # whatever lies between here and the weights
        with_these = f" with teacher_kwargs={dict(keywords)}" if keywords else ""
        raise ValueError(
            f"model={name!r}: its weights cannot be had{with_these} ({_reason(error)}); give --teacher-checkpoint FILE "
            "or --teacher RUN"
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
        shown = _keywords_of(plain, load_state_dict(file), given.get("img_size"))
        keywords = {**shown, **given}
        noted = {key: shown[key] for key in ("num_classes",) if key in shown}
        overlay = {"file": file, "custom_load": False, **noted, **_input_of(name, shown)}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **keywords)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        with_these = f" with teacher_kwargs={given}" if given else ""
        raise ValueError(f"{source}: holds no weights of {name}{with_these} ({_reason(error)})") from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ValueError(f"{source}: holds NaN or infinite numbers")
    if not classifies:
        model.reset_classifier(0)
        keywords["num_classes"] = 0
    return model, keywords


def _keywords_of(plain: Any, weights: Mapping[str, Any], image_size: Any = None) -> dict[str, Any]:
    """What weights show of their network: classes, colours, image size, pooling.

    Args:
        plain: such a network with what is usual.
        weights: as the file has them.
        image_size: that the user wants; if the weights can be of it they are, else they are of a square one.
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
    if places is None or usual is None or pixels is None:
        return found
    others = usual.shape[1] - plain.patch_embed.num_patches
    patches = places.shape[1] - others
    height, width = pixels.shape[2:]
    if image_size is not None:
        rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        if (rows // height) * (columns // width) == patches:
            return found | {"img_size": [rows, columns]}
    side = math.isqrt(max(patches, 0))
    if side**2 != patches:
        raise ValueError(
            f"its position embedding has {places.shape[1]} places: {others} for other tokens leave {patches} patches, "
            "which make no square; say --teacher-set with img_size=[HEIGHT,WIDTH], or with class_token, reg_tokens or "
            "no_embed_class if the other tokens are not those"
        )
    if patches != plain.patch_embed.num_patches:
        found["img_size"] = [side * height, side * width]
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
