"""Equivariant strided convolution whose windows do not overlap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.nn.depthwise import irrep_products
from equiflop.nn.grid import GridTransform
from equiflop.nn.linear import Linear


class Downsample(nn.Module):
    """A 2x2 convolution of stride 2 as a block-diagonal linear map of channels (x) pixels.

    The four pixels of a window are taken apart into irreps; their products with the channels' irreps are mapped by an
    equivariant linear map, at half the MACs of the convolution for the mirror group.

    Args:
        in_rep: type of the input channels; the group's irreps must be one-dimensional.
        out_rep: type of the output channels.
        group: the group that acts on the image.
        bias: whether there is a bias on the trivial irrep.

    Raises:
        ValueError: if an irrep has a dimension above 1.

    Shape: ``(B, H, W, in_rep.dim)`` to ``(B, H / 2, W / 2, out_rep.dim)``; a last odd row or column is left out, as a
    strided convolution does, where that breaks no symmetry.
    """

    def __init__(
        self,
        in_rep: Rep,
        out_rep: Rep,
        group: ImageGroup,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_rep = in_rep
        self.products = irrep_products(group)
        self.transform = GridTransform(group, 2, 2, device=device, dtype=dtype)
        pixels = self.transform.rep.multiplicities
        count = len(self.products)
        joint = [
            sum(pixels[j] * in_rep.multiplicities[self.products[target][j]] for j in range(count))
            for target in range(count)
        ]
        self.proj = Linear(Rep(group, joint), out_rep, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        windows = x[:, :height, :width].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, h, 2, w, 2, C
        windows = windows.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        pixels = self.transform(windows)
        rows = [(block.start, block.stop) for block in self.transform.rep.blocks()]
        channels = [(block.start, block.stop) for block in self.in_rep.blocks()]
        parts = []
        for products in self.products:
            for (first, last), product in zip(rows, products, strict=True):
                start, stop = channels[product]
                parts.append(pixels[..., first:last, start:stop].flatten(-2))
        return self.proj(torch.cat(parts, dim=-1))

    def extra_repr(self) -> str:
        return f"{self.in_rep} -> {self.proj.out_rep}, 2x2, stride 2"
