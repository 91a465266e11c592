"""A hundred broken inputs: each gives one line that names it and exit code 2, or is skipped and counted."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from equiflop.classify import ClassifierTrainer, TrainConfig
from equiflop.cli.main import main
from equiflop.data import open_data, read_image
from equiflop.data.sources import ShardImages
from equiflop.training import CheckpointError
from equiflop.training.state import load_state, saved_states

SMALL = ["flop_deit3_tiny_patch16_224", "--set", "patch_size=8", "--set", "embed_dim=16", "--set", "depth=1"]
SMALL += ["--set", "num_heads=2", "--img-size", "16", "--device", "cpu"]


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


BROKEN_IMAGES: dict[str, bytes] = {
    "empty.jpg": b"",
    "text.png": b"this is not a picture",
    "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "zeros.jpg": bytes(4096),
    "magic.png": b"\x89PNG\r\n\x1a\n",
    "magic.jpg": b"\xff\xd8\xff\xe0",
    "magic.gif": b"GIF89a",
    "magic.webp": b"RIFF\x00\x00\x00\x00WEBP",
    "magic.bmp": b"BM",
    "magic.tiff": b"II*\x00",
    "archive.png": b"PK\x03\x04 zip",
    "bomb.png": bomb(),
    "crc.png": picture("PNG").replace(b"IDAT", b"IDAX"),
    **{f"cut{share}.png": picture("PNG")[: len(picture("PNG")) * share // 100] for share in range(5, 96, 10)},
    **{f"cut{share}.jpg": picture("JPEG")[: len(picture("JPEG")) * share // 100] for share in range(5, 96, 10)},
    "cut.gif": picture("GIF")[:300],
    "cut.webp": picture("WEBP")[:200],
    "cut.bmp": picture("BMP")[:500],
    "cut.tiff": picture("TIFF")[:60],
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_a_broken_image_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN_IMAGES[name])
    with pytest.raises(ValueError, match=name) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with every broken image among whole ones, in training and in testing."""
    folder = tmp_path_factory.mktemp("spoilt")
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(24):
                (folder / split / label / f"good{i:02d}.jpg").write_bytes(picture())
        for name, content in BROKEN_IMAGES.items():
            (folder / split / "a" / name).write_bytes(content)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def assert_one_line(result: Result, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith(("equiflop:", "Error:"))]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in words), lines


def test_training_skips_counts_and_lists_them(spoilt: Path, tmp_path: Path) -> None:
    options = ["--data", str(spoilt), "--batch-size", "8", "--epochs", "2", "--workers", "0"]
    result = run("train", *SMALL, *options, "--out", str(tmp_path))
    assert_one_line(result, str(spoilt / "test"))  # in testing they are an error
    whole = [*(spoilt / "test").rglob("good*.jpg")]
    good = tmp_path / "good"
    (good / "train").parent.mkdir(parents=True)
    (good / "train").symlink_to(spoilt / "train")
    for path in whole:
        place = good / "test" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "second"
    result = run("train", *SMALL, "--data", str(good), *options[2:], "--out", str(out))
    assert result.exit_code == 0, result.output
    listed = (out / "unreadable.txt").read_text().splitlines()
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    size = 48 + len(BROKEN_IMAGES)
    seen = size // 8 * 8
    for record in records:
        assert len(BROKEN_IMAGES) - (size - seen) <= record["unreadable"] <= len(BROKEN_IMAGES)
    assert max(record["unreadable"] for record in records) <= len(listed) <= len(BROKEN_IMAGES)
    assert "unreadable images left out" in result.output


def test_training_can_be_told_to_stop(spoilt: Path, tmp_path: Path) -> None:
    result = run(
        "train", *SMALL, "--data", str(spoilt), "--unreadable", "stop", "--out", str(tmp_path), "--epochs", "1"
    )
    assert_one_line(result, str(spoilt / "train" / "a"))


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


