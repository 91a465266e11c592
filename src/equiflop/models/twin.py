"""E(X) for the vision transformers of timm by one call: read a plain network, rebuild it, build its twin, compare.

Three steps see to it that nothing of the plain network is lost. What it consists of is read from its modules as
keywords. A plain network made from these keywords must equal the given one, module by module, setting by setting. And
the equivariant network made from them must have a counterpart for every module.
"""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import (
    Attention,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    get_act_layer,
)
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from equiflop import nn as enn
from equiflop.grids import ImageGroup, as_image_group
from equiflop.models.entry_points import own_keywords, registered_twin
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.transition import ToInvariants, ToIrrepOrder, ToRegular
from equiflop.nn.attention import Heads
from equiflop.timm_compat import update_model_args
from equiflop.warnings import EquiflopWarning

_KEYWORDS = tuple(inspect.signature(EquivariantVisionTransformer).parameters)
_OWN_KEYWORDS = own_keywords(EquivariantVisionTransformer, VisionTransformer)

#: Pointwise activations without parameters, by the names that timm knows them by.
POINTWISE = (
    *("gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "relu", "relu6", "leaky_relu", "elu", "celu", "selu"),
    *("sigmoid", "tanh", "hard_sigmoid", "hard_swish", "hard_mish"),
)
_NORMS = (nn.LayerNorm, LayerNorm)
_TRANSITIONS = (ToInvariants, ToIrrepOrder, ToRegular)

# Settings of modules that do not change what a network computes.
_IMMATERIAL = {"training", "fused_attn", "grad_checkpointing", "weight_init_mode", "feature_info", "inplace"}
_MODEL_SETTINGS = (
    *("num_classes", "in_chans", "global_pool", "embed_dim", "num_features", "num_prefix_tokens", "num_reg_tokens"),
    *("has_class_token", "no_embed_class", "pool_include_prefix", "dynamic_img_size", "fix_init", "attn_pool"),
)
_INPUT_SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def twin(
    model: str | nn.Module,
    group: str | ImageGroup = "flop",
    heads: Heads | None = None,
    **overrides: Any,
) -> nn.Module:
    """The untrained equivariant twin E(X) of a vision transformer X of timm, or of a ResMLP or ConvNeXt by name.

    It has X's width, depth, heads, patches, tokens, norms, scales, activation, pooling, head and dropouts, the epsilon
    of X's norms included, and every block is equivariant. X is a network of timm's class ``VisionTransformer`` with
    pre-norm blocks, learned or no position embedding, and token, average or no pooling; anything else is refused rather
    than approximated. Weights are not carried over: those of a plain network have no equivariant image. The twin is
    initialised as :class:`EquivariantVisionTransformer` is, whatever ``weight_init`` X was made with. For the names of
    plain ResMLP and ConvNeXt networks that have a registered twin ("convnext_tiny"), it is that one.

    Args:
        model: a name that timm knows (built without memory, to be read), or a network. The twin of a network gets its
            dtype, device, and training or evaluation mode.
        group: ``"flop"``, ``"updown"``, ``"flips"``, ``"rot4"``, ``"octic"`` or an :class:`~equiflop.ImageGroup`.
        heads: ``"coupled"`` or ``"regular"``, see :class:`equiflop.nn.Attention`; by default regular where ``|G|``
            divides the number of heads, else coupled.
        **overrides: keywords of :class:`EquivariantVisionTransformer` that replace what was read, such as
            ``num_classes``, ``img_size`` or ``design="hybrid"``.

    Raises:
        ValueError: if the network has something that the twin cannot mirror exactly, does not fit the group, the name
            is none of timm's or an override is unknown; the message names the model and the reason.
        TypeError: if ``model`` is neither a name nor a module.

    Warns:
        EquiflopWarning: if the network has weights, or the name a tag of pretrained ones, which the twin has not.

    >>> model = twin("vit_small_patch16_224", device="meta")
    >>> model.rep, len(model.blocks), model.norm.eps
    (Rep(C2: 192 A + 192 B), 12, 1e-06)
    >>> twin("vit_base_patch16_siglip_224", device="meta")
    Traceback (most recent call last):
    ValueError: vit_base_patch16_siglip_224 has no twin: global_pool='map' breaks the symmetry: its attention mixes \
channels of different irreps; use 'avg'
    """
    _refuse_pretrained(overrides)
    registered = registered_twin(model) if isinstance(model, str) else None
    if registered is not None:
        network = _registered(registered, group, heads, overrides)
        _warn_of_weights(model)
        return network
    plain, name = _plain_model(model)
    keywords = _twin_keywords(plain, name, group, heads, overrides)
    _warn_of_weights(model)
    if isinstance(model, nn.Module):
        weight = plain.patch_embed.proj.weight
        keywords = {"device": weight.device, "dtype": weight.dtype, **keywords}
    variant = f"{as_image_group(group).name}_{name.split('.')[0]}"
    cfg = _input_cfg(plain, variant, keywords)
    try:
        made = build_model_with_cfg(EquivariantVisionTransformer, variant, False, pretrained_cfg=cfg, **keywords)
    except ValueError as error:
        raise _refusal(name, str(error)) from error
    difference = next(_twin_differences(made, keywords), None)
    if difference is not None:
        raise _refusal(name, f"the twin would differ in {difference}")
    update_model_args(made, **{key: value for key, value in keywords.items() if key not in ("device", "dtype")})
    made.set_grad_checkpointing(plain.grad_checkpointing)
    return made.train(plain.training)


def twin_keywords(
    model: str | nn.Module, group: str | ImageGroup = "flop", heads: Heads | None = None, **overrides: Any
) -> dict[str, Any]:
    """The keywords with which :class:`EquivariantVisionTransformer` makes :func:`twin`; same arguments and errors."""
    return _twin_keywords(*_plain_model(model), group, heads, overrides)


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
        raise ValueError(f"{name} cannot be made with {overrides}: {error}") from error


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} has no twin: {reason}")


