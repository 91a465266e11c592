"""Dense prediction: class logits per pixel that move with the image."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.models.dense import DenseModel
from equiflop.models.equivariant_transformer import EquivariantTransformer
from equiflop.models.initialise import init_linear, init_linears
from equiflop.nn import Dropout, GridTransform, Linear, Mlp

#: ``pixels``: a logit for every pixel; ``tokens``: one for every patch.
Resolution = Literal["pixels", "tokens"]


class PatchDecoder(nn.Module):
    """Tokens to a map: the transpose of :class:`equiflop.nn.PatchEmbed`.

    An equivariant linear map takes every token to ``channels`` copies of the pixels of a patch, written in irreps; the
    transform back to pixels is made of additions for the named groups. So it costs the block-diagonal share of the MACs
    of a dense map to all pixels: half for the mirror group.

    Args:
        rep: type of the tokens.
        group: the group that acts on the image.
        patch_size: height and width of a patch in pixels; (1, 1) for a map of one value per token.
        channels: channels of the map; the group leaves them as they are.
        bias: whether to add a bias on the trivial irrep.

    Raises:
        ValueError: if ``channels`` is not positive, or the group does not act on a patch of this shape.

    Shape: ``(B, rows, columns, rep.dim)`` to ``(B, channels, rows * p, columns * p)``.

    Source: the decoder of octic ViTs, arXiv 2505.15441, here for any image group and patch size.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        patch_size: int | tuple[int, int],
        channels: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} is not positive")
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.channels = channels
        self.transform = GridTransform(group, *self.patch_size, device=device, dtype=dtype)
        self.proj = Linear(rep, channels * self.transform.rep, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights truncated normal 0.02, bias 0, as heads in timm."""
        init_linear(self.proj)

    @property
    def macs_per_token(self) -> int:
        """MACs of the transform for one token, without the linear map: 0 where it is made of additions."""
        return self.channels * self.transform.macs_per_channel

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds of the transform to pixels; the linear map is a module of its own."""
        return shapes[0][:-1].numel() * self.macs_per_token

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.proj(x).unflatten(-1, (-1, self.channels))  # B, rows, columns, pixels in irreps, channels
        patches = self.transform.inverse(pixels).unflatten(-2, self.patch_size)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"{self.channels} channels, patches of {self.patch_size[0]}x{self.patch_size[1]}"


class Segmenter(DenseModel):
    """An E(ViT) or a twin with a head that gives class logits per pixel or per token.

    Move the image by an element of the group, and the logits move along. The head reads the patch tokens behind the
    backbone's final norm. Class and register tokens act through attention alone. As in timm, ``drop_rate`` of the
    backbone is the dropout before the head.

    Args:
        backbone: an E(ViT) or a twin, every block equivariant. It becomes a part of this module and loses its
            classifier.
        num_classes: channels of the output.
        resolution: ``"pixels"``, or ``"tokens"`` for one logit per patch and class.
        mlp_ratio: if not 0, a residual MLP comes before the head, its hidden width ``mlp_ratio`` times ``embed_dim``.

    Raises:
        TypeError: if the backbone is another network.
        ValueError: if the backbone has blocks that are not equivariant or drops patches, ``num_classes`` is not
            positive, ``resolution`` is unknown, or the width of the MLP does not fit the group.

    Shape: ``(B, in_chans, H, W)`` to ``(B, num_classes, H, W)`` or ``(B, num_classes, H / p, W / p)``.

    >>> from equiflop.models import EquivariantVisionTransformer
    >>> backbone = EquivariantVisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    >>> Segmenter(backbone, num_classes=5)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 5, 32, 32])
    """

    def __init__(
        self,
        backbone: EquivariantTransformer,
        num_classes: int,
        *,
        resolution: Resolution = "pixels",
        mlp_ratio: float = 0.0,
    ) -> None:
        super().__init__(backbone)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} is not positive; a segmenter needs at least one class")
        if resolution not in get_args(Resolution):
            raise ValueError(f"resolution={resolution!r} is unknown; choose from {', '.join(get_args(Resolution))}")
        if mlp_ratio < 0:
            raise ValueError(f"mlp_ratio={mlp_ratio} is negative; use 0 for no MLP")
        self.num_classes = num_classes
        self.resolution = resolution
        self.output_rep = Rep.trivial(backbone.group, num_classes)  # read by equiflop.check
        weight = next(backbone.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.mlp: Mlp | None = None
        if mlp_ratio:
            hidden = Rep.regular_of_dim(self.group, int(mlp_ratio * self.rep.dim), "mlp_ratio * embed_dim")
            self.mlp = Mlp(self.rep, hidden, **dd)
        self.drop = Dropout(self.rep, self.backbone.head_drop.p)
        patch_size = self.backbone.embedding.patch_size if resolution == "pixels" else (1, 1)
        self.head = PatchDecoder(self.rep, self.group, patch_size, num_classes, **dd)
        self._init_mlp()
        self.drop_classifier()

    def init_weights(self) -> None:
        """Initialise backbone and head anew."""
        self.backbone.init_weights()
        self.head.reset_parameters()
        self._init_mlp()

    def _init_mlp(self) -> None:
        if self.mlp is not None:
            init_linears(self.mlp)

    def forward_head(self, x: Tensor) -> Tensor:
        """Patch tokens to logits, ``(B, H / p, W / p, embed_dim)`` to ``(B, num_classes, H, W)`` or one per token."""
        if self.mlp is not None:
            x = x + self.mlp(x)
        return self.head(self.drop(x))
