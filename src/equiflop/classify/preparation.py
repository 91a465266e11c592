"""What is done to a fresh network before it is trained."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from equiflop.classify.weights import load_model
from equiflop.training.state import load_weights


def start_from(model: nn.Module, source: str, input_size: tuple[int, int, int]) -> None:
    """Take the weights of a trained network.

    Position embeddings are resampled to the new input size; a classifier for another number of classes is not taken,
    and there need not be one.

    Args:
        model: the network, freshly initialised.
        source: what :func:`equiflop.classify.load_model` reads.
        input_size: (channels, height, width) of the network's input.

    Raises:
        ValueError: if the weights are of another network.
    """
    trained = load_model(source)
    set_input_size = getattr(trained.model, "set_input_size", None)
    if trained.spec.preprocessing.input_size != input_size and set_input_size is not None:
        set_input_size(img_size=input_size[1:])
    own, state = model.state_dict(), dict(trained.model.state_dict())
    classifier = classifier_of(model)
    heads = {id(parameter) for parameter in classifier.parameters()} if classifier is not None else set()
    head_names = {name for name, parameter in model.named_parameters() if id(parameter) in heads}
    for name in head_names:
        if name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
    load_weights(model, state, source)


def classifier_of(model: nn.Module) -> nn.Module | None:
    """The classifier of a model with timm's methods, if it has one."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier is not None else None
    return classifier if isinstance(classifier, nn.Module) else None


def set_drop_path(model: nn.Module, rate: float) -> None:
    """The same rate in every block, as published; timm's models grow it with depth."""
    for module in list(model.modules()):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            # timm's ResNets have None in the place of a rate of 0
            if isinstance(getattr(module, name, ""), (DropPath, nn.Identity, type(None))):
                setattr(module, name, DropPath(rate))
