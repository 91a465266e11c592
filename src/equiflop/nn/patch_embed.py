"""Equivariant patch embedding."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from timm.layers import Format, to_2tuple
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.nn.checks import check_divisible, check_images
from equiflop.nn.fit import warn_of_fit
from equiflop.nn.grid import GridTransform
from equiflop.nn.linear import Linear
from equiflop.warnings import EquiflopWarning


class PatchEmbed(nn.Module):
    """Image to patch tokens: the pixels of a patch are taken apart into irreps, then mapped by an equivariant map.

    That costs the block-diagonal share of the MACs (half for the mirror group), where a convolution with tied kernels
    would cost all of them. Has the attributes and methods of timm's ``PatchEmbed``; ``norm``, behind the map, is none
    unless one is put there.

    Args:
        rep: type of the output channels.
        group: the group that acts on the image.
        img_size: height and width of the image in pixels.
        patch_size: height and width of a patch in pixels.
        in_chans: image channels; the group leaves them as they are.
        bias: whether to add a bias on the trivial irrep.
        strict_img_size: whether only ``img_size`` is accepted.
        output_fmt: ``"NLC"`` for tokens, ``"NHWC"`` for a grid of tokens.

    Raises:
        ValueError: if the image is not a whole number of patches, or the group swaps axes and the patch is not square.

    Warns:
        EquiflopWarning: if the patch is so small that it lacks irreps of the output.

    Shape: ``(B, in_chans, H, W)`` to ``(B, N, rep.dim)`` or ``(B, H / p, W / p, rep.dim)``.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: str = "NLC",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.in_chans = in_chans
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size={patch_size} is not positive")
        if group.swaps_axes and self.patch_size[0] != self.patch_size[1]:
            raise ValueError(
                f"patch_size={self.patch_size} is not square, which group {group.name!r} needs "
                f"since it swaps height and width; group 'flips' does without"
            )
        self.strict_img_size = strict_img_size
        self.output_fmt = Format(output_fmt)
        self.set_input_size(img_size)
        self.transform = GridTransform(group, *self.patch_size, device=device, dtype=dtype)
        pixels = self.transform.rep
        missing = [
            irrep.name
            for irrep, has, wants in zip(group.irreps, pixels.multiplicities, rep.multiplicities, strict=True)
            if wants and not has
        ]
        if missing:
            warnings.warn(
                f"patch_size={self.patch_size} is too small for irreps {', '.join(missing)} of group {group.name!r}: "
                "no pixels feed their channels",
                EquiflopWarning,
                stacklevel=2,
            )
        self.proj = Linear(in_chans * pixels, rep, bias=bias, device=device, dtype=dtype)
        self.norm: nn.Module = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and bias uniform in ``+-1 / sqrt(inputs per irrep)``, as the published code and ``nn.Conv2d`` do.

        The published code scales the output, bias included, by ``sqrt(1/2)``; the bound of the bias follows it.
        """

        def uniform(weight: Tensor, algebra: int) -> None:
            bound = 1.0 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)

        self.proj.init_weights(uniform)
        if self.proj.bias is not None:
            bound = 1.0 / math.sqrt(self.in_chans * math.prod(self.patch_size))
            nn.init.uniform_(self.proj.bias, -bound, bound)

    def fit_weights(self, state: dict[str, Any], prefix: str) -> str | None:
        """Adapt the weights for another number of image channels within a state dict, in place, as timm does.

        A single channel gets the sum over the channels; others get their weights again and again, times the quotient
        of the numbers of channels.

        Args:
            state: a state dict.
            prefix: of this module's keys in it.

        Returns:
            what was done, or None if nothing had to be (or could be: then loading them reports the sizes).
        """
        pixels = {i.name: m for i, m in zip(self.group.irreps, self.transform.rep.multiplicities, strict=True)}
        found: dict[str, Tensor] = {}
        channels: set[int] = set()
        for irrep, own in self.proj.weights():
            for key in (f"{prefix}proj.{irrep.name}.weight", f"{prefix}proj.weight_{irrep.name}"):
                weight, count = state.get(key), pixels[irrep.name]
                if isinstance(weight, Tensor) and weight.ndim == 2 and count:
                    if len(weight) != len(own) or weight.shape[1] % count:
                        return None
                    found[key] = weight.unflatten(1, (count, -1))
                    channels.add(weight.shape[1] // count)
        if len(channels) != 1 or channels == {self.in_chans}:
            return None
        old = channels.pop()
        ratio = max(old, self.in_chans) / min(old, self.in_chans)
        if math.sqrt(ratio).is_integer():
            return None  # more likely the same channels with patches of another size
        for key, weight in found.items():  # outputs, pixels, channels
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.in_chans == 1:
                fitted = wide.sum(-1, keepdim=True)
            else:
                repeats = -(-self.in_chans // old)
                fitted = wide.repeat(1, 1, repeats)[..., : self.in_chans] * (old / self.in_chans)
            state[key] = fitted.flatten(1).to(weight.dtype)
        return f"patch embedding adapted from {old} to {self.in_chans} channels"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the weights for another number of image channels as well."""
        warn_of_fit(self.fit_weights(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Accept images of another size from now on.

        Raises:
            ValueError: if the size is not a whole number of patches, or another patch size is asked for.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size={patch_size} cannot replace {self.patch_size}; build a new model for it")
        if img_size is not None:
            height, width = to_2tuple(img_size)
            check_divisible(height, width, self.patch_size)
            self.img_size = (height, width)
            self.grid_size = self.dynamic_feat_size((height, width))
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token, along the larger side or along both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens for an image size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.img_size if self.strict_img_size else None, self.patch_size)
        p_height, p_width = self.patch_size
        patches = x.unflatten(-1, (-1, p_width)).unflatten(-3, (-1, p_height))  # B, C, rows, p, columns, p
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)  # B, rows, columns, pixels, C
        tokens = self.norm(self.proj(self.transform(patches).flatten(-2)))
        return tokens if self.output_fmt == Format.NHWC else tokens.flatten(1, 2)
