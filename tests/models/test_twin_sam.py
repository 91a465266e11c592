"""The twin of SAM's image encoder: windows that the group would break in a plain network, positions, neck, head."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn

import equiflop
from equiflop.models import PoseEstimator, Segmenter
from equiflop.models.pose import joint_action
from equiflop.models.twin import twin
from oracles import scramble

NAME = "samvit_base_patch16"
WIDE = {"embed_dim": 64, "depth": 2, "num_heads": 8, "mlp_ratio": 2.0, "neck_chans": 16, "num_classes": 5}


def made_of(group: str = "flop", **options: Any) -> Any:
    """A small twin of windows and one block of attention over the whole grid."""
    settings = {"patch_size": 4, "img_size": 20, "window_size": 3, "global_attn_indexes": (1,), **WIDE, **options}
    return twin(NAME, group, dtype=torch.float64, **settings).eval()


def check(made: nn.Module, *size: int) -> None:
    report = equiflop.check(made, input_size=size or None)
    assert report.passed and report.max_error < 1e-12


@pytest.mark.parametrize("group", ["flop", "updown", "flips", "rot4", "octic"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7])
def test_windows_need_not_divide_the_grid(group: str, window: int) -> None:
    check(made_of(group, window_size=window))


def test_plain_windows_break_the_symmetry_that_the_twin_keeps() -> None:
    """Also where all weights of a plain network are symmetric: windows start at the top left."""
    plain: Any = timm.create_model(NAME, img_size=20, patch_size=4, window_size=3, **WIDE).double().eval()
    block = scramble(plain.blocks[0])
    nn.init.zeros_(block.attn.rel_pos_h)
    nn.init.zeros_(block.attn.rel_pos_w)
    x = torch.randn(1, 5, 5, 64, dtype=torch.float64)
    assert (block(x.flip(2)).flip(2) - block(x)).abs().max() > 1e-3
    x = torch.randn(1, 6, 6, 64, dtype=torch.float64)
    assert (block(x.flip(2)).flip(2) - block(x)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [(20, 20), (12, 28), (36, 20), (4, 4)])
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_images_of_any_size(group: str, size: tuple[int, int]) -> None:
    made = made_of(group)
    check(made, *size)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    assert made(images).shape == (2, 5)
    assert made.forward_features(images).shape == (2, 16, size[0] // 4, size[1] // 4)


def test_another_size_from_now_on() -> None:
    made = made_of("octic")
    made.set_input_size((28, 28))
    assert made.patch_embed.positions.grid_size == (7, 7)
    check(made)


@pytest.mark.parametrize("group", ["flop", "octic"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rel_pos": False, "use_rope": True},
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"qk_norm": True},
        {"init_values": 0.1, "pre_norm": True},
        {"neck_chans": None},
        {"qkv_bias": False},
        {"window_size": 0},
        {"norm_layer": timm.layers.RmsNorm, "neck_chans": None},
    ],
    ids=lambda options: "-".join(options),
)
def test_keywords(group: str, options: dict[str, Any]) -> None:
    made = made_of(group, **options)
    check(made)
    assert equiflop.macs(made, (20, 20)) > 0


def test_features_and_maps_without_a_head() -> None:
    made = made_of(num_classes=0)
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    assert made(images).shape == (2, 16)
    assert made.forward_head(made.forward_features(images), pre_logits=True).shape == (2, 8)
    check(made)
    made.reset_classifier(0, "")
    assert made(images).shape == (2, 16, 5, 5)
    made.reset_classifier(3, "avg")
    assert made(images).shape == (2, 3) and made.global_pool == "avg"
    check(made)
    with pytest.raises(ValueError, match="global_pool='max' breaks the symmetry"):
        made.reset_classifier(3, "max")


@pytest.mark.parametrize(("norm", "channels"), [(True, 16), (False, 64)])
def test_features_with_and_without_the_neck(norm: bool, channels: int) -> None:
    features = FeatureGetterNet(made_of(), out_indices=(0, 1), norm=norm)
    assert [x.shape[1] for x in features(torch.randn(1, 3, 20, 20, dtype=torch.float64))] == [channels] * 2
    assert features.feature_info.channels() == [channels] * 2


def test_a_neck_that_is_taken_away() -> None:
    made = made_of()
    made.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    assert made.num_features == 64 and made(images).shape == (2, 64, 5, 5)
    made.reset_classifier(4, "avg")
    assert made(images).shape == (2, 4)
    check(made)


def test_maps_of_its_features() -> None:
    pairs = [(0, 1)]
    pose = PoseEstimator(made_of(num_classes=0), 3, pairs)
    check(pose)
    assert pose.output_rep == joint_action(pose.group, 3, pairs)
    assert pose(torch.randn(1, 3, 20, 12, dtype=torch.float64)).shape == (1, 3, 20, 12)
    segmenter = Segmenter(made_of("octic", num_classes=0), 4)
    check(segmenter)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head_hidden_size": 8}, "module head is a NormMlpClassifierHead, which has no equivariant counterpart"),
        ({"global_pool": "max"}, "global_pool='max' breaks the symmetry"),
        ({"num_heads": 2}, r"num_heads=2 of blocks.0.attn is not divisible by \|G\|=8"),
        ({"neck_chans": 12}, "width of neck"),
    ],
)
def test_what_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        made_of("octic", **options)
    assert "\n" not in str(error.value)
