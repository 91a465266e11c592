"""What a plain network may hold, and how the rest is refused: with its place and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm
from torch import nn

#: Norms over the channels that have a counterpart.
NORMS = (nn.LayerNorm, LayerNorm, LayerNorm2d, RmsNorm)


def check_untouched(network: nn.Module) -> None:
    """See that a network is what its classes say: no hooks, no replaced methods, nothing shared between two places.

    Raises:
        ValueError: if not; it names the place.
    """
    for reason in _changes(network):
        raise ValueError(reason)


def _changes(network: nn.Module) -> Iterator[str]:
    seen: dict[int, str] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        where = f"module {path}" if path else "the network"
        if id(module) in seen and any(True for _ in module.parameters()):
            yield f"{where} is shared with {seen[id(module)]}"
        seen[id(module)] = where
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            yield f"{where} has hooks, which a twin cannot take over"
        for key in module.__dict__:
            if callable(getattr(type(module), key, None)):
                yield f"{where} has its own method {key!r}"
    owners: dict[int, str] = {}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            yield f"parameter {path} is shared with {owners[id(parameter)]}"
        owners[id(parameter)] = path


def no_counterpart(module: nn.Module, path: str) -> ValueError:
    return ValueError(f"{path} is a {type(module).__name__}, which has no equivariant counterpart")


def only(
    module: nn.Module,
    path: str,
    parameters: tuple[str, ...] = (),
    modules: tuple[str, ...] | None = None,
    buffers: tuple[str, ...] = (),
) -> None:
    """See that a module holds nothing itself but what is known; ``modules=None``: its children have their rules."""
    held = (
        ("parameter", module._parameters, parameters),
        ("buffer", module._buffers, buffers),
        ("module", module._modules, modules),
    )
    for kind, values, known in held:
        for name, value in values.items():
            if value is not None and known is not None and name not in known:
                raise ValueError(f"{kind} {path}.{name}".replace(" .", " ") + " has no equivariant counterpart")


def check_no_padding(embed: Any) -> None:
    if embed.dynamic_img_pad:
        raise ValueError("dynamic_img_pad=True pads one side only, which breaks the symmetry; pad or resize the image")


def check_learned(field: nn.Parameter | None, trained: bool) -> None:
    """See that a position embedding is learned where the rest of the network is.

    Raises:
        ValueError: if not.
    """
    if field is not None and not field.requires_grad and trained:
        raise ValueError("fixed position embedding (pos_embed requires no gradient); that of a twin is learned")


def exactly(module: nn.Module, kind: type[nn.Module], path: str) -> Any:
    if type(module) is not kind:
        raise ValueError(f"{path} is a {type(module).__name__} where {kind.__name__} is supported")
    return module


def check_linear(linear: Any, path: str, in_features: int | None = None, out_features: int | None = None) -> None:
    exactly(linear, nn.Linear, path)
    for key, wanted in (("in_features", in_features), ("out_features", out_features)):
        if wanted is not None and getattr(linear, key) != wanted:
            raise ValueError(f"{path} has {key}={getattr(linear, key)} where {wanted} is supported")


def check_norm(norm: Any, path: str, channels: int) -> None:
    shape = tuple(norm.normalized_shape)
    if shape != (channels,):
        raise ValueError(f"{path} normalises {shape} where ({channels},) is supported")


def check_patches(conv: Any, path: str, patch: tuple[int, int], width: int) -> None:
    settings = {"kernel_size": tuple(patch), "stride": tuple(patch), "padding": (0, 0)}
    check_conv(conv, path, {**settings, "dilation": (1, 1), "groups": 1, "out_channels": width})


def check_conv(conv: Any, path: str, settings: dict[str, Any]) -> None:
    exactly(conv, nn.Conv2d, path)
    for key, wanted in settings.items():
        if getattr(conv, key) != wanted:
            raise ValueError(f"{path} has {key}={getattr(conv, key)} where {wanted} is supported")


def pointwise(act: nn.Module, path: str) -> nn.Module:
    """See that an activation computes every entry from that entry alone."""
    if any(True for _ in act.parameters()) or any(True for _ in act.buffers()):
        raise ValueError(f"{path} ({type(act).__name__}) has parameters, which may differ between the group's copies")
    with torch.no_grad():
        x = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64, device="cpu").view(2, 12)
        was_training = act.training
        whole = act.eval()(x)
        apart = torch.stack([act(entry) for entry in x.flatten()]).view(whole.shape) if whole.shape == x.shape else None
        act.train(was_training)
    if apart is None or not torch.allclose(whole, apart, rtol=1e-12, atol=1e-12):
        raise ValueError(f"{path} ({type(act).__name__}) is not pointwise")
    return act
