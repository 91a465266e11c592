"""E(X) for the vision transformers of timm by one call: the plain network, without memory, with its parts replaced.

Longer than other files: the ways to a twin, by a name of timm, of ours and from a model, share their refusals.
"""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import timm
from torch import nn

from equiflop.grids import ImageGroup
from equiflop.models.entry_points import registered_twin
from equiflop.models.keywords import keyword_problem
from equiflop.models.twin_build import ENTRY_POINT, build, named
from equiflop.models.twin_entry_point import create
from equiflop.models.twin_keywords import (
    check_class,
    own_keywords,
    refusal,
    split_overrides,
)
from equiflop.models.twin_plain import made_by_timm, without_memory
from equiflop.nn.attention import Heads
from equiflop.timm_compat import update_model_args
from equiflop.warnings import EquiflopWarning


def twin(
    model: str | nn.Module,
    group: str | ImageGroup = "flop",
    heads: Heads | None = None,
    **overrides: Any,
) -> nn.Module:
    """The untrained equivariant twin E(X) of a vision transformer X of timm, or of a ResMLP or ConvNeXt by name.

    X's own modules, one by one, become equivariant, see :mod:`equiflop.models.substitution`: norms, layer scales and
    the linear maps that lead into a branch and out of it are replaced, whatever is pointwise or works head by head
    stays the plain module, and what depends on position is seen by every copy of the heads through its group element.
    So the twin has X's width, depth, heads, patches, tokens, position embeddings, norms, scales, activations, pooling,
    head and dropouts; a part without an equivariant counterpart is refused rather than approximated. X is of timm's
    class ``VisionTransformer``, ``VisionTransformerDistilled``, ``Eva``, ``Beit``, ``VisionTransformerRelPos`` or
    ``NaFlexVit`` (for images). Weights are not carried over: those of a plain network have no equivariant image. The
    twin is initialised as :class:`EquivariantVisionTransformer` is, whatever X was initialised by, and all of it
    trains. A folder for the hub loads again where timm makes X by its name and keywords, and the group has a name.

    For the names of plain ResMLP and ConvNeXt networks that have a registered twin ("convnext_tiny"), it is that one.

    Args:
        model: a name that timm knows (built without memory), or a network, which is left as it is. The twin of a
            network gets its dtype, device, and training or evaluation mode.
        group: ``"flop"``, ``"updown"``, ``"flips"``, ``"rot4"``, ``"octic"`` or an :class:`~equiflop.ImageGroup`.
        heads: ``"coupled"`` or ``"regular"``, see :class:`equiflop.nn.Attention`; by default regular where ``|G|``
            divides the number of heads, else coupled. Where something depends on position or works head by head
            (rotary embeddings, relative position biases, norms of queries and keys), they must be regular.
        **overrides: for a name, keywords of the plain network, such as ``depth``, ``num_classes`` or ``img_size``; for
            a network ``num_classes``, ``global_pool`` and ``img_size``. For both ``invariants``, ``multiplicities``,
            ``norm_eps``, ``norm_weighting``, ``token_std``, ``device`` and ``dtype``, and for a ``VisionTransformer``
            ``design``, ``equivariant_depth``, ``plain_order`` and ``plain_norm_eps``, as in
            :class:`EquivariantVisionTransformer`.

    Raises:
        ValueError: if the network has something that the twin cannot mirror exactly, does not fit the group, the name
            is none of timm's or an override is unknown; the message names the model and the reason.
        TypeError: if ``model`` is neither a name nor a module.

    Warns:
        EquiflopWarning: if the network has weights, or the name a tag of pretrained ones, which the twin has not.

    >>> model = twin("eva02_small_patch14_224", device="meta")
    >>> model.rep, len(model.blocks), model.blocks[0].attn.qkv.A
    (Rep(C2: 192 A + 192 B), 12, Linear(in_features=192, out_features=576, bias=False))
    >>> twin("eva02_tiny_patch14_224", device="meta")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: eva02_tiny_patch14_224 has no twin: num_heads=3 of blocks.0.attn is not divisible by |G|=2 ...
    """
    _refuse_pretrained(overrides)
    if isinstance(model, str):
        registered = registered_twin(model)
        if registered is not None:
            network = _registered(registered, group, heads, overrides)
        else:
            network = _twin_of_name(model, group, heads, overrides)
    elif isinstance(model, nn.Module):
        network = _twin_of_network(getattr(model, "_orig_mod", model), group, heads, overrides)
    else:
        raise TypeError(f"model={model!r} is neither a name that timm knows nor a network")
    _warn_of_weights(model)
    return network


