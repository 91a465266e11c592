"""``pretrained=True`` with weights that the user names: a folder or the hub, checked by their SHA-256."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import equiflop
from equiflop.checksums import checksum_file, write_checksum
from equiflop.classify import ModelSpec
from equiflop.classify.objective import Teacher
from equiflop.classify.prediction import Classifier
from equiflop.classify.weights import save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing
from equiflop.hub import publish
from equiflop.models.pretrained import WEIGHTS_VARIABLE
from hub_stand_in import hub_of
from oracles import relative_error
from small_models import ALL, CONVNEXT, KEYWORDS, VIT, small_model
from test_convert import golden

CLASSES = tuple("abcdefg")
PIXELS = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "bilinear", 0.9)


def saved(name: str, path: Path) -> tuple[Any, Path]:
    """A small model, and the file of its weights as ``equiflop train`` and ``convert`` write it."""
    model = small_model(name)
    save_weights(path, model.state_dict(), ModelSpec(name, dict(KEYWORDS[name]), CLASSES, PIXELS))
    write_checksum(path)
    return model, path


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that EQUIFLOP_WEIGHTS names."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(folder))
    return folder


def create(name: str = VIT, **options: Any) -> Any:
    return timm.create_model(name, pretrained=True, **options).eval()


@pytest.mark.parametrize("how", ["file", "folder"])
@pytest.mark.parametrize("name", ALL)
def test_weights_of_every_family_are_found(name: str, how: str, weights: Path, tmp_path: Path) -> None:
    file = (weights if how == "file" else tmp_path) / f"{name}.safetensors"
    model, file = saved(name, file)
    if how == "folder":
        publish(file, weights / name)
    x = torch.randn(2, 3, 32, 32)
    found = create(name)
    assert torch.equal(found(x), model(x))
    assert found.pretrained_cfg["mean"] == PIXELS.mean or found.pretrained_cfg["mean"] == list(PIXELS.mean)
    assert found.pretrained_cfg["interpolation"] == "bilinear"
    timm.models.save_for_hf(found, tmp_path / "again")  # the keywords are known to timm as well
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()(x), model(x))


@pytest.mark.parametrize("how", ["file", "folder"])
def test_timm_adapts_classes_channels_and_image_size(how: str, weights: Path, tmp_path: Path) -> None:
    model, file = saved(VIT, (weights if how == "file" else tmp_path) / f"{VIT}.safetensors")
    if how == "folder":
        publish(file, weights / VIT)
    x = torch.randn(2, 3, 32, 32)
    other = create(num_classes=3)
    assert other(x).shape == (2, 3)
    torch.testing.assert_close(other.forward_features(x), model.forward_features(x))
    assert create(num_classes=0)(x).shape == (2, 32)
    grey = create(in_chans=1)
    torch.testing.assert_close(grey(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    larger = create(img_size=48)
    model.set_input_size(48)
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(larger(x), model(x), rtol=1e-4, atol=1e-4)
    features = create(features_only=True, out_indices=(0, 1))
    assert len(features(torch.randn(2, 3, 32, 32))) == 2


def test_converted_official_weights_are_found(weights: Path, tmp_path: Path) -> None:
    _, state, images, _, logits = golden("flop_resmlp")
    torch.save(state, tmp_path / "official.pth")
    name = "flop_resmlp_12_224"
    arguments = ["convert", str(tmp_path / "official.pth"), "-o", str(weights / f"{name}.safetensors")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    with torch.no_grad():
        assert relative_error(create(name)(images).double(), logits) < 1e-5


def test_a_tag_is_part_of_the_name(weights: Path) -> None:
    model, _ = saved(VIT, weights / f"{VIT}.mine.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(create(f"{VIT}.mine")(x), model(x))
    with pytest.raises(ValueError, match=f"holds neither {VIT}/ nor {VIT}.safetensors$"):
        create()


def test_a_named_file_goes_before_the_variable(weights: Path, tmp_path: Path) -> None:
    saved(VIT, weights / f"{VIT}.safetensors")
    torch.manual_seed(5)
    other = small_model(VIT)
    with torch.no_grad():
        other.head.bias.add_(1.0)
    path = tmp_path / "other.pth"
    torch.save(other.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 7}
    found = create(pretrained_cfg_overlay=overlay, **KEYWORDS[VIT])
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found(x), other(x)) and not torch.equal(create()(x), other(x))


def test_other_models_of_timm_do_not_look_there(weights: Path) -> None:
    assert timm.create_model("deit3_small_patch16_224", depth=1).num_classes == 1000
    with pytest.raises(ValueError, match="have no equivariant image"):
        equiflop.twin("vit_tiny_patch16_224", pretrained=True)


def test_without_the_variable_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"no weights of .* to download; set EQUIFLOP_WEIGHTS to a folder") as caught:
        create()
    assert "equiflop convert IN -o OUT" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_what_they_should_be(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = saved(VIT, weights / f"{VIT}.safetensors")
    whole, noted = file.read_bytes(), checksum_file(file).read_text()

    def refused(*words: str, name: str = VIT) -> None:
        with pytest.raises(ValueError, match=r"^EQUIFLOP_WEIGHTS=") as caught:
            create(name)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value

    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(f"{VIT}.safetensors: SHA-256", noted[:12], "damaged")
    file.write_bytes(whole[:1000])
    refused("damaged")
    file.write_bytes(whole)
    checksum_file(file).write_text("no checksum\n")
    refused(".sha256: does not begin with a SHA-256 sum")
    checksum_file(file).unlink()
    refused("no checksum", f"sha256sum {file.name} > {file.name}.sha256")
    save_file({"a": torch.ones(1)}, file)
    write_checksum(file)
    refused("does not say which model it belongs to")
    file.write_bytes(b"")
    write_checksum(file)
    refused("does not say which model it belongs to")
    file.unlink()
    refused(f"holds neither {VIT}/ nor {VIT}.safetensors")
    saved(CONVNEXT, file)
    refused(f"holds weights of {CONVNEXT}, not of {VIT}")
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(weights / "none"))
    refused("no such folder; give a folder, hf-hub:OWNER")


def test_folders_that_are_not_what_they_should_be(weights: Path, tmp_path: Path) -> None:
    _, file = saved(VIT, tmp_path / "model.safetensors")
    folder = publish(file, weights / VIT).path
    config = folder / "config.json"
    text = config.read_text()

    def refused(*words: str) -> None:
        with pytest.raises(ValueError, match=r"^EQUIFLOP_WEIGHTS=") as caught:
            create()
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value

    for content in ("{", "[]", "{}", '{"pretrained_cfg": {}}'):
        config.write_text(content)
        refused("config.json: not the description of a model")
    config.write_text(json.dumps({**json.loads(text), "architecture": CONVNEXT}))
    refused(f"config.json: describes {CONVNEXT}, not {VIT}")
    config.unlink()
    refused(f"{folder}: holds no config.json")
    config.write_text(text)
    weight = folder / "model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-4] + b"1234")
    refused("model.safetensors: SHA-256", "damaged")
    weight.unlink()
    refused("holds no model.safetensors")


@pytest.mark.parametrize("place", ["hf-hub:me", f"hf-hub:me/{VIT}", f"hf-hub:me/{VIT}@main"])
def test_from_a_hub(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = saved(VIT, tmp_path / "model.safetensors")
    publish(file, tmp_path / "hub" / "me" / VIT)
    monkeypatch.setenv(WEIGHTS_VARIABLE, place)
    x = torch.randn(1, 3, 32, 32)
    with hub_of(tmp_path / "hub", monkeypatch) as requests:
        assert torch.equal(create(cache_dir=tmp_path / "cache")(x), model(x))
        by_timm = timm.create_model(f"hf-hub:me/{VIT}", pretrained=True, cache_dir=tmp_path / "other").eval()
        assert torch.equal(by_timm(x), model(x))
        assert any(f"GET /me/{VIT}/resolve/" in request for request in requests)
    assert torch.equal(create(cache_dir=tmp_path / "cache")(x), model(x))  # the hub is gone, the copy is not


def test_what_a_hub_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = saved(VIT, tmp_path / "model.safetensors")
    folder = publish(file, tmp_path / "hub" / "me" / VIT).path
    with hub_of(tmp_path / "hub", monkeypatch):

        def refused(place: str, *words: str) -> None:
            monkeypatch.setenv(WEIGHTS_VARIABLE, place)
            with pytest.raises(ValueError, match=r"^EQUIFLOP_WEIGHTS=hf-hub:") as caught:
                create(cache_dir=tmp_path / f"cache{len(list(tmp_path.iterdir()))}")
            assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value

        refused("hf-hub:you", f"you/{VIT}: no such repository")
        refused("hf-hub:a/b/c", "a/b/c: cannot be downloaded")
        weight = folder / "model.safetensors"
        weight.write_bytes(weight.read_bytes()[:-4] + b"1234")
        refused("hf-hub:me", "SHA-256", "damaged")
        checksum_file(weight).unlink()
        refused("hf-hub:me", f"me/{VIT}: holds no model.safetensors.sha256")


def test_the_commands_find_them_too(weights: Path, tmp_path: Path) -> None:
    model, _ = saved(VIT, weights / f"{VIT}.safetensors")
    classifier = Classifier.from_timm(VIT)
    assert classifier.classes == CLASSES and classifier.preprocessing == PIXELS
    x = torch.randn(2, 3, 32, 32)
    model.requires_grad_(False)  # as a teacher is: other kernels compute with frozen weights, and round differently
    assert torch.equal(Teacher(VIT, CLASSES, PIXELS)(x), model(x))
    result = CliRunner().invoke(main, ["predict", str(tmp_path / "none.png"), "--model", VIT, "--pretrained"])
    assert result.exit_code == 2 and "none.png" in result.output
