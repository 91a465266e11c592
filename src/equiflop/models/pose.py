"""Pose estimation without a second pass: heatmaps whose left and right joints change places when the image is mirrored.

Detectors of poses are run on an image and on its mirror image, and their heatmaps averaged, with left and right
exchanged ("flip test"). An equivariant network gives in one pass what that average only approaches: mirror the image,
and its heatmaps are mirrored, with left and right exchanged, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from equiflop.groups import Action
from equiflop.image_group import ImageGroup
from equiflop.models.dense import DenseModel
from equiflop.models.equivariant_transformer import EquivariantTransformer
from equiflop.models.transition import ToRegular
from equiflop.nn.tied_conv import TiedBatchNorm2d, TiedConv2d, copies_of

#: The decoders of ViTPose (arXiv 2204.12484, section 3.1): ``simple``, a rectifier, bilinear upsampling four times and
#: one convolution; ``classic``, two transposed convolutions with batch norm and rectifier, and a pointwise convolution.
Decoder = Literal["simple", "classic"]

#: COCO's 17 joints: pairs of left and right ones, as in mmpose and in transformers.
COCO_FLIP_PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))


def joint_action(group: ImageGroup, num_joints: int, flip_pairs: Sequence[Sequence[int]] | Tensor) -> Action:
    """How a group acts on joints: its mirrorings exchange left and right, its turns do not.

    Args:
        group: the group that moves the image.
        num_joints: number of joints.
        flip_pairs: pairs of joints that a mirror exchanges, in any order; joints without a partner stay.

    Raises:
        ValueError: if a pair is none, names a joint that is not there, or two pairs share a joint.

    >>> from equiflop.image_group import named_image_group
    >>> joint_action(named_image_group("flop"), 3, [(1, 2)]).act(1, torch.tensor([0.0, 1.0, 2.0]))
    tensor([0., 2., 1.])
    """
    partners = _partners(num_joints, flip_pairs)
    mirrors = np.linalg.det(group.matrices) < 0
    images = np.where(mirrors[:, None], partners, np.arange(num_joints))
    return Action.permuting(group, images, name="joints")


def _partners(num_joints: int, flip_pairs: Sequence[Sequence[int]] | Tensor) -> np.ndarray:
    if num_joints < 1:
        raise ValueError(f"num_joints={num_joints} is not positive")
    pairs = flip_pairs.tolist() if isinstance(flip_pairs, Tensor) else list(flip_pairs)
    partners = np.arange(num_joints)
    taken: dict[int, Any] = {}
    for pair in pairs:
        is_pair = isinstance(pair, Sequence | np.ndarray) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(joint, int | np.integer) for joint in pair):
            raise ValueError(f"flip_pairs holds {pair!r}, which is no pair of joints; give pairs such as (1, 2)")
        left, right = (int(joint) for joint in pair)
        if left == right:
            raise ValueError(f"flip_pairs holds {pair!r}, a joint with itself; leave out joints without a partner")
        for joint in (left, right):
            if not 0 <= joint < num_joints:
                raise ValueError(
                    f"flip_pairs holds {pair!r}, but there are joints 0..{num_joints - 1} (num_joints={num_joints})"
                )
            if joint in taken:
                raise ValueError(f"flip_pairs holds joint {joint} twice, in {taken[joint]!r} and in {pair!r}")
            taken[joint] = pair
        partners[left], partners[right] = right, left
    return partners


class PoseEstimator(DenseModel):
    """An E(ViT) or a twin with a decoder that gives a heatmap for every joint.

    Mirror the image, and the heatmaps are mirrored, those of left and right joints exchanged. The decoder works in the
    group's basis, where the rectifier is allowed, with tied convolutions; it costs the MACs of the plain decoder.

    Args:
        backbone: every block equivariant, its width a multiple of the regular representation. It becomes a part of this
            module and loses its classifier.
        num_joints: number of joints.
        flip_pairs: pairs of joints that a mirror exchanges, in mmpose's and transformers' form
            (:data:`COCO_FLIP_PAIRS`).
        decoder: see :data:`Decoder`.
        hidden: channels of the classic decoder; a multiple of the group's order.

    Raises:
        TypeError: if the backbone is another network.
        ValueError: if the backbone does not fit, a pair is wrong, the decoder is unknown or ``hidden`` does not fit the
            group.

    Shape: ``(B, in_chans, H, W)`` to ``(B, num_joints, 4 * H / p, 4 * W / p)``.

    Source: Xu et al., ViTPose, arXiv 2204.12484.

    >>> from equiflop.models import EquivariantVisionTransformer
    >>> backbone = EquivariantVisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    >>> PoseEstimator(backbone, 17, COCO_FLIP_PAIRS)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 17, 16, 16])
    """

    def __init__(
        self,
        backbone: EquivariantTransformer,
        num_joints: int,
        flip_pairs: Sequence[Sequence[int]] | Tensor,
        *,
        decoder: Decoder = "simple",
        hidden: int = 256,
    ) -> None:
        super().__init__(backbone)
        joints = joint_action(self.group, num_joints, flip_pairs)
        if decoder not in get_args(Decoder):
            raise ValueError(f"decoder={decoder!r} is unknown; choose from {', '.join(get_args(Decoder))}")
        order, rep = self.group.order, self.rep
        if not rep.regular_copies:
            raise ValueError(f"backbone has features {rep!r}, no multiple of the regular representation")
        if decoder == "classic" and (hidden < 1 or hidden % order):
            raise ValueError(f"hidden={hidden} is not divisible by |G|={order} (group {self.group.name})")
        self.num_joints = num_joints
        self.decoder = decoder
        self.output_rep = joints  # read by equiflop.check
        weight = next(self.backbone.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.to_copies = ToRegular(rep, **dd)
        copies = copies_of(self.group)
        points = np.stack([joints.matrices[a].argmax(axis=0) for a in range(order)])
        width, inner = rep.dim // order, hidden // order
        if decoder == "simple":
            last = TiedConv2d(self.group, copies, points, width, 1, 3, **dd)
            layers: list[nn.Module] = [nn.ReLU(), nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)]
        else:
            layers = []
            for channels in (width, inner):
                layers.append(TiedConv2d(self.group, copies, copies, channels, inner, 4, stride=2, bias=False, **dd))
                layers += [TiedBatchNorm2d(inner, order, **dd), nn.ReLU()]
            last = TiedConv2d(self.group, copies, points, inner, 1, 1, **dd)
        self.head = nn.Sequential(*layers, last)
        self.drop_classifier()
        self.reset_head()

    def reset_head(self) -> None:
        """Initialise the decoder: convolutions by their own rule, the last one small (0.001), as in ViTPose."""
        convolutions = [layer for layer in self.head if isinstance(layer, TiedConv2d)]
        for layer in convolutions:
            layer.reset_parameters()
        nn.init.normal_(convolutions[-1].weight, std=0.001)

    def init_weights(self) -> None:
        """Initialise backbone and decoder anew."""
        self.backbone.init_weights()
        self.reset_head()

    def forward_head(self, x: Tensor) -> Tensor:
        """Patch tokens ``(B, H / p, W / p, embed_dim)`` to heatmaps ``(B, num_joints, 4 * H / p, 4 * W / p)``."""
        return self.head(self.to_copies(x).permute(0, 3, 1, 2).contiguous())


def target_heatmaps(joints: Tensor, visible: Tensor, size: tuple[int, int], sigma: float = 2.0) -> Tensor:
    """Gaussian heatmaps, as in ViTPose.

    Args:
        joints: where they are on the heatmap, in its pixels (x, y), shape ``(B, K, 2)``.
        visible: whether they are labelled, shape ``(B, K)``; the heatmap of others is 0.
        size: height and width of the heatmaps.
        sigma: standard deviation in pixels of the heatmap.

    Returns:
        shape ``(B, K, height, width)``, the peak 1.
    """
    rows, columns = (torch.arange(side, device=joints.device, dtype=joints.dtype) for side in size)
    across = (columns - joints[..., 0, None]).square()
    down = (rows - joints[..., 1, None]).square()
    maps = torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * sigma**2))
    return maps * visible[..., None, None].to(maps)


def joints_of_heatmaps(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Where every heatmap has its peak, to a fraction of a pixel, and how high it is.

    The highest pixel, moved by a quarter towards the higher of its neighbours, as usual in the field. Mirrored heatmaps
    give mirrored joints.

    Args:
        heatmaps: shape ``(B, K, H, W)``.

    Returns:
        the joints (x, y), shape ``(B, K, 2)``, and their heights, shape ``(B, K)``.
    """
    height, width = heatmaps.shape[-2:]
    scores, places = heatmaps.flatten(-2).max(dim=-1)
    row, column = places // width, places % width
    moved = []
    for place, length, step in ((column, width, 1), (row, height, width)):
        inside = (place > 0) & (place < length - 1)
        around = [
            heatmaps.flatten(-2).gather(-1, (places + sign * step).clamp(0, height * width - 1)[..., None])[..., 0]
            for sign in (-1, 1)
        ]
        moved.append(place + 0.25 * torch.sign(around[1] - around[0]) * inside)
    return torch.stack(moved, dim=-1).to(heatmaps.dtype), scores


