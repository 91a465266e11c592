"""E(X) for the vision transformers of timm by one call: the plain network, without memory, with its parts replaced."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from typing import Any, get_args

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import RmsNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_model_args, register_model
from torch import nn

from equiflop.grids import NAMED_IMAGE_GROUPS, ImageGroup, as_image_group
from equiflop.models.entry_points import TWIN, registered_twin
from equiflop.models.equivariant_transformer import Design, EquivariantTransformer
from equiflop.models.equivariant_vit import EquivariantVisionTransformer, feature_rep
from equiflop.models.image_size import check_image_size
from equiflop.models.keywords import keyword_problem
from equiflop.models.tied import become
from equiflop.models.twin_networks import TWIN_CLASSES
from equiflop.nn.attention import Heads
from equiflop.nn.fit import fit_checkpoint
from equiflop.timm_compat import update_model_args
from equiflop.warnings import EquiflopWarning

#: The name under which timm's registry makes twins: folders of twins for the hub load by it.
ENTRY_POINT = "equiflop_twin"
_DEFAULT = "deit3_small_patch16_224"

#: Overrides that are no keywords of the plain network.
_OWN = ("invariants", "multiplicities", "norm_eps", "norm_weighting", "token_std", "device", "dtype")
_OWN_OF_VIT = ("design", "equivariant_depth", "plain_order", "plain_norm_eps")
_INPUT_SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


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
        text = f"the twin is untrained: weights of a plain network, such as {left}, have no equivariant image"
        warnings.warn(text, EquiflopWarning, stacklevel=3)


def _registered(name: str, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]) -> nn.Module:
    if heads is not None:
        raise ValueError(f"heads={heads!r} is for vision transformers; {name} has no heads")
    try:
        return timm.create_model(name, group=group, **overrides)
    except TypeError as error:
        problem = keyword_problem(name, overrides, error)
        raise ValueError(problem or f"{name} cannot be made with {overrides}: {error}") from error


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} has no twin: {reason}")


def _twin_of_name(name: str, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(module="vision_transformer"), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() has the names"
        raise ValueError(f"model={name!r} is not a model of timm{hint}")
    keywords = {key: value for key, value in overrides.items() if key not in ("device", "dtype")}
    made = _create(plain=name, group=group, heads=heads, **overrides)
    update_model_args(made, plain=name, group=_named(group), heads=heads, **keywords)
    return made


def _twin_of_network(
    network: nn.Module, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]
) -> nn.Module:
    cfg = getattr(network, "pretrained_cfg", None)
    known = cfg.get("architecture") if isinstance(cfg, dict) else None
    name = known or type(network).__name__
    plain = _without_memory(network)
    _check_class(plain, name)
    own, of_plain = _split(plain, overrides)
    try:
        if "img_size" in of_plain and hasattr(plain, "set_input_size"):
            plain.set_input_size(img_size=of_plain.pop("img_size"))
        if "num_classes" in of_plain or "global_pool" in of_plain:
            plain.reset_classifier(of_plain.pop("num_classes", plain.num_classes), of_plain.pop("global_pool", None))
    except AssertionError as error:
        raise _refusal(name, str(error)) from error
    for key, value in of_plain.items():
        known_keys = ("img_size", "num_classes", "global_pool", *_own_keywords(plain))
        close = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.8)
        if close and close[0] != key:
            raise ValueError(f"override {key}={value!r} is unknown; did you mean {close[0]}?")
        raise ValueError(
            f"override {key}={value!r} is for names of networks; of a network itself {', '.join(known_keys)} can be "
            "replaced where it takes them"
        )
    args = _made_by_timm(network, known)
    weight = next(network.parameters())
    own = {"device": weight.device, "dtype": weight.dtype, **own}
    made = _build(plain, name, cfg, group, heads, own, architecture=None if args is None else ENTRY_POINT)
    if args is not None:
        kept = {key: value for key, value in own.items() if key not in ("device", "dtype")}
        args = {key: value for key, value in args.items() if key not in ("device", "dtype")}
        update_model_args(made, plain=known, group=_named(group), heads=heads, **{**args, **kept})
    return made


def _create(
    plain: str = _DEFAULT,
    group: str | ImageGroup = "flop",
    heads: Heads | None = None,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    features: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """The twin of a name; see :func:`twin`."""
    own = {key: overrides[key] for key in (*_OWN, *_OWN_OF_VIT) if key in overrides}
    network = _plain(plain, {key: value for key, value in overrides.items() if key not in own})
    _check_class(network, plain)
    _check_own(network, own)
    cfg = getattr(network, "pretrained_cfg", None)
    return _build(network, plain, cfg, group, heads, own, pretrained, pretrained_cfg, features or {})


def _plain(name: str, keywords: dict[str, Any]) -> nn.Module:
    """The plain network of a name, without memory.

    Raises:
        ValueError: if timm does not make it.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, **keywords)
    except TypeError as error:

        def known() -> list[str]:
            return [*inspect.signature(type(_plain(name, {}))).parameters, *_OWN, *_OWN_OF_VIT]

        problem = keyword_problem(TWIN + name, keywords, error, known)
        raise ValueError(problem or f"{name} cannot be made with {keywords}: {error}") from error
    except AssertionError as error:
        raise ValueError(f"{name} cannot be made with {keywords}: {error}") from error
    except RuntimeError as error:  # timm's answer to an unknown tag
        raise ValueError(f"model={name!r} cannot be made by timm: {error}") from error


