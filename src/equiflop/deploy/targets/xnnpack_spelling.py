"""Graphs spelled in the operators that XNNPACK takes.

A mean is a product with a constant row, attention two products and a softmax, a split so many slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten

#: Constants of one value alone; a product with such a row is a sum, and does not count as a product.
FILLED = "filled"


class Spelled(nn.Module):
    """A graph whose operators XNNPACK knows, computing the same.

    Args:
        graph: of ``torch.export``, as a module, of fixed sizes.
        example: images ``(B, C, H, W)``.
    """

    def __init__(self, graph: fx.GraphModule, example: Tensor) -> None:
        super().__init__()
        self.network = graph
        with torch.no_grad():
            self(example)  # makes the constants

    def forward(self, images: Tensor) -> Any:
        return _Speller(self).run(images)

    def filled(self, shape: Sequence[int], value: float) -> Tensor:
        """A constant."""
        name = f"{FILLED}_{'_'.join(map(str, shape))}_{value}".replace(".", "_")
        if name not in self._buffers:
            self.register_buffer(name, torch.full(tuple(shape), value))
        return self.get_buffer(name)


class _Speller(fx.Interpreter):
    def __init__(self, spelled: Spelled) -> None:
        super().__init__(spelled.network)
        self.filled = spelled.filled

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in SPELLINGS:
            return SPELLINGS[target](self.filled, *args, **kwargs)
        return target(*args, **kwargs)


#: Makes a constant of a shape and a value.
Filled = Callable[[Sequence[int], float], Tensor]


def _summed(filled: Filled, x: Tensor, dims: Sequence[int] | None, keepdim: bool, factor: float) -> Tensor:
    """Over any axes, as a product with a constant row."""
    axes = sorted(axis % x.dim() for axis in (dims or range(x.dim())))
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    count = math.prod(x.shape[axis] for axis in axes)
    last = x if rest + axes == list(range(x.dim())) else x.permute(*rest, *axes)
    row = filled((1, count), factor)
    total = F.linear(last.reshape([*(x.shape[axis] for axis in rest), count]), row)
    kept = [1 if axis in axes else x.shape[axis] for axis in range(x.dim())]
    return total.reshape(kept if keepdim else [x.shape[axis] for axis in rest])


def _mean(
    filled: Filled, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    count = math.prod(x.shape[axis] for axis in (dims or range(x.dim())))
    return _summed(filled, x, dims, keepdim, 1.0 / count)


def _sum(
    filled: Filled, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    return _summed(filled, x, dims, keepdim, 1.0)


def _layer_norm(
    filled: Filled,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = list(range(-len(shape), 0))
    x = x - _mean(filled, x, axes, True)
    x = x * torch.rsqrt(_mean(filled, x * x, axes, True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _rms_norm(
    filled: Filled, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x * torch.rsqrt(_mean(filled, x * x, list(range(-len(shape), 0)), True) + eps)
    return x if weight is None else x * weight


def _attention(
    filled: Filled,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead, (n, width), m = q.shape[:-2], q.shape[-2:], k.shape[-2]
    flat = math.prod(lead)
    factor = width**-0.5 if scale is None else scale
    logits = torch.bmm((q * factor).reshape(flat, n, width), k.transpose(-1, -2).reshape(flat, width, m))
    if attn_mask is not None:
        logits = (logits.reshape(*lead, n, m) + attn_mask).reshape(flat, n, m)
    return torch.bmm(logits.softmax(dim=-1), v.reshape(flat, m, -1)).reshape(*lead, n, -1)


def _matmul(filled: Filled, a: Tensor, b: Tensor) -> Tensor:
    """One matrix for many on its right: as a linear map, since it would be copied for each."""
    if a.dim() == 2 and b.dim() > 2:
        return F.linear(b.transpose(-1, -2), a).transpose(-1, -2)
    return torch.matmul(a, b)


def _vector_norm(
    filled: Filled,
    x: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    if ord != 2:
        return torch.linalg.vector_norm(x, ord, dim, keepdim)
    return torch.sqrt(_sum(filled, x * x, dim, keepdim))


def _cut(filled: Filled, x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    ends = np.cumsum(sizes).tolist()
    return [x.narrow(dim, end - size, size) for end, size in zip(ends, sizes, strict=True)]


def _split(filled: Filled, x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return _cut(filled, x, [min(size, x.shape[dim] - start) for start in range(0, x.shape[dim], size)], dim)


def _chunk(filled: Filled, x: Tensor, count: int, dim: int = 0) -> list[Tensor]:
    return _split(filled, x, -(-x.shape[dim] // count), dim)


def _select(filled: Filled, x: Tensor, dim: int, index: int) -> Tensor:
    shape = list(x.shape)
    del shape[dim]
    return x.narrow(dim, index % x.shape[dim], 1).reshape(shape)


def _unbind(filled: Filled, x: Tensor, dim: int = 0) -> list[Tensor]:
    return [_select(filled, x, dim, index) for index in range(x.shape[dim])]


def _expand(filled: Filled, x: Tensor, sizes: Sequence[int], implicit: bool = False) -> Tensor:
    old = [1] * (len(sizes) - x.dim()) + list(x.shape)
    new = [own if size == -1 else size for size, own in zip(sizes, old, strict=True)]
    return x.reshape(new) if new == old else x + filled(new, 0.0)


def _unsqueeze(filled: Filled, x: Tensor, dim: int) -> Tensor:
    dim %= x.dim() + 1
    return x.reshape(*x.shape[:dim], 1, *x.shape[dim:])


def _squeeze(filled: Filled, x: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
    some = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % x.dim() for dim in some if x.shape[dim] == 1}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


def _stack(filled: Filled, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat([_unsqueeze(filled, part, dim) for part in parts], dim)


def _same(filled: Filled, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


#: How operators that XNNPACK does not take are spelled.
SPELLINGS: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.chunk.default: _chunk,
    aten.dropout.default: _same,
    aten.expand.default: _expand,
    aten.layer_norm.default: _layer_norm,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.matmul.default: _matmul,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split.sizes: _cut,
    aten.split_with_sizes.default: _cut,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.stack.default: _stack,
    aten.sum.dim_IntList: _sum,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
}