def correct_keypoints(found: Tensor, expected: Tensor, visible: Tensor, scale: Tensor, share: float = 0.2) -> float:
    """PCK: the share of labelled joints that are found within ``share`` times a scale of the figure.

    Args:
        found: shape ``(B, K, 2)``.
        expected: shape ``(B, K, 2)``.
        visible: whether a joint is labelled, shape ``(B, K)``.
        scale: of every figure, such as the longer side of its box or the size of its torso, shape ``(B,)``.
        share: of the scale.
    """
    distance = (found - expected).norm(dim=-1)
    right = (distance <= share * scale[:, None]) & visible
    return float(right.sum() / visible.sum().clamp(min=1))


def object_keypoint_similarity(
    found: Tensor, expected: Tensor, visible: Tensor, area: Tensor, falloff: Tensor
) -> Tensor:
    """OKS of every figure, COCO's measure: the mean over labelled joints of ``exp(-d^2 / (2 area k^2))``.

    Args:
        found: shape ``(B, K, 2)``.
        expected: shape ``(B, K, 2)``.
        visible: whether a joint is labelled, shape ``(B, K)``.
        area: of every figure in square pixels, shape ``(B,)``.
        falloff: the constant ``k = 2 sigma`` of every joint, shape ``(K,)``.

    Returns:
        shape ``(B,)``, between 0 and 1.
    """
    squared = (found - expected).square().sum(-1)
    near = torch.exp(-squared / (2 * area[:, None] * falloff.square() + math.ulp(1.0)))
    return (near * visible).sum(-1) / visible.sum(-1).clamp(min=1)


def average_precision(similarity: Tensor) -> float:
    """AP over OKS thresholds 0.50, 0.55, ..., 0.95 where every figure is found once: the mean share above them."""
    thresholds = torch.arange(10, dtype=similarity.dtype, device=similarity.device) * 0.05 + 0.5
    return float((similarity[None, :] >= thresholds[:, None]).double().mean())


def flip_test(model: nn.Module, images: Tensor, flip_pairs: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """What plain networks need twice the work for: the mean over the heatmaps of an image and of its mirror image, the
    latter mirrored back with left and right exchanged.

    Args:
        model: any network of heatmaps.
        images: shape ``(B, C, H, W)``.
        flip_pairs: see :class:`PoseEstimator`.
    """
    heatmaps = model(images)
    partners = torch.from_numpy(_partners(heatmaps.shape[1], flip_pairs)).to(images.device)
    return (heatmaps + model(images.flip(-1)).flip(-1).index_select(1, partners)) / 2
