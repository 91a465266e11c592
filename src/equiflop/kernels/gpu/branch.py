"""Residual branches of a transformer by Triton kernels: one for a norm, one for a product and all that is around it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from equiflop.kernels import branch as branches
from equiflop.kernels import norm as norms
from equiflop.kernels import schur
from equiflop.kernels.branch import Attention, Mlp, Parts
from equiflop.kernels.choose import TABLE, Variant, is_eager, is_traced_for_kernels
from equiflop.kernels.layout import Layout

#: Compute capability from which bfloat16 and asynchronous copies are there.
CAPABILITY = (8, 0)
#: Lanes of fewer channels fill no tile.
CHANNELS = 16

#: Where kernels are taken.
_where: Literal["nowhere", "on GPUs", "anywhere"] = "nowhere" if os.environ.get("EQUIFLOP_TRITON") == "0" else "on GPUs"


@contextmanager
def _taken(where: Literal["nowhere", "anywhere"]) -> Iterator[None]:
    global _where
    before, _where = _where, where
    try:
        yield
    finally:
        _where = before


def without_triton() -> AbstractContextManager[None]:
    """Within this context GPUs take the form that a compiler or PyTorch's own operations make, to compare with."""
    return _taken("nowhere")


def anywhere() -> AbstractContextManager[None]:
    """Within this context kernels are taken on any device and in any dtype, for the interpreter and for tracing."""
    return _taken("anywhere")


def fits(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> bool:
    """Whether the kernels compute all of these branches."""
    if (
        _where == "nowhere"
        or torch._C._are_functorch_transforms_active()
        or not (is_traced_for_kernels() or is_eager(x))
    ):
        return False
    if not (_where == "anywhere" or _is_for(x)) or not branches.fits(x, layout, parts):
        return False
    if not layout.code or (layout.copies or 0) < CHANNELS:
        return False
    return all(_fits_body(part.body) and not isinstance(part.norm, norms.Affine) for part in parts)


def _is_for(x: Tensor) -> bool:
    """Products in half precision on a GPU that has the units."""
    return x.is_cuda and _compute_dtype(x) in (torch.bfloat16, torch.float16) and _has_units(x.device.index)


@torch.compiler.assume_constant_result
def _has_units(index: int) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= CAPABILITY


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _fits_body(body: Mlp | Attention) -> bool:
    if isinstance(body, Attention):
        return True
    return bool(body.hidden.code) and body.bias1 is None and body.bias2 is None and bool(activation_of(body.act))


def activation_of(act: nn.Module) -> str:
    """The name of a pointwise module in the kernels; empty for one that they do not know."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else ""
    return {QuickGELU: "quick_gelu", nn.SiLU: "silu", nn.ReLU: "relu"}.get(type(act), "")


def by_triton(x: Tensor, layout: Layout, parts: Sequence[Parts]) -> Tensor:
    """``x + path * scale * body(norm(x))``, branch after branch."""
    from equiflop.kernels.gpu.functions import Normalise

    dtype = _compute_dtype(x)
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    for part in parts:
        normal = rows
        if part.norm is not None:
            assert isinstance(part.norm, norms.Norm)
            entries = tuple(norms.entry_weights(layout, part.norm))
            rows, normal = Normalise.apply(
                rows, part.norm.weight, part.norm.bias, layout.code, entries, part.norm.eps, dtype
            )
        residual = rows if part.residual else None
        if part.norm is None and residual is not None:  # a compiler wants every input of a function to be another
            residual = rows.view_as(rows)
        path = None if part.keep is None else part.keep.reshape(-1)
        if isinstance(part.body, Mlp):
            rows = _mlp(normal.to(dtype), residual, path, part.body, part.scale, layout)
        else:
            rows = _attention(normal.to(dtype), residual, path, part.body, part.scale, layout, shape)
    return rows.view(shape)


def _mlp(
    normal: Tensor, residual: Tensor | None, path: Tensor | None, mlp: Mlp, scale: Tensor | None, layout: Layout
) -> Tensor:
    from equiflop.kernels.gpu.functions import Map, multiply_twice

    first, bias1 = _tensors(mlp.fc1, normal.dtype)
    second, bias2 = _tensors(mlp.fc2, normal.dtype)
    hows, activation = (Map(layout.code), Map(layout.code)), activation_of(mlp.act)
    around = {"scale": scale, "residual": residual, "path": path}
    return multiply_twice(normal, (first, second), (bias1, bias2), hows, activation, **around)


def _attention(
    normal: Tensor,
    residual: Tensor | None,
    path: Tensor | None,
    body: Attention,
    scale: Tensor | None,
    layout: Layout,
    shape: torch.Size,
) -> Tensor:
    from equiflop.kernels.gpu.functions import Map, multiply

    axis: Literal["heads", "group"] = "heads" if body.heads == "coupled" else "group"
    heads = body.num_heads if axis == "heads" else 1
    qkv = multiply(normal, *_tensors(body.qkv, normal.dtype), Map(layout.code, writes=axis, sections=3, heads=heads))
    q, k, v = qkv.view(*shape[:2], 3, body.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    attended = branches.attend(q, k, v, body).transpose(1, 2).reshape(-1, shape[-1])
    weights, bias = _tensors(body.proj, normal.dtype)
    how = Map(layout.code, reads=axis, heads=heads)
    return multiply(attended, weights, bias, how, scale=scale, residual=residual, path=path)


def _tensors(maps: schur.Maps, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """Weights and the trivial irrep's bias in the products' dtype."""
    bias = maps[0][1]
    return [weight.to(dtype) for weight, _ in maps if weight is not None], None if bias is None else bias.to(dtype)


TABLE["branches"] = (
    Variant("triton", fits, by_triton, "GPU from Ampere on, half precision, irreps of real type"),
    *TABLE["branches"],
)
