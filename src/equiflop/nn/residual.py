"""Residual branches: their modules one after the other, or one kernel where nobody watches them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

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


class Branch(NamedTuple):
    """The modules of a residual branch.

    Attributes:
        norm: a norm or identity.
        body: attention or MLP, best with :class:`Body`'s method.
        scale: a layer scale or identity.
        drop_path: stochastic depth or identity.
        options: keywords of the body.
    """

    norm: nn.Module
    body: Any
    scale: nn.Module
    drop_path: nn.Module
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def residual_branches(x: Tensor, layout: Layout, *branches: Branch, residual: bool = True) -> Tensor:
    """``x = x + drop_path(scale(body(norm(x), **options)))``, branch after branch; the sums only with ``residual``.

    Args:
        x: shape ``(B, N, dim)``.
        layout: of the axis.
        *branches: what is added.
        residual: whether the input is added.
    """
    parts = [_parts(x, branch, residual) for branch in branches]
    y = kernels.branches(x, layout, parts)
    if y is not None:
        return y
    for branch, found in zip(branches, parts, strict=True):
        y = None if len(branches) == 1 else kernels.branches(x, layout, [found])
        if y is not None:
            x = y
            continue
        y = branch.scale(branch.body(branch.norm(x), **branch.options))
        if found is None:
            y = branch.drop_path(y)
        elif found.keep is not None:  # drawn already: once, whichever path computes the branch
            y = y * found.keep
        x = x + y if residual else y
    return x


def _parts(x: Tensor, branch: Branch, residual: bool) -> kernels.Parts | None:
    """The branch's tensors, or None where a module is watched, wrapped, or of a kind that kernels do not know."""
    norm, body, scale, drop_path, options = branch
    norm_parts: Any
    gamma: Any
    if is_bare(norm, LayerNorm) or is_bare(norm, Affine):
        norm_parts = norm.parts()  # type: ignore[operator]
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
