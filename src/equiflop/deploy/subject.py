"""What is exported: a network with all that somebody needs who has the file alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equiflop
from equiflop.checking import own_input_size, randomize_parameters
from equiflop.classify.model_spec import check_model_name, check_takes, create_model, input_keywords
from equiflop.classify.prediction import Classifier, published_classes
from equiflop.classify.weights import load_model
from equiflop.data import Preprocessing
from equiflop.image_group import ImageGroup


@dataclass(frozen=True)
class Subject:
    """A network that is exported.

    Attributes:
        name: what it is called.
        model: in evaluation mode, in float32, on the CPU.
        preprocessing: what its input is.
        classes: names of the classes in the order of the logits; empty where its output is something else.
        keywords: with which the model was made, as far as they are known.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    keywords: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: str | Path | nn.Module,
        settings: dict[str, Any] | None = None,
        img_size: tuple[int, int] | None = None,
    ) -> Subject:
        """A network, a model's name (random weights), or what ``equiflop train`` wrote.

        Random weights are such that every part counts. Fresh ones are not: with layer scales and class tokens of 1e-6
        no block would show in a proof, and float16 would make noise of them.

        Args:
            model: the network, a name that timm knows or ``twin:NAME``, or the path of a run's folder, of its weights
                or of a checkpoint.
            settings: for a name, keywords of the model; ``pretrained`` and ``checkpoint_path`` are timm's.
            img_size: height and width of the images in place of the model's own.

        Raises:
            ValueError: if the name is unknown, ``settings`` are given for anything but a name, or the network does not
                take images of that size.
            CheckpointError: if a file is missing or damaged.
        """
        if isinstance(model, nn.Module):
            if settings:
                raise ValueError("settings are for names of models, not for a network")
            network = copy.deepcopy(getattr(model, "_orig_mod", model))
            return cls._with(type(network).__name__, network, img_size)
        if Path(model).exists():
            if settings:
                raise ValueError(f"--set does not apply to {str(model)!r}: the file says how its model is made")
            trained = load_model(model)
            found = Classifier.from_trained(trained)
            sized = _sized(found.name, found.model, found.preprocessing, img_size)
            return cls(found.name, found.model.float().eval(), sized, found.classes, dict(trained.spec.kwargs))
        name, keywords = str(model), dict(settings or {})
        check_model_name(name)
        if img_size is not None and "img_size" in input_keywords(name, (3, *img_size)):
            keywords.setdefault("img_size", img_size)
        pretrained = bool(keywords.pop("pretrained", False))
        network = create_model(name, keywords, pretrained)
        if not (pretrained or keywords.get("checkpoint_path")):
            randomize_parameters(network, torch.Generator().manual_seed(0))
        return dataclasses.replace(cls._with(name, network, img_size), keywords=keywords)

    @classmethod
    def _with(cls, name: str, network: nn.Module, img_size: tuple[int, int] | None) -> Subject:
        noted = getattr(network, "pretrained_cfg", None) or {}
        parts: list[Any] = [getattr(network, name, None) for name in ("patch_embed", "stem")]
        strict = next((part.img_size for part in parts if getattr(part, "strict_img_size", False)), None)
        size = tuple(strict or noted.get("input_size") or own_input_size(network))[-2:]
        preprocessing = Preprocessing(
            (int(getattr(network, "in_chans", 3)), int(size[0]), int(size[1])),
            tuple(noted.get("mean", (0.0, 0.0, 0.0))),
            tuple(noted.get("std", (1.0, 1.0, 1.0))),
            noted.get("interpolation", "bicubic"),
            noted.get("crop_pct", 1.0),
        )
        network = network.float().cpu().eval()
        classes = published_classes(network) if getattr(network, "num_classes", 0) else ()
        return cls(name, network, _sized(name, network, preprocessing, img_size), classes)

    @property
    def group(self) -> ImageGroup | None:
        """The group whose action the output follows; None for a plain network."""
        return getattr(self.model, "group", None)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.preprocessing.input_size

    def metadata(self, precision: str) -> dict[str, str]:
        """What is written into the file, as text."""
        about = self.preprocessing
        return {
            "model": self.name,
            "description": f"{self.name}, exported by equiflop {equiflop.__version__}",
            "version": equiflop.__version__,
            "group": self.group.name if self.group is not None else "",
            "precision": precision,
            "input_size": json.dumps(about.input_size),
            "mean": json.dumps(about.mean),
            "std": json.dumps(about.std),
            "interpolation": about.interpolation,
            "crop_pct": str(about.crop_pct),
            "labels": json.dumps(self.classes),
            "macs": self._macs(),
            "parameters": str(sum(p.numel() for p in self.model.parameters())),
            "license": str((getattr(self.model, "pretrained_cfg", None) or {}).get("license") or ""),
        }

    def _macs(self) -> str:
        try:
            return str(equiflop.macs(self.model, self.input_size))
        except (ValueError, RuntimeError):  # a network with products of a kind that has no counter
            return ""

    def example(self, batch: int, seed: int = 0) -> torch.Tensor:
        """Random images."""
        return torch.randn(batch, *self.input_size, generator=torch.Generator().manual_seed(seed))


def _sized(name: str, network: Any, about: Preprocessing, img_size: tuple[int, int] | None) -> Preprocessing:
    """The description of images of another size, which the network takes from now on."""
    if img_size is None or img_size == about.input_size[1:]:
        return about
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size)
    size = (about.input_size[0], *img_size)
    check_takes(network, name, size)
    return dataclasses.replace(about, input_size=size)
