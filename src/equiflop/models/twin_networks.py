"""The classes of twins: timm's networks with equivariant parts, where a class has to know what timm's does."""

from __future__ import annotations

from typing import Any

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.models.classifier import replace_classifier
from equiflop.models.equivariant_transformer import EquivariantTransformer, check_pooling
from equiflop.models.equivariant_vit import EquivariantVisionTransformer
from equiflop.models.substitution import Substitution, naflex_embeds, position_bias, rotary, sam_neck
from equiflop.models.tied import become, invariant_channels, made_by, tied
from equiflop.models.twin_layers import PatchEmbedWithPositions
from equiflop.nn import PatchEmbed


def pool_tokens(network: Any, x: Tensor) -> Tensor:
    """The mean of the patches, the class token, or all tokens, where timm's class has no method for it."""
    if not network.global_pool:
        return x
    return x[:, network.num_prefix_tokens :].mean(dim=1) if network.global_pool == "avg" else x[:, 0]


class EquivariantVisionTransformerDistilled(EquivariantTransformer, VisionTransformerDistilled):
    """E(DeiT) with a distillation token."""

    head_dist: nn.Module
    own_parts = ("head", "head_dist", "head_drop")
    classifier = ("head", "head_dist")

    def _replace_head(self, invariants: Any, dd: dict[str, Any]) -> None:
        super()._replace_head(invariants, dd)
        self.head_dist = self._classifier(self.head_dist, "head_dist", dd)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads; see timm.

        Raises:
            ValueError: if the pooling is not that of the class and distillation tokens.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool={global_pool!r} is not supported by a distilled network; use 'token'")
        replace_classifier(self, num_classes)
        head = self.head
        replace_classifier(self, num_classes)
        self.head, self.head_dist = head, self.head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """The mean of what both tokens say; in training with ``distilled_training`` both."""
        tokens = [self._invariants(x[:, i], pre_logits) for i in (0, 1)]
        if not pre_logits:
            tokens = [self.head(tokens[0]), self.head_dist(tokens[1])]
            if self.distilled_training and self.training:
                return tokens[0], tokens[1]
        return (tokens[0] + tokens[1]) / 2


class EquivariantEva(EquivariantTransformer, Eva):
    """E(X) of EVA, EVA-02, DINOv3 and their like."""

    rope: Any
    own_parts = ("head", "head_drop", "rope")

    fix_init = True
    opens_gates = False
    fc_norm_keyword = "use_fc_norm"

    def substitute(self, parts: Substitution) -> None:
        super().substitute(parts)
        if self.rope is not None:
            self.rope = rotary(parts, self.rope, "rope", self.blocks[0].attn.num_heads, self.patch_embed.grid_size)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        if self.rope is not None:
            self.rope.update_feat_shape(grid)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else self.patch_embed.grid_size
        x = self.pos_drop(self._tokens(x))
        rope = None if self.rope is None else self.rope.get_embed(grid if self.rope.grid_size is None else None)
        if self.patch_drop is not None:
            x, keep = self.patch_drop(x)
            if rope is not None and keep is not None:
                rope = apply_keep_indices_nlc(x, rope, keep)  # (B, [depth,] heads, N, D)
                rope = rope.transpose(0, 1) if self.rope_mixed else rope
        return x, rope


class EquivariantBeit(EquivariantTransformer, Beit):
    """E(X) of BEiT."""

    fix_init = True
    opens_gates = False
    fc_norm_keyword = "use_fc_norm"
    cls_token = tied("cls_token", invariant_channels)
    pos_embed = tied("pos_embed", made_by)
    rel_pos_bias: Any
    own_parts = ("head", "head_drop", "rel_pos_bias")

    def substitute(self, parts: Substitution) -> None:
        if self.rel_pos_bias is not None:
            self.rel_pos_bias = position_bias(parts, self.rel_pos_bias, "rel_pos_bias", 1)
        super().substitute(parts)

    pool = pool_tokens

    def _set_grid(self, grid: tuple[int, int]) -> None:
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.set_window_size(grid)
        for block in self.blocks:
            block.attn.set_window_size(grid)


class EquivariantVisionTransformerRelPos(EquivariantTransformer, VisionTransformerRelPos):
    """E(ViT) with relative position biases."""

    cls_token = tied("cls_token", invariant_channels)
    shared_rel_pos: Any
    own_parts = ("head", "head_drop", "shared_rel_pos")

    def substitute(self, parts: Substitution) -> None:
        if self.shared_rel_pos is not None:
            prefix = self.num_prefix_tokens
            self.shared_rel_pos = position_bias(parts, self.shared_rel_pos, "shared_rel_pos", prefix)
        super().substitute(parts)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        for bias in (self.shared_rel_pos, *(block.attn.rel_pos for block in self.blocks)):
            if bias is not None:
                bias.set_window_size(grid)

    pool = pool_tokens


