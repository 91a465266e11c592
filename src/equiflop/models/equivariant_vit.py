"""E(ViT): timm's vision transformer with equivariant blocks, as a thin subclass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm as PlainLayerNorm
from timm.models.vision_transformer import Block as PlainBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from equiflop.grids import ImageGroup, as_image_group
from equiflop.groups import Rep
from equiflop.models.equivariant_transformer import Design, EquivariantTransformer, check_pooling
from equiflop.models.image_size import check_image_size
from equiflop.models.substitution import Substitution
from equiflop.models.transition import FinalPlainNorm, FirstPlainBlock, ToInvariants, ToIrrepOrder, ToRegular
from equiflop.nn import PositionEmbedding
from equiflop.nn.attention import Heads, check_heads
from equiflop.nn.invariants import InvariantKind
from equiflop.nn.norm import Weighting


class EquivariantVisionTransformer(EquivariantTransformer, VisionTransformer):
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
        norm_eps: ``eps`` of the layer norms, where ``norm_layer`` does not say which norms there are.
        norm_weighting: see :class:`equiflop.nn.LayerNorm`.
        token_std: standard deviation of class token and position embedding when they are initialised.
        plain_order: the channels' order in the plain blocks of a hybrid design: ``"group"``, the group's own basis, or
            ``"irreps"``.
        plain_norm_eps: ``eps`` of the plain layer norms of hybrid and invariant designs; None leaves them as they are.

    Raises:
        ValueError: if width, heads or image size do not fit the group, a pooling would break the symmetry, or a part
            that was asked for has no equivariant counterpart.

    Source: Bökman et al., arXiv 2502.05169, section 4.
    """

    pos_embed: PositionEmbedding | None
    norm: nn.Module

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
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
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
        embed_norm_layer: Any = None,
        norm_layer: Any = None,
        act_layer: str | type[nn.Module] | None = None,
        block_fn: type[nn.Module] | None = None,
        mlp_layer: type[nn.Module] | None = None,
        attn_layer: Any = None,
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
        plain_norm_eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group = as_image_group(group)
        if pos_embed not in ("learn", "none", ""):
            raise ValueError(f"pos_embed={pos_embed!r} is unknown; choose 'learn' or 'none'")
        if weight_init not in ("", "skip", "reset"):
            raise ValueError(f"weight_init={weight_init!r} is not supported; choose '', 'skip' or 'reset'")
        check_image_size(group, img_size, dynamic_img_size)
        if design not in get_args(Design):
            raise ValueError(f"design={design!r} is unknown; choose 'equivariant', 'hybrid' or 'invariant'")
        check_pooling(global_pool, class_token, design)
        rep = feature_rep(group, embed_dim, multiplicities, design)
        check_heads(rep, num_heads, heads)
        if mlp_layer is None:
            Rep.regular_of_dim(group, int(embed_dim * mlp_ratio), f"int({embed_dim} * mlp_ratio)")
        layers = {"block_fn": block_fn, "mlp_layer": mlp_layer, "attn_layer": attn_layer}
        # timm's constructor makes the plain network, without memory; then its parts become equivariant.
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_attn_norm=scale_attn_norm,
            scale_mlp_norm=scale_mlp_norm,
            proj_bias=proj_bias,
            init_values=init_values,
            class_token=class_token,
            pos_embed=pos_embed,
            no_embed_class=no_embed_class,
            reg_tokens=reg_tokens,
            pre_norm=pre_norm,
            final_norm=final_norm,
            fc_norm=fc_norm,
            pool_include_prefix=pool_include_prefix,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init="skip",
            fix_init=fix_init,
            embed_norm_layer=embed_norm_layer,
            norm_layer=partial(PlainLayerNorm, eps=norm_eps) if norm_layer is None else norm_layer,
            act_layer=act_layer,
            **{key: value for key, value in layers.items() if value is not None},
            device="meta",
        )
        self.become_equivariant(
            group,
            rep,
            heads,
            design=design,
            equivariant_depth=equivariant_depth,
            invariants=invariants,
            weighting=norm_weighting,
            token_std=token_std,
            plain_order=plain_order,
            plain_norm_eps=plain_norm_eps,
            device=device,
            dtype=dtype,
        )
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def become_equivariant(
        self,
        group: ImageGroup,
        rep: Rep,
        heads: Heads | None = None,
        *,
        design: Design = "equivariant",
        equivariant_depth: int | None = None,
        plain_order: Literal["group", "irreps"] = "group",
        plain_norm_eps: float | None = None,
        **options: Any,
    ) -> None:
        """See :meth:`EquivariantTransformer.become_equivariant`; the arguments beside those are the constructor's."""
        if design == "hybrid" and options.get("invariants") is not None:
            raise ValueError(
                f"invariants={options['invariants']!r} does not apply to a hybrid model, whose plain blocks take all "
                "channels"
            )
        self.design = design
        self.equivariant_depth = _equivariant_depth(design, equivariant_depth, len(self.blocks))
        self.plain_order, self.plain_norm_eps = plain_order, plain_norm_eps
        super().become_equivariant(group, rep, heads, **options)

    def substitute(self, parts: Substitution) -> None:
        if self.design == "equivariant":
            super().substitute(parts)
            return
        self.own_parts = (*type(self).own_parts, "blocks", "norm", "fc_norm")
        super().substitute(parts)
        for i, block in enumerate(self.blocks):
            if i < self.equivariant_depth:
                self.blocks[i] = parts.residual(block, f"blocks.{i}")
            elif type(block) is not PlainBlock:
                raise ValueError(f"blocks.{i} is a {type(block).__name__}, which design={self.design!r} cannot keep")
            else:
                self._keep_plain(block, parts)
        for name in ("norm", "fc_norm"):
            self._keep_plain(getattr(self, name), parts)

    def _keep_plain(self, module: nn.Module, parts: Substitution) -> None:
        parts.kept(module)
        for part in module.modules():
            if isinstance(part, nn.LayerNorm) and self.plain_norm_eps is not None:
                part.eps = self.plain_norm_eps

    def _replace_head(self, invariants: InvariantKind | None, dd: dict[str, Any]) -> None:
        if self.design == "equivariant":
            super()._replace_head(invariants, dd)
            return
        self.invariants = self.feature_invariants = nn.Identity()
        self.head = self._classifier(self.head, "head", dd)
        if self.design == "invariant":
            self._leave_irreps(ToInvariants(self.rep, invariants or "norm", **dd))
        else:
            self._leave_irreps(ToRegular(self.rep, **dd) if self.plain_order == "group" else ToIrrepOrder(self.rep))

    def _leave_irreps(self, transition: nn.Module) -> None:
        """Put the transition to plain channels in front of the first plain block, else of the final norm."""
        behind = self.norm if self.equivariant_depth == len(self.blocks) else self.blocks[self.equivariant_depth]
        if isinstance(behind, nn.Identity):
            self.norm = transition
            return
        if not isinstance(behind, PlainBlock | nn.LayerNorm):
            raise ValueError(f"norm is a {type(behind).__name__}, which design={self.design!r} cannot keep")
        behind.__class__ = FirstPlainBlock if isinstance(behind, PlainBlock) else FinalPlainNorm
        behind.enter = transition

    @property
    def invariant_output(self) -> bool:  # type: ignore[override]
        """Whether the logits are invariant; those of a hybrid model are not."""
        return self.design != "hybrid"

    def feature_rep(self, block: int) -> Rep | None:
        """Type of the features after block ``block`` (-1: before the first), or None where the group no longer acts.

        Behind the invariants of an invariant design the group moves tokens and leaves all channels as they are.
        """
        if block < self.equivariant_depth:
            return self.rep
        return Rep.trivial(self.group, self.embed_dim) if self.design == "invariant" else None


def feature_rep(
    group: ImageGroup, embed_dim: int, multiplicities: Sequence[int] | None = None, design: str = "equivariant"
) -> Rep:
    """The type of the features between blocks.

    Raises:
        ValueError: if the width is no multiple of the group's order, or the multiplicities do not make it.
    """
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
