"""A residual branch: its modules one after the other, or one kernel where nobody watches them."""

from __future__ import annotations

from typing import Any, Protocol

from timm.layers import DropPath
from torch import Tensor, nn

from equiflop.kernels import Layout
from equiflop.kernels import branch as kernels
from equiflop.kernels.watched import is_bare
from equiflop.nn.norm import Affine, LayerNorm, LayerScale


class Body(Protocol):
    """Attention or MLP of a branch."""

    def parts(self, **options: Any) -> kernels.Mlp | kernels.Attention | None:
        """What a kernel needs, or None where the module has to be called."""
        ...


def residual_branch(
    x: Tensor,
    layout: Layout,
    norm: nn.Module,
    body: Any,
    scale: nn.Module,
    drop_path: nn.Module,
    *,
    residual: bool = True,
    **options: Any,
) -> Tensor:
    """``x + drop_path(scale(body(norm(x), **options)))``, the sum only with ``residual``.

    Args:
        x: shape ``(B, N, dim)``.
        layout: of the axis.
        norm: a norm or identity.
        body: a module with :class:`Body`'s method.
        scale: a layer scale or identity.
        drop_path: stochastic depth or identity.
        residual: whether the input is added.
        **options: of the body.
    """
    parts = _parts(x, norm, body, scale, drop_path, residual, options)
    if parts is not None:
        y = kernels.branch(x, layout, parts)
        if y is not None:
            return y
    y = scale(body(norm(x), **options))
    if parts is None:
        y = drop_path(y)
    elif parts.keep is not None:  # drawn already: once, whichever path computes the branch
        y = y * parts.keep
    return x + y if residual else y


def _parts(
    x: Tensor, norm: Any, body: Any, scale: Any, drop_path: Any, residual: bool, options: dict[str, Any]
) -> kernels.Parts | None:
    """The branch's tensors, or None where a module is watched, wrapped, or of a kind that kernels do not know."""
    if is_bare(norm, LayerNorm) or is_bare(norm, Affine):
        norm_parts = norm.parts()
    elif is_bare(norm, nn.Identity):
        norm_parts = None
    else:
        return None
    if is_bare(scale, LayerScale):
        gamma = scale.gamma
    elif is_bare(scale, nn.Identity):
        gamma = None
    else:
        return None
    body_parts = body.parts(**options) if hasattr(body, "parts") else None
    if body_parts is None:
        return None
    if is_bare(drop_path, DropPath):
        # what stochastic depth makes of ones is its factor for every sample
        keep = drop_path(x.new_ones(x.shape[0], 1, 1)) if drop_path.training and drop_path.drop_prob else None
    elif is_bare(drop_path, nn.Identity):
        keep = None
    else:
        return None
    return kernels.Parts(norm_parts, body_parts, gamma, keep, residual)
