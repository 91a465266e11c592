"""What dense prediction shares: an equivariant vision transformer whose patch tokens a head turns into a map."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.models.equivariant_transformer import EquivariantTransformer


class DenseModel(nn.Module):
    """A backbone and the map of its patch tokens; the head is the subclass's.

    The head reads the patch tokens behind the backbone's final norm. Class and register tokens act through attention
    alone.

    Args:
        backbone: a network whose blocks are all equivariant: an E(ViT) or a twin. It becomes a part of this module and
            loses its classifier.

    Raises:
        TypeError: if the backbone is another network.
        ValueError: if the backbone has blocks that are not equivariant or drops patches.
    """

    def __init__(self, backbone: EquivariantTransformer) -> None:
        super().__init__()
        self._check(backbone)
        self.backbone: Any = backbone

    @classmethod
    def _check(cls, backbone: Any) -> None:
        if not isinstance(backbone, EquivariantTransformer):
            raise TypeError(
                f"backbone={type(backbone).__name__} is no equivariant vision transformer, which {cls.__name__} needs; "
                "give an EquivariantVisionTransformer or a twin"
            )
        if backbone.design != "equivariant":
            raise ValueError(
                f"backbone has design={backbone.design!r}, whose last blocks are not equivariant; use "
                "design='equivariant'"
            )
        drops = getattr(backbone, "patch_drop", None)
        if isinstance(drops, PatchDropout | PatchDropoutWithIndices):
            raise ValueError(f"backbone has patch_drop_rate={drops.prob}, but a map needs every patch; use 0.0")

    def drop_classifier(self) -> None:
        """Take classifier and attention pooling, which a map has no use for, from the backbone."""
        pools = getattr(self.backbone, "attn_pool", None) is not None
        self.backbone.reset_classifier(0, "" if pools else None)

    @property
    def group(self) -> ImageGroup:
        """The group whose action the output follows."""
        return self.backbone.group

    @property
    def rep(self) -> Rep:
        """Type of the tokens that the head reads."""
        return self.backbone.head_rep

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.backbone.embedding.in_chans

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.backbone.embedding.img_size

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens."""
        return self.backbone.num_prefix_tokens

    def feature_rep(self, block: int) -> Rep | None:
        """Type of the backbone's features after block ``block``."""
        return self.backbone.feature_rep(block)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Accept images of another size from now on; see the backbone's method of this name."""
        self.backbone.set_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to compute the backbone's activations again on the way back instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **options: Any) -> Any:
        """Features after the backbone's blocks; see timm."""
        return self.backbone.forward_intermediates(x, indices, **options)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised patch tokens, ``(B, in_chans, H, W)`` to ``(B, H / p, W / p, rep.dim)``."""
        return self.backbone.patch_features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Patch tokens ``(B, H / p, W / p, embed_dim)`` to a map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