BROKEN_SHARDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "shard.tar"),
    "text": (b"not an archive" * 100, "not a readable tar file"),
    "no images": (archive({"a.cls": b"0"}), "holds no images"),
    "no label": (archive({"a.jpg": picture()}), "a.jpg has no label"),
    "a label in words": (archive({"a.jpg": picture(), "a.cls": b"cat"}), "a.cls is not a label"),
    "an empty label": (archive({"a.jpg": picture(), "a.cls": b""}), "a.cls is not a label"),
    "a label of bytes": (archive({"a.jpg": picture(), "a.cls": b"\xff\xfe"}), "a.cls is not a label"),
    "broken JSON": (archive({"a.jpg": picture(), "a.json": b"{"}), "a.json is not a label"),
    "JSON without a label": (archive({"a.jpg": picture(), "a.json": b"{}"}), "a.jpg has no label"),
    "a negative label": (archive({"a.jpg": picture(), "a.cls": b"-1"}), "a.cls is not a label"),
    "JSON of another kind": (archive({"a.jpg": picture(), "a.json": b"[1]"}), "a.json is not a label"),
    "half a header": (archive({"a.jpg": picture(), "a.cls": b"0"})[:200], "shard.tar"),
    "cut": (archive({"a.jpg": picture(), "a.cls": b"0"})[:700], "shard.tar"),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_a_broken_shard_is_named(name: str, tmp_path: Path) -> None:
    content, message = BROKEN_SHARDS[name]
    (tmp_path / "shard.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ShardImages([tmp_path / "shard.tar"])
    assert "\n" not in str(error.value)


def test_a_broken_image_in_a_shard_is_named(tmp_path: Path) -> None:
    content = archive({"a.jpg": picture(), "a.cls": b"3", "b.jpg": b"junk", "b.json": b'{"label": 1}'})
    for split in ("train", "val"):
        (tmp_path / f"{split}-000.tar").write_bytes(content)
    data = open_data(f"wds/{tmp_path}", (16, 16))
    assert len(data.train) == 2 and data.classes == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"train-000\.tar:b\.jpg"):
        list(data.train.batches(torch.arange(2), 2))
    (batch,) = data.train.batches(torch.arange(2), 2, skip_unreadable=True)
    assert batch.labels.tolist() == [3] and batch.images.shape == (1, 3, 16, 16) and len(batch.problems) == 1


BROKEN_RECIPES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a recipe is a mapping"),
    "a list": (b"- lr\n- epochs\n", "a recipe is a mapping"),
    "a word": (b"hello", "a recipe is a mapping"),
    "not YAML": (b"lr: [1, 2\nepochs: 3", "not YAML in line"),
    "a tab": (b"lr:\t1\n\tepochs: 2", "not YAML in line"),
    "code": (b"lr: !!python/object/apply:os.system ['touch ran']", "not YAML"),
    "not text": (b"\xff\xfe\x00\x01", "cannot be read as text"),
    "unknown": (b"learning_rate: 1", "unknown training option 'learning_rate'"),
    "misspelt": (b"lable_smoothing: 0.1", "did you mean 'label_smoothing'"),
    "text for a number": (b"lr: fast", "lr='fast' is not a number"),
    "a number with a comma": (b"lr: 0,001", "lr='0,001' is not a number"),
    "half an epoch": (b"epochs: 1.5", "epochs=1.5 is not a whole number"),
    "negative": (b"lr: -1.0", "lr=-1.0 must be at least 0"),
    "not a number": (b"lr: .nan", "lr=nan must be"),
    "infinite epochs": (b"warmup_epochs: .inf", "warmup_epochs=inf"),
    "no such loss": (b"loss: hinge", "loss='hinge' is unknown; choose from ce, bce"),
    "no such precision": (b"precision: int8", "precision='int8' is unknown"),
    "a truth for a number": (b"batch_size: true", "batch_size=True is not a whole number"),
    "a number for a truth": (b"compile: 3", "compile=3 is not true or false"),
    "a size of one number": (b"image_size: 224", "image_size=224 is not (height, width)"),
    "an empty size": (b"image_size: [0, 0]", "is not (height, width)"),
    "keywords as a list": (b"model_kwargs: [depth]", "model_kwargs=['depth'] is not a mapping"),
    "an odd batch to mix": (b"batch_size: 7\nmixup: 0.8", "batch_size=7 must be even"),
    "an average that never moves": (b"ema_decay: 1.0", "ema_decay=1"),
}