def _without_memory(network: nn.Module) -> Any:
    """A copy whose parameters and buffers are on the meta device."""
    tensors = (*network.parameters(), *network.buffers())
    memo: dict[int, Any] = {id(t): t.to("meta") for t in tensors if not isinstance(t, nn.Parameter)}
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def _check_class(network: nn.Module, name: str) -> None:
    if isinstance(network, EquivariantTransformer):
        raise _refusal(name, "it is an equivariant network already; give the plain one")
    if type(network) not in TWIN_CLASSES:
        supported = ", ".join(cls.__name__ for cls in TWIN_CLASSES)
        raise _refusal(name, f"its class is {type(network).__name__}; supported are timm's {supported}")


def _own_keywords(network: nn.Module) -> tuple[str, ...]:
    is_vit = TWIN_CLASSES[type(network)] is EquivariantVisionTransformer
    return (*_OWN, *_OWN_OF_VIT) if is_vit else _OWN


def _split(network: nn.Module, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the twin, and those of the plain network."""
    _check_own(network, overrides)
    known = _own_keywords(network)
    own = {key: value for key, value in overrides.items() if key in known}
    return own, {key: value for key, value in overrides.items() if key not in known}


def _check_own(network: nn.Module, overrides: dict[str, Any]) -> None:
    """See that no override is for twins of another class.

    Raises:
        ValueError: if one is.
    """
    known = _own_keywords(network)
    for key in overrides:
        if key in _OWN_OF_VIT and key not in known:
            raise ValueError(
                f"override {key}={overrides[key]!r} is for twins of a VisionTransformer, not of a "
                f"{type(network).__name__}"
            )


def _made_by_timm(network: Any, name: str | None) -> dict[str, Any] | None:
    """The keywords with which timm makes this very architecture; None where it was changed since or is not timm's."""
    if name is None or not timm.is_model(name) or not hasattr(network, "_model_args"):
        return None
    made_with = {key: value for key, value in network._model_args.items() if value is not None}
    args = {**made_with, **get_model_args(network)}  # the latter leaves out what acts in training alone
    args.pop("pretrained_cfg", None)
    try:
        again = _plain(name, args)
    except ValueError:
        return None
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (network, again)]
    same = repr(network) == repr(again) and shapes[0] == shapes[1] and _settings(network) == _settings(again)
    return args if same else None


