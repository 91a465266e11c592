"""A classifier as a description that fits in a file: which model, which classes, which input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

from equiflop.data import Preprocessing
from equiflop.models.entry_points import TWIN
from equiflop.models.keywords import keyword_problem
from equiflop.models.twin import twin
from equiflop.timm_compat import get_model_input_config


def check_model_name(name: str) -> None:
    """See that timm, with equiflop's models registered, knows the name, or the one behind ``"twin:"``.

    Raises:
        ValueError: if not; it names the closest ones.
    """
    plain = name.removeprefix(TWIN)
    if timm.is_model(plain):
        return
    close = get_close_matches(plain, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "'equiflop models' lists ours, timm.list_models() all"
    raise ValueError(f"model={name!r} is unknown; {hint}")


def create_model(name: str, kwargs: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Make a model by timm's registry.

    Args:
        name: a name that timm knows; with ``"twin:"`` in front the equivariant twin of that network.
        kwargs: timm's keywords.
        pretrained: load timm's published weights, downloading them if necessary.

    Raises:
        ValueError: if the name is unknown, a keyword's value does not fit, or there are no such weights.
        TypeError: if a keyword is unknown.
    """
    check_model_name(name)
    if name.startswith(TWIN):
        wanted: dict[str, Any] = {"pretrained": True} if pretrained else {}
        return twin(name.removeprefix(TWIN), **wanted, **kwargs)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (AssertionError, ArithmeticError) as error:
        raise ValueError(f"model {name!r} cannot be made with {dict(kwargs)}: {error}") from error
    except TypeError as error:
        problem = keyword_problem(name, kwargs, error)
        raise TypeError(problem or f"model {name!r} cannot be made with {dict(kwargs)}: {error}") from error


def check_takes(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """See that a network, in evaluation mode and on the CPU, takes an image of (channels, height, width).

    Raises:
        ValueError: if not.
    """
    was_training = model.training
    image = torch.zeros(1, *input_size)
    try:
        with torch.no_grad():
            model.eval()(image)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        size = "x".join(map(str, input_size))
        raise ValueError(f"model={name!r} does not take images of {size} (channels, height, width): {error}") from error
    finally:
        model.train(was_training)


def input_keywords(name: str, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """timm's keywords that make a model fit its input; ``img_size`` only for models of a fixed size."""
    config = timm.get_pretrained_cfg(name.removeprefix(TWIN))
    keywords: dict[str, Any] = {"in_chans": input_size[0]}
    if config is not None and config.fixed_input_size:
        keywords["img_size"] = list(input_size[1:])
    return keywords


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The input of a model that timm made, as its weights want it.

    Raises:
        ValueError: if nothing is noted about it.
    """
    noted: Any = getattr(model, "pretrained_cfg", None)
    if not noted:
        raise ValueError(f"nothing is noted about the input of this {type(model).__name__}")
    size = tuple(get_model_input_config(model)["input_size"])
    return Preprocessing(size, tuple(noted["mean"]), tuple(noted["std"]), noted["interpolation"], noted["crop_pct"])


@dataclass(frozen=True)
class ModelSpec:
    """Which network a file of weights belongs to.

    Attributes:
        name: timm's name of the model.
        kwargs: keywords it was made with.
        classes: names of the classes, in the order of the logits; none where it gives an embedding.
        preprocessing: what its input is.
    """

    name: str
    kwargs: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def build(self) -> nn.Module:
        """A freshly initialised network.

        Raises:
            ValueError: see :func:`create_model`.
            TypeError: see :func:`create_model`.
        """
        outputs = len(self.classes) or self.kwargs.get("num_classes", 0)
        return create_model(self.name, {**self.kwargs, "num_classes": outputs})

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: if the text is not what :meth:`to_json` writes.
        """
        try:
            values = json.loads(text)
            pre = values["preprocessing"]
            channels, height, width = (int(size) for size in pre["input_size"])
            preprocessing = Preprocessing(
                (channels, height, width),
                tuple(map(float, pre["mean"])),
                tuple(map(float, pre["std"])),
                str(pre["interpolation"]),
                float(pre["crop_pct"]),
            )
            return cls(str(values["name"]), dict(values["kwargs"]), tuple(values["classes"]), preprocessing)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the description of a model ({error})") from error