@pytest.mark.parametrize("name", BROKEN_RECIPES)
def test_a_broken_recipe_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = BROKEN_RECIPES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(content)
    assert_one_line(run("train", "deit3_small_patch16_224", "--recipe", "mine.yaml", "--data", "digits"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "nothing ran, nothing was written"


WRONG_FLAGS = [
    ("train", "give MODEL"),
    ("train deit3_small_patch16_224", "give --data"),
    ("train --recipe deit3-smal --data digits", "did you mean 'deit3-small'"),
    ("train nosuchmodel --data digits", "model='nosuchmodel' is unknown"),
    ("train deit3_small_patch16_224 --data nowhere", "data='nowhere' is neither a folder"),
    ("train deit3_small_patch16_224 --data wds/nowhere", "there is no folder nowhere"),
    ("train deit3_small_patch16_224 --data torch/nosuchset", "data='torch/nosuchset'"),
    ("train deit3_small_patch16_224 --data digits --optimizer nosuch", "nosuch"),
    ("train deit3_small_patch16_224 --data digits --lr fast", "fast"),
    ("train deit3_small_patch16_224 --data digits --epochs 0", "epochs=0 must be at least 1"),
    ("train deit3_small_patch16_224 --data digits --mixup -1", "mixup=-1.0 must be at least 0"),
    ("train deit3_small_patch16_224 --data digits --set depth", "is not KEY=VALUE"),
    ("train deit3_small_patch16_224 --data digits --img-size big", "is not a size"),
    ("train deit3_small_patch16_224 --data digits --device tpu", "device='tpu' is not available"),
    ("train deit3_small_patch16_224 --data digits --teacher nosuch --img-size 224", "model='nosuch' is unknown"),
    ("train deit3_small_patch16_224 --data digits --img-size 224 --start-from nowhere", "no such file or folder"),
    ("train deit3_small_patch16_224 --data digits --auto-augment 3a --img-size 224", "needs image files"),
    ("train deit3_small_patch16_224 --data digits --accumulate 5000 --img-size 224", "are too few"),
    ("train flop_deit3_small_patch16_224 --data digits --fsdp", "fsdp: there is only one process"),
    ("eval nowhere", "no such file or folder"),
    ("eval", "give either CHECKPOINT"),
    ("plot nowhere", "not a run of equiflop train"),
    ("plot nowhere --output runs.docx", "not a run of equiflop train"),
    ("predict cat.jpg --checkpoint nowhere", "no such file or folder"),
    ("trian", "did you mean 'train'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_FLAGS)
def test_a_wrong_flag_is_one_line(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(run(*arguments.split()), message)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.safetensors"))


def test_there_are_a_hundred() -> None:
    assert len(BROKEN_IMAGES) + len(BROKEN_SHARDS) + len(BROKEN_RECIPES) + len(WRONG_FLAGS) >= 95


def test_a_checkpoint_cut_at_fifty_places_is_named_and_the_one_before_loads(tmp_path: Path) -> None:
    config = TrainConfig(
        model="flop_deit3_tiny_patch16_224",
        data="digits",
        out=str(tmp_path),
        model_kwargs={"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2},
        epochs=2,
        batch_size=500,
        device="cpu",
    )
    ClassifierTrainer(config).run()
    newest, previous = saved_states(tmp_path / "checkpoints")
    whole = newest.read_bytes()
    messages: list[str] = []
    say: Callable[[object, str], None] = lambda self, line: messages.append(line)  # noqa: E731
    again = ClassifierTrainer(config)
    again.progress.print = say.__get__(again.progress)  # type: ignore[method-assign]
    for i in range(50):
        newest.write_bytes(whole[: len(whole) * i // 50])
        with pytest.raises(CheckpointError, match=newest.name) as error:
            load_state(newest)
        assert "\n" not in str(error.value)
        assert again.resume() == previous and again.epoch == 1
        assert newest.name in messages.pop()
