"""What all equivariant vision transformers share, whatever class of timm they are made from."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Rep
from equiflop.image_group import ImageGroup
from equiflop.models.classifier import replace_classifier
from equiflop.models.image_size import check_image_size
from equiflop.models.initialise import init_linears, open_gates, reset_all
from equiflop.models.substitution import Substitution, check_learned, check_untouched
from equiflop.nn import Invariants, PatchEmbed, PositionEmbedding
from equiflop.nn.attention import Heads
from equiflop.nn.fit import fit_checkpoint
from equiflop.nn.fixed import settle_constants
from equiflop.nn.invariants import InvariantKind, all_magnitudes
from equiflop.nn.norm import Weighting
from equiflop.timm_compat import update_model_args, update_model_input_size

#: ``equivariant``: every block; ``hybrid``: the first blocks, then plain ones on the same channels; ``invariant``: the
#: first blocks, then plain ones on invariants.
Design = Literal["equivariant", "hybrid", "invariant"]

#: Parameters of a network itself that are tokens of invariant channels, in the order in which they stand.
TOKENS = ("cls_token", "dist_token", "reg_token")


# What timm's classes hold is for them to say: to a type checker their attributes are of any type.
_Base: Any = nn.Module


class EquivariantTransformer(_Base):
    """A vision transformer of timm whose parts are equivariant; to be put in front of timm's class as a base.

    Attributes:
        group: the group that acts on the image.
        rep: type of the features between blocks.
        design: see :data:`Design`.
        token_std: standard deviation with which class token and position embedding start.
        invariants: what the classifier sees.
        feature_invariants: what the network returns without a classifier.
    """

    group: ImageGroup
    rep: Rep
    head: nn.Module
    design: Design = "equivariant"
    token_std: float = 0.02
    invariant_output = True
    fit_checkpoint = staticmethod(fit_checkpoint)
    #: Modules of the network itself that are replaced by a rule of their own; all others by their class.
    own_parts: tuple[str, ...] = ("head", "head_drop")
    #: Name of the classifier, or names, as timm's configurations say it.
    classifier: ClassVar[str | tuple[str, ...]] = "head"
    #: Whether gated MLPs start with open gates.
    opens_gates: ClassVar[bool] = True
    #: timm's keyword for the norm behind the pooling.
    fc_norm_keyword: ClassVar[str] = "fc_norm"

    def become_equivariant(
        self,
        group: ImageGroup,
        rep: Rep,
        heads: Heads | None = None,
        *,
        invariants: InvariantKind | None = None,
        weighting: Weighting = "entries",
        token_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parts of a network that timm's class made equivariant, each in its place; untrained.

        Args:
            group: the group.
            rep: type of the features between blocks.
            heads: see :class:`~equiflop.models.substitution.Substitution`.
            invariants: what the classifier sees, see :class:`equiflop.nn.Invariants`; by default ``"trivial"``.
            weighting: of the layer norms.
            token_std: standard deviation of class token and position embedding when they are initialised.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ValueError: if a part has no equivariant counterpart or does not fit the group.
        """
        check_untouched(self)
        self.group, self.rep, self.token_std = group, rep, token_std
        parts = Substitution(group, rep, heads, weighting=weighting, device=device, dtype=dtype)
        self._check_own()
        self.substitute(parts)
        self.register_load_state_dict_post_hook(settle_constants)
        self._replace_head(invariants, parts.dd)

    def _check_own(self) -> None:
        """See that the network itself holds nothing that has no counterpart."""
        check_pooling(self.global_pool, self._has_token(), self.design)
        if not len(self.blocks):
            raise ValueError("it has no blocks")
        known = (*TOKENS, "pos_embed")
        for kind, values in (("parameter", self._parameters), ("buffer", self._buffers)):
            for name, value in values.items():
                if value is not None and (name not in known or kind == "buffer"):
                    raise ValueError(f"{kind} {name} has no equivariant counterpart")
        check_learned(self._parameters.get("pos_embed"), any(p.requires_grad for p in self.blocks.parameters()))

    def substitute(self, parts: Substitution) -> None:
        """Put equivariant parts in the places of plain ones."""
        embedding = self._parameters.get("pos_embed")
        for name, child in list(self.named_children()):
            if name not in self.own_parts:
                setattr(self, name, parts.residual(child, name))
        parts.tie_tokens(self, *TOKENS)
        if embedding is not None:
            grid = self.patch_embed.grid_size
            prefix = embedding.shape[1] - grid[0] * grid[1]
            if prefix not in (0, self.num_prefix_tokens) or embedding.shape[-1] != self.rep.dim:
                raise ValueError(f"parameter pos_embed is {tuple(embedding.shape)}, which does not fit the tokens")
            del self._parameters["pos_embed"]
            self._modules["pos_embed"] = parts.field(grid, prefix)

    def _replace_head(self, invariants: InvariantKind | None, dd: dict[str, Any]) -> None:
        """Invariants, and a classifier that sees them."""
        self.kind_of_invariants = invariants
        self._make_invariants(dd)
        self.head = self._classifier(self.head, "head", dd)

    def _make_invariants(self, dd: dict[str, Any]) -> None:
        rep, kind = self.head_rep, self.kind_of_invariants
        self.invariants: Any = Invariants(rep, kind or "trivial", **dd)
        self.feature_invariants: Any = self.invariants if kind else Invariants(rep, all_magnitudes(rep.group), **dd)
        self.head_hidden_size = self.invariants.out_features

    def _classifier(self, head: nn.Module, name: str, dd: dict[str, Any]) -> nn.Module:
        if type(head) is nn.Identity:
            return head
        if type(head) is not nn.Linear or head.in_features != self.rep.dim:
            raise ValueError(f"module {name} is {head} where a linear map of {self.rep.dim} features is supported")
        return nn.Linear(self.head_hidden_size, head.out_features, bias=head.bias is not None, **dd)

    def _has_token(self) -> bool:
        return bool(getattr(self, "has_class_token", self._parameters.get("cls_token") is not None))

    @property
    def embedding(self) -> PatchEmbed:
        """The patch embedding."""
        return self.patch_embed

    @property
    def head_rep(self) -> Rep:
        """Type of the features behind the last norm, as the head sees them."""
        return self.rep

    def patch_features(self, x: Tensor) -> Tensor:
        """Patch tokens behind the last norm, ``(B, in_chans, H, W)`` to ``(B, H / p, W / p, head_rep.dim)``."""
        grid = self.embedding.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        tokens = self.fc_norm(self.forward_features(x))  # most often one of the two norms is an identity
        return tokens[:, self.num_prefix_tokens :].unflatten(1, grid)

    def feature_rep(self, block: int) -> Rep | None:
        """Type of the features after block ``block`` (-1: before the first)."""
        return self.rep

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise: linear maps, position embedding and class token truncated normal 0.02, biases 0.

        Class token and position embedding take ``token_std``.

        Args:
            mode: ``""``, or ``"reset"`` to use every layer's own initialisation.
            needs_reset: whether layers that initialised themselves when they were made are reset as well.

        Raises:
            ValueError: if the mode is unknown.
        """
        mode = mode or getattr(self, "weight_init_mode", "")
        if mode not in ("", "reset"):
            raise ValueError(f"weight_init={mode!r} is not supported; choose '', 'skip' or 'reset'")
        for name in ("cls_token", "dist_token"):
            token = self._parameters.get(name)
            if token is not None:
                nn.init.trunc_normal_(token, std=self.token_std)
        if self._parameters.get("reg_token") is not None:
            nn.init.normal_(self._parameters["reg_token"], std=1e-6)
        if needs_reset:
            reset_all(self)
        if mode == "":
            init_linears(self, skip=("patch_embed", "embeds", "shared_rel_pos"))
            if self.opens_gates:
                open_gates(self)
        for block in self.blocks:  # norms behind a branch, which start small
            if hasattr(block, "init_weights"):
                block.init_weights()
        field = self._modules.get("pos_embed")
        if isinstance(field, PositionEmbedding):
            field.reset_parameters(self.token_std)
        if getattr(self, "fix_init", False):
            self.fix_init_weight()
        small = getattr(self, "head_init_scale", None)  # EVA and BEiT start with a small classifier
        if small and isinstance(self.head, nn.Linear):
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.mul_(small)

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Scale the last linear map of every branch by ``1 / sqrt(2 * layer)``."""
        for layer, block in enumerate(self.blocks, start=1):
            names = ("attn.proj", "mlp.fc2", "attn_out_proj", "mlp_out_proj")
            for linear in (part for name, part in block.named_modules() if name in names):
                for parameter in linear.parameters():
                    if parameter.ndim == 2:
                        parameter.div_(math.sqrt(2.0 * layer))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: those of timm's network."""
        plain = super().no_weight_decay()
        within = tuple(f"{name}." for name in plain)
        return {name for name, _ in self.named_parameters() if name in plain or name.startswith(within)}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; see timm.

        Raises:
            ValueError: if the pooling would break the symmetry or needs a class token that is not there.
        """
        if global_pool is not None:
            check_pooling(global_pool, self._has_token(), self.design)
            if global_pool == "map" and self._modules.get("attn_pool") is None:
                raise ValueError("global_pool='map' cannot be added to a network; build it with global_pool='map'")
            if global_pool != "map" and self._modules.get("attn_pool") is not None:
                self.attn_pool = None
            self.global_pool = global_pool
            update_model_args(self, **{self.fc_norm_keyword: not isinstance(self.fc_norm, nn.Identity)})
        replace_classifier(self, num_classes)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Accept images of another size from now on; the position embedding is resampled and stays equivariant.

        Raises:
            ValueError: if the size is not a whole number of patches or does not fit the group, or the patch size
                differs.
        """
        if img_size is not None:
            check_image_size(self.group, img_size, getattr(self, "dynamic_img_size", False))
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid_size
        field = self._modules.get("pos_embed")
        if isinstance(field, PositionEmbedding) and grid != old_grid:
            self._modules["pos_embed"] = field.resized(grid)
        self._set_grid(grid)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        """Bring what else depends on the grid of tokens to another one."""

    def _tokens(self, x: Tensor) -> Tensor:
        """Patches with class and register tokens in front, and the position embedding; ``(B, N, C)``."""
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        if self.dynamic_img_size:
            x = x.flatten(1, 2)
        stored = [getattr(self, name) for name in TOKENS if name in self._parameters]
        pad = (0, self.rep.dim - self.rep.multiplicities[0])
        prefix = [F.pad(token, pad).expand(x.shape[0], -1, -1) for token in stored if token is not None]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        field = self.pos_embed(grid)
        if self.no_embed_class:
            return torch.cat([*prefix, x + field], dim=1)
        return torch.cat([*prefix, x], dim=1) + field

    def _pos_embed(self, x: Tensor) -> Any:
        x = self._tokens(x)
        return x if self.pos_embed is None else self.pos_drop(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, norm, invariants and classifier.

        The classifier sees ``head_hidden_size`` invariants, by default the trivial irrep alone, as published. A network
        without classifier (``num_classes=0``) is there to be read by something else, which counts on ``num_features``
        values, as everywhere in timm: it returns those invariants and behind them the magnitudes of all other channels
        (``invariants="magnitudes"``), so that no channel is lost; where ``invariants`` was given, those.

        Args:
            x: features, shape ``(B, N, embed_dim)``.
            pre_logits: return what a classifier sees, shape ``(B, head_hidden_size)``, instead of the logits.
        """
        x = self._invariants(self.fc_norm(self.pool(x)), pre_logits)
        return x if pre_logits else self.head(x)

    def _invariants(self, x: Tensor, pre_logits: bool) -> Tensor:
        headless = self.num_classes == 0 and not pre_logits
        return self.head_drop((self.feature_invariants if headless else self.invariants)(x))


def check_pooling(global_pool: str, class_token: bool, design: Design) -> None:
    """See that a pooling keeps the symmetry, where there still is one, and has what it reads.

    Raises:
        ValueError: if not; it names those that would do.
    """
    reasons = {
        "max": "the maximum of a sign-flipping channel is not equivariant",
        "avgmax": "the maximum of a sign-flipping channel is not equivariant",
        "prr": "its heads mix channels of different irreps",
    }
    poolings = ["avg", "map"] if design == "equivariant" else ["avg", "avgmax", "max"]
    if class_token:
        poolings.insert(0, "token")
    known = "".join(f"{pooling!r}, " for pooling in poolings[:-1]).removesuffix(", ") + f" or {poolings[-1]!r}"
    if design == "equivariant" and global_pool in reasons:
        raise ValueError(f"global_pool={global_pool!r} breaks the symmetry: {reasons[global_pool]}; use {known}")
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True; use 'avg' without a class token")
    if global_pool not in ("", *poolings):
        raise ValueError(f"global_pool={global_pool!r} is unknown or not supported here; use {known}")
