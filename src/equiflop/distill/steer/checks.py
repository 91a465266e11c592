"""Which teachers steering can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Attention as PlainAttention
from timm.layers import Mlp as PlainMlp
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from equiflop.distill.features import has_maps, prefix_tokens
from equiflop.image_group import ImageGroup
from equiflop.models.equivariant_vit import EquivariantVisionTransformer

#: Linear maps of a block; their biases take up those of the norms in front of them.
LINEAR_MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def check_steerable(teacher: nn.Module, group: ImageGroup, source: str) -> None:
    """See that steering can read a teacher.

    Raises:
        ValueError: if not; it says what else to do.
    """
    instead = "choose --init random"
    if group.order != 2:
        raise ValueError(f"init='steer' is for groups of one mirroring, flop or updown, not {group.name!r}; {instead}")
    if type(teacher) is not VisionTransformer:
        raise ValueError(
            f"init='steer' reads timm's VisionTransformer, and {source} is a {type(teacher).__name__}; {instead}"
        )
    problem = _unread_part(teacher)
    if problem is not None:
        raise ValueError(f"init='steer' cannot read {problem} of {source}; {instead}")


def check_student(student: nn.Module, teacher: Any, source: str) -> None:
    """See that steering can read a teacher and write a student of it.

    Raises:
        ValueError: if not; it says what would do.
    """
    if not isinstance(student, EquivariantVisionTransformer):
        raise ValueError(f"init='steer' writes twins of timm's VisionTransformer, not a {type(student).__name__}")
    if student.design != "equivariant":
        raise ValueError(f"design={student.design!r}: init='steer' writes networks of design 'equivariant'")
    check_steerable(teacher, student.group, source)
    check_tokens(student, teacher, source)
    if 0 in student.rep.multiplicities:
        raise ValueError(f"multiplicities={student.rep.multiplicities}: init='steer' needs channels of both kinds")
    if student.kind_of_invariants not in (None, "trivial"):
        raise ValueError(f"invariants={student.kind_of_invariants!r}: init='steer' writes heads on 'trivial' ones")
    for name, own, theirs in _shared(student, teacher):
        if own != theirs:
            raise ValueError(f"the student has {name}={own!r}, {source} {name}={theirs!r}; init='steer' needs the same")
    for i, block in enumerate(student.blocks):
        for name in LINEAR_MAPS:
            if block.get_submodule(name).bias is None:
                raise ValueError(
                    f"blocks.{i}.{name} of the student has no bias: init='steer' needs it for the biases of {source}"
                )
        if not _same_function(block.mlp.act, teacher.blocks[i].mlp.act):
            raise ValueError(f"blocks.{i}.mlp.act of the student is another function than that of {source}")


def _shared(student: Any, teacher: Any) -> Iterator[tuple[str, Any, Any]]:
    """What both networks must have alike, by its name; of parts, whether there is one."""
    yield "depth", len(student.blocks), len(teacher.blocks)
    yield "global_pool", student.global_pool, teacher.global_pool
    for name in ("pos_embed", "norm_pre", "norm", "fc_norm"):
        yield name, _is_there(getattr(student, name)), _is_there(getattr(teacher, name))
    if teacher.pos_embed is not None:
        yield "no_embed_class", student.no_embed_class, teacher.no_embed_class
    if student.num_classes:  # without a classifier there is nothing to write
        yield "num_classes", student.num_classes, teacher.num_classes or teacher.head_hidden_size
    for name in ("attn.norm", "mlp.norm"):
        own, theirs = (network.blocks[0].get_submodule(name) for network in (student, teacher))
        yield f"blocks.0.{name}", _is_there(own), _is_there(theirs)


def _is_there(part: Any) -> bool:
    return part is not None and not isinstance(part, nn.Identity)


def _same_function(one: nn.Module, other: nn.Module) -> bool:
    x = torch.linspace(-6, 6, 97)
    return torch.allclose(one(x.clone()), other(x.clone()), atol=1e-6)


def check_tokens(student: Any, teacher: Any, source: str) -> None:
    """See that a student's tokens are those of its teacher.

    Raises:
        ValueError: if patches or tokens in front of them differ.
    """
    if _tokens(student) != _tokens(teacher):
        leave = "patch_size and depths" if has_maps(teacher) else "patch_size, img_size, class_token and reg_tokens"
        raise ValueError(f"the student has {_in_words(student)}, {source} {_in_words(teacher)}; leave {leave} alone")


def _tokens(network: Any) -> tuple[int, ...]:
    """Pixels of a patch and what else decides which tokens there are."""
    if has_maps(network):
        return tuple(sorted({int(info["reduction"]) for info in network.feature_info}))
    embed = network.stem if hasattr(network, "stem") else network.patch_embed
    return (*embed.patch_size, *embed.grid_size, prefix_tokens(network))


def _in_words(network: Any) -> str:
    tokens = _tokens(network)
    if has_maps(network):
        return f"maps of a place per {', '.join(map(str, tokens))} pixels"
    return "{}x{} pixels in {}x{} patches and {} other tokens".format(*tokens)


def _unread_part(teacher: Any) -> str | None:
    for name, part in teacher.named_modules():
        allowed = isinstance(part, nn.Identity | nn.Dropout) or part is teacher
        if name.endswith(("norm_pre", "q_norm", "k_norm", "attn.norm", "mlp.norm", "patch_embed.norm")) and not allowed:
            return f"module {name}"
        if name.endswith((".norm1", ".norm2")) and not isinstance(part, nn.LayerNorm):
            return f"module {name} ({type(part).__name__})"
    for i, block in enumerate(teacher.blocks):
        for name, kind in (("", PlainBlock), ("attn", PlainAttention), ("mlp", PlainMlp)):
            part = block.get_submodule(name)
            if type(part) is not kind:
                return f"module {f'blocks.{i}.{name}'.removesuffix('.')} ({type(part).__name__})"
        for name in LINEAR_MAPS:
            if block.get_submodule(name).bias is None:  # the biases of the norms have to go somewhere
                return f"module blocks.{i}.{name}, which has no bias,"
        if block.attn.gate is not None or any(True for _ in block.mlp.act.parameters()):
            return f"module blocks.{i}"
    last = [part for part in (teacher.norm, teacher.fc_norm) if not isinstance(part, nn.Identity)]
    if len(last) != 1 or not isinstance(last[0], nn.LayerNorm):
        return "the last norm"
    if isinstance(teacher.head, nn.Linear) and teacher.head.bias is None:
        return "module head, which has no bias,"
    if teacher.attn_pool is not None or teacher.global_pool not in ("token", "avg"):
        return f"pooling {teacher.global_pool!r}"
    return None
