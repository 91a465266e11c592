"""Pose estimation: heatmaps that mirror with left and right exchanged, and the measures of the field."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equiflop
from equiflop.image_group import named_image_group
from equiflop.models import EquivariantVisionTransformer, PoseEstimator
from equiflop.models.pose import (
    COCO_FLIP_PAIRS,
    average_precision,
    correct_keypoints,
    flip_test,
    joint_action,
    joints_of_heatmaps,
    object_keypoint_similarity,
    target_heatmaps,
)
from equiflop.models.twin import twin

PARTNERS = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def estimator(group: str = "flop", backbone: dict[str, Any] | None = None, **options: Any) -> PoseEstimator:
    order = named_image_group(group).order
    keywords = {"img_size": 32, "patch_size": 8, "embed_dim": 8 * order, "depth": 1, "num_heads": 2, "reg_tokens": 1}
    made = EquivariantVisionTransformer(group=group, **{**keywords, **(backbone or {})})
    return PoseEstimator(made, 17, COCO_FLIP_PAIRS, **{"hidden": 2 * order, **options}).double().eval()


@pytest.mark.parametrize("group", ["flop", "updown", "flips", "rot4", "octic"])
@pytest.mark.parametrize("decoder", ["simple", "classic"])
def test_heatmaps_move_and_joints_change_places(group: str, decoder: str) -> None:
    model = estimator(group, decoder=decoder)
    report = equiflop.check(model)
    assert report.passed and report.max_error < 1e-12
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 17, 16, 16)


@pytest.mark.filterwarnings("ignore:the twin is untrained:equiflop.EquiflopWarning")
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_small_patch14_224", "beit_base_patch16_224"])
def test_twins_as_backbones(name: str) -> None:
    side = 14 if "patch14" in name else 16
    backbone: Any = twin(name, img_size=(4 * side, 3 * side), embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0)
    model = PoseEstimator(backbone, 17, COCO_FLIP_PAIRS).double()
    assert equiflop.check(model, input_size=(4 * side, 3 * side)).max_error < 1e-12


def test_one_pass_says_what_two_say() -> None:
    """The flip test of an equivariant network changes nothing."""
    model = estimator()
    equiflop.checking.randomize_parameters(model, torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        once = model(images)
        torch.testing.assert_close(model(images.flip(-1)).flip(-1)[:, PARTNERS], once, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flip_test(model, images, COCO_FLIP_PAIRS), once, rtol=1e-10, atol=1e-12)
    assert once.std() > 1e-3


def test_the_decoder_is_the_one_of_vitpose() -> None:
    """With the weights of its own kernel a plain decoder in the group's basis gives the same heatmaps."""
    model = estimator(decoder="simple")
    tokens = torch.randn(1, 4, 4, 16, dtype=torch.float64)
    copies = model.to_copies(tokens).permute(0, 3, 1, 2)
    plain = nn.Sequential(
        nn.ReLU(), nn.UpsamplingBilinear2d(scale_factor=4), nn.Conv2d(16, 17, 3, padding=1, bias=False)
    ).double()
    plain[1] = nn.Upsample(scale_factor=4, mode="bilinear")
    last: Any = model.head[-1]
    plain[2].weight = nn.Parameter(last.kernel())
    torch.testing.assert_close(model.forward_head(tokens), plain(copies))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 17)], r"flip_pairs holds \(1, 17\), but there are joints 0..16 \(num_joints=17\)"),
        ([(-1, 2)], r"flip_pairs holds \(-1, 2\), but there are joints 0..16"),
        ([(1, 2), (2, 3)], r"flip_pairs holds joint 2 twice, in \(1, 2\) and in \(2, 3\)"),
        ([(1, 1)], r"flip_pairs holds \(1, 1\), a joint with itself"),
        ([(1, 2, 3)], r"flip_pairs holds \(1, 2, 3\), which is no pair of joints"),
        ([5], "flip_pairs holds 5, which is no pair of joints"),
        (["ab"], "flip_pairs holds 'ab', which is no pair"),
        ([(1.0, 2.0)], r"flip_pairs holds \(1.0, 2.0\), which is no pair"),
    ],
)
def test_wrong_pairs_are_refused_in_one_line(pairs: Any, message: str) -> None:
    backbone = EquivariantVisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=message) as caught:
        PoseEstimator(backbone, 17, pairs)
    assert "\n" not in str(caught.value)
    assert isinstance(backbone.head, nn.Linear), "a refused backbone keeps its classifier"


def test_other_refusals() -> None:
    backbone = EquivariantVisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="decoder='deconv' is unknown; choose from simple, classic"):
        PoseEstimator(backbone, 17, COCO_FLIP_PAIRS, decoder="deconv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hidden=255 is not divisible by \|G\|=2"):
        PoseEstimator(backbone, 17, COCO_FLIP_PAIRS, decoder="classic", hidden=255)
    with pytest.raises(ValueError, match="num_joints=0 is not positive"):
        PoseEstimator(backbone, 0, [])
    with pytest.raises(TypeError, match="backbone=Linear is no equivariant vision transformer"):
        PoseEstimator(nn.Linear(2, 2), 17, COCO_FLIP_PAIRS)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array])