class EquivariantNaFlexVit(EquivariantTransformer, NaFlexVit):
    """E(X) of a NaFlexVit for images; sequences of patches of several images are refused."""

    rope: Any
    embeds: Any
    own_parts = ("head", "head_drop", "rope", "embeds")

    def _check_own(self) -> None:
        super()._check_own()
        if self.rope is not None and self.patch_drop is not None:
            raise ValueError("rotary position embedding with dropped patches (patch_drop_rate) is not supported")

    def substitute(self, parts: Substitution) -> None:
        self.embeds = naflex_embeds(parts, self.embeds, "embeds", self.embeds.in_chans)
        super().substitute(parts)
        if self.rope is not None:
            self.rope = rotary(parts, self.rope, "rope", self.blocks[0].attn.num_heads, None)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.embeds.pos_embed is not None:
            self.embeds.pos_embed.reset_parameters(self.token_std)

    @property
    def embedding(self) -> PatchEmbed:
        """The patch embedding."""
        return self.embeds.proj

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Images of any size are taken; this sees that the size is a whole number of patches.

        Raises:
            ValueError: if it is not, or the patch size differs.
        """
        self.embeds.proj.set_input_size(img_size, patch_size)

    def forward_head(self, patches: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None) -> Tensor:
        """See :meth:`EquivariantTransformer.forward_head`; the arguments are those of timm."""
        x = self._invariants(self.fc_norm(self._pool(patches, patch_valid=patch_valid)), pre_logits)
        return x if pre_logits else self.head(x)


class EquivariantVisionTransformerSAM(EquivariantTransformer, VisionTransformerSAM):
    """E(X) of SAM's image encoder: windowed attention, relative positions, a neck."""

    own_parts = ("head", "neck", "rope_global", "rope_window")
    classifier = "head.fc"
    neck: Any
    pos_embed: Any
    num_classes: int
    head: Any
    rope_global: Any
    rope_window: Any

    def substitute(self, parts: Substitution) -> None:
        field, self.pos_embed = self.pos_embed, None
        super().substitute(parts)
        for name in ("rope_global", "rope_window"):
            if getattr(self, name) is not None:
                setattr(self, name, parts.kept(getattr(self, name)))
        if field is not None:  # timm resamples it in float32, which is not exact in float64
            become(self.patch_embed, PatchEmbedWithPositions)
            self.patch_embed.positions = parts.field((field.shape[1], field.shape[2]), 0)
        if not isinstance(self.neck, nn.Identity):
            self.neck = sam_neck(parts, self.neck, "neck")

    @property
    def head_rep(self) -> Rep:
        rep: Rep = getattr(self.neck, "rep", self.rep)
        return rep

    @property
    def head_drop(self) -> nn.Dropout:
        """Dropout in front of the classifier."""
        return self.head.drop

    def _classifier(self, head: nn.Module, name: str, dd: dict[str, Any]) -> nn.Module:
        if type(head) is not ClassifierHead or head.use_conv:
            raise ValueError(f"module {name} is a {type(head).__name__}, which has no equivariant counterpart")
        self._reset_head(head, dd)
        return head

    def _reset_head(self, head: Any, dd: dict[str, Any]) -> None:
        """A new classifier on the invariants."""
        count = self.head_hidden_size
        head.fc = nn.Linear(count, self.num_classes, **dd) if self.num_classes else nn.Identity()
        head.in_features = head.num_features = count
        head.train(self.training)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the head; see timm.

        Raises:
            ValueError: if the pooling would break the symmetry, or there is none in front of a classifier.
        """
        if global_pool is not None:
            check_pooling(global_pool, self._has_token(), self.design)
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ValueError("global_pool='' leaves a map, which the classifier cannot read; use 'avg'")
        weight = next(self.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if self.invariants.rep != self.head_rep:  # timm took the neck away
            self._make_invariants(dd)
        self.num_classes = num_classes
        self.head.global_pool = SelectAdaptivePool2d(pool_type=self.global_pool, flatten=bool(self.global_pool))
        self._reset_head(self.head, dd)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if isinstance(self.patch_embed, PatchEmbedWithPositions):
            self.patch_embed.positions.reset_parameters(self.token_std)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: the position embedding."""
        return {name for name, _ in self.named_parameters() if name.startswith("patch_embed.positions.")}

    def _set_grid(self, grid: tuple[int, int]) -> None:
        if isinstance(self.patch_embed, PatchEmbedWithPositions):
            self.patch_embed.positions = self.patch_embed.positions.resized(grid)
        if self.rope_global is not None:
            self.rope_global.update_feat_shape(list(grid))

    def patch_features(self, x: Tensor) -> Tensor:
        return self.forward_features(x).permute(0, 2, 3, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """See :meth:`EquivariantTransformer.forward_head`; features are a map ``(B, num_features, H, W)``."""
        x = self._invariants(self.head.global_pool(x).movedim(1, -1), pre_logits).movedim(-1, 1)
        return x if pre_logits else self.head.fc(x)


#: The class of the twin for every class of timm that has one.
TWIN_CLASSES: dict[type[nn.Module], type[EquivariantTransformer]] = {
    VisionTransformer: EquivariantVisionTransformer,
    VisionTransformerDistilled: EquivariantVisionTransformerDistilled,
    Eva: EquivariantEva,
    Beit: EquivariantBeit,
    VisionTransformerRelPos: EquivariantVisionTransformerRelPos,
    NaFlexVit: EquivariantNaFlexVit,
    VisionTransformerSAM: EquivariantVisionTransformerSAM,
}
