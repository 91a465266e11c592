"""``equiflop publish``: folders for the hub that timm and transformers load, with a card that says what is known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

import equiflop
from equiflop.classify import ModelSpec
from equiflop.classify.weights import load_model, save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing
from equiflop.distill import DistillConfig
from equiflop.hub import publish
from equiflop.hub.card import data_name
from oracles import scramble
from small_models import ALL, KEYWORDS, VIT
from test_data import write_fashion_mnist, write_image_folder

CLASSES = tuple("abcdefg")
PIXELS = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "bilinear", 0.9)
LAYOUT = {"README.md", "config.json", "model.safetensors", "model.safetensors.sha256"}


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.output


def saved(name: str, path: Path, classes: tuple[str, ...] = CLASSES, **kwargs: Any) -> tuple[Any, Path]:
    """A small model with random weights, and its file."""
    spec = ModelSpec(name, {**KEYWORDS.get(name, {}), **kwargs}, classes, PIXELS)
    model = scramble(spec.build().eval())
    save_weights(path, model.state_dict(), spec)
    return model, path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, of a small E(ViT)."""
    data = write_fashion_mnist(tmp_path_factory.mktemp("secret-place") / "shoes")
    out = tmp_path_factory.mktemp("run")
    small = ("--set", "patch_size=7", "--set", "embed_dim=16", "--set", "depth=1", "--set", "num_heads=2")
    options = ("--batch-size", "8", "--epochs", "2", "--lr", "0.002", "--device", "cpu")
    result = run("train", "flop_deit3_tiny_patch16_224", *small, *options, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def front_matter(card: str) -> Any:
    return huggingface_hub.ModelCard(card).data


@pytest.mark.parametrize("name", ALL)
def test_the_folder_makes_the_same_network_again(name: str, tmp_path: Path) -> None:
    model, file = saved(name, tmp_path / "model.safetensors")
    folder = publish(file, tmp_path / "out").path
    assert {path.name for path in folder.iterdir()} == LAYOUT
    x = torch.randn(2, 3, 32, 32)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    config = timm.data.resolve_model_data_config(again)
    assert (tuple(config["mean"]), tuple(config["std"])) == (PIXELS.mean, PIXELS.std)
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.9)
    assert load_model(folder).spec.classes == CLASSES  # the other commands take it too
    summed = subprocess.run(["sha256sum", "-c", "model.safetensors.sha256"], cwd=folder, capture_output=True, text=True)
    assert summed.returncode == 0, summed.stderr


