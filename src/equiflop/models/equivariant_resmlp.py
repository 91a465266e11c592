"""E(ResMLP): timm's ``MlpMixer`` with equivariant residual MLP blocks.

Longer than other files, since the family is one story: its biases, blocks and invariants serve no other network.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import get_act_layer, to_2tuple
from timm.models.mlp_mixer import MlpMixer, ResBlock
from torch import Tensor, nn

from equiflop.grids import ImageGroup, as_image_group
from equiflop.groups import Rep
from equiflop.models.classifier import replace_classifier
from equiflop.models.image_size import check_image_size
from equiflop.models.initialise import init_linears
from equiflop.models.resmlp_layers import EquivariantResBlock, MeanInvariants, PairedInvariants
from equiflop.nn import Affine, Invariants, PatchEmbed
from equiflop.nn.fit import fit_checkpoint
from equiflop.nn.fixed import settle_constants
from equiflop.nn.invariants import InvariantKind, all_magnitudes


class EquivariantResMLP(MlpMixer):
    """A ResMLP whose features transform under a group of image symmetries.

    Between blocks features are plain ``(B, N, C)`` tensors, tokens in raster order, channels ordered by ``self.rep``.

    Keywords of timm's ResMLP keep their meaning; those of our own are:

    Args:
        group: ``"flop"``, ``"updown"``, ``"flips"``, ``"rot4"``, ``"octic"`` or an :class:`~equiflop.ImageGroup`.
        invariants: what the head sees; see :class:`equiflop.nn.Invariants`.
        matched_bias: a bias wherever channel and token are of one irrep, as published for the mirror group, in place of
            biases on trivial channels. For groups with one-dimensional irreps.
        head: ``"mean"``, invariants of every token, averaged; or ``"paired"``, as published for the mirror group:
            symmetric channels at symmetric tokens and antisymmetric ones at antisymmetric tokens share weights.
        init_values: initial layer scale.

    Raises:
        ValueError: if width or image size do not fit the group.

    Source: Bökman et al., arXiv 2502.05169, section 4.
    """

    fit_checkpoint = staticmethod(fit_checkpoint)

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 16,
        num_blocks: int = 12,
        embed_dim: int = 384,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        act_layer: str | type[nn.Module] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        group: str | ImageGroup = "flop",
        invariants: InvariantKind | None = None,
        matched_bias: bool = False,
        head: Literal["mean", "paired"] = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group = as_image_group(group)
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r} is not supported; use 'avg' or ''")
        check_image_size(group, img_size)
        rep = Rep.regular_of_dim(group, embed_dim, "embed_dim")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if head not in ("mean", "paired"):
            raise ValueError(f"head={head!r} is unknown; choose 'mean' or 'paired'")
        # timm's constructor makes the plain network, without memory; then the parts of this one take their places.
        super().__init__(
            num_classes=num_classes,
            img_size=img_size,
            in_chans=in_chans,
            patch_size=patch_size,
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            mlp_ratio=mlp_ratio,
            block_layer=ResBlock,
            drop_rate=drop_rate,
            global_pool=global_pool,
            device="meta",
        )
        self.group = group
        self.rep = rep
        self.stem = PatchEmbed(rep, group, img_size, to_2tuple(patch_size), in_chans, **dd)
        grid = self.stem.grid_size
        for i in range(num_blocks):
            self.blocks[i] = EquivariantResBlock(
                rep,
                group,
                grid,
                matched_bias=matched_bias,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                act=get_act_layer(act_layer)() if act_layer is not None else None,
                drop=proj_drop_rate,
                drop_path=drop_path_rate,
                **dd,
            )
        self.norm = nn.Identity()
        kind: InvariantKind = invariants or "trivial"

        def make_invariants(kind: InvariantKind) -> Invariants:
            paired = head == "paired"
            return PairedInvariants(rep, kind, group, grid, **dd) if paired else MeanInvariants(rep, kind, **dd)

        self.invariants = make_invariants(kind)
        every: InvariantKind = "norm" if head == "paired" else all_magnitudes(rep.group)
        self.feature_invariants = self.invariants if invariants else make_invariants(every)
        self.head_hidden_size = self.invariants.out_features
        self.head_norm = Affine(Rep.trivial(group, self.head_hidden_size), **dd)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()
        self.register_load_state_dict_post_hook(settle_constants)

    def init_weights(self, nlhb: bool = False) -> None:
        """Linear maps truncated normal 0.02, biases 0, as published; patch embedding as ``nn.Conv2d``."""
        init_linears(self, skip=("stem",))

    def feature_rep(self, block: int) -> Rep:
        """Type of the features after block ``block``."""
        return self.rep

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; see timm.

        Raises:
            ValueError: if the pooling is not supported.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool={global_pool!r} is not supported; use 'avg' or ''")
            self.global_pool = global_pool
        replace_classifier(self, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Invariants, their mean over tokens, affine "norm" and classifier.

        Without classifier (``num_classes=0``) the output has ``num_features`` values, as everywhere in timm: what the
        classifier would see, and behind it the invariants of all other channels, without the "norm"; where
        ``invariants`` was given, what the classifier would see alone.

        Args:
            x: features, shape ``(B, N, embed_dim)``; returned as they are if there is neither pooling nor classifier.
            pre_logits: return what a classifier sees, shape ``(B, head_hidden_size)``, instead of the logits.
        """
        if self.global_pool == "avg" and self.num_classes == 0 and not pre_logits:
            every, seen = self.feature_invariants(x), self.head_hidden_size
            x = torch.cat([self.head_norm(every[..., :seen]), every[..., seen:]], dim=-1)
        elif self.global_pool == "avg":
            x = self.head_norm(self.invariants(x))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)
