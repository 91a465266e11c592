"""Equivariant depthwise convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.grids import ImageGroup, field_tables
from equiflop.groups import Rep
from equiflop.nn.fixed import FixedTensors


def irrep_products(group: ImageGroup) -> list[list[int]]:
    """For a group with one-dimensional irreps, the index of the product of every two.

    Raises:
        ValueError: if an irrep has a dimension above 1.
    """
    characters = [irrep.matrices[:, 0, 0] for irrep in group.irreps]
    if any(irrep.dim > 1 for irrep in group.irreps):
        raise ValueError(
            f"group {group.name!r} has irreps of dimension above 1, for which there is no depthwise convolution; "
            "use 'flop', 'updown' or 'flips'"
        )
    return [[next(k for k, c in enumerate(characters) if (c == a * b).all()) for b in characters] for a in characters]


class DepthwiseConv(FixedTensors):
    """Depthwise convolution between channels of one-dimensional irreps.

    A kernel from irrep ``i`` to irrep ``j`` must itself transform as their product: for the mirror group symmetric
    kernels keep the irrep, antisymmetric ones swap it. Every irrep's channels are cut into as many parts as there are
    irreps; part ``j`` of irrep ``i`` becomes part ``i`` of irrep ``j``. Kernels are stored tied, one value per orbit of
    the kernel's grid.

    Parameters: ``weight_<irrep>`` for the kernels of one irrep, shape ``(channels / irreps, values)``, by irrep of the
    output; ``bias`` on the trivial irrep of the output. Source: Bökman et al., arXiv 2502.05169, section 4 and its
    code.

    Args:
        rep: type of the channels; every multiplicity the same and divisible by the number of irreps.
        group: the group that acts on the image.
        kernel_size: side of the kernel in pixels, odd.
        bias: whether there is a bias.

    Raises:
        ValueError: if the kernel is even, the channels cannot be cut, or an irrep has a dimension above 1.

    Shape: ``(B, rep.dim, H, W)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        kernel_size: int = 7,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.products = irrep_products(group)
        parts = len(self.products)
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} is not odd; an even kernel has no centre to mirror about")
        copies = rep.regular_copies
        if not copies or copies % parts:
            raise ValueError(
                f"channels={rep.dim} is not divisible by {parts * parts} (irreps of group {group.name!r}, squared)"
            )
        self.rep = rep
        self.kernel_size = kernel_size
        self.part = copies // parts
        for irrep in group.irreps:
            index, coefficients, stabilisers = field_tables(group, irrep, (kernel_size, kernel_size))
            self.fix(f"index_{irrep.name}", index[:, 0], device)
            self.fix(f"coefficients_{irrep.name}", coefficients[:, 0, 0], device, dtype)
            if len(stabilisers):
                weight = torch.empty(parts * self.part, len(stabilisers), device=device, dtype=dtype)
                self.register_parameter(f"weight_{irrep.name}", nn.Parameter(weight))
        self.bias = nn.Parameter(torch.empty(copies, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance ``1 / kernel_size^2``, so that variance is kept; bias 0."""
        for name, parameter in self.named_parameters():
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 / self.kernel_size)

    def init_weights(self, std: float) -> None:
        """Tied kernels truncated normal, bias 0."""
        for name, parameter in self.named_parameters():
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(B, rep.dim, H, W)``."""
        return math.prod(shapes[0]) * self.kernel_size**2

    def kernel(self) -> Tensor:
        """The kernels in the order of the input channels, shape ``(rep.dim, 1, kernel_size, kernel_size)``."""
        kernels = []
        for source in range(len(self.products)):
            for target in range(len(self.products)):
                name = self.rep.group.irreps[self.products[source][target]].name
                weight = getattr(self, f"weight_{name}", None)
                if weight is None:
                    zero = next(self.parameters()).new_zeros(self.part, self.kernel_size**2)
                    kernels.append(zero)
                    continue
                rows = weight[target * self.part : (target + 1) * self.part]
                coefficients = getattr(self, f"coefficients_{name}").to(rows.dtype)
                kernels.append(rows.index_select(1, getattr(self, f"index_{name}")) * coefficients)
        return torch.cat(kernels).view(-1, 1, self.kernel_size, self.kernel_size)

    def bias_of_outputs(self) -> Tensor | None:
        """The bias in the order of the input channels, shape ``(rep.dim,)``; None for none."""
        if self.bias is None:
            return None
        parts = len(self.products)  # input part 0 of every irrep becomes the trivial irrep of the output
        return F.pad(self.bias.view(parts, 1, self.part), (0, 0, 0, parts - 1)).flatten()

    def order(self) -> list[int]:
        """Which parts of the channels, as they come from the convolution, make up the output."""
        parts = len(self.products)
        return [source * parts + target for target in range(parts) for source in range(parts)]

    def forward(self, x: Tensor) -> Tensor:
        padding, bias = self.kernel_size // 2, self.bias_of_outputs()
        y = F.conv2d(x, self.kernel(), bias, padding=padding, groups=self.rep.dim)
        # Slices joined rather than an axis transposed, and three axes rather than four: compilers vectorise that.
        pieces = y.permute(0, 2, 3, 1).flatten(1, 2).split(self.part, dim=-1)
        joined = torch.cat([pieces[i] for i in self.order()], dim=-1)
        return joined.unflatten(1, y.shape[-2:]).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.rep}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
