"""Names of the linear maps inside a model, for tools that adapt or quantise them by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from equiflop.nn import Linear


def linear_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Full names of the ``nn.Linear`` modules in a model: those that are one irrep's block of an equivariant map, and
    plain ones.

    A tool that is told ``qkv`` finds an equivariant map there, which consists of an ``nn.Linear`` per irrep. Give it
    these names instead: ``LoraConfig(target_modules=equiflop.linear_layers(model, ["qkv", "proj"]))``. What is adapted
    within an irrep stays equivariant.

    Args:
        model: any network.
        names: names of layers, such as ``"qkv"`` or ``"blocks.0.mlp.fc1"``: the whole name or its end. All by default,
            the classifier included.

    Raises:
        ValueError: if a name belongs to no linear map with such modules.

    >>> import timm
    >>> model = timm.create_model("flop_deit3_tiny_patch16_224", depth=1)
    >>> linear_layers(model, ["qkv", "fc1"])
    ['blocks.0.attn.qkv.A', 'blocks.0.attn.qkv.B', 'blocks.0.mlp.fc1.A', 'blocks.0.mlp.fc1.B']
    """
    found: list[str] = []
    used: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent = path.rpartition(".")[0]
        layer = parent if path and isinstance(model.get_submodule(parent), Linear) else path
        fitting = {name for name in names or () if f".{layer}".endswith(f".{name}") or name == path}
        used |= fitting
        if names is None or fitting:
            found.append(path)
    for name in names or ():
        if name not in used:
            raise ValueError(f"names: {name!r} is no linear map of {type(model).__name__} with nn.Linear inside")
    return found