def test_the_card_says_what_is_known_of_a_run(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "hub" / "mine"
    result = run("publish", trained, "-o", output, "--licence", "cc-by-4.0")
    assert result.exit_code == 0, result.output
    card = (output / "README.md").read_text()
    record = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    model = load_model(trained).model
    sizes: dict[str, Any] = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
    plain = timm.create_model("deit3_tiny_patch16_224", **sizes, img_size=28, in_chans=1, num_classes=10)
    macs, plain_macs = equiflop.macs(model, (1, 28, 28)), equiflop.macs(plain, (1, 28, 28))
    parameters = sum(p.numel() for p in plain.parameters())
    for line in (
        "| group | flop, 2 elements |",
        "| input | 1 x 28 x 28 |",
        f"(plain `deit3_tiny_patch16_224`: {parameters / 1e3:.4g} k) |",
        f"| {macs / 1e3:.4g} k (plain: {plain_macs / 1e3:.4g} k, {plain_macs / macs:.2f} times as many) |",
        f"| top-1 accuracy | {100 * record['test_accuracy']:.2f} % of the test images of shoes |",
        "| licence | cc-by-4.0 |",
        "- epochs: 2",
        "- lr: 0.002",
        'timm.create_model("hf-hub:OWNER/flop_deit3_tiny_patch16_224", pretrained=True)',
    ):
        assert line in card, card
    data = front_matter(card)
    assert data.license == "cc-by-4.0" and data.library_name == "timm" and data.metrics == ["accuracy"]
    assert data.pipeline_tag == "image-classification" and {"timm", "equiflop"} <= set(data.tags)
    assert "transformers" not in card  # which has no grey images
    assert data.eval_results[0].metric_value == pytest.approx(record["test_accuracy"], abs=1e-6)
    assert json.loads((output / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    for path in output.iterdir():
        assert b"secret-place" not in path.read_bytes()
    assert "top-1 accuracy" in result.output and f"local-dir:{output}" in result.output


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/home/somebody/photos", "photos"),
        ("../secret/photos/", "photos"),
        ("wds//home/somebody/shards", "shards"),
        ("torch/cifar10", "torch/cifar10"),
        ("fashion-mnist", "fashion-mnist"),
        ("", ""),
    ],
)
def test_places_on_a_disk_are_not_told(data: str, name: str) -> None:
    assert data_name(data) == name


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    _, file = saved(VIT, tmp_path / "model.safetensors")
    card = (publish(file, tmp_path / "out").path / "README.md").read_text()
    assert "| top-1 accuracy | not measured |" in card and "| licence | not stated |" in card
    assert "does not say how it was trained" in card
    assert f'pipeline("image-classification", "OWNER/{VIT}")("cat.jpg")' in card
    data = front_matter(card)
    assert data.license is None and data.metrics is None and data.eval_results is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["license"] is None


@pytest.mark.parametrize("teacher", ["deit3_small_patch16_224", "deit3_small_patch16_224.fb_in22k_ft_in1k"])
def test_a_student_names_the_weights_of_its_teacher(teacher: str, tmp_path: Path) -> None:
    """Who uses a student has to know whose weights it comes from, and under which licence they are."""
    name = f"twin:{teacher.partition('.')[0]}"
    model, file = saved(name, tmp_path / "model.safetensors", **KEYWORDS[VIT])
    spec = load_model(file).spec
    about = timm.get_pretrained_cfg(teacher)
    tagged = f"{about.architecture}.{about.tag}"
    sources: list[dict[str, Any]] = [{}, {"teacher": "runs/x"}, {"teacher_checkpoint": "mine.pth"}]
    for number, told in enumerate(sources):
        knows = not told
        save_weights(file, model.state_dict(), spec, DistillConfig(model=teacher, data="photos", out="x", **told))
        card = (publish(file, tmp_path / str(number), licence="mit").path / "README.md").read_text()
        assert (f"| distilled from | `{tagged}` of timm |" in card) == knows
        assert ("| licence | mit (the teacher's: apache-2.0) |" in card) == knows
        assert front_matter(card).base_model == (f"timm/{tagged}" if knows else None)
        assert "distilled from another network" in card


def test_accuracy_and_mirrored_answers_are_measured_on_data(tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "photos")
    classes = tuple(sorted(path.name for path in (images / "test").iterdir()))
    rows = {}
    for name in (VIT, "deit3_small_patch16_224"):
        _, file = saved(name, tmp_path / f"{name}.safetensors", classes, **KEYWORDS[VIT])
        result = run("publish", file, "-o", tmp_path / name, "--data", images, "--device", "cpu")
        assert result.exit_code == 0, result.output
        measured = json.loads(run("eval", file, "--data", images, "--device", "cpu", "--json").stdout)
        rows[name] = (tmp_path / name / "README.md").read_text()
        of = f"of {measured['images']:,} test images of {measured['data']}"
        assert f"| top-1 accuracy | {100 * measured['top1']:.2f} % {of} |" in rows[name]
        assert f"| same answer for the mirror image | {100 - 100 * measured['changed_share']:.2f} % |" in rows[name]
    assert "| same answer for the mirror image | 100.00 % |" in rows[VIT]
    assert "| group | none: a plain network |" in rows["deit3_small_patch16_224"]
    assert "(plain" not in rows["deit3_small_patch16_224"]


def test_checkpoints_and_published_folders_are_published_too(trained: Path, tmp_path: Path) -> None:
    checkpoint = next((trained / "checkpoints").glob("step-*.pt"))
    from_state = publish(checkpoint, tmp_path / "state")
    assert from_state.facts.measured is None  # the log is about the final weights
    first = publish(trained, tmp_path / "mine")
    again = publish(first.path, first.path, licence="mit")
    assert again.facts.licence == "mit" and again.facts.trained is not None
    assert {path.name for path in first.path.iterdir()} == LAYOUT


def test_a_log_of_another_training_is_not_believed(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    lines = (trained / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text(lines[0] + "\n")  # a training of which one epoch is done
    assert publish(folder, tmp_path / "a").facts.measured is None
    (folder / "log.jsonl").write_text(lines[0] + "\n{")
    refused(run("publish", folder, "-o", tmp_path / "b"), "log.jsonl: a damaged log")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("group", ["flop", "flips"])
def test_twins_are_published_with_their_classes(group: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32}
    model, file = saved("twin:vit_small_patch16_224", tmp_path / "model.safetensors", group=group, **sizes)
    made = publish(file, tmp_path / "out")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{made.path}", pretrained=True).eval()(x), model(x))
    assert made.facts.plain is not None and made.facts.plain[0] == "vit_small_patch16_224"


def test_networks_without_classifier(tmp_path: Path) -> None:
    name = "octic_hybrid_deit3_small_patch16_224"
    model, file = saved(name, tmp_path / "model.safetensors", ())
    made = publish(file, tmp_path / "out")
    card = (made.path / "README.md").read_text()
    assert "| classes | none: features |" in card and "accuracy" not in card and "pipeline(" not in card
    assert front_matter(card).pipeline_tag == "image-feature-extraction"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(timm.create_model(f"local-dir:{made.path}", pretrained=True).eval()(x), model(x))


def test_folders_with_other_things_are_left_alone(tmp_path: Path, trained: Path) -> None:
    _, file = saved(VIT, tmp_path / "model.safetensors")
    output = tmp_path / "out"
    output.mkdir()
    assert run("publish", file, "-o", output).exit_code == 0  # an empty folder
    assert run("publish", file, "-o", output, "--licence", "mit").exit_code == 0  # one of ours
    assert "| licence | mit |" in (output / "README.md").read_text()
    (output / "notes.txt").write_text("mine")
    refused(run("publish", file, "-o", output), "holds 'notes.txt'", "take another folder")
    assert (output / "notes.txt").read_text() == "mine" and "mit" in (output / "README.md").read_text()
    refused(run("publish", trained, "-o", trained), "none of what publish writes")
    refused(run("publish", file, "-o", file), "is a file; give a folder")
    refused(run("publish", file, "-o", file / "below"), "model.safetensors", "cannot write")
    refused(run("publish", tmp_path / "none", "-o", tmp_path / "new"), "none: no such file or folder")
    (tmp_path / "empty.safetensors").touch()
    refused(
        run("publish", tmp_path / "empty.safetensors", "-o", tmp_path / "new"), "empty.safetensors", "not a readable"
    )
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_written_of_what_does_not_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = saved(VIT, tmp_path / "model.safetensors")
    output = publish(file, tmp_path / "out", licence="mit").path
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    made = timm.create_model

    def another(name: str, **kwargs: Any) -> Any:
        model = made(name, **kwargs)
        if name.startswith("local-dir:"):
            with torch.no_grad():
                model.head.bias.add_(1.0)
        return model

    monkeypatch.setattr(timm, "create_model", another)
    refused(run("publish", file, "-o", output), "computes something else")

    def unknown(name: str, **kwargs: Any) -> Any:
        if name.startswith("local-dir:"):
            raise RuntimeError("Unknown model (mine)")
        return made(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", unknown)
    refused(run("publish", file, "-o", output), "cannot make its model from a folder (Unknown model (mine))")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


class HubApi:
    """What push needs of the hub's interface, noting what it is asked."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012  (one list, for the test to look at)
    refusal: Exception | None = None

    def __init__(self, **kwargs: Any) -> None:
        pass

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(("create", repo_id, exist_ok))
        return SimpleNamespace(repo_id=repo_id, url=f"https://hub.example/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        self.calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}, set(allow_patterns)))


def test_push_uploads_when_asked_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equiflop.hub.folder.HfApi", HubApi)
    monkeypatch.setattr(HubApi, "calls", [])
    _, file = saved(VIT, tmp_path / "model.safetensors")
    assert run("publish", file, "-o", tmp_path / "a").exit_code == 0
    assert HubApi.calls == []
    result = run("publish", file, "-o", tmp_path / "b", "--push", "me/mine")
    assert result.exit_code == 0, result.output
    assert HubApi.calls == [("create", "me/mine", True), ("upload", "me/mine", LAYOUT, LAYOUT)]
    assert "uploaded: https://hub.example/me/mine" in result.output
    assert 'timm.create_model("hf-hub:me/mine"' in (tmp_path / "b" / "README.md").read_text()


def test_a_push_that_fails_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equiflop.hub.folder.HfApi", HubApi)
    monkeypatch.setattr(HubApi, "refusal", RuntimeError("401\nnot logged in"))
    _, file = saved(VIT, tmp_path / "model.safetensors")
    result = run("publish", file, "-o", tmp_path / "out", "--push", "me/mine")
    assert result.exit_code == 2
    assert (
        result.stderr.strip()
        == f"equiflop: push='me/mine': 401 not logged in; the folder {tmp_path / 'out'} is complete"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == LAYOUT
    refused(run("publish", file, "-o", tmp_path / "new", "--push", "not a name"), "not a name")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", [VIT, "flop_convnext_tiny", "twin:vit_small_patch16_224"])
def test_transformers_loads_the_folder(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, pipeline

    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    model, file = saved(name, tmp_path / "model.safetensors", **({} if name in KEYWORDS else sizes))
    folder = publish(file, tmp_path / "out").path
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits
        torch.testing.assert_close(logits, model(x))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(folder))(photo, top_k=7)
    again = timm.create_model(f"local-dir:{folder}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(again))
    with torch.no_grad():
        expected = model(transform(photo)[None])[0].softmax(0)
    found = {answer["label"]: answer["score"] for answer in answers}
    assert found == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-4)


def test_features_are_measured_and_get_a_classifier_by_training(tmp_path: Path) -> None:
    """What there is to do with networks without classifier, such as those of DINOv2."""
    images = write_image_folder(tmp_path / "photos")
    name = "octic_hybrid_deit3_small_patch16_224"
    model, file = saved(name, tmp_path / "model.safetensors", ())
    found = run("eval", file, "--data", images, "--neighbours", "3", "--json", "--device", "cpu")
    assert json.loads(found.stdout)["neighbours_top1"] == 1.0  # red and blue
    assert "give --neighbours" in run("eval", file, "--data", images).output
    photo = next((images / "test").rglob("*.png"))
    refused(run("predict", photo, "--checkpoint", file, "--device", "cpu"), name, "has no classifier")
    sizes = [
        part
        for key in ("patch_size", "embed_dim", "depth", "num_heads")
        for part in ("--set", f"{key}={KEYWORDS[name][key]}")
    ]
    probe = ("--start-from", file, "--freeze-backbone", "--epochs", "1", "--batch-size", "4", "--img-size", "32")
    out = tmp_path / "probe"
    result = run("train", name, *sizes, *probe, "--data", images, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    trained = load_model(out)
    assert trained.spec.classes == ("blue", "red")
    weight = "blocks.0.attn.qkv.A1.weight"
    assert torch.equal(trained.model.get_parameter(weight), model.get_parameter(weight))
