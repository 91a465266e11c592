"""A network of periodic signals whose output does not change under cyclic shifts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.groups import FiniteGroup, cyclic
from equiflop.models.sizes import check_sizes
from equiflop.nn.circulant import CirculantLinear


@lru_cache(maxsize=4)
def shifts(n: int) -> FiniteGroup:
    """The cyclic shifts of a period of length ``n``; element ``a`` shifts by ``a``."""
    return cyclic(n)


class SignalBlock(nn.Module):
    """Pre-norm residual block: layer norm over channels, circular convolution, GELU, channels mixed pointwise.

    Every step commutes with cyclic shifts: the convolution by construction, the others since they do the same at every
    position.

    Args:
        n: length of the period.
        width: channels.
        dropout: probability to drop a value of the branch.

    Shape: ``(..., n, width)`` to the same.
    """

    def __init__(
        self,
        n: int,
        width: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.shift = CirculantLinear(n, width, width, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.drop(self.act(self.shift(self.norm(x)))))


class SignalNetwork(nn.Module):
    """Classifier of periodic signals, invariant to cyclic shifts: blocks, mean over positions, linear head.

    Args:
        n: length of the period.
        in_channels: channels of the signal.
        num_classes: outputs.
        width: channels inside.
        depth: number of blocks.
        dropout: probability to drop a value inside a block.

    Raises:
        ValueError: if ``depth`` is negative, another number is not positive, or the input does not have its shape.

    Shape: ``(B, n, in_channels)`` to ``(B, num_classes)``.

    >>> network = SignalNetwork(12, 3, 10, width=8, depth=2)
    >>> network(torch.zeros(5, 12, 3)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        n: int,
        in_channels: int,
        num_classes: int,
        *,
        width: int = 32,
        depth: int = 3,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(depth, {"width": width, "num_classes": num_classes})
        self.embed = CirculantLinear(n, in_channels, width, **dd)
        self.blocks = nn.ModuleList(SignalBlock(n, width, dropout=dropout, **dd) for _ in range(depth))
        self.norm = nn.LayerNorm(width, **dd)
        self.head = nn.Linear(width, num_classes, **dd)

    @property
    def group(self) -> FiniteGroup:
        """The cyclic shifts."""
        return shifts(self.embed.n)

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random signals, for :func:`equiflop.check`."""
        shape = (batch_size, self.embed.n, self.embed.in_channels)
        return (torch.randn(shape, generator=generator, dtype=torch.float64),)

    def act_on_inputs(self, a: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Signals shifted by ``a``."""
        return tuple(x.roll(a, dims=1) for x in inputs)

    def act_on_output(self, a: int, output: Tensor) -> Tensor:
        """Logits do not change."""
        return output

    def named_features(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Features after the embedding and every block, ``(B, n, width)``."""
        (x,) = inputs
        features = {"embedded signal": self.embed(x)}
        x = features["embedded signal"]
        for i, block in enumerate(self.blocks):
            features[f"features {i}"] = x = block(x)
        return features

    def act_on_features(self, a: int, name: str, features: Tensor) -> Tensor:
        """Features move with the signal."""
        return features.roll(a, dims=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features that move with the signal, ``(B, n, width)``."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean(dim=-2))
