"""The weights of a plain vision transformer under the names of its twin, for the group of one element."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from equiflop import ImageGroup
from equiflop import nn as enn
from equiflop.groups import cyclic

#: The group of one element: every channel is of the trivial irrep, and an equivariant network is a plain one.
TRIVIAL = ImageGroup(cyclic(1), np.eye(2, dtype=np.int64)[None], "trivial")


def plain_weights(plain: Any, made: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain network, each tensor where it belongs in the twin; nothing may be left over."""
    left = dict(plain.state_dict())
    state: dict[str, Tensor] = {}
    for path, module in made.named_modules():
        at = f"{path}." if path else ""
        if isinstance(module, enn.PatchEmbed):
            origin = at if f"{at}proj.weight" in left else at.removesuffix("proj.")
            weight = left.pop(f"{origin}proj.weight" if f"{origin}proj.weight" in left else f"{at}weight")
            if weight.ndim == 4:  # channels behind the pixels of a patch
                weight = weight.permute(0, 2, 3, 1).flatten(1)
            state[f"{at}proj.A.weight"] = weight
            if f"{origin}proj.bias" in left:
                state[f"{at}proj.A.bias"] = left.pop(f"{origin}proj.bias")
        elif isinstance(module, enn.TiedConv2d):
            state[f"{at}weight"] = left.pop(f"{at}weight").permute(2, 3, 0, 1).flatten(0, 1)
        elif isinstance(module, enn.LinearToSeveral):
            rows = [part.get_parameter("A.weight").shape[0] for part in module.parts]
            for kind in ("weight", "bias"):
                if at + kind in left:
                    for i, part in enumerate(left.pop(at + kind).split(rows)):
                        state[f"{at}parts.{i}.A.{kind}"] = part
        elif isinstance(module, enn.LinearFromSeveral):
            for i, part in enumerate(left.pop(f"{at}weight").split(module.widths, dim=1)):
                state[f"{at}parts.{i}.A.weight"] = part
            if f"{at}bias" in left:
                state[f"{at}parts.0.A.bias"] = left.pop(f"{at}bias")
        elif isinstance(module, enn.PositionEmbedding):
            value = left.pop("pos_embed" if path == "patch_embed.positions" else path).flatten(1, -2)[0]
            prefix = 0 if module.prefix is None else len(module.prefix)
            if prefix:
                state[f"{at}prefix"] = value[:prefix]
            state[f"{at}weight_A"] = value[prefix:]
    for key, value in left.items():
        layer, _, kind = key.rpartition(".")
        value = value.flatten(1) if key == "neck.0.weight" else value
        candidates = [key, f"{layer}.A.{kind}", f"{layer}.core.{kind}"]
        candidates += [key.replace("rope.", "rope.rope.", 1), key.replace("rel_pos.", "rel_pos.bias.", 1)]
        candidates += [key.replace("rel_pos_bias.", "rel_pos_bias.bias.", 1)]
        names = made.state_dict().keys()
        state[next((name for name in candidates if name in names), key)] = value
    return state
