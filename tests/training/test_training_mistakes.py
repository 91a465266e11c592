"""Mistakes in training and measuring that are only found once something runs: one line, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from timm.layers import DropPath

from equiflop.classify.neighbours import nearest_neighbour_accuracy
from equiflop.classify.prediction import Classifier
from equiflop.classify.preparation import set_drop_path
from equiflop.classify.recipe import load_recipe
from equiflop.cli.main import main
from equiflop.data.sources import FolderImages
from equiflop.training.records import add_lines
from test_malformed import assert_one_line

MODEL = ["flop_deit3_tiny_patch16_224", "--set", "depth=1", "--set", "embed_dim=16", "--set", "num_heads=2"]
MODEL += ["--set", "patch_size=8", "--img-size", "16", "--device", "cpu", "--batch-size", "8"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes, eight training and four test images each."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("test", 4)):
        for label in "abc":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 255, (16, 16, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(images: object, out: Path, *options: object, model: list[str] = MODEL) -> Result:
    return run("train", *model, "--data", images, "--out", out, "--epochs", "1", *options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--auto-augment", "nonsense"], "auto_augment='nonsense' is not a policy"),
        (["--set", "patch_size=4", "--set", "depth=x"], "cannot be made with"),
        (["--set", "num_classes=5"], "num_classes=5: images has 3 classes"),
        (["--img-size", "24x20"], "image width 20 is not a multiple"),
    ],
)
def test_starting_anew_with_a_mistake_loses_nothing(
    options: list[str], words: str, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert train(images, out).exit_code == 0
    before = contents(out)
    assert_one_line(train(images, out, "--resume", "never", *options), words)
    assert contents(out) == before


def test_starting_anew_from_its_own_weights(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(images, out).exit_code == 0
    again = train(images, out, "--resume", "never", "--start-from", out, "--seed", "1")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "config.json").read_text())["seed"] == 1


def test_images_too_small_for_the_model(images: Path, tmp_path: Path) -> None:
    small = ["convnext_atto", "--img-size", "16", "--device", "cpu", "--batch-size", "8"]
    result = train(images, tmp_path / "run", model=small)
    assert_one_line(result, "model='convnext_atto' does not take images of 3x16x16")
    assert not (tmp_path / "run").exists()
    result = run("bench", "convnext_tiny", "--img-size", "16", "--set", "depths=[1,1,1,1]", "--device", "cpu")
    assert_one_line(result, "model='convnext_tiny' does not take images of 3x16x16")


def test_a_whole_step_without_a_readable_image(images: Path, tmp_path: Path) -> None:
    for name in ("a/0", "b/3"):
        (images / "train" / f"{name}.png").write_text("xx")
    result = train(images, tmp_path / "run", "--batch-size", "1", "--lr", "1e-3")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert record["unreadable"] == 2 and record["train_loss"] > 0.5
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == 2


def test_no_readable_image_at_all(images: Path, tmp_path: Path) -> None:
    for path in (images / "train").rglob("*.png"):
        path.write_text("xx")
    assert_one_line(train(images, tmp_path / "run"), "no training image can be read", "unreadable.txt")
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == 24


def test_an_unreadable_test_image_is_left_out_on_demand(images: Path, tmp_path: Path) -> None:
    (images / "test" / "a" / "0.png").write_text("xx")
    out = tmp_path / "run"
    assert_one_line(train(images, out), "a/0.png", "state after training is saved in", "--unreadable-test skip")
    result = train(images, out, "--unreadable-test", "skip")
    assert result.exit_code == 0, result.output
    assert "going on from" in result.stderr and "1 unreadable test images left out" in result.stderr
    assert json.loads((out / "log.jsonl").read_text())["test_unreadable"] == 1


def test_hidden_files_are_no_classes_and_empty_folders_an_error(images: Path) -> None:
    (images / "train" / ".ipynb_checkpoints").mkdir()
    (images / "train" / "a" / "._0.png").write_text("xx")
    found = FolderImages(images / "train")
    assert found.classes == ("a", "b", "c") and len(found) == 24
    (images / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="train/empty: holds no images"):
        FolderImages(images / "train")


@pytest.mark.parametrize(
    ("classes", "fits"),
    [(("a", "b", "c"), True), (("x", "y", "z"), True), (("a", "b", "z"), True), (("a", "c", "zz"), False)],
)
def test_classes_that_moved(classes: tuple[str, ...], fits: bool) -> None:
    classifier = Classifier("m", torch.nn.Identity(), ("a", "b", "c"), preprocessing=None)  # type: ignore[arg-type]
    if fits:
        classifier.check_classes(classes)
    else:
        with pytest.raises(ValueError, match="'c' is number 1 of the data but 2 of m"):
            classifier.check_classes(classes)


@pytest.mark.parametrize(("readable", "message"), [(2, "only 2 of the training images"), (0, "none of the 5 images")])
def test_fewer_readable_images_than_neighbours(readable: int, message: str) -> None:
    class Images:
        def __len__(self) -> int:
            return 5

        def batches(self, *_: object, **__: object) -> list[SimpleNamespace]:
            return [SimpleNamespace(images=torch.ones(readable, 4), labels=torch.zeros(readable, dtype=torch.int64))]

    model = torch.nn.Module()
    model.forward_features = lambda x: x  # type: ignore[assignment]
    model.forward_head = lambda x, pre_logits: x  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        nearest_neighbour_accuracy(model, Images(), Images(), 5, torch.device("cpu"))  # type: ignore[arg-type]


def test_constant_drop_path_reaches_every_block_of_a_resnet() -> None:
    model = timm.create_model("resnet18", drop_path_rate=0.1)
    set_drop_path(model, 0.1)
    assert sum(isinstance(module, DropPath) for module in model.modules()) == 8


def test_moved_data_and_lost_starting_weights(images: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "run"
    assert train(images, source).exit_code == 0

    def command(data: Path) -> Result:
        return train(data, out, "--start-from", source)

    assert command(images).exit_code == 0
    shutil.rmtree(source)
    moved = images.rename(tmp_path / "moved")
    result = command(moved)
    assert result.exit_code == 0, result.output
    assert "is taken for" in result.stderr and "all epochs are done" in result.stderr
    shutil.rmtree(out)
    assert_one_line(command(moved), str(source))


def test_plot_leaves_out_what_is_no_run(images: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "_first$x", tmp_path / "second"]
    for out in runs:
        assert train(images, out).exit_code == 0
    result = run("plot", *runs, images, "--output", tmp_path / "figure.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "figure.png").is_file()
    assert f"left out {images}: not a run" in result.stderr
    assert_one_line(run("plot", images, "--output", tmp_path / "other.png"), "not a run")
    assert not (tmp_path / "other.png").exists()


def test_mistakes_that_name_what_is_wrong(images: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    assert train(images, teacher).exit_code == 0
    out = tmp_path / "run"
    grey = train(images, out, "--channels", "1", "--teacher", teacher)
    assert_one_line(grey, "takes images of 3 channels, the network of 1")
    assert_one_line(train(images, out, "--amp", "--precision", "float16"), "--amp", "float16")
    assert_one_line(run("train", *MODEL, "--data", images, "--out", ""), "out='' is not a folder")


def test_a_recipe_may_write_1e_3(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\nmodel: resnet18\nseed: 3\n")
    assert load_recipe(str(tmp_path / "mine.yaml")) == {"lr": 1e-3, "model": "resnet18", "seed": 3}


def test_names_that_are_not_text_are_listed_once(tmp_path: Path) -> None:
    for _ in range(2):
        add_lines(tmp_path / "list.txt", ["a\udcff.png: broken"])
    assert (tmp_path / "list.txt").read_text() == "a\\udcff.png: broken\n"
