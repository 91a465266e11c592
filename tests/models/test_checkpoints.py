"""Weights that are loaded: into models of another image size or other channels, and into models without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import equiflop
from equiflop.models import EquivariantVisionTransformer
from equiflop.nn import PositionEmbedding
from small_models import ALL, KEYWORDS, OCTIC, VIT, classifier, small_model

VITS = [name for name in ALL if "deit3" in name]


def saved(model: torch.nn.Module, folder: Path) -> str:
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def load(name: str, file: str, how: str, **kwargs: Any) -> Any:
    """By one of timm's two ways."""
    options = {"num_classes": 7, **KEYWORDS[name], **kwargs}
    if how == "pretrained":
        overlay = {"file": file, "num_classes": 7}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    return timm.create_model(name, checkpoint_path=file, **options).eval()


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("size", [48, (24, 40)])
@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
@pytest.mark.parametrize("how", ["pretrained", "checkpoint_path"])
def test_position_embedding_is_resampled_to_another_image_size(name: str, size: Any, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dynamic_img_size": True} if "octic" in name else {}
    model = small_model(name, **options)
    found = load(name, saved(model, tmp_path), how, img_size=size, **options)
    model.set_input_size(size)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
@pytest.mark.parametrize("group", ["flop", "updown", "flips", "rot4", "octic"])
def test_every_group_is_resampled_from_every_grid(group: str) -> None:
    def make(size: tuple[int, int]) -> EquivariantVisionTransformer:
        keywords = {**KEYWORDS[VIT], "embed_dim": 64, "group": group, "img_size": size, "num_classes": 7}
        return timm.create_model(VIT, **keywords, dynamic_img_size=True, no_embed_class=False).double().eval()

    sizes = [(8, 8), (24, 24), (40, 40), (24, 40), (56, 24)]
    for old in sizes:
        source = make(old)
        for new in (*sizes, (32, 16)):
            target = make(new)
            target.load_state_dict(source.state_dict())
            source_again = make(old)
            source_again.load_state_dict(source.state_dict())
            assert source_again.pos_embed is not None and target.pos_embed is not None
            expected = source_again.pos_embed.resized(target.patch_embed.grid_size)
            torch.testing.assert_close(target.pos_embed(), expected(), rtol=1e-6, atol=1e-7)


def test_loading_says_what_it_adapts(tmp_path: Path) -> None:
    file = saved(small_model(VIT), tmp_path)
    with pytest.warns(equiflop.EquiflopWarning, match="position embedding resampled from 4x4 to 6x6 tokens"):
        load(VIT, file, "checkpoint_path", img_size=48)
    with pytest.warns(equiflop.EquiflopWarning, match="patch embedding adapted from 3 to 4 channels"):
        load(VIT, file, "checkpoint_path", in_chans=4)
    load(VIT, file, "checkpoint_path")  # nothing to say: warnings of this kind are errors here
    load(VIT, file, "pretrained", img_size=48)  # timm's own way of adapting says nothing either


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
@pytest.mark.parametrize("how", ["pretrained", "checkpoint_path"])
def test_patch_embedding_is_adapted_to_other_channels(name: str, how: str, tmp_path: Path) -> None:
    model = small_model(name)
    file = saved(model, tmp_path)

    def agree(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    grey = torch.randn(2, 1, 32, 32)
    agree(load(name, file, how, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))
    x = torch.randn(2, 4, 32, 32)  # the fourth channel takes the weights of the first
    agree(load(name, file, how, in_chans=4)(x), model(0.75 * (x[:, :3] + torch.cat([x[:, 3:], 0 * x[:, :2]], 1))))
    x = torch.randn(2, 2, 32, 32)
    agree(load(name, file, how, in_chans=2)(x), model(1.5 * torch.cat([x, 0 * x[:, :1]], 1)))


@pytest.mark.parametrize("name", ALL)
def test_another_number_of_classes_drops_the_classifier(name: str, tmp_path: Path) -> None:
    model = small_model(name)
    file = saved(model, tmp_path)
    options = {**KEYWORDS[name], "num_classes": 3}
    overlay = {"file": file, "num_classes": 7}
    found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.forward_features(x), model.forward_features(x))
    assert found.get_submodule(classifier(name)).weight.shape[0] == 3
    backbone = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**options, "num_classes": 0}
    ).eval()
    features = backbone(x)
    assert features.shape == (2, backbone.num_features)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features[:, : pooled.shape[1]], pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
def test_what_cannot_be_adapted_is_still_an_error(tmp_path: Path) -> None:
    file = saved(small_model(VIT), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for patch_embed.proj.A.weight"):
        load(VIT, file, "checkpoint_path", patch_size=4)
    with pytest.raises(RuntimeError, match=r"size mismatch for pos_embed.weight_A"):
        load(VIT, file, "checkpoint_path", embed_dim=64)


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
def test_names_of_the_first_version_are_adapted_too() -> None:
    model = small_model(VIT, torch.float64)
    old = {}
    for key, value in model.state_dict().items():
        path, _, last = key.rpartition(".")
        owner, _, irrep = path.rpartition(".")
        layer = model.get_submodule(owner) if owner else model
        if isinstance(layer, equiflop.nn.Linear):
            found = next(i for i in layer.in_rep.group.irreps if i.name == irrep)
            gain = layer.gain(found) if last == "weight" else layer.bias_gain
            old[f"{owner}.weight_{irrep}" if last == "weight" else f"{owner}.bias"] = value / gain
        else:
            old[key] = value
    assert any("qkv.weight_B" in key for key in old)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    target = small_model(VIT, torch.float64)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.load_state_dict(old)
    torch.testing.assert_close(target(x), model(x), rtol=1e-12, atol=1e-12)
    target = small_model(VIT, torch.float64, in_chans=1, img_size=48)
    target.load_state_dict(old)
    model.set_input_size(48)
    x = torch.randn(2, 1, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(target(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_models_made_on_the_meta_device_are_right_once_loaded(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype)
    state, x = model.state_dict(), torch.randn(2, 3, 32, 32, dtype=dtype)
    expected = model(x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5

    def empty() -> Any:
        with torch.device("meta"):
            made = timm.create_model(name, **{"num_classes": 7, **KEYWORDS[name]})
        assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
        return made.eval()

    assigned = empty()
    assigned.load_state_dict(state, assign=True)
    torch.testing.assert_close(assigned(x), expected, rtol=tolerance, atol=tolerance)
    assert assigned.state_dict().keys() == state.keys()

    allocated = empty().to(dtype).to_empty(device="cpu")
    for buffer in allocated.buffers():
        buffer.zero_()  # memory may hold anything
    allocated.load_state_dict(state)
    torch.testing.assert_close(allocated(x), expected, rtol=tolerance, atol=tolerance)

    outer = torch.nn.Sequential(empty())
    outer.load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=True)
    torch.testing.assert_close(outer(x), expected, rtol=tolerance, atol=tolerance)


def test_layers_made_on_the_meta_device_are_right_once_loaded() -> None:
    rep = small_model(OCTIC).rep
    field = PositionEmbedding(rep, equiflop.models.equivariant_vit.as_image_group("octic"), (5, 5)).double()
    with torch.device("meta"):
        empty = PositionEmbedding(rep, field.group, (5, 5))
    empty.load_state_dict(field.state_dict(), assign=True)
    torch.testing.assert_close(empty(), field(), rtol=0, atol=0)
