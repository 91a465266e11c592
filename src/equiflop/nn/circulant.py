"""Linear maps of periodic signals that commute with cyclic shifts, by the fast Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equiflop.nn.initialise import fan_in_


class CirculantLinear(nn.Module):
    """The general linear map of periodic signals that commutes with shifts: a circular convolution of full length.

    By Schur's lemma it is block-diagonal over the irreps of C_n: a real matrix at frequency 0 (and n/2), a complex one
    at every other frequency. Where ``equiflop.nn.Linear`` works on features that are already in the irreps, this layer
    takes the signal and goes there and back by ``torch.fft``.

    ``weight[i]`` are the blocks of ``Linear(Rep.regular(cyclic(n), in_channels), Rep.regular(cyclic(n),
    out_channels))`` one after the other in the order of the irreps: ``A``, for even ``n`` ``B`` (frequency n/2), then
    two for each of ``E1, E2, ...``. :meth:`linear_state` and :meth:`load_linear_state` convert.

    Initialised so that inputs of variance 1 give outputs of variance 1. Half precision is computed in float32.

    Args:
        n: length of the period.
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether to add a bias, the same at all positions.

    Raises:
        ValueError: if a number is not positive, or the input does not have its shape.

    Shape: ``(..., n, in_channels)`` to ``(..., n, out_channels)``.
    """

    def __init__(
        self,
        n: int,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("n", n), ("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{argument}={value} is not positive; it must be at least 1")
        self.n = n
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.empty(n, out_channels, in_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def _real_irreps(self) -> int:
        """Irreps of real type: frequency 0, and n/2 if n is even."""
        return 2 - self.n % 2

    def reset_parameters(self) -> None:
        """Weights normal with variance ``1 / in_channels``, half of it in complex irreps; bias 0."""
        with torch.no_grad():
            fan_in_(self.weight[: self._real_irreps], self.in_channels, self.bias)
            fan_in_(self.weight[self._real_irreps :], 2 * self.in_channels)

    def macs(self, *shapes: torch.Size) -> int:
        """Real MACs for signals of shape ``(..., n, in_channels)``: transforms, and 4 for a product of complex numbers.

        A real transform of length n counts ``n * ceil(log2 n)`` per channel: a quarter of ``n log2 n`` complex
        products, 4 real ones each, in the usual radix-2 scheme for real numbers; its additions come with the products.
        The matrices of the real irreps are multiplied in the same batch as the complex ones and count as such.
        """
        transforms = (self.in_channels + self.out_channels) * self.n * (self.n - 1).bit_length()
        per_signal = transforms + 4 * (self.n // 2 + 1) * self.in_channels * self.out_channels
        return shapes[0][:-2].numel() * per_signal

    def spectrum(self) -> Tensor:
        """The complex matrix per frequency of ``torch.fft.rfft``: ``(n // 2 + 1, out_channels, in_channels)``."""
        weight = _wide(self.weight)
        single, pairs = weight[: self._real_irreps], weight[self._real_irreps :]
        pairs = pairs.unflatten(0, ((self.n - 1) // 2, 2))
        zero = torch.zeros_like(single)
        # rfft has exp(-i k t) where the irrep E_k has the rotation by +k t, hence the conjugate.
        real = torch.cat([single[:1], pairs[:, 0], single[1:]])
        imaginary = torch.cat([zero[:1], -pairs[:, 1], zero[1:]])
        return torch.complex(real, imaginary)

    def kernel(self) -> Tensor:
        """The kernel of the circular convolution, ``(n, out_channels, in_channels)``: entry ``s`` for a shift by s."""
        return torch.fft.irfft(self.spectrum(), n=self.n, dim=0)

    def matrix(self) -> Tensor:
        """The dense block-circulant matrix ``(n * out_channels, n * in_channels)`` on flattened signals, for checks."""
        positions = torch.arange(self.n, device=self.weight.device)
        blocks = self.kernel()[(positions[:, None] - positions) % self.n]  # (n, n, out_channels, in_channels)
        return blocks.transpose(1, 2).reshape(self.n * self.out_channels, self.n * self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-2:] != (self.n, self.in_channels):
            raise ValueError(f"x has shape {tuple(x.shape)}; (..., {self.n}, {self.in_channels}) is needed")
        wide = _wide(x)
        coefficients = torch.fft.rfft(wide.flatten(0, -3) if x.ndim > 2 else wide.unsqueeze(0), dim=1)
        matrices = self.spectrum().to(coefficients.dtype)
        mixed = torch.bmm(coefficients.transpose(0, 1), matrices.mT).transpose(0, 1)
        y = torch.fft.irfft(mixed, n=self.n, dim=1)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_channels)

    def linear_state(self) -> dict[str, Tensor]:
        """The state dict of the ``equiflop.nn.Linear`` between regular Reps of C_n that is the same map in the irreps.

        The weights are slices; the bias is ``sqrt(n)`` times as large, since the trivial coordinate of a signal is its
        sum over ``sqrt(n)``.
        """
        weight = self.weight.detach()
        singles = self._real_irreps
        state = dict(zip(("A.weight", "B.weight"), weight[:singles], strict=False))
        for k, pair in enumerate(weight[singles:].split(2) if self.n > singles else (), start=1):
            state[f"E{k}.weight"] = pair.flatten(0, 1)
        if self.bias is not None:
            state["A.bias"] = self.bias.detach() * math.sqrt(self.n)
        return state

    def load_linear_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of an ``equiflop.nn.Linear``: the inverse of :meth:`linear_state`.

        Raises:
            ValueError: if a name or a shape in ``state`` is not that of this layer's :meth:`linear_state`.
        """
        own = self.linear_state()
        expected, found = ({name: tuple(t.shape) for name, t in s.items()} for s in (own, state))
        if found != expected:
            name = next(name for name in (*expected, *found) if found.get(name) != expected.get(name))
            raise ValueError(
                f"state has {name} of shape {found.get(name)}; {self} needs {expected.get(name)} (None: not there)"
            )
        with torch.no_grad():
            stacked = torch.cat([state[name] for name in own if name != "A.bias"])
            self.weight.copy_(stacked.view_as(self.weight))
            if self.bias is not None:
                self.bias.copy_(state["A.bias"] / math.sqrt(self.n))

    def extra_repr(self) -> str:
        return f"n={self.n}, {self.in_channels} -> {self.out_channels} channels, bias={self.bias is not None}"


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32, which the Fourier transform needs; others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
