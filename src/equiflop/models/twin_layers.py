"""timm's layers whose own parameters have to be tied; all else of them is timm's."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import Block as SamBlock
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from equiflop.groups import Rep
from equiflop.image_group import ImageGroup, ImageMove
from equiflop.models.tied import invariant_channels, same_copies, spread_channels, tied
from equiflop.nn.fit import warn_of_fit
from equiflop.nn.linear import Linear
from equiflop.nn.norm import LayerNorm
from equiflop.nn.patch_embed import PatchEmbed
from equiflop.nn.pos_embed import PositionEmbedding
from equiflop.nn.position import bias_of_copies, fit_table
from equiflop.nn.spatial import FromSpatial
from equiflop.nn.tied_conv import TiedConv2d


@torch.no_grad()
def fill(module: Any, value: float, *names: str) -> None:
    """Set parameters of a module as they are stored, where they are there."""
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.fill_(value)


class TiedScales:
    """Layer scales per (irrep, multiplicity)."""

    init_values: float | None
    gamma_1 = tied("gamma_1", spread_channels)
    gamma_2 = tied("gamma_2", spread_channels)

    def reset_parameters(self) -> None:
        fill(self, self.init_values or 0.0, "gamma_1", "gamma_2")


class TwinEvaBlock(TiedScales, EvaBlock):
    """EVA's block."""


class TwinBeitBlock(TiedScales, BeitBlock):
    """BEiT's block."""


class TiedBiases:
    """Biases of queries and values the same in all copies."""

    q_bias = tied("q_bias", same_copies)
    v_bias = tied("v_bias", same_copies)

    def reset_parameters(self) -> None:
        fill(self, 0.0, "q_bias", "v_bias", "relative_position_bias_table")
        self._init_buffers()  # type: ignore[attr-defined]


class TwinEvaAttention(TiedBiases, EvaAttention):
    """EVA's attention."""


