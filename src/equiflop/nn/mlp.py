"""Equivariant MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from equiflop.groups import Rep
from equiflop.nn.activation import FourierActivation
from equiflop.nn.blocks import compiled_for_gpu, join, split
from equiflop.nn.dropout import Dropout
from equiflop.nn.linear import Linear

#: Without gradients a CPU computes hidden features beyond so many bytes in parts of the batch: the C library gives
#: large tensors back to the system after every layer, and gets them again page by page.
_LARGE_BYTES = 25_000_000
#: Size of the parts, which stay in the processor's caches.
_PART_BYTES = 5_000_000


class Mlp(nn.Module):
    """Linear, Fourier activation, linear.

    Args:
        rep: type of the feature axis.
        hidden_rep: type of the hidden axis; a multiple of the regular representation.
        act: the pointwise function; GELU by default.
        bias: whether both linear maps have a bias (on the trivial irrep).
        drop: dropout after the activation and after the output.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``hidden_rep`` is not a multiple of the regular representation.

    Shape: ``(..., rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        hidden_rep: Rep,
        *,
        act: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = rep
        self.fc1 = Linear(rep, hidden_rep, bias=bias, device=device, dtype=dtype)
        self.act = FourierActivation(hidden_rep, act, device=device, dtype=dtype)
        self.drop1 = Dropout(hidden_rep, drop)
        self.fc2 = Linear(hidden_rep, rep, bias=bias, device=device, dtype=dtype)
        self.drop2 = Dropout(rep, drop)

    def forward(self, x: Tensor) -> Tensor:
        count = self._parts(x)
        if count == 1:
            return self._forward(x)
        return torch.cat([self._forward(part) for part in x.tensor_split(count)])

    def _parts(self, x: Tensor) -> int:
        """Into how many parts the batch is cut; 1 where its size is a symbol."""
        if torch.is_grad_enabled() or self.training or x.device.type != "cpu" or torch.compiler.is_exporting():
            return 1
        if torch.compiler.is_compiling() and not _is_constant(x.shape[0]):
            return 1
        hidden_bytes = x.numel() // self.rep.dim * self.fc1.out_rep.dim * x.element_size()
        return min(x.shape[0], -(-hidden_bytes // _PART_BYTES)) if hidden_bytes > _LARGE_BYTES else 1

    def _forward(self, x: Tensor) -> Tensor:
        # A compiler for GPUs fuses the factors with the activation; elsewhere the matrix products take them for free.
        inside = compiled_for_gpu(x)
        scales = None if inside else self.act.irrep_scales
        blocks = self.fc1.forward_blocks(split(x, self.rep), output_scales=scales)
        if inside:
            blocks = self.act.scaled(self.act.forward_blocks(self.act.scaled(blocks)))
        else:
            blocks = self.act.forward_blocks(blocks, overwrite=True)
        if self.training and self.drop1.p:
            blocks = split(self.drop1(join(blocks)), self.fc1.out_rep)
        return self.drop2(join(self.fc2.forward_blocks(blocks, input_scales=scales)))


def _is_constant(size: int) -> bool:
    """Whether a compiler takes a size for a number, not a symbol: then it knows its bounds and its parity."""
    odd = statically_known_true(size % 2 == 1)
    return statically_known_true(size < 2**31) and (odd or statically_known_true(size % 2 == 0))
