"""Predictions for image files: the same for both views with an equivariant model, and clear errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from equiflop.classify import ModelSpec
from equiflop.classify.prediction import Classifier, predict
from equiflop.classify.weights import save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing

KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [32, 48], "init_values": 1.0}
COLOUR = Preprocessing((3, 32, 48), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def save_random_model(path: Path, name: str) -> Path:
    spec = ModelSpec(name, KWARGS, ("cat", "dog", "horse"), COLOUR)
    torch.manual_seed(0)
    model = spec.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_weights(path, model.state_dict(), spec)
    return path


@pytest.fixture(scope="module")
def equivariant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("e") / "model.safetensors", "flop_deit3_tiny_patch16_224")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("p") / "model.safetensors", "deit3_small_patch16_224")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["predict", *arguments, "--device", "cpu"])


def test_equivariant_model_gives_one_answer(equivariant: Path, photo: Path) -> None:
    prediction = predict(Classifier.from_file(equivariant), photo, torch.device("cpu"))
    assert prediction.same_answer and prediction.largest_logit_difference < 1e-4
    assert [answer.name for answer in prediction.best] == [answer.name for answer in prediction.mirrored]
    assert sum(answer.probability for answer in prediction.best) == pytest.approx(1)


def test_plain_model_is_seen_to_differ(plain: Path, photo: Path) -> None:
    assert predict(Classifier.from_file(plain), photo, torch.device("cpu")).largest_logit_difference > 1e-3


def test_command_shows_both_views(equivariant: Path, photo: Path) -> None:
    result = run(str(photo), "--checkpoint", str(equivariant), "--top", "2")
    assert result.exit_code == 0, result.output
    assert "as it is" in result.stdout and "mirrored" in result.stdout and "same answer" in result.stdout
    assert result.stdout.count(" %") == 4


def test_command_as_json_for_several_images(equivariant: Path, photo: Path) -> None:
    result = run(str(photo), str(photo), "--checkpoint", str(equivariant), "--json")
    first, second = json.loads(result.stdout)
    assert first == second and first["same_answer"] is True
    assert {answer["name"] for answer in first["best"]} == {"cat", "dog", "horse"}


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "I;16"])
def test_every_kind_of_image_is_classified(equivariant: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new(mode, (70, 50)).save(path)
    assert run(str(path), "--checkpoint", str(equivariant)).exit_code == 0


def test_mistakes_are_one_line(equivariant: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for arguments, word in (
        ([str(tmp_path / "text.png"), "--checkpoint", str(equivariant)], "text.png"),
        ([str(tmp_path / "none.png"), "--checkpoint", str(equivariant)], "none.png"),
        ([str(photo), "--checkpoint", str(photo)], "photo.png"),
        ([str(photo), "--checkpoint", str(tmp_path / "none")], "none"),
        ([str(photo), "--model", "flop_deit3_smal_patch16_224", "--pretrained"], "flop_deit3_small_patch16_224"),
        ([str(photo), "--model", "flop_deit3_small_patch16_224", "--pretrained"], "convert"),
    ):
        result = run(*arguments)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and word in lines[0], result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_after_an_image_that_cannot_be_read_it_goes_on(
    equivariant: Path, photo: Path, tmp_path: Path, as_json: bool
) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    bad, none = str(tmp_path / "bad.jpg"), str(tmp_path / "none.jpg")
    more = ["--json"] if as_json else []
    result = run(bad, str(photo), none, str(photo), "--checkpoint", str(equivariant), *more)
    assert result.exit_code == 2
    first, second = result.stderr.strip().splitlines()
    assert "bad.jpg: not an image" in first and "none.jpg: no such file" in second
    if as_json:
        assert [answer["image"] for answer in json.loads(result.stdout)] == [str(photo)] * 2
    else:
        assert result.stdout.count("same answer when mirrored") == 2


@pytest.mark.parametrize(
    "arguments", [[], ["--model", "deit3_small_patch16_224"], ["--model", "m", "--checkpoint", "c"]]
)
def test_it_must_be_said_which_weights(photo: Path, arguments: list[str]) -> None:
    assert run(str(photo), *arguments).exit_code == 2