def _plain_model(model: str | nn.Module) -> tuple[VisionTransformer, str]:
    """The network and what messages call it."""
    if isinstance(model, str):
        if not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(module="vision_transformer"), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() has the names"
            raise ValueError(f"model={model!r} is not a model of timm{hint}")
        try:
            with torch.device("meta"):
                plain = timm.create_model(model)
        except RuntimeError as error:  # timm's answer to an unknown tag
            raise ValueError(f"model={model!r} cannot be made by timm: {error}") from error
        name = model
    elif isinstance(model, nn.Module):
        plain = getattr(model, "_orig_mod", model)
        cfg = getattr(plain, "pretrained_cfg", None)
        name = (cfg.get("architecture") if isinstance(cfg, dict) else None) or type(plain).__name__
    else:
        raise TypeError(f"model={model!r} is neither a name that timm knows nor a network")
    if isinstance(plain, EquivariantVisionTransformer):
        raise _refusal(name, "it is an equivariant network already; give the plain one")
    if type(plain) is not VisionTransformer:
        raise _refusal(name, f"its class is {type(plain).__name__}; supported is timm's VisionTransformer")
    return plain, name


def _twin_keywords(
    plain: VisionTransformer, name: str, group: str | ImageGroup, heads: Heads | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    _refuse_pretrained(overrides)
    for key in overrides:
        if key not in _KEYWORDS or key in ("group", "heads"):
            close = difflib.get_close_matches(key, _KEYWORDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_KEYWORDS)}"
            raise ValueError(f"override {key}={overrides[key]!r} is unknown; {hint}")
    reasons = list(_obstacles(plain))
    if reasons:
        raise _refusal(name, "; ".join(reasons))
    keywords = _read_keywords(plain)
    difference = next(_plain_differences(plain, _rebuilt(keywords)), None)
    if difference is not None:
        raise _refusal(name, difference)
    made = {**keywords, "group": group, **overrides}
    if heads is None:
        fits = made["num_heads"] % as_image_group(group).order == 0 and made.get("multiplicities") is None
        heads = "regular" if fits else "coupled"
    return {**made, "heads": heads}


def _obstacles(plain: VisionTransformer) -> Iterator[str]:
    """What rules out a twin at first sight; whatever is not listed here shows when the network is rebuilt."""
    embed = plain.patch_embed
    if type(embed) is not PatchEmbed:
        yield f"patch embedding of class {type(embed).__name__}; supported is PatchEmbed"
    elif not isinstance(embed.norm, nn.Identity):
        yield "norm inside the patch embedding (embed_norm_layer)"
    pos_embed = plain.pos_embed
    if isinstance(pos_embed, nn.Parameter) and not pos_embed.requires_grad and _trains(plain.blocks):
        yield "fixed position embedding (pos_embed requires no gradient); that of a twin is learned"
    if len(plain.blocks) == 0:
        yield "it has no blocks"
        return
    block = plain.blocks[0]
    if type(block) is not Block:
        yield f"blocks of class {type(block).__name__}; supported is the pre-norm Block"
        return
    if type(block.norm1) not in _NORMS:
        yield f"norms of class {type(block.norm1).__name__}; supported is LayerNorm"
    if type(block.attn) is not Attention:
        yield f"attention of class {type(block.attn).__name__}; supported is Attention"
    else:
        if not isinstance(block.attn.q_norm, nn.Identity) or not isinstance(block.attn.k_norm, nn.Identity):
            yield "norm of queries and keys (qk_norm)"
        if not isinstance(block.attn.norm, nn.Identity):
            yield "norm of the attention's output (scale_attn_norm)"
        if getattr(block.attn, "gate", None) is not None:
            yield "gated attention"
    if type(block.mlp) is not Mlp:
        yield f"MLP of class {type(block.mlp).__name__}; supported is Mlp"
        return
    if not isinstance(block.mlp.norm, nn.Identity):
        yield "norm inside the MLP (scale_mlp_norm)"
    if not isinstance(block.mlp.fc1, nn.Linear):
        yield f"MLP of {type(block.mlp.fc1).__name__} layers; supported are Linear ones"
    if _activation_name(block.mlp.act) is None:
        yield f"activation of class {type(block.mlp.act).__name__}; supported are {', '.join(POINTWISE)}"


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _activation_name(act: nn.Module) -> str | None:
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return next((name for name in POINTWISE if get_act_layer(name) is type(act)), None)


