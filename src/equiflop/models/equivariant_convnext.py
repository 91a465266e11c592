"""E(ConvNeXt) and its isotropic form, with timm's names, methods and layout.

Longer than other files: block, stem, stage and head serve no network but these two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, get_act_layer, to_ntuple
from timm.models.convnext import ConvNeXt
from torch import nn

from equiflop.grids import ImageGroup, as_image_group
from equiflop.groups import Rep
from equiflop.models.convnext_layers import (
    EquivariantConvNeXtBlock,
    EquivariantConvNeXtStage,
    EquivariantStem,
    InvariantHead,
)
from equiflop.models.initialise import init_linears
from equiflop.models.isotropic_convnext import IsotropicConvNeXt
from equiflop.nn import DepthwiseConv
from equiflop.nn.fit import fit_checkpoint
from equiflop.nn.fixed import settle_constants
from equiflop.nn.invariants import InvariantKind


class EquivariantConvNeXt(ConvNeXt):
    """A ConvNeXt whose feature maps transform under a group of mirrorings.

    Keywords of timm's ``ConvNeXt`` keep their meaning; those of our own are:

    Args:
        group: ``"flop"``, ``"updown"``, ``"flips"`` or an :class:`~equiflop.ImageGroup` with one-dimensional irreps.
        invariants: what the head sees, see :class:`equiflop.nn.Invariants`.
        norm_eps: ``eps`` of the equivariant layer norms.

    Raises:
        ValueError: if the widths do not fit the group, or the group has irreps of dimension above 1.

    Feature maps are ``(B, C, H, W)`` in channels-last memory, channels ordered by ``self.reps[stage]``.
    Source: Bökman et al., arXiv 2502.05169, section 4.
    """

    fit_checkpoint = staticmethod(fit_checkpoint)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: int | Sequence[int] = 7,
        ls_init_value: float | None = 1e-6,
        patch_size: int = 4,
        head_init_scale: float = 1.0,
        conv_bias: bool = True,
        act_layer: str | type[nn.Module] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        group: str | ImageGroup = "flop",
        invariants: InvariantKind | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != len(dims):
            raise ValueError(f"depths={tuple(depths)} and dims={tuple(dims)} differ in length")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        group = as_image_group(group)
        # timm's constructor makes a plain network, without memory; then the parts of this one take their places.
        super().__init__(in_chans, num_classes, depths=(0, 0, 0, 0), drop_rate=drop_rate, device="meta")
        self.group = group
        self.reps = [Rep.regular_of_dim(group, dim, f"dims[{i}]") for i, dim in enumerate(dims)]
        strides = [2 if i > 0 or patch_size == 2 else 1 for i in range(len(dims))]  # as in timm
        reductions = [patch_size * math.prod(strides[: i + 1]) for i in range(len(dims))]
        self.stem = EquivariantStem(self.reps[0], group, patch_size, in_chans, reductions[-1], norm_eps, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        kernels = to_ntuple(len(dims))(kernel_sizes)
        self.stages = nn.Sequential(
            *[
                EquivariantConvNeXtStage(
                    self.reps[max(i - 1, 0)],
                    rep,
                    group,
                    downsample=strides[i] == 2,
                    norm_eps=norm_eps,
                    drop_path_rates=rates[i],
                    block_options={
                        "kernel_size": kernels[i],
                        "ls_init_value": ls_init_value,
                        "act": get_act_layer(act_layer)() if act_layer is not None else None,
                        "conv_bias": conv_bias,
                    },
                    **dd,
                )
                for i, rep in enumerate(self.reps)
            ]
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": reductions[i], "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.head = InvariantHead(self.reps[-1], num_classes, global_pool, invariants, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        _init_convnext(self, head_init_scale)
        self.register_load_state_dict_post_hook(settle_constants)

    def feature_rep(self, stage: int) -> Rep:
        """Type of the channels after stage ``stage``."""
        return self.reps[stage]


class EquivariantIsotropicConvNeXt(IsotropicConvNeXt):
    """An isotropic ConvNeXt whose feature maps transform under a group of mirrorings.

    Keywords are those of :class:`IsotropicConvNeXt` and ``group``, ``invariants`` and ``norm_eps`` of
    :class:`EquivariantConvNeXt`.

    Raises:
        ValueError: if the width does not fit the group, or the group has irreps of dimension above 1.
    """

    fit_checkpoint = staticmethod(fit_checkpoint)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        depth: int = 18,
        dim: int = 384,
        kernel_size: int = 7,
        ls_init_value: float | None = None,
        head_init_scale: float = 1.0,
        act_layer: str | type[nn.Module] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        group: str | ImageGroup = "flop",
        invariants: InvariantKind | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        group = as_image_group(group)
        rep = Rep.regular_of_dim(group, dim, "dim")
        super().__init__(in_chans, num_classes, patch_size=patch_size, depth=depth, dim=dim, device="meta")
        self.group = group
        self.rep = rep
        self.stem = EquivariantStem(rep, group, patch_size, in_chans, patch_size, None, **dd)
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            self.blocks[i] = EquivariantConvNeXtBlock(
                rep,
                group,
                kernel_size=kernel_size,
                ls_init_value=ls_init_value,
                act=get_act_layer(act_layer)() if act_layer is not None else None,
                norm_eps=norm_eps,
                drop_path=rate,
                **dd,
            )
        self.head = InvariantHead(rep, num_classes, global_pool, invariants, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        _init_convnext(self, head_init_scale)
        self.register_load_state_dict_post_hook(settle_constants)

    def feature_rep(self, block: int) -> Rep:
        """Type of the channels after block ``block``."""
        return self.rep


def _init_convnext(model: Any, head_init_scale: float) -> None:
    """As published: matrices and tied kernels truncated normal 0.02, the stem included, biases 0."""
    init_linears(model)
    for module in model.modules():
        if isinstance(module, DepthwiseConv):
            module.init_weights(std=0.02)
    with torch.no_grad():
        for parameter in model.head.fc.parameters():
            parameter.mul_(head_init_scale)