def _settings(network: nn.Module) -> list[dict[str, Any]]:
    """Numbers, words and truth values that modules hold, of those that change what a network computes."""
    plain = (bool, int, float, str)
    ignored = ("training", "fused_attn", "grad_checkpointing")
    return [
        {key: value for key, value in vars(module).items() if isinstance(value, plain) and key not in ignored}
        for module in network.modules()
    ]


def _build(
    plain: Any,
    name: str,
    cfg: Any,
    group: str | ImageGroup,
    heads: Heads | None,
    own: dict[str, Any],
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    features: dict[str, Any] | None = None,
    architecture: str | None = ENTRY_POINT,
) -> Any:
    """Make a plain network without memory equivariant, as a model of timm's."""
    group = as_image_group(group)
    variant = architecture or f"{group.name}_{name.split('.')[0]}"
    try:
        _make_equivariant(plain, group, heads, **own)
    except ValueError as error:
        raise _refusal(name, str(error)) from error
    return build_model_with_cfg(
        lambda **_: plain,
        variant,
        pretrained,
        pretrained_cfg=_input_cfg(plain, variant, cfg) if pretrained_cfg is None else pretrained_cfg,
        pretrained_filter_fn=fit_checkpoint,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(features or {}),
    )


def _make_equivariant(
    plain: Any,
    group: ImageGroup,
    heads: Heads | None,
    multiplicities: Any = None,
    norm_eps: float | None = None,
    norm_weighting: Any = "entries",
    **own: Any,
) -> None:
    was_training = plain.training
    embed = getattr(plain, "patch_embed", None)
    if embed is not None:
        check_image_size(group, embed.img_size, getattr(plain, "dynamic_img_size", False))
    if norm_eps is not None:
        for module in plain.modules():
            if isinstance(module, nn.LayerNorm | RmsNorm):
                module.eps = norm_eps
    design = own.get("design", "equivariant")
    if design not in get_args(Design):
        raise ValueError(f"design={design!r} is unknown; choose from {', '.join(get_args(Design))}")
    rep = feature_rep(group, plain.embed_dim, multiplicities, design)
    become(plain, TWIN_CLASSES[type(plain)])
    plain.become_equivariant(group, rep, heads, weighting=norm_weighting, **own)
    plain.weight_init_mode = ""
    plain.init_weights(needs_reset=False)
    plain.train(was_training)


def _named(group: str | ImageGroup) -> str | ImageGroup:
    """The name of a group that has one, which fits in a file."""
    if isinstance(group, ImageGroup) and group.name in NAMED_IMAGE_GROUPS and group == as_image_group(group.name):
        return group.name
    return group


def _input_cfg(network: Any, architecture: str, cfg: Any) -> dict[str, Any]:
    """timm's description of the input: that of the plain network, without a source of weights."""
    known = cfg if isinstance(cfg, dict) else {}
    embed = network.embedding
    height, width = known.get("input_size", (0, *embed.img_size))[1:] if not embed.strict_img_size else embed.img_size
    return {
        **{key: known[key] for key in _INPUT_SETTINGS if key in known},
        "architecture": architecture,
        "input_size": (embed.in_chans, height, width),
        "fixed_input_size": embed.strict_img_size,
        "num_classes": network.num_classes,
        "first_conv": None,
        "classifier": network.classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        ENTRY_POINT: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": (),
            "classifier": "head",
        }
    }
)


@register_model
def equiflop_twin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Twins by timm's registry, as folders of the hub load: ``plain`` names the plain network."""
    of_features = ("features_only", "out_indices", "feature_cls", "cache_dir")  # what timm's builder takes
    features: dict[str, Any] = {key: kwargs.pop(key) for key in of_features if key in kwargs}
    if pretrained and not kwargs.get("pretrained_cfg"):
        raise ValueError("pretrained=True: there are no weights of twins to download")
    noted = kwargs.get("pretrained_cfg")
    if isinstance(noted, dict) and "num_classes" in noted:
        kwargs.setdefault("num_classes", noted["num_classes"])
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if overlay:
        features["pretrained_cfg_overlay"] = overlay
    return _create(pretrained=pretrained, features=features, **kwargs)
