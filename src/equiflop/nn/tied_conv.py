"""Convolutions between maps whose channels the group permutes: the layers of dense heads.

In the group's basis a map holds ``|G|`` copies of its channels, which the group permutes while it moves the pixels.
Label maps whose channels are exchanged, such as left and right joints, are of that kind too. Between two such maps an
equivariant convolution is a plain one with a tied kernel: ``K[g o, g i, g d] = K[o, i, d]`` for output point o, input
point i and offset d.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.image_group import ImageGroup
from equiflop.nn.fixed import FixedTensors
from equiflop.nn.initialise import fan_in_


def copies_of(group: ImageGroup) -> np.ndarray:
    """How a group permutes the ``|G|`` copies of its own basis: ``a`` moves copy ``h`` to ``a h``, shape (|G|, |G|)."""
    return np.array([[group.group.multiply(a, h) for h in range(group.order)] for a in range(group.order)])


class TiedConv2d(FixedTensors):
    """An equivariant convolution, or transposed convolution, between maps with permuted channels.

    The kernel holds one block ``(out_channels, in_channels)`` per orbit of the group on (output point, input point,
    offset). It costs the MACs of the plain convolution: what a symmetry saves in a map, it saves in the irreps' order.

    Args:
        group: the group that moves the pixels.
        in_points: where each element moves the points of the input, integers ``(|G|, points)``; see :func:`copies_of`.
        out_points: the same for the output.
        in_channels: channels of each input point.
        out_channels: channels of each output point.
        kernel_size: height and width of the kernel.
        stride: of a transposed convolution, how many times larger the map becomes; of others 1.
        bias: whether there is a bias, the same for output points that the group exchanges.

    Raises:
        ValueError: if points do not belong to the group, or ``kernel_size - stride`` is not even, so that the kernel
            would not lie in the middle.

    Shape: ``(B, points * in_channels, H, W)`` to ``(B, points * out_channels, stride * H, stride * W)``; points slow.
    """

    index: Tensor
    bias_index: Tensor

    def __init__(
        self,
        group: ImageGroup,
        in_points: np.ndarray | Sequence[Sequence[int]],
        out_points: np.ndarray | Sequence[Sequence[int]],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < stride or (kernel_size - stride) % 2:
            raise ValueError(
                f"kernel_size={kernel_size} and stride={stride}: their difference must be even and not negative, so "
                "that the kernel lies in the middle"
            )
        self.group = group
        self.kernel_size, self.stride = kernel_size, stride
        self.padding = (kernel_size - stride) // 2
        self.in_channels, self.out_channels = in_channels, out_channels
        inputs, outputs = (_checked(points, group) for points in (in_points, out_points))
        offsets = np.stack([group.act_on_grid(a, kernel_size, kernel_size) for a in range(group.order)])
        index = _orbits(outputs, inputs, offsets)
        self.points = outputs.shape[1], inputs.shape[1]
        self.fix("index", index.reshape(*self.points, kernel_size, kernel_size), device)
        blocks = int(index.max()) + 1
        self.weight = nn.Parameter(torch.empty(blocks, out_channels, in_channels, device=device, dtype=dtype))
        bias_index = _orbits(outputs)
        self.fix("bias_index", bias_index, device)
        rows = int(bias_index.max()) + 1
        self.bias = nn.Parameter(torch.empty(rows, out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance ``1 / inputs of a pixel``, bias 0."""
        inputs = self.points[1] * self.in_channels * self.kernel_size**2 / self.stride**2
        fan_in_(self.weight, inputs, self.bias)

    def kernel(self) -> Tensor:
        """The whole kernel, ``(outputs, inputs, k, k)``."""
        blocks = self.weight.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        return blocks.permute(0, 4, 1, 5, 2, 3).flatten(2, 3).flatten(0, 1)

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds of the plain convolution."""
        batch, channels, height, width = shapes[0]
        outputs = self.points[0] * self.out_channels
        return batch * height * width * channels * outputs * self.kernel_size**2

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.index_select(0, self.bias_index).flatten()
        kernel = self.kernel()
        if self.stride == 1:
            return F.conv2d(x, kernel, bias, padding=self.padding)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        kind = f", {self.stride} times larger" if self.stride > 1 else ""
        outputs, inputs = self.points
        return (
            f"{inputs} x {self.in_channels} -> {outputs} x {self.out_channels} channels, "
            f"kernel_size={self.kernel_size}{kind}, bias={self.bias is not None}"
        )


class TiedBatchNorm2d(nn.Module):
    """Batch norm of a map in the group's basis: one mean and variance for all copies of a channel.

    Args:
        channels: channels of a copy.
        copies: how many copies there are.

    Shape: ``(B, copies * channels, H, W)`` to the same.
    """

    def __init__(
        self,
        channels: int,
        copies: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.copies = copies
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        apart = x.unflatten(1, (self.copies, -1))
        return self.norm(apart.flatten(0, 1)).unflatten(0, apart.shape[:2]).flatten(1, 2)


def _checked(points: np.ndarray | Sequence[Sequence[int]], group: ImageGroup) -> np.ndarray:
    moved = np.asarray(points, dtype=np.int64)
    if moved.ndim != 2 or len(moved) != group.order:
        raise ValueError(f"points has shape {moved.shape}; group {group.name!r} needs ({group.order}, points)")
    for a in range(group.order):
        for b in range(group.order):
            if not np.array_equal(moved[a][moved[b]], moved[group.group.multiply(a, b)]):
                raise ValueError(f"points={moved.tolist()} do not multiply like the elements of group {group.name!r}")
    return moved


def _orbits(*moves: np.ndarray) -> np.ndarray:
    """Number of the orbit of every tuple of points, one from each set, flattened; in the order of their first tuple."""
    sizes = [move.shape[1] for move in moves]
    tuples = np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij")).reshape(len(sizes), -1)
    places = [
        np.ravel_multi_index([move[a][points] for move, points in zip(moves, tuples, strict=True)], sizes)
        for a in range(len(moves[0]))
    ]
    _, numbers = np.unique(np.min(places, axis=0), return_inverse=True)
    return numbers.reshape(-1)
