"""Plain isotropic ConvNeXt: one resolution, one width (Liu et al., arXiv 2201.03545, section 3.3); timm has none."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead, calculate_drop_path_rates
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from equiflop.models.initialise import init_linear
from equiflop.timm_compat import checkpoint, checkpoint_seq, feature_take_indices


class IsotropicConvNeXt(nn.Module):
    """Patch embedding, ConvNeXt blocks at one resolution, pooling, norm and classifier.

    Args:
        in_chans: image channels.
        num_classes: classes; 0 for no classifier.
        global_pool: ``"avg"`` or ``""``.
        patch_size: pixels per position along each side.
        depth: number of blocks.
        dim: channels.
        kernel_size: side of the depthwise kernels.
        ls_init_value: initial layer scale, None or 0 for none.
        head_init_scale: factor on the classifier's initial weights.
        act_layer: the pointwise function.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; linear in depth.

    Shape: ``(B, in_chans, H, W)`` to ``(B, num_classes)``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        depth: int = 18,
        dim: int = 384,
        kernel_size: int = 7,
        ls_init_value: float | None = None,
        head_init_scale: float = 1.0,
        act_layer: str | type[nn.Module] = "gelu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim
        self.grad_checkpointing = False
        self.feature_info = [{"module": f"blocks.{i}", "num_chs": dim, "reduction": patch_size} for i in range(depth)]
        self.stem: nn.Module = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *[
                ConvNeXtBlock(
                    dim,
                    kernel_size=kernel_size,
                    ls_init_value=ls_init_value or None,
                    act_layer=act_layer,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates
            ]
        )
        self.head = NormMlpClassifierHead(
            dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d, **dd
        )
        self.init_weights(head_init_scale)

    head: Any

    def init_weights(self, head_init_scale: float = 1.0) -> None:
        """Matrices and kernels truncated normal 0.02, biases 0."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                init_linear(module)
                if name.startswith("head"):
                    module.weight.data.mul_(head_init_scale)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after chosen blocks; see timm.

        Returns:
            the list of feature maps ``(B, dim, H / p, W / p)``, or a pair of the final features and that list.

        Raises:
            ValueError: if another output format is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; use 'NCHW'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self.stem(x)
        maps = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one that is wanted, and the head; see timm."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, shape ``(B, dim, H / p, W / p)``."""
        x = self.stem(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, norm and classifier; ``pre_logits`` leaves the classifier out."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
