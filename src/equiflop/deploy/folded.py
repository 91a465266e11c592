"""Modules whose constants are computed already: what a prepared network has in the place of ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Format
from torch import Tensor, nn

from equiflop.kernels import layout_of
from equiflop.kernels.branch import Mlp as MlpParts
from equiflop.kernels.layout import per_channel
from equiflop.models.convnext_layers import EquivariantConvNeXtBlock
from equiflop.models.resmlp_layers import ChannelMlp, MatchedBias
from equiflop.nn import PatchEmbed, PositionEmbedding
from equiflop.nn.checks import check_images
from equiflop.nn.residual import Branch, residual_branches


class FoldedPatchEmbed(PatchEmbed):
    """A patch embedding as one convolution."""

    kernel: Tensor
    kernel_bias: Tensor

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for images ``(B, C, H, W)``: those of the plain network."""
        return shapes[0].numel() * len(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.img_size if self.strict_img_size else None, self.patch_size)
        x = F.conv2d(x, self.kernel, self.kernel_bias, stride=self.patch_size)
        if self.output_fmt == Format.NHWC:
            return self.norm(x.permute(0, 2, 3, 1))
        return self.norm(x.flatten(2).transpose(1, 2))


class FixedField(nn.Module):
    """A position embedding as a constant; on another grid than its own it is made as before.

    Args:
        made_by: the position embedding.
    """

    field: Tensor

    def __init__(self, made_by: PositionEmbedding) -> None:
        super().__init__()
        self.register_buffer("field", made_by())
        self.grid_size = made_by.grid_size
        self.made_by: PositionEmbedding | None = made_by

    def forward(self, grid_size: tuple[int, int] | None = None) -> Tensor:
        if grid_size is None or tuple(grid_size) == self.grid_size:
            return self.field
        if self.made_by is None:
            raise ValueError(f"this network was prepared for {self.grid_size} tokens, not {tuple(grid_size)}")
        return self.made_by(grid_size)


class MixedTokens(nn.Module):
    """Token mixing as one dense product, affine "norm" and layer scale with it: ``M (x * factor) + table``.

    The product has the MACs of the plain network, twice those of the map taken apart into irreps. In its place go the
    transforms of all tokens, which cost runtimes more.

    Args:
        block: the block whose first branch it is.
    """

    matrix: Tensor
    factor: Tensor
    table: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        mixing, norm, scale = block.linear_tokens, block.norm1, block.ls1
        tokens, rep = mixing.transform.rep.dim, mixing.rep
        like = mixing.bias
        nothing = torch.zeros(1, tokens, rep.dim, dtype=like.dtype, device=like.device)
        at_rest = mixing(nothing)[0]
        columns = []
        for token in range(tokens):  # one after the other: together they take as many images as there are tokens
            nothing[:, token] = 1.0
            columns.append(mixing(nothing)[0, :, 0] - at_rest[:, 0])
            nothing[:, token] = 0.0
        gamma = per_channel(scale.gamma, layout_of(rep))
        shift = norm(torch.zeros_like(at_rest))
        self.register_buffer("matrix", torch.stack(columns, dim=1))
        self.register_buffer("factor", gamma * (norm(torch.ones_like(gamma)) - norm(torch.zeros_like(gamma))))
        self.register_buffer("table", gamma * (self.matrix @ shift + at_rest))

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for ``(B, N, C)``."""
        return shapes[0].numel() * len(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.matrix, x * self.factor) + self.table


class FixedBias(nn.Module):
    """A bias that depends on the token as a constant.

    Args:
        made_by: the bias.
    """

    constant: Tensor

    def __init__(self, made_by: MatchedBias) -> None:
        super().__init__()
        self.register_buffer("constant", made_by.table())
        lanes = made_by.lanes() if made_by.order.kind == "group" else []
        self.count = len(lanes)
        for i, lane in enumerate(lanes):
            self.register_buffer(f"lane_{i}", lane.contiguous(), persistent=False)

    def lanes(self) -> list[Tensor]:
        """The table in the group's basis by lanes."""
        return [getattr(self, f"lane_{i}") for i in range(self.count)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant


class FoldedChannelMlp(ChannelMlp):
    """An MLP across channels with :class:`FixedBias`."""

    bias1: Any
    bias2: Any

    def parts(self) -> MlpParts | None:
        """What a kernel needs, or None where the modules have to be called."""
        parts = self._parts_of(FoldedChannelMlp)
        if parts is None:
            return None
        return parts._replace(bias1=self.bias1.lanes(), bias2=self.bias2.constant)


class FoldedDownsample(nn.Module):
    """A downsampling as one strided convolution: the MACs of the plain network, none of the transforms.

    Args:
        kernel: ``(out, in, 2, 2)``.
        bias: ``(out,)``.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)
        self.register_buffer("bias", bias)

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for feature maps ``(B, H, W, in)``."""
        return shapes[0].numel() * len(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self.kernel, self.bias, stride=2).permute(0, 2, 3, 1)


class FoldedConvNeXtBlock(EquivariantConvNeXtBlock):
    """A block on four axes, its depthwise kernels one constant, its output channels put in order part by part."""

    kernel: Tensor
    kernel_bias: Tensor | None
    part: int
    order: list[int]

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, self.kernel_bias, padding=self.kernel.shape[-1] // 2, groups=len(self.kernel))
        parts = y.permute(0, 2, 3, 1).split(self.part, dim=-1)
        y = torch.cat([parts[i] for i in self.order], dim=-1)
        branch = Branch(self.norm, self.mlp, self.ls, self.drop_path)
        return x + residual_branches(y, self._layout, branch, residual=False).permute(0, 3, 1, 2)