def _read_keywords(plain: VisionTransformer) -> dict[str, Any]:
    """Keywords of :class:`EquivariantVisionTransformer`, read from the modules of a network without obstacles."""
    embed, block, last = plain.patch_embed, plain.blocks[0], plain.blocks[-1]
    width = plain.embed_dim
    hidden = block.mlp.fc1.out_features
    has_norm, has_fc_norm = (not isinstance(norm, nn.Identity) for norm in (plain.norm, plain.fc_norm))
    fc_norm_by_default = plain.global_pool in ("avg", "avgmax", "max")
    final_norm = has_norm or has_fc_norm
    return {
        "img_size": tuple(embed.img_size),
        "patch_size": tuple(embed.patch_size),
        "in_chans": plain.in_chans,
        "num_classes": plain.num_classes,
        "global_pool": plain.global_pool,
        "embed_dim": width,
        "depth": len(plain.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": getattr(block.ls1, "init_values", None),
        "class_token": plain.has_class_token,
        "pos_embed": "none" if plain.pos_embed is None else "learn",
        "no_embed_class": plain.no_embed_class,
        "reg_tokens": plain.num_reg_tokens,
        "pre_norm": not isinstance(plain.norm_pre, nn.Identity),
        "final_norm": final_norm,
        # None where timm would choose the same, so that it follows when the pooling is replaced
        "fc_norm": None if not final_norm or has_fc_norm == fc_norm_by_default else has_fc_norm,
        "pool_include_prefix": plain.pool_include_prefix,
        "dynamic_img_size": plain.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": plain.head_drop.p,
        "pos_drop_rate": plain.pos_drop.p,
        "patch_drop_rate": getattr(plain.patch_drop, "prob", 0.0),
        "proj_drop_rate": block.mlp.drop1.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
        "fix_init": plain.fix_init,
        "act_layer": _activation_name(block.mlp.act),
        "norm_eps": block.norm1.eps,
        "plain_norm_eps": block.norm1.eps,
    }


def _ratio(hidden: int, width: int) -> float:
    """A ratio with ``int(width * ratio) == hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _rebuilt(keywords: dict[str, Any]) -> VisionTransformer:
    """The plain network of a twin's keywords, without memory."""
    options = {key: value for key, value in keywords.items() if key not in (*_OWN_KEYWORDS, "device", "dtype")}
    norm_layer = partial(LayerNorm, eps=keywords["norm_eps"])
    return VisionTransformer(**{**options, "norm_layer": norm_layer, "weight_init": "skip"}, device="meta")


def _plain_differences(plain: VisionTransformer, rebuilt: VisionTransformer) -> Iterator[str]:
    """Where a network is not the one that its keywords describe."""
    expected = dict(rebuilt.named_modules())
    found = dict(plain.named_modules())
    for path, module in found.items():
        where = f"module {path}" if path else "the network"
        if path not in expected:
            yield f"{where} ({type(module).__name__}) is no part of a VisionTransformer with its keywords"
            continue
        other = expected[path]
        if _plain_class(module) is not _plain_class(other):
            yield f"{where} is {type(module).__name__} where {type(other).__name__} would be supported"
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{where} has forward hooks, which a twin cannot take over"
        for key, value in _settings(other).items():
            if getattr(module, key, None) != value:
                yield f"{where} has {key}={getattr(module, key, None)!r} where {value!r} would be supported"
        for key in module.__dict__:
            if callable(getattr(type(module), key, None)):
                yield f"{where} has its own method {key!r}"
    for path, module in expected.items():
        if path not in found:
            yield f"module {path} ({type(module).__name__}) is missing, or shared with another place"
    for kind in ("parameter", "buffer"):
        shapes, others = (
            {name: tuple(tensor.shape) for name, tensor in getattr(network, f"named_{kind}s")()}
            for network in (plain, rebuilt)
        )
        for name in sorted({*shapes, *others}):
            if shapes.get(name) != others.get(name):
                shape, other_shape = (s.get(name, "absent (or shared with another)") for s in (shapes, others))
                yield f"{kind} {name} is {shape} where {other_shape} would be supported"


def _plain_class(module: nn.Module) -> type[nn.Module] | str:
    """The class or activation, the same for classes that compute the same."""
    return LayerNorm if type(module) is nn.LayerNorm else _activation_name(module) or type(module)


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if not key.startswith("_") and key not in _IMMATERIAL}


