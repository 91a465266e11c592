"""Which of our models a file of official weights is, by its keys and shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equiflop.models.entry_points import equivariant_models, model_keywords


@dataclass(frozen=True)
class Recognised:
    """A model of ours that official weights belong to.

    Attributes:
        name: its registered name.
        keywords: those that differ from what the name stands for.
        description: what it is, for people.
    """

    name: str
    keywords: dict[str, Any]
    description: str

    def __str__(self) -> str:
        """The name and its keywords as options of the command line."""
        return " ".join([self.name, *(f"--set {key}={_compact(value)}" for key, value in self.keywords.items())])


def recognise(
    state_dict: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None, trained_as: str | None = None
) -> Recognised:
    """Say which of our models an official state dict belongs to.

    Width, depth, patch and image size, classes and the presence of layer scales, tokens and invariants are read from
    keys and shapes. The number of heads is not in them: it is that of the published network of the same width.

    Args:
        state_dict: the official state dict, freed from wrappers and prefixes.
        settings: keywords that the user knows; they take the place of what is found.
        trained_as: the official name that the file notes, which tells hybrid from early-invariant mirror networks.

    Raises:
        ValueError: if it is none of the official networks, or something cannot be told; it says what was found.
    """
    shapes = _Shapes({name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)})
    settings = settings or {}
    if "patch_embed.lift8.conv_A1.weight" in shapes:
        return _octic_vit(shapes, settings)
    if "downsample_layers.0.0.proj_sym.weight" in shapes:
        return _convnext(shapes, settings)
    if "stem.proj_sym.weight" in shapes:
        return _isotropic(shapes, settings)
    if "patch_embed.proj_sym.weight" in shapes:
        if "blocks.0.attn.lin_sym.weight" in shapes:
            return _resmlp(shapes, settings)
        return _flop_vit(shapes, settings, trained_as)
    raise ValueError(shapes.what_else())


class _Shapes:
    """The shapes of a state dict's entries, by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.family = ""

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def get(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an entry.

        Raises:
            ValueError: if it is missing or has another number of axes.
        """
        if name not in self._shapes:
            raise ValueError(f"looks like an official {self.family}, but {name!r} is missing")
        shape = self._shapes[name]
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"looks like an official {self.family}, but {name!r} has shape {shape}")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group finds, or 0."""
        found = (re.match(pattern, name) for name in self._shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def what_else(self) -> str:
        """What a file is that is no official one."""
        known = ("patch_embed.proj.", "stem.proj.", "stem.")
        if any(name.endswith((".A.weight", ".A1.weight")) and name.startswith(known) for name in self._shapes):
            return "holds weights of equiflop already, which need no conversion"
        plain = ("patch_embed.proj.weight", "downsample_layers.0.0.weight", "stem.0.weight", "stem.proj.weight")
        if any(name in self._shapes for name in plain):
            return (
                "holds weights of a plain network, which have no equivariant image; official files hold "
                "'patch_embed.proj_sym.weight' or the like"
            )
        few = ", ".join(map(repr, list(self._shapes)[:3]))
        return (
            f"is none of the official E(ViT), E(ResMLP), E(ConvNeXt) and octic ViT: it holds {len(self._shapes)} "
            f"tensors ({few}, ...) and no patch embedding of theirs"
        )


def _flop_vit(shapes: _Shapes, settings: Mapping[str, Any], trained_as: str | None) -> Recognised:
    shapes.family = "E(ViT)"
    half, chans, height, half_width = shapes.get("patch_embed.proj_sym.weight", 4)
    depth = shapes.count(r"blocks\.(\d+)\.")
    equivariant = shapes.count(r"blocks\.(\d+)\.attn\.qkv\.linear_sym\.")
    _, half_tokens, _ = shapes.get("pos_embed.0", 3)
    classes, features = shapes.get("head.weight", 2)
    patch = _patch(height, 2 * half_width)
    found: dict[str, Any] = {
        "embed_dim": 2 * half,
        "depth": depth,
        "patch_size": patch,
        "img_size": _image_size(2 * half_tokens, height, 2 * half_width, settings),
        "in_chans": chans,
        "num_classes": classes,
        **_layer_scale(shapes, "init_values", "blocks.0.gamma_1.alpha_sym"),
    }
    if equivariant == depth:
        if features == 2 * half:
            found["invariants"] = "norm"
        return _choose(shapes, "flop_deit3_", "flop", found, settings)
    if equivariant != depth // 2:
        found["equivariant_depth"] = equivariant
    designs = {"flop_hybrid_deit3_": "hybrid", "flop_inv_deit3_": "inv_early"}
    noted = [prefix for prefix, word in designs.items() if word in (trained_as or "")]
    fitting = [_choose(shapes, prefix, "flop", dict(found), settings) for prefix in (noted or designs)]
    if len(fitting) > 1:
        raise ValueError(
            f"holds an E(ViT) of width {2 * half} with {equivariant} equivariant and {depth - equivariant} plain "
            "blocks, hybrid or early-invariant, whose entries are the same; say which: "
            + " or ".join(f"--model {choice}" for choice in fitting)
        )
    return fitting[0]


def _octic_vit(shapes: _Shapes, settings: Mapping[str, Any]) -> Recognised:
    shapes.family = "octic ViT"
    part, chans, half, _ = shapes.get("patch_embed.lift8.conv_A1.weight", 4)
    side, _, _ = shapes.get("pos_embed.0", 3)
    depth = shapes.count(r"blocks\.(\d+)\.")
    octic = shapes.count(r"blocks\.(\d+)\.attn\.qkv\.lin_A1\.")
    self_supervised = "mask_token.0" in shapes and "head.weight" not in shapes  # DINOv2
    found: dict[str, Any] = {
        "embed_dim": 8 * part,
        "depth": depth,
        "patch_size": 2 * half,
        "img_size": 2 * side * 2 * half,
        "in_chans": chans,
        "num_classes": 0 if self_supervised else shapes.get("head.weight", 2)[0],
    }
    scale = "ls1" if "blocks.0.ls1.alpha_A1" in shapes else "gamma_1"
    found |= _layer_scale(shapes, "init_values", f"blocks.0.{scale}.alpha_A1")
    if octic != depth // 2:
        found["equivariant_depth"] = octic
    if "register_tokens.0" in shapes:
        found["reg_tokens"] = shapes.get("register_tokens.0", 3)[1]
    if "cls_token.0" not in shapes:
        found |= {"class_token": False, "global_pool": "avg"}
    if "invariant_proj.weight" not in shapes:
        return _choose(shapes, "octic_hybrid_deit3_", "octic", found, settings)
    _, invariants = shapes.get("invariant_proj.weight", 2)
    if invariants != 6 * part:
        raise ValueError(
            f"holds an octic ViT of width {8 * part} whose plain blocks see {invariants} invariants; only the "
            f"{6 * part} norms of its irreps can be converted"
        )
    return _choose(shapes, "octic_inv_deit3_", "octic", found, settings)


def _resmlp(shapes: _Shapes, settings: Mapping[str, Any]) -> Recognised:
    shapes.family = "E(ResMLP)"
    half, chans, height, half_width = shapes.get("patch_embed.proj_sym.weight", 4)
    half_tokens, _ = shapes.get("blocks.0.attn.lin_sym.weight", 2)
    classes, features = shapes.get("head.weight", 2)
    found: dict[str, Any] = {
        "embed_dim": 2 * half,
        "num_blocks": shapes.count(r"blocks\.(\d+)\."),
        "patch_size": _patch(height, 2 * half_width),
        "img_size": _image_size(2 * half_tokens, height, 2 * half_width, settings),
        "in_chans": chans,
        "num_classes": classes,
        **({"invariants": "norm"} if features == 2 * half else {}),
    }
    return _choose(shapes, "flop_resmlp_", "flop", found, settings)


def _convnext(shapes: _Shapes, settings: Mapping[str, Any]) -> Recognised:
    shapes.family = "E(ConvNeXt)"
    half, chans, patch, _ = shapes.get("downsample_layers.0.0.proj_sym.weight", 4)
    stages = shapes.count(r"stages\.(\d+)\.")
    dims = [2 * half]
    dims += [2 * shapes.get(f"downsample_layers.{i}.1.sym_to_sym.weight", 4)[0] for i in range(1, stages)]
    classes, features = shapes.get("head.weight", 2)
    found: dict[str, Any] = {
        "dims": dims,
        "depths": [shapes.count(rf"stages\.{i}\.(\d+)\.") for i in range(stages)],
        "patch_size": patch,
        "in_chans": chans,
        "num_classes": classes,
        **_layer_scale(shapes, "ls_init_value", "stages.0.0.gamma.alpha_sym"),
        **({"invariants": "norm"} if features == dims[-1] else {}),
    }
    return _choose(shapes, "flop_convnext_", "flop", found, settings)


def _isotropic(shapes: _Shapes, settings: Mapping[str, Any]) -> Recognised:
    shapes.family = "isotropic E(ConvNeXt)"
    half, chans, patch, _ = shapes.get("stem.proj_sym.weight", 4)
    classes, features = shapes.get("head.weight", 2)
    found: dict[str, Any] = {
        "dim": 2 * half,
        "depth": shapes.count(r"blocks\.(\d+)\."),
        "patch_size": patch,
        "in_chans": chans,
        "num_classes": classes,
        **_layer_scale(shapes, "ls_init_value", "blocks.0.gamma.alpha_sym"),
        **({"invariants": "norm"} if features == 2 * half else {}),
    }
    return _choose(shapes, "flop_convnext_isotropic_", "flop", found, settings)


def _layer_scale(shapes: _Shapes, keyword: str, entry: str) -> dict[str, bool]:
    """Whether there are layer scales; :func:`_choose` makes a value of it."""
    return {keyword: entry in shapes}


def _patch(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]


def _image_size(tokens: int, height: int, width: int, settings: Mapping[str, Any]) -> Any:
    """Of a square token grid."""
    if "img_size" in settings:
        return settings["img_size"]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"holds {tokens} tokens, which make no square: give the image, --set img_size=[HEIGHT,WIDTH]")
    return side * height if height == width else [side * height, side * width]


def _nearest(prefix: str, found: Mapping[str, Any]) -> str:
    """The registered model of a family that agrees in most of the sizes, width first."""
    names = [name for name in equivariant_models() if name.startswith(prefix)]
    if prefix == "flop_convnext_":
        names = [name for name in names if "isotropic" not in name]
    sizes = [key for key in ("embed_dim", "dim", "dims", "depth", "depths", "num_blocks", "patch_size") if key in found]

    def agreement(name: str) -> list[bool]:
        keywords = model_keywords(name)
        return [_same(found[key], keywords[key]) for key in sizes]

    return max(names, key=agreement)


def _choose(shapes: _Shapes, prefix: str, group: str, found: dict[str, Any], settings: Mapping[str, Any]) -> Recognised:
    """The nearest model of a family, with the keywords that differ."""
    name = _nearest(prefix, found)
    own = model_keywords(name)
    for key in ("init_values", "ls_init_value"):
        if key in found:
            has_scale = found.pop(key)
            if has_scale != bool(own[key]):
                found[key] = 1e-6 if has_scale else 0
    found |= settings
    width = found.get("embed_dim", found.get("dim", found.get("dims")))
    words = [f"group {group}", f"width {width}", f"depth {_depth(found)}"]
    if "num_heads" in own:
        if found["embed_dim"] != own["embed_dim"] and "num_heads" not in settings:
            raise ValueError(
                f"holds an {shapes.family} of {', '.join(words[1:])}; its number of heads is not in the file and no "
                "published network has this width: give --set num_heads=N"
            )
        words.append(f"{found.get('num_heads', own['num_heads'])} heads")
    words.append(f"patches of {found['patch_size']}")
    if "img_size" in found:
        words.append(f"images of {found['img_size']} pixels")
    words.append(f"{found['num_classes']} classes" if found["num_classes"] else "no classifier")
    keywords = {key: value for key, value in found.items() if key not in own or not _same(value, own[key])}
    return Recognised(name, keywords, f"{shapes.family}, {', '.join(words)}")


def _compact(value: Any) -> str:
    """A value as the command line takes it."""
    return json.dumps(value, separators=(",", ":"))


def _depth(found: Mapping[str, Any]) -> Any:
    return found.get("depth", found.get("num_blocks", found.get("depths")))


def _same(one: Any, other: Any) -> bool:
    """Whether two keywords are the same, lists and tuples not told apart."""
    return (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other)
