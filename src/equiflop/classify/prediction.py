"""Classifying single images, and their mirror images beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equiflop.classify.model_spec import create_model, preprocessing_of
from equiflop.classify.weights import TrainedModel, load_model
from equiflop.data import Preprocessing, read_image
from equiflop.data.splits import image_transform


@dataclass(frozen=True)
class Classifier:
    """A network that is ready to classify.

    Attributes:
        name: timm's name of the model.
        model: in evaluation mode.
        classes: names of the classes, in the order of the logits.
        preprocessing: what its input is.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    @classmethod
    def from_file(cls, path: str | Path) -> Classifier:
        """A network that ``equiflop train`` wrote: a run's folder, its weights or a checkpoint.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        return cls.from_trained(load_model(path))

    @classmethod
    def from_trained(cls, trained: TrainedModel) -> Classifier:
        """A network that :func:`equiflop.classify.load_model` has read."""
        return cls(trained.spec.name, trained.model, trained.spec.classes, trained.spec.preprocessing)

    @classmethod
    def from_timm(cls, name: str) -> Classifier:
        """A network with its published weights: timm's, downloaded if necessary, or those in ``EQUIFLOP_WEIGHTS``.

        Raises:
            ValueError: if the name is unknown or there are no such weights.
        """
        model = create_model(name, {}, pretrained=True).eval()
        return cls(name, model, published_classes(model), preprocessing_of(model))

    def check_classes(self, classes: tuple[str, ...]) -> None:
        """See that a data set has this network's classes.

        Names that the network does not know are taken for other names of its classes.

        Raises:
            ValueError: if not.
        """
        if len(classes) != len(self.classes):
            raise ValueError(f"{self.name} has {len(self.classes)} classes, the data have {len(classes)}")
        for label, (own, name) in enumerate(zip(self.classes, classes, strict=True)):
            if name != own and name in self.classes:
                raise ValueError(
                    f"class {name!r} is number {label} of the data but {self.classes.index(name)} of {self.name}: the "
                    "same classes in different orders, or different classes"
                )


@dataclass(frozen=True)
class Answer:
    """One class with its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a network says about an image and about its mirror image.

    Attributes:
        image: the file.
        best: the likeliest classes, the likeliest first.
        mirrored: the same for the mirror image.
        same_answer: whether the likeliest class is the same.
        largest_logit_difference: between the two, over all classes.
    """

    image: str
    best: tuple[Answer, ...]
    mirrored: tuple[Answer, ...]
    same_answer: bool
    largest_logit_difference: float


def predict(classifier: Classifier, path: str | Path, device: torch.device, count: int = 5) -> Prediction:
    """Classify an image file and its mirror image.

    Args:
        classifier: the network; it is moved to the device.
        path: the file.
        device: where to compute.
        count: how many classes to name.

    Raises:
        ValueError: if the file cannot be read, the logits are not finite, or the network has no classifier.
    """
    if not classifier.classes:
        raise ValueError(f"{classifier.name} has no classifier: its weights make features alone")
    channels = classifier.preprocessing.input_size[0]
    pixels = image_transform(classifier.preprocessing)(read_image(path, channels))
    model = classifier.model.to(device)
    with torch.no_grad():
        logits, mirrored = (model(view[None].to(device))[0].double().cpu() for view in (pixels, pixels.flip(-1)))
    if not bool(torch.isfinite(logits).all() and torch.isfinite(mirrored).all()):
        raise ValueError(f"{path}: the logits of {classifier.name} are not finite")
    best, best_mirrored = (_best(values, classifier.classes, count) for values in (logits, mirrored))
    return Prediction(
        image=str(path),
        best=best,
        mirrored=best_mirrored,
        same_answer=best[0].name == best_mirrored[0].name,
        largest_logit_difference=float((logits - mirrored).abs().max()),
    )


def _best(logits: Tensor, classes: tuple[str, ...], count: int) -> tuple[Answer, ...]:
    top = logits.softmax(0).topk(min(count, len(classes)))
    return tuple(Answer(classes[i], float(p)) for p, i in zip(top.values, top.indices.tolist(), strict=True))


def published_classes(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classes: those noted beside its weights, else ImageNet's by their number, else numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = int(model.num_classes)  # type: ignore[arg-type]
    noted = getattr(model, "pretrained_cfg", {}).get("label_names")
    if noted and len(noted) == count:
        return tuple(noted)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return tuple(map(str, range(count)))
    info = ImageNetInfo(subset)
    return tuple(map(info.index_to_description, range(count)))
