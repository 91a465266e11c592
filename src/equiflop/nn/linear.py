"""Equivariant linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Irrep, Rep, fourier_matrix
from equiflop.kernels import layout_of
from equiflop.kernels.choose import choose, is_made_for_runtimes
from equiflop.kernels.orders import Order, read, write
from equiflop.kernels.schur import Maps, algebra_product
from equiflop.kernels.watched import is_bare
from equiflop.nn.checks import check_axis
from equiflop.nn.fixed import FixedTensors
from equiflop.nn.initialise import fan_in_

OrderName = Literal["irreps", "group", "heads"]


class AlgebraLinear(nn.Module):
    """The block of one irrep of complex or quaternionic type: ``sum_k J_k (x) W_k``.

    ``weight`` holds the ``W_k`` below each other, shape ``(e * out_features, in_features)`` with e = 2 or 4.

    Args:
        irrep: the irrep.
        in_features: its multiplicity in the input.
        out_features: its multiplicity in the output.

    Shape: ``(..., d, in_features)`` to ``(..., d, out_features)``.
    """

    def __init__(
        self,
        irrep: Irrep,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.algebra = irrep.endomorphism_dim
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(self.algebra * out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance ``1 / (e * in_features)``."""
        fan_in_(self.weight, self.algebra * max(self.in_features, 1))

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds for an input ``(..., d, in_features)``."""
        return math.prod(shapes[0][:-1]) * self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        return algebra_product(x, self.weight, self.algebra)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, algebra={self.algebra}"


class Linear(FixedTensors):
    """The general equivariant linear map between two Reps: block-diagonal over the irreps (Schur's lemma).

    Every irrep that both sides have is a child module of the irrep's name: an ``nn.Linear`` from its multiplicity in
    the input to that in the output where its type is real, an :class:`AlgebraLinear` otherwise. The trivial irrep's
    child alone has a bias. Whatever adapts, quantises or watches ``nn.Linear`` finds the children, and the map stays
    equivariant. Source: Bökman et al., arXiv 2502.05169, section 3.

    Each side is ordered by irreps (the residual stream), in the group's own basis (``|G|`` copies of ``n`` channels
    that the group permutes; for pointwise functions and heads), or by heads that share every irrep. A side in the
    group's basis needs a multiple of the regular representation. Where the group's Fourier transform is made of
    additions, its factors live in the weights: a child's weights are ``gain(irrep)`` times those of the map between
    orthonormal bases.

    Initialised so that inputs of variance 1 give outputs of variance 1.

    Args:
        in_rep: type of the input axis.
        out_rep: type of the output axis (of each section); irreps that the input lacks are zero in the output.
        bias: whether to add a bias on the trivial irrep.
        in_order: order of the input axis.
        out_order: order of the output axis.
        sections: outputs of type ``out_rep`` behind each other, such as queries, keys and values.
        num_heads: heads, where a side is ordered by heads.

    Raises:
        ValueError: if the two Reps belong to different groups, or an order does not fit its Rep.

    Shape: ``(..., in_rep.dim)`` to ``(..., sections * out_rep.dim)``.
    """

    _version = 2
    fourier: Tensor

    def __init__(
        self,
        in_rep: Rep,
        out_rep: Rep,
        bias: bool = True,
        *,
        in_order: OrderName = "irreps",
        out_order: OrderName = "irreps",
        sections: int = 1,
        num_heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_rep.group != out_rep.group:
            raise ValueError(f"in_rep={in_rep!r} and out_rep={out_rep!r} belong to different groups")
        for side, rep, order in (("in", in_rep, in_order), ("out", out_rep, out_order)):
            if order == "group" and not rep.regular_copies:
                raise ValueError(
                    f"{side}_rep={rep!r} is not a multiple of the regular representation, "
                    f"which {side}_order='group' needs"
                )
        self.in_rep = in_rep
        self.out_rep = out_rep
        self.in_order = Order(in_order, num_heads=num_heads)
        self.out_order = Order(out_order, sections, num_heads)
        self._in_layout, self._out_layout = layout_of(in_rep), layout_of(out_rep)
        self._irreps: list[str | None] = []
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        pairs = zip(in_rep.group.irreps, in_rep.multiplicities, out_rep.multiplicities, strict=True)
        for i, (irrep, m_in, m_out) in enumerate(pairs):
            has_bias = i == 0 and bias and m_out > 0
            present = m_out > 0 and (m_in > 0 or has_bias)
            self._irreps.append(irrep.name if present else None)
            if present and irrep.type == "real":
                self.add_module(irrep.name, _uninitialised_linear(m_in, sections * m_out, has_bias, device, dtype))
            elif present:
                self.add_module(irrep.name, AlgebraLinear(irrep, m_in, sections * m_out, **dd))
        bases = (in_order, out_order).count("group")
        gains = zip(in_rep.group.irreps, self._in_layout.gains, strict=True)
        self._gains = {irrep.name: gain**bases for irrep, gain in gains}
        self.by_product = bases > 0 and self._in_layout.plan is None
        if self.by_product:
            self.fix("fourier", fourier_matrix(in_rep.group), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance ``gain^2 / (e * m_in)``, bias 0."""
        self.init_weights(lambda weight, e: fan_in_(weight, e * max(weight.shape[1], 1)))

    @torch.no_grad()
    def init_weights(self, init: Callable[[Tensor, int], object]) -> None:
        """Set the weights of the map between orthonormal bases, and the bias to 0.

        Args:
            init: fills a matrix ``(e * m_out, m_in)`` in place, given it and e.
        """
        for irrep, weight in self.weights():
            if weight.numel():
                init(weight, irrep.endomorphism_dim)
                gain = self.gain(irrep)
                if gain != 1.0:
                    weight.mul_(gain)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def in_features(self) -> int:
        """Length of the input axis."""
        return self.in_rep.dim

    @property
    def out_features(self) -> int:
        """Length of the output axis, all sections."""
        return self.out_order.sections * self.out_rep.dim

    def gain(self, irrep: Irrep) -> float:
        """Factor of an irrep's weights against those of the map between orthonormal bases."""
        return self._gains[irrep.name]

    @property
    def bias_gain(self) -> float:
        """Factor of the bias against that of the map between orthonormal bases: the output's alone."""
        return self._out_layout.gains[0] if self.out_order.kind == "group" else 1.0

    def weights(self) -> list[tuple[Irrep, Tensor]]:
        """The weight of every irrep that has one, shape ``(e * sections * m_out, m_in)``."""
        named = zip(self.in_rep.group.irreps, self._irreps, strict=True)
        return [(irrep, getattr(self, name).weight) for irrep, name in named if name is not None]

    @property
    def bias(self) -> Tensor | None:
        """The bias on the trivial irrep, shape ``(sections * m_out,)``, or None."""
        name = self._irreps[0]
        return None if name is None else getattr(getattr(self, name), "bias", None)

    @property
    def macs_per_vector(self) -> int:
        """MACs for one input vector: ``sum d * e * m_out * m_in``, transforms by matrix products included."""
        own = sum(irrep.dim * weight.numel() for irrep, weight in self.weights())
        return own + self._transform_macs()

    def _transform_macs(self) -> int:
        if not self.by_product:
            return 0
        order = self.in_rep.group.order
        into = order * self.in_rep.dim if self.in_order.kind == "group" else 0
        return into + (order * self.out_rep.dim * self.out_order.sections if self.out_order.kind == "group" else 0)

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds of the changes of basis by matrix products; the children count themselves."""
        return math.prod(shapes[0][:-1]) * self._transform_macs()

    def maps(self) -> Maps | None:
        """Weights and biases of all irreps for a kernel, or None where a child is missing, watched or replaced."""
        found: list[tuple[Tensor | None, Tensor | None]] = []
        if not is_bare(self, Linear):
            return None
        for name, m_in, m_out in zip(
            self._irreps, self.in_rep.multiplicities, self.out_rep.multiplicities, strict=True
        ):
            if m_in == m_out == 0:
                found.append((None, None))
                continue
            child = None if name is None else getattr(self, name)
            if child is None or not m_in or not (is_bare(child, nn.Linear) or is_bare(child, AlgebraLinear)):
                return None
            found.append((child.weight, getattr(child, "bias", None)))
        return tuple(found)

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.in_rep.dim, self._in_layout.text)
        if is_made_for_runtimes():  # asked first: looking after the children takes time in every step
            parts = (x, self.maps(), self._in_layout, self._out_layout, self.in_order, self.out_order)
            kernel = choose("linear", *parts)
            if kernel is not None:
                return kernel(*parts)
        fourier = self.fourier if self.by_product else None
        blocks = read(x, self._in_layout, self.in_order, fourier)
        outputs = [
            _absent(block, span.multiplicity * self.out_order.sections) if name is None else getattr(self, name)(block)
            for name, block, span in zip(self._irreps, blocks, self._out_layout.spans, strict=True)
        ]
        return write(outputs, self._out_layout, self.out_order, fourier)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the names of version 1 as well: ``weight_<irrep>`` and ``bias``, between orthonormal bases."""
        renamed = [(f"weight_{irrep.name}", f"{irrep.name}.weight", self.gain(irrep)) for irrep, _ in self.weights()]
        renamed.append(("bias", f"{self._irreps[0]}.bias", self.bias_gain))
        for old, new, gain in renamed:
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old) * gain
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script cannot compile equiflop's layers; use torch.jit.trace(model, images) or torch.export"
        )

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        orders = (
            ""
            if self.in_order.kind == self.out_order.kind == "irreps"
            else (f", {self.in_order.kind} -> {self.out_order.kind}")
        )
        sections = "" if self.out_order.sections == 1 else f"{self.out_order.sections} x "
        return f"{self.in_rep} -> {sections}{self.out_rep}{orders}, {count} parameters, bias={self.bias is not None}"


def _absent(block: Tensor, width: int) -> Tensor:
    """The output of an irrep that the input lacks: zeros."""
    return F.pad(block[..., :0], (0, width))


def _uninitialised_linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    device = torch.get_default_device() if device is None else device
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=device, dtype=dtype)