def test_pairs_in_the_forms_of_mmpose_and_transformers(form: Any) -> None:
    action = joint_action(named_image_group("flop"), 17, form(COCO_FLIP_PAIRS))
    assert action.matrices[1].argmax(axis=0).tolist() == PARTNERS
    assert (
        joint_action(named_image_group("rot4"), 17, form(COCO_FLIP_PAIRS)).matrices.trace(axis1=1, axis2=2).min() == 17
    )


def test_the_macs_are_those_of_backbone_and_plain_decoder() -> None:
    model = estimator()
    backbone = equiflop.macs(model.backbone, (32, 32))
    assert equiflop.macs(model, (32, 32)) - backbone == 16 * 16 * 16 * 17 * 9
    classic = estimator(decoder="classic", hidden=8)
    decoder = 16 * 16 * 8 * 16 + 64 * 8 * 8 * 16 + 256 * 8 * 17
    assert equiflop.macs(classic, (32, 32)) - backbone == decoder


@pytest.mark.parametrize("decoder", ["simple", "classic"])
def test_export_and_state_dict(decoder: str) -> None:
    model = estimator(decoder=decoder)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))
    other = estimator(decoder=decoder)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images), model(images))
    model.train()(images.expand(2, -1, -1, -1)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_peaks_are_found_and_mirror() -> None:
    joints = torch.tensor([[[3.0, 5.0], [7.26, 2.0]]], dtype=torch.float64)
    maps = target_heatmaps(joints, torch.ones(1, 2, dtype=torch.bool), (9, 12), sigma=1.5)
    found, scores = joints_of_heatmaps(maps)
    assert (found - joints).abs().max() <= 0.25 and scores.min() > 0.9
    mirrored, _ = joints_of_heatmaps(maps.flip(-1))
    torch.testing.assert_close(11 - mirrored[..., 0], found[..., 0])
    hidden = target_heatmaps(joints, torch.tensor([[True, False]]), (9, 12))
    assert hidden[0, 1].max() == 0


def test_measures_by_hand() -> None:
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    found: Tensor = expected + torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]])
    visible = torch.tensor([[True, True], [True, False]])
    assert correct_keypoints(found, expected, visible, torch.tensor([10.0, 10.0]), share=0.2) == pytest.approx(2 / 3)
    similarity = object_keypoint_similarity(
        found, expected, visible, torch.tensor([4.0, 4.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    )
    first = (np.exp(-1 / 8) + np.exp(-9 / 8)) / 2
    assert similarity.tolist() == pytest.approx([first, 1.0])
    assert average_precision(torch.tensor([0.5, 1.0])) == pytest.approx((2 + 9) / 20)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "pose.py"
    sys.path.append(str(path.parent))  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location("pose_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_figures_of_the_example(example: ModuleType) -> None:
    """Drawn again alike from a seed; mirroring twice changes nothing; perfect answers have perfect scores."""
    figures = example.draw_figures(20, seed=3)
    assert torch.equal(figures.images, example.draw_figures(20, seed=3).images)
    assert figures.images.shape == (20, 3, 64, 48) and figures.joints.shape == (20, 13, 2)
    inside = (figures.joints > 0).all(-1) & (figures.joints < torch.tensor([48.0, 64.0])).all(-1)
    assert inside.double().mean() > 0.95
    everything = torch.ones(20, dtype=torch.bool)
    twice = figures.mirrored(everything).mirrored(everything)
    assert torch.equal(twice.images, figures.images)
    torch.testing.assert_close(twice.joints, figures.joints)
    nobody = figures.mirrored(~everything)
    assert torch.equal(nobody.joints, figures.joints)

    def knows(images: Tensor) -> Tensor:
        """Heatmaps with their peaks where the joints are."""
        mirrored = not torch.equal(images, figures.images[: len(images)])
        joints = figures.mirrored(everything).joints if mirrored else figures.joints
        return target_heatmaps(0.5 * joints - 0.5, torch.ones(20, 13, dtype=torch.bool), (32, 24), 1.0)

    scores = example.evaluate(knows, figures)
    assert scores["pck"] > 0.95 and scores["nearer_to_the_other_side"] < 0.05
    assert scores["pixels_moved_by_mirroring"] < 0.2


def test_figures_face_every_way(example: ModuleType) -> None:
    """Left stands left of right as often as right of left: nothing but the way a figure faces tells them apart."""
    joints = example.draw_figures(300, seed=1).joints
    left_is_left = (joints[:, 1, 0] < joints[:, 2, 0]).double().mean()
    assert 0.4 < left_is_left < 0.6


@pytest.mark.slow
def test_example_runs(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    output, figure = tmp_path / "results.json", tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["pose.py", "--quick", "--output", str(output), "--figure", str(figure)])
    example.main()
    networks = json.loads(output.read_text())["networks"]
    plain, twice, ours = (networks[name] for name in ("plain ViT", "plain ViT, flip test", "E(ViT) flop"))
    assert ours["scores"]["pixels_moved_by_mirroring"] < 0.1 < plain["scores"]["pixels_moved_by_mirroring"]
    assert twice["macs"] == 2 * plain["macs"] and ours["macs"] < plain["macs"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