def _twin_differences(made: EquivariantVisionTransformer, keywords: dict[str, Any]) -> Iterator[str]:
    """Where a twin is not the counterpart of the plain network of its keywords."""
    plain = _rebuilt(keywords)
    same_eps = keywords["norm_eps"] == keywords["plain_norm_eps"]
    # transitions to plain blocks, and the irreps' parts of a linear map, are parts of our own
    own = tuple(
        f"{path}." if isinstance(module, enn.Linear) else path
        for path, module in made.named_modules()
        if isinstance(module, (enn.Linear, *_TRANSITIONS))
    )
    expected, found = (
        {path: _role(module, same_eps) for path, module in network.named_modules() if path and not path.startswith(own)}
        for network in (plain, made)
    )
    for path in sorted({*expected, *found}):
        role, other = found.get(path), expected.get(path)
        if path == "head" and role is not None and other is not None:
            role, other = (role[0], *role[2:]), (other[0], *other[2:])  # the head sees invariants alone
        if role != other:
            yield f"module {path}: {role} in place of {other}"
    for key in _MODEL_SETTINGS:
        if getattr(made, key) != getattr(plain, key):
            yield f"{key}: {getattr(made, key)!r} in place of {getattr(plain, key)!r}"
    embedded = None if plain.pos_embed is None else plain.pos_embed.shape[1] - plain.patch_embed.num_patches
    prefix = None if made.pos_embed is None else len(made.pos_embed.prefix) if made.pos_embed.prefix is not None else 0
    if embedded != prefix:
        yield f"class and register tokens with a position embedding: {prefix} in place of {embedded}"
    for key in ("cls_token", "reg_token"):
        counts = [0 if token is None else token.shape[1] for token in (getattr(made, key), getattr(plain, key))]
        if counts[0] != counts[1]:
            yield f"{key}: {counts[0]} in place of {counts[1]}"


def _role(module: nn.Module, with_eps: bool) -> tuple[Any, ...] | None:
    """What a module does, in the same words for plain and equivariant ones; None where it does nothing of its own."""
    match module:
        case nn.Identity() | enn.Invariants() | enn.PositionEmbedding() | enn.GridTransform():
            return None
        case enn.Linear():
            return "linear", module.in_rep.dim, module.out_order.sections * module.out_rep.dim, module.bias is not None
        case nn.Linear():
            return "linear", module.in_features, module.out_features, module.bias is not None
        case nn.Conv2d():
            return "linear", module.weight[0].numel(), module.out_channels, module.bias is not None
        case enn.LayerNorm():
            affine = module.weight is not None, module.bias is not None
            return "layer norm", module.rep.dim, *affine, module.eps if with_eps else None
        case nn.LayerNorm():
            affine = module.weight is not None, module.bias is not None
            return "layer norm", *module.normalized_shape, *affine, module.eps if with_eps else None
        case enn.Dropout() | nn.Dropout():
            return "dropout", module.p
        case DropPath():
            return "drop path", module.drop_prob
        case PatchDropout():
            return "patch dropout", module.prob, module.num_prefix_tokens, module.ordered
        case enn.LayerScale() | LayerScale():
            return "layer scale", module.init_values
        case enn.Attention() | Attention():
            return "attention", module.num_heads
        case enn.Mlp() | Mlp():
            return ("mlp",)
        case enn.Block() | Block():
            return ("block",)
        case enn.PatchEmbed() | PatchEmbed():
            return "patches", tuple(module.patch_size), tuple(module.img_size), module.strict_img_size
        case nn.Sequential():
            return "sequence", len(module)
        case _ if _activation_name(module) is not None:
            return "activation", type(module)
        case _:
            return (type(module).__name__,)


def _input_cfg(plain: VisionTransformer, name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """timm's description of the input: that of the plain network, without a source of weights."""
    cfg = getattr(plain, "pretrained_cfg", None)
    known = cfg if isinstance(cfg, dict) else {}
    size = keywords["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        **{key: known[key] for key in _INPUT_SETTINGS if key in known},
        "architecture": name,
        "input_size": (keywords["in_chans"], height, width),
        "fixed_input_size": not keywords["dynamic_img_size"],
        "num_classes": keywords["num_classes"],
        "first_conv": None,
        "classifier": "head",
    }