class TwinBeitAttention(TiedBiases, BeitAttention):
    """BEiT's attention; the relative position bias of copy ``g`` is seen through ``g^-1``."""

    group: ImageGroup

    def fit_weights(self, state: dict[str, Any], prefix: str) -> str | None:
        """Fit the table of another grid of tokens within a state dict; see :func:`equiflop.nn.fit.fit_checkpoint`."""
        return fit_table(self._parameters["relative_position_bias_table"], self.window_size, state, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        warn_of_fit(self.fit_weights(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get_rel_pos_bias(self) -> Tensor:
        return bias_of_copies(super()._get_rel_pos_bias(), self.group, tuple(self.window_size), prefix=1)


class LinearToSharedHeads(Linear):
    """Keys or values of fewer heads than there are queries, written out for every head of the queries.

    So each has a rotary table of its own. timm repeats them behind the rotation, where one table serves all heads.

    Attributes:
        head_dim: channels of a head.
        repeats: heads of queries that share a head of keys and values.
    """

    head_dim: int
    repeats: int

    def forward(self, x: Tensor) -> Tensor:
        heads = super().forward(x).unflatten(-1, (-1, self.head_dim))
        return heads.repeat_interleave(self.repeats, dim=-2).flatten(-2)


class TwinParallelScalingBlock(ParallelScalingBlock):
    """A bias of the MLP the same in all copies."""

    mlp_bias = tied("mlp_bias", same_copies)

    def reset_parameters(self) -> None:
        fill(self, 0.0, "mlp_bias")


class TwinDiffParallelScalingBlock(DiffParallelScalingBlock):
    """A bias of the MLP the same in all copies."""

    mlp_bias = tied("mlp_bias", same_copies)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        fill(self, 0.0, "mlp_bias")


class TwinAttentionPool(AttentionPoolLatent):
    """A query of invariant channels."""

    latent = tied("latent", invariant_channels)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self._parameters["latent"], std=self.latent_dim**-0.5)

    def init_weights(self) -> None:
        self.reset_parameters()


class TwinAttentionPoolOfQueries(AttentionPoolLatent):
    """Without a projection of the query it is in the group's basis, and the same in all copies."""

    latent = tied("latent", same_copies)

    reset_parameters = TwinAttentionPool.reset_parameters
    init_weights = TwinAttentionPool.init_weights


class TwinNaFlexEmbeds(NaFlexEmbeds):
    """The embedding of images as a whole grid of patches; sequences of patches of several images are refused."""

    cls_token = tied("cls_token", invariant_channels)
    reg_token = tied("reg_token", invariant_channels)

    def reset_parameters(self) -> None:
        for name in ("cls_token", "reg_token"):
            if self._parameters[name] is not None:
                nn.init.normal_(self._parameters[name], std=1e-6)

    def forward(
        self, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        if patch_coord is not None:
            raise ValueError(
                "patch_coord is given: the twin of a NaFlexVit takes images (B, C, H, W), not sequences of patches"
            )
        x = self.norm(self.proj(x))
        grid = (x.shape[1], x.shape[2])
        if self.pos_embed_ar_preserving and grid[0] != grid[1]:
            raise ValueError(
                f"an image of {grid[0]}x{grid[1]} patches is not square: with pos_embed_ar_preserving=True the "
                "position embedding would be cut at one side, which breaks the symmetry"
            )
        x = x.flatten(1, 2)
        if self.pos_embed is not None:
            x = x + self.pos_embed(grid)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return self.pos_drop(torch.cat([*prefix, x], dim=1)), grid


class TwinSamBlock(SamBlock):
    """The block of SAM's encoder; its attention takes care of windows."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class AttentionOfCopies(nn.Module):
    """Attention on a grid of tokens, within windows or not, for regular heads.

    Copy ``g`` of queries, keys and values is turned back by ``g^-1``. There everything is as in the plain network:
    windows from the top left on, padding at the bottom and on the right, relative positions. So windows need not divide
    the grid, which in the plain network breaks the symmetry.

    Args:
        core: timm's attention for the heads of one copy, without its linear maps.
        qkv: from the residual stream to queries, keys and values in the group's basis.
        proj: back.
        proj_drop: dropout behind it.
        group: the group that acts on the grid.
        window_size: side of a window in tokens, or 0 for attention over the whole grid.

    Shape: ``(B, H, W, C)`` to the same.
    """

    def __init__(
        self,
        core: SamAttention,
        qkv: nn.Module,
        proj: nn.Module,
        proj_drop: nn.Module,
        group: ImageGroup,
        window_size: int,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.core = core
        self.proj = proj
        self.proj_drop = proj_drop
        self.group = group
        self.window_size = window_size
        moves = [(a, move, group.moves[group.inverse(a)]) for a, move in enumerate(group.moves)]
        kinds = ([entry for entry in moves if entry[1].transposes == turned] for turned in (False, True))
        #: Copies that see the grid as it is, and those that see its axes exchanged: number, move and inverse move.
        self.views = [kind for kind in kinds if kind]

    def forward(self, x: Tensor) -> Tensor:
        shape = (3, self.group.order, -1)
        copies = self.qkv(x).unflatten(-1, shape)
        no_token = self.qkv(x.new_zeros(1, 1, 1, x.shape[-1])).unflatten(-1, shape) if self.window_size else None
        results: dict[int, Tensor] = {}
        for view in self.views:
            seen = torch.cat([_moved(back, copies[..., a, :].flatten(-2)) for a, _, back in view])
            attended = self._attend(seen, None if no_token is None else no_token[..., 0, :].flatten(-2))
            parts = attended.unflatten(0, (len(view), -1))
            results |= {a: _moved(move, parts[i]) for i, (a, move, _) in enumerate(view)}
        joined = torch.cat([results[a] for a in range(self.group.order)], dim=-1)
        return self.proj_drop(self.proj(joined))

    def _attend(self, qkv: Tensor, no_token: Tensor | None) -> Tensor:
        """Attention of one copy, ``(B, H, W, 3 * n)`` to ``(B, H, W, n)``."""
        if no_token is None:
            return self.core(qkv)
        windows, padded = window_partition(_filled(qkv, no_token, self.window_size), self.window_size)
        return window_unpartition(self.core(windows), self.window_size, (qkv.shape[1], qkv.shape[2]), padded)

    def extra_repr(self) -> str:
        windows = f"windows of {self.window_size}x{self.window_size}" if self.window_size else "the whole grid"
        return f"{windows}, in {self.group.order} copies"


def _filled(x: Tensor, no_token: Tensor, size: int) -> Tensor:
    """A grid of whole windows: where there is no token, below and on the right, is what a map makes of zeros."""
    if has_torch_function((x, no_token)):  # one step of a symbolic trace
        return handle_torch_function(_filled, (x, no_token), x, no_token, size)
    batch, height, width = x.shape[:3]
    below, right = -height % size, -width % size
    if right:
        x = torch.cat([x, no_token.expand(batch, height, right, -1)], dim=2)
    if below:
        x = torch.cat([x, no_token.expand(batch, below, width + right, -1)], dim=1)
    return x


def _moved(move: ImageMove, x: Tensor) -> Tensor:
    """Move a grid of tokens, ``(B, H, W, C)``."""
    return move(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbedWithPositions(PatchEmbed):
    """A patch embedding that adds the position embedding for images of any size.

    Attributes:
        positions: the position embedding.
    """

    positions: PositionEmbedding

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.positions((x.shape[1], x.shape[2])).unflatten(1, (x.shape[1], x.shape[2]))


class NormOfMap(LayerNorm):
    """The norm of a map ``(B, C, H, W)`` whose channels have a type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SamNeck(nn.Sequential):
    """The neck of SAM's encoder: a product, a norm, a tied convolution, a norm, in the group's basis.

    Args:
        proj: from the residual stream to the group's basis.
        norm: behind it.
        conv: in the group's basis.
        last_norm: behind that.
        rep: type of the output.

    Shape: ``(B, C, H, W)`` to ``(B, rep.dim, H, W)``.
    """

    def __init__(
        self, proj: Linear, norm: nn.Module, conv: TiedConv2d, last_norm: nn.Module, rep: Rep, **dd: Any
    ) -> None:
        super().__init__(proj, norm, conv, last_norm, FromSpatial(rep, **dd))
        self.rep = rep

    def forward(self, x: Tensor) -> Tensor:
        proj, norm, conv, last_norm, to_irreps = self
        x = conv(norm(proj(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return to_irreps(last_norm(x).unflatten(-1, (self.rep.group.order, -1))).permute(0, 3, 1, 2)