def _refuse_pretrained(overrides: dict[str, Any]) -> None:
    if overrides.get("pretrained"):
        raise ValueError("pretrained=True: weights of a plain network have no equivariant image; the twin is untrained")


def _warn_of_weights(model: str | nn.Module) -> None:
    """Say that weights are left behind, where there are any."""
    if isinstance(model, str):
        left = f"those of {model!r}" if "." in model else None
    else:
        left = "those of the given network" if any(not p.is_meta for p in model.parameters()) else None
    if left is not None:
        text = (
            f"the twin is untrained: weights of a plain network, such as {left}, have no equivariant image; "
            "'equiflop distill' trains a twin from them"
        )
        warnings.warn(text, EquiflopWarning, stacklevel=3)


def _registered(name: str, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]) -> nn.Module:
    if heads is not None:
        raise ValueError(f"heads={heads!r} is for vision transformers; {name} has no heads")
    try:
        return timm.create_model(name, group=group, **overrides)
    except TypeError as error:
        problem = keyword_problem(name, overrides, error)
        raise ValueError(problem or f"{name} cannot be made with {overrides}: {error}") from error


def _twin_of_name(name: str, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(module="vision_transformer"), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() has the names"
        raise ValueError(f"model={name!r} is not a model of timm{hint}")
    keywords = {key: value for key, value in overrides.items() if key not in ("device", "dtype")}
    made = create(plain=name, group=group, heads=heads, **overrides)
    update_model_args(made, plain=name, group=named(group), heads=heads, **keywords)
    return made


def _twin_of_network(
    network: nn.Module, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]
) -> nn.Module:
    cfg = getattr(network, "pretrained_cfg", None)
    known = cfg.get("architecture") if isinstance(cfg, dict) else None
    name = known or type(network).__name__
    plain = without_memory(network)
    check_class(plain, name)
    own, of_plain = split_overrides(plain, overrides)
    try:
        if "img_size" in of_plain and hasattr(plain, "set_input_size"):
            plain.set_input_size(img_size=of_plain.pop("img_size"))
        if "num_classes" in of_plain or "global_pool" in of_plain:
            plain.reset_classifier(of_plain.pop("num_classes", plain.num_classes), of_plain.pop("global_pool", None))
    except AssertionError as error:
        raise refusal(name, str(error)) from error
    for key, value in of_plain.items():
        known_keys = ("img_size", "num_classes", "global_pool", *own_keywords(plain))
        close = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.8)
        if close and close[0] != key:
            raise ValueError(f"override {key}={value!r} is unknown; did you mean {close[0]}?")
        raise ValueError(
            f"override {key}={value!r} is for names of networks; of a network itself {', '.join(known_keys)} can be "
            "replaced where it takes them"
        )
    args = made_by_timm(network, known)
    weight = next(network.parameters())
    own = {"device": weight.device, "dtype": weight.dtype, **own}
    made = build(plain, name, cfg, group, heads, own, architecture=None if args is None else ENTRY_POINT)
    if args is not None:
        kept = {key: value for key, value in own.items() if key not in ("device", "dtype")}
        args = {key: value for key, value in args.items() if key not in ("device", "dtype")}
        update_model_args(made, plain=known, group=named(group), heads=heads, **{**args, **kept})
    return made
