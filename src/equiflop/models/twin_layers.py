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
from torch import Tensor, nn

from equiflop.image_group import ImageGroup
from equiflop.models.tied import invariant_channels, same_copies, spread_channels, tied
from equiflop.nn.fit import warn_of_fit
from equiflop.nn.linear import Linear
from equiflop.nn.position import bias_of_copies, fit_table


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
