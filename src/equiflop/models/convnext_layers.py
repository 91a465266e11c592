"""What E(ConvNeXt) is made of: blocks, the stem, stages and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.kernels import layout_of
from equiflop.nn import DepthwiseConv, Downsample, Invariants, LayerScale, Mlp, PatchEmbed
from equiflop.nn import LayerNorm as EquivariantLayerNorm
from equiflop.nn.checks import check_images, check_mirrored
from equiflop.nn.invariants import InvariantKind, all_magnitudes
from equiflop.nn.residual import Branch, residual_branches
from equiflop.timm_compat import checkpoint_seq


class EquivariantConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm and MLP in a residual branch.

    Args:
        rep: type of the channels.
        group: the group that acts on the image.
        kernel_size: side of the depthwise kernels.
        ls_init_value: initial layer scale, None or 0 for none (timm.create_model leaves out keywords that are None).
        act: the pointwise function; GELU by default.
        conv_bias: whether the convolution and the linear maps have biases.
        mlp_ratio: hidden width over ``rep.dim``.
        drop_path: probability to drop the branch, per sample.
        norm_eps: ``eps`` of the layer norm.

    Shape: ``(B, rep.dim, H, W)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        *,
        kernel_size: int = 7,
        ls_init_value: float | None = 1e-6,
        act: nn.Module | None = None,
        conv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_rep = Rep.regular_of_dim(group, int(rep.dim * mlp_ratio), f"int({rep.dim} * mlp_ratio)")
        self.conv_dw = DepthwiseConv(rep, group, kernel_size, conv_bias, **dd)
        self.norm = EquivariantLayerNorm(rep, norm_eps, **dd)
        self._layout = layout_of(rep)
        self.mlp = Mlp(rep, hidden_rep, act=act, **dd)
        self.ls = LayerScale(rep, ls_init_value, **dd) if ls_init_value else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # Three axes: with four, Inductor takes positions times channels for an image and reorders its axes.
        branch = self.conv_dw(x).permute(0, 2, 3, 1).flatten(1, 2)
        branches = Branch(self.norm, self.mlp, self.ls, self.drop_path)
        branch = residual_branches(branch, self._layout, branches, residual=False)
        return x + branch.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


class EquivariantStem(nn.Module):
    """Patch embedding to a feature map, with an optional norm; refuses images whose size breaks the symmetry further
    in.

    Args:
        rep: type of the channels.
        group: the group that acts on the image.
        patch_size: pixels per position along each side.
        in_chans: image channels.
        stride: pixels per position of the last feature map: mirrored sides must be a multiple of it.
        norm_eps: ``eps`` of the layer norm that follows; None for none.

    Shape: ``(B, in_chans, H, W)`` to ``(B, rep.dim, H / p, W / p)``.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        patch_size: int,
        in_chans: int,
        stride: int,
        norm_eps: float | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group = group
        self.stride = stride
        self._mirrors = (group.mirrors_rows, group.mirrors_columns)
        self.proj = PatchEmbed(
            rep, group, patch_size, patch_size, in_chans, strict_img_size=False, output_fmt="NHWC", **dd
        )
        self.norm = nn.Identity() if norm_eps is None else EquivariantLayerNorm(rep, norm_eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.patch_size[0]
        check_images(x, self.proj.in_chans, None, (1, 1))
        check_mirrored(x, self.stride, patch, self._mirrors, self.group.name)
        x = x[..., : x.shape[-2] // patch * patch, : x.shape[-1] // patch * patch]
        return self.norm(self.proj(x)).permute(0, 3, 1, 2)


class EquivariantConvNeXtStage(nn.Module):
    """A 2x2 downsampling behind a norm (not in the first stage, but for a patch size of 2), then blocks.

    Args:
        in_rep: type of the input channels.
        rep: type of the channels of the stage.
        group: the group that acts on the image.
        downsample: whether the stage halves the resolution.
        norm_eps: ``eps`` of the layer norms.
        drop_path_rates: one per block.
        block_options: keywords of :class:`EquivariantConvNeXtBlock`.

    Shape: ``(B, in_rep.dim, H, W)`` to ``(B, rep.dim, H, W)`` or ``(B, rep.dim, H / 2, W / 2)``.
    """

    def __init__(
        self,
        in_rep: Rep,
        rep: Rep,
        group: ImageGroup,
        *,
        downsample: bool,
        norm_eps: float,
        drop_path_rates: Sequence[float],
        block_options: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            bias = block_options["conv_bias"]
            norm = EquivariantLayerNorm(in_rep, norm_eps, **dd)
            self.downsample = nn.Sequential(norm, Downsample(in_rep, rep, group, bias, **dd))
        shared = {"norm_eps": norm_eps, **block_options, **dd}
        self.blocks = nn.Sequential(
            *[EquivariantConvNeXtBlock(rep, group, drop_path=rate, **shared) for rate in drop_path_rates]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class InvariantHead(nn.Module):
    """Invariants of every position, their mean, plain layer norm, classifier.

    Without classifier the output has as many values as there are channels, as everywhere in timm: what the classifier
    would see, and behind it the magnitudes of all other channels, in a layer norm without parameters; where ``kind``
    was given, what the classifier would see alone.

    Args:
        rep: type of the channels.
        num_classes: classes; 0 for no classifier.
        pool_type: ``"avg"``, or ``""`` to return the equivariant feature map as it is.
        kind: which invariants; the trivial irrep by default.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: for another pooling.

    Shape: ``(B, rep.dim, H, W)`` to ``(B, num_classes)``.
    """

    def __init__(
        self,
        rep: Rep,
        num_classes: int,
        pool_type: str,
        kind: InvariantKind | None,
        drop_rate: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.invariants = Invariants(rep, kind or "trivial", **dd)
        self.feature_invariants = self.invariants if kind else Invariants(rep, all_magnitudes(rep.group), **dd)
        self.num_features = self.invariants.out_features
        self.more_features = self.feature_invariants.out_features - self.num_features
        self.norm = LayerNorm(self.num_features, eps=1e-6, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifier, and the pooling if one is given; ``reset_other`` removes the norm (see timm)."""
        if pool_type is not None:
            if pool_type not in ("avg", ""):
                reason = "the maximum of a sign-flipping channel is not equivariant; " if "max" in pool_type else ""
                raise ValueError(f"global_pool={pool_type!r} is not supported: {reason}use 'avg' or ''")
            self.pool_type = pool_type
        if not self.pool_type and num_classes:
            raise ValueError(f"global_pool='' returns feature maps, so num_classes={num_classes} must be 0")
        if reset_other:
            self.norm = nn.Identity()
        self.num_classes = num_classes
        self.fc: nn.Module = (
            nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        )
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pool_type:
            return x
        x = x.permute(0, 2, 3, 1)
        if self.num_classes or pre_logits or self.feature_invariants is self.invariants:
            x = self.drop(self.norm(self.invariants(x).mean((1, 2))))
            return x if pre_logits else self.fc(x)
        every = self.feature_invariants(x).mean((1, 2))
        others = every[..., self.num_features :]
        features = [self.norm(every[..., : self.num_features]), F.layer_norm(others, (self.more_features,))]
        return self.fc(self.drop(torch.cat(features, dim=-1)))
