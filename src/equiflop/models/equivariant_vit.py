"""E(ViT): timm's vision transformer with equivariant blocks, as a thin subclass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm as PlainLayerNorm
from timm.layers import calculate_drop_path_rates, get_act_layer
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from equiflop.grids import ImageGroup, as_image_group
from equiflop.groups import Rep
from equiflop.models.classifier import replace_classifier
from equiflop.models.image_size import check_image_size
from equiflop.models.initialise import init_linears, reset_all
from equiflop.models.transition import FinalPlainNorm, FirstPlainBlock, ToInvariants, ToIrrepOrder, ToRegular
from equiflop.nn import Block, Invariants, LayerNorm, PatchEmbed, PositionEmbedding
from equiflop.nn.attention import Heads, check_heads
from equiflop.nn.fit import fit_checkpoint
from equiflop.nn.fixed import settle_constants
from equiflop.nn.invariants import InvariantKind, all_magnitudes
from equiflop.nn.norm import Weighting
from equiflop.timm_compat import update_model_args, update_model_input_size

#: ``equivariant``: every block; ``hybrid``: the first blocks, then plain ones on the same channels; ``invariant``: the
#: first blocks, then plain ones on invariants.
Design = Literal["equivariant", "hybrid", "invariant"]


class EquivariantVisionTransformer(VisionTransformer):
    """A ViT whose features transform under a group of image symmetries.

    Between blocks features are plain ``(B, N, C)`` tensors; the channels are ordered by ``self.rep`` (in blocks before
    ``self.equivariant_depth``). Keywords of timm's ``VisionTransformer`` keep their meaning; those of our own are:

    Args:
        group: ``"flop"``, ``"updown"``, ``"flips"``, ``"rot4"``, ``"octic"`` or an :class:`~equiflop.ImageGroup`.
        design: see :data:`Design`.
        equivariant_depth: number of equivariant blocks, counted from the image; for hybrid and invariant designs.
        invariants: what the head, or the plain blocks of an invariant design, see: ``"trivial"``, ``"norm"``,
            ``"magnitudes"``, ``"power_spectrum"`` or ``"polynomial"``; see :class:`equiflop.nn.Invariants`. With
            ``num_classes=0`` see :meth:`forward_head`.
        multiplicities: how often each irrep occurs in the features, in the order of ``group.irreps``, together
            ``embed_dim`` channels; by default a multiple of the regular representation, as published. For the mirror
            group ``(m, n)`` is m invariant and n sign-flipping channels. Not for hybrid designs.
        heads: ``"coupled"``, every head holds its share of every irrep, as published; or ``"regular"``, heads come as
            ``|G|`` copies that the group permutes. See :class:`equiflop.nn.Attention`.
        norm_eps: ``eps`` of the equivariant layer norms.
        norm_weighting: see :class:`equiflop.nn.LayerNorm`.
        token_std: standard deviation of class token and position embedding when they are initialised.
        plain_order: the channels' order in the plain blocks of a hybrid design: ``"group"``, the group's own basis, or
            ``"irreps"``.
        plain_norm_eps: ``eps`` of the plain layer norms of hybrid and invariant designs.

    Raises:
        ValueError: if width, heads or image size do not fit the group, or a pooling would break the symmetry.

    Source: Bökman et al., arXiv 2502.05169, section 4.
    """

    pos_embed: PositionEmbedding | None
    norm: nn.Module
    fit_checkpoint = staticmethod(fit_checkpoint)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        init_values: float | None = 1e-4,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = True,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Literal["", "skip", "reset"] = "",
        fix_init: bool = False,
        act_layer: str | type[nn.Module] | None = None,
        group: str | ImageGroup = "flop",
        design: Design = "equivariant",
        equivariant_depth: int | None = None,
        invariants: InvariantKind | None = None,
        multiplicities: Sequence[int] | None = None,
        heads: Heads = "coupled",
        norm_eps: float = 1e-6,
        norm_weighting: Weighting = "entries",
        token_std: float = 0.02,
        plain_order: Literal["group", "irreps"] = "group",
        plain_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group = as_image_group(group)
        _check_arguments(design, global_pool, class_token, pos_embed, weight_init, dynamic_img_pad, invariants)
        equivariant_depth = _equivariant_depth(design, equivariant_depth, depth)
        check_image_size(group, img_size, dynamic_img_size)
        rep = _feature_rep(group, embed_dim, multiplicities, design)
        check_heads(rep, num_heads, heads)
        # timm's constructor makes the plain network, without memory; then the parts of this one take their places.
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            class_token=class_token,
            pos_embed="none",
            no_embed_class=no_embed_class,
            reg_tokens=reg_tokens,
            pre_norm=pre_norm,
            final_norm=final_norm,
            fc_norm=fc_norm,
            pool_include_prefix=pool_include_prefix,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            weight_init="skip",
            fix_init=fix_init,
            device="meta",
        )
        self.group = group
        self.rep = rep
        self.design = design
        self.equivariant_depth = equivariant_depth
        self.token_std = token_std
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(LayerNorm, rep, norm_eps, weighting=norm_weighting, **dd)
        plain_norm = partial(PlainLayerNorm, eps=plain_norm_eps)

        sizes: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        self.patch_embed = PatchEmbed(rep, group, img_size, patch_size, in_chans, bias=not pre_norm, **sizes, **dd)
        trivial = rep.multiplicities[0]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, trivial, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, trivial, **dd)) if reg_tokens else None
        if pos_embed == "learn":
            embedded_prefix = 0 if no_embed_class else self.num_prefix_tokens
            self.pos_embed = PositionEmbedding(rep, group, self.patch_embed.grid_size, embedded_prefix, **dd)
        if pre_norm:
            self.norm_pre = norm()

        act = nn.GELU if act_layer is None else get_act_layer(act_layer)
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_bias": proj_bias}
        options |= {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate, "init_values": init_values, **dd}
        own: dict[str, Any] = {"heads": heads, "norm_eps": norm_eps, "norm_weighting": norm_weighting}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        for i, rate in enumerate(rates[:equivariant_depth]):
            self.blocks[i] = Block(rep, num_heads, act=act(), drop_path=rate, **own, **options)
        for i, rate in enumerate(rates[equivariant_depth:], start=equivariant_depth):
            plain = FirstPlainBlock if i == equivariant_depth else PlainBlock
            layers: dict[str, Any] = {"act_layer": act, "norm_layer": plain_norm}
            self.blocks[i] = plain(embed_dim, num_heads, drop_path=rate, depth=i, **layers, **options)

        for name in ("norm", "fc_norm"):
            if isinstance(getattr(self, name), nn.Identity):
                continue
            kind = FinalPlainNorm if name == "norm" and equivariant_depth == depth else PlainLayerNorm
            setattr(self, name, norm() if design == "equivariant" else kind(embed_dim, eps=plain_norm_eps, **dd))
        if design == "equivariant":
            self.invariants: nn.Module = Invariants(rep, invariants or "trivial", **dd)
            self.head_hidden_size = self.invariants.out_features
            self.feature_invariants: nn.Module = (
                self.invariants if invariants else Invariants(rep, all_magnitudes(rep.group), **dd)
            )
        else:
            self.invariants = self.feature_invariants = nn.Identity()
            if design == "invariant":
                self._leave_irreps(ToInvariants(rep, invariants or "norm", **dd))
            else:
                self._leave_irreps(ToRegular(rep, **dd) if plain_order == "group" else ToIrrepOrder(rep))
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.register_load_state_dict_post_hook(settle_constants)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _leave_irreps(self, transition: nn.Module) -> None:
        """Put the transition to plain channels in front of the first plain block, else of the final norm."""
        if self.equivariant_depth < len(self.blocks):
            self.blocks[self.equivariant_depth].enter = transition
        elif isinstance(self.norm, FinalPlainNorm):
            self.norm.enter = transition
        else:
            self.norm = transition

    @property
    def invariant_output(self) -> bool:
        """Whether the logits are invariant; those of a hybrid model are not."""
        return self.design != "hybrid"

    def feature_rep(self, block: int) -> Rep | None:
        """Type of the features after block ``block`` (-1: before the first), or None where the group no longer acts.

        Behind the invariants of an invariant design the group moves tokens and leaves all channels as they are.
        """
        if block < self.equivariant_depth:
            return self.rep
        return Rep.trivial(self.group, self.embed_dim) if self.design == "invariant" else None

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as published: linear maps, position embedding and class token truncated normal 0.02, biases 0.

        Class token and position embedding take ``token_std``, eight times as much in the published octic networks
        (arXiv 2505.15441).

        Args:
            mode: ``""``, or ``"reset"`` to use every layer's own initialisation.
            needs_reset: whether layers that initialised themselves when they were made are reset as well.

        Raises:
            ValueError: if the mode is unknown.
        """
        mode = mode or self.weight_init_mode
        if mode not in ("", "reset"):
            raise ValueError(f"weight_init={mode!r} is not supported; choose '', 'skip' or 'reset'")
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=self.token_std)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        if needs_reset:
            reset_all(self)
        if mode == "":
            init_linears(self, skip=("patch_embed",))
        if self.pos_embed is not None:
            self.pos_embed.reset_parameters(self.token_std)
        if self.fix_init:
            self.fix_init_weight()

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Scale the last linear map of every branch by ``1 / sqrt(2 * layer)``."""
        for layer, block in enumerate(self.blocks, start=1):
            for linear in (block.attn.proj, block.mlp.fc2):
                for parameter in linear.parameters():
                    if parameter.ndim == 2:
                        parameter.div_(math.sqrt(2.0 * layer))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {
            name
            for name, _ in self.named_parameters()
            if name in ("cls_token", "reg_token") or name.startswith("pos_embed.")
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; see timm.

        Raises:
            ValueError: if the pooling would break the symmetry or needs a class token that is not there.
        """
        if global_pool is not None:
            _check_pooling(self.design, global_pool, self.has_class_token)
            self.global_pool = global_pool
            update_model_args(self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        replace_classifier(self, num_classes)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Accept images of another size from now on; the position embedding is resampled and stays equivariant.

        Raises:
            ValueError: if the size is not a whole number of patches or does not fit the group, or the patch size
                differs.
        """
        if img_size is not None:
            check_image_size(self.group, img_size, self.dynamic_img_size)
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            self.pos_embed = self.pos_embed.resized(self.patch_embed.grid_size)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        if self.dynamic_img_size:
            x = x.flatten(1, 2)
        pad = (0, self.embed_dim - self.rep.multiplicities[0])
        prefix = [
            nn.functional.pad(token, pad).expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        pos_embed = self.pos_embed(grid)
        if self.no_embed_class:
            x = torch.cat([*prefix, x + pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + pos_embed
        return self.pos_drop(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, norm, invariants and classifier.

        The classifier sees ``head_hidden_size`` invariants, by default the trivial irrep alone, as published. A network
        without classifier (``num_classes=0``) is there to be read by something else, which counts on ``num_features``
        values, as everywhere in timm: it returns those invariants and behind them the magnitudes of all other channels
        (``invariants="magnitudes"``), so that no channel is lost; where ``invariants`` was given, those.

        Args:
            x: features, shape ``(B, N, embed_dim)``.
            pre_logits: return what a classifier sees, shape ``(B, head_hidden_size)``, instead of the logits.
        """
        headless = self.num_classes == 0 and not pre_logits
        invariants = self.feature_invariants if headless else self.invariants
        x = self.head_drop(invariants(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)


def _check_arguments(
    design: str,
    global_pool: str,
    class_token: bool,
    pos_embed: str,
    weight_init: str,
    dynamic_img_pad: bool,
    invariants: str | None,
) -> None:
    if design not in ("equivariant", "hybrid", "invariant"):
        raise ValueError(f"design={design!r} is unknown; choose 'equivariant', 'hybrid' or 'invariant'")
    if design == "hybrid" and invariants is not None:
        raise ValueError(
            f"invariants={invariants!r} does not apply to a hybrid model, whose plain blocks take all channels"
        )
    if pos_embed not in ("learn", "none", ""):
        raise ValueError(f"pos_embed={pos_embed!r} is unknown; choose 'learn' or 'none'")
    if weight_init not in ("", "skip", "reset"):
        raise ValueError(f"weight_init={weight_init!r} is not supported; choose '', 'skip' or 'reset'")
    if dynamic_img_pad:
        raise ValueError("dynamic_img_pad=True pads one side only, which breaks the symmetry; pad or resize the image")
    _check_pooling(design, global_pool, class_token)


def _check_pooling(design: str, global_pool: str, class_token: bool) -> None:
    reasons = {
        "max": "the maximum of a sign-flipping channel is not equivariant",
        "avgmax": "the maximum of a sign-flipping channel is not equivariant",
        "map": "its attention mixes channels of different irreps",
        "prr": "its attention mixes channels of different irreps",
    }
    if global_pool in reasons:
        if design == "equivariant":
            instead = "'token' or 'avg'" if class_token else "'avg'"
            raise ValueError(f"global_pool={global_pool!r} breaks the symmetry: {reasons[global_pool]}; use {instead}")
        if global_pool in ("map", "prr"):
            raise ValueError(f"global_pool={global_pool!r} is not supported; use 'token', 'avg', 'avgmax' or 'max'")
    elif global_pool not in ("", "avg", "token"):
        raise ValueError(f"global_pool={global_pool!r} is unknown; use 'token', 'avg' or ''")
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True; use 'avg' without a class token")


def _feature_rep(group: ImageGroup, embed_dim: int, multiplicities: Sequence[int] | None, design: str) -> Rep:
    if multiplicities is None:
        return Rep.regular_of_dim(group, embed_dim, "embed_dim")
    rep = Rep(group, multiplicities)
    given = f"multiplicities={tuple(multiplicities)}"
    if rep.dim != embed_dim:
        raise ValueError(f"{given} of group {group.name!r} make {rep.dim} channels, not embed_dim={embed_dim}")
    if rep.multiplicities[0] == 0:
        raise ValueError(f"{given} hold no invariant channel; class token, biases and head need at least one")
    if design == "hybrid" and not rep.regular_copies:
        raise ValueError(f"{given} do not apply to a hybrid model, whose plain blocks need the spatial domain")
    return rep


def _equivariant_depth(design: str, equivariant_depth: int | None, depth: int) -> int:
    if design == "equivariant":
        if equivariant_depth not in (None, depth):
            raise ValueError(
                f"equivariant_depth={equivariant_depth} applies to hybrid and inv models; "
                f"this one is equivariant in all {depth} blocks"
            )
        return depth
    if equivariant_depth is None:
        return depth // 2
    if not 0 <= equivariant_depth <= depth:
        raise ValueError(f"equivariant_depth={equivariant_depth} is not in 0..depth={depth}")
    return equivariant_depth
