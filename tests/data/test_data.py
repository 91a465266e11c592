"""Data sets: what is read, what is refused and how, and that augmentation is a function of (seed, epoch, sample)."""

import gzip
import hashlib
import importlib.util
import io
import struct
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from equiflop.data import (
    Augmentation,
    DataNotFoundError,
    ImageSplit,
    Preprocessing,
    fashion_mnist,
    open_data,
    read_image,
)
from equiflop.data.fashion_mnist.make_part import first_of_each_class
from equiflop.data.hugging_face import find_columns, split_name
from equiflop.data.idx import read_idx
from equiflop.data.randomness import derive_seed, epoch_order, uniform
from equiflop.data.sources import FolderImages
from equiflop.data.splits import MemorySplit, shift_and_mirror
from equiflop.training.records import check_tensorboard

GREY = Preprocessing((1, 28, 28), (0.5,), (0.5,))


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, train: int = 40, test: int = 20, suffix: str = ".gz") -> Path:
    """A made-up set in the format of Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for prefix, size in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", random.integers(0, 256, (size, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(size) % 10)
    return folder


def write_image_folder(folder: Path, test_name: str = "test") -> Path:
    """Two classes, red and blue, of 40x30 images."""
    for split, size in (("train", 6), (test_name, 3)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(size):
                Image.new("RGB", (40, 30), colour).save(place / f"{i}.png")
    return folder


class TestRandomness:
    def test_does_not_depend_on_the_company_of_a_sample(self) -> None:
        together = uniform(3, 5, np.arange(100), stream=1)
        assert uniform(3, 5, np.array([41]), stream=1)[0] == together[41]

    def test_is_uniform_and_independent_of_seed_epoch_and_stream(self) -> None:
        samples = np.arange(20_000)
        words = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        draws = [uniform(seed, epoch, samples, stream) for seed, epoch, stream in words]
        for draw in draws:
            assert draw.min() >= 0 and draw.max() < 1
            assert abs(np.histogram(draw, 10, (0, 1))[0] / 2000 - 1).max() < 0.1
        assert abs(np.corrcoef(draws) - np.eye(4)).max() < 0.03

    def test_order_of_an_epoch_is_a_permutation_that_changes(self) -> None:
        first, second = epoch_order(0, 0, 100), epoch_order(0, 1, 100)
        assert torch.equal(first.sort().values, torch.arange(100))
        assert not torch.equal(first, second)
        assert torch.equal(first, epoch_order(0, 0, 100))

    def test_seeds_depend_on_the_order_of_the_words(self) -> None:
        assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900


class TestAugmentation:
    images = torch.randint(0, 256, (50, 2, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_a_sample_is_treated_alike_in_every_batch(self) -> None:
        split = MemorySplit(self.images, torch.zeros(50).long(), Preprocessing((2, 9, 12), (0.0, 0.0), (1.0, 1.0)))
        augmentation = Augmentation(0.5, 2, 0.5, seed=7, epoch=3)
        together = next(split.batches(torch.arange(50), 50, augmentation))[0]
        order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
        scattered = torch.cat([batch.images for batch in split.batches(order, 7, augmentation)])
        assert torch.equal(scattered, together[order])

    def test_images_on_a_device_stay_there(self) -> None:
        """On the meta device, which computes nothing, a tensor of another device in an operation would be an error."""
        split = MemorySplit(self.images, torch.zeros(50).long(), Preprocessing((2, 9, 12), (0.0, 0.0), (1.0, 1.0)))
        augmentation = Augmentation(0.5, 2, 0.5, seed=7, epoch=3)
        here = next(split.batches(torch.arange(50), 50, augmentation))
        there = next(split.on(torch.device("meta")).batches(torch.arange(50), 50, augmentation))
        assert there.images.device.type == there.labels.device.type == "meta"
        assert there.images.shape == here.images.shape and split.images.device.type == "cpu"

    def test_every_outcome_is_a_shift_of_the_image_or_its_mirror_image(self) -> None:
        augmented = shift_and_mirror(self.images, torch.arange(50), Augmentation(0.5, 1, 0.5, 0, 0))
        outcomes = set()
        for image, result in zip(self.images, augmented, strict=True):
            matches = [
                (down, right, mirrored)
                for mirrored in (False, True)
                for down in range(3)
                for right in range(3)
                if torch.equal(
                    result,
                    torch.nn.functional.pad(image.flip(-1) if mirrored else image, (1, 1, 1, 1))[
                        :, down : down + 9, right : right + 12
                    ],
                )
            ]
            assert len(matches) == 1
            outcomes.add(matches[0])
        assert len(outcomes) > 12, "almost all of the 18 outcomes should occur among 50 images"

    @pytest.mark.parametrize(("mirror", "expected"), [(0.0, False), (1.0, True)])
    def test_mirror_probability_at_its_ends(self, mirror: float, expected: bool) -> None:
        augmented = shift_and_mirror(self.images, torch.arange(50), Augmentation(mirror, 0, 0.5, 0, 0))
        assert torch.equal(augmented, self.images.flip(-1) if expected else self.images)

    def test_workers_change_nothing(self, tmp_path: Path) -> None:
        folder = write_image_folder(tmp_path) / "train"
        random = np.random.default_rng(0)
        for path in folder.glob("*/*.png"):
            Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
        split = ImageSplit(FolderImages(folder), Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
        augmentation = Augmentation(0.5, 0, 0.3, 0, 1)
        alone = torch.cat([batch.images for batch in split.batches(torch.arange(12), 4, augmentation)])
        helped = torch.cat([batch.images for batch in split.batches(torch.arange(12), 4, augmentation, workers=2)])
        assert torch.equal(alone, helped)


class TestFashionMnist:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_opens_a_folder_of_idx_files(self, tmp_path: Path, suffix: str) -> None:
        data = open_data(write_fashion_mnist(tmp_path, suffix=suffix))
        assert (len(data.train), len(data.test), len(data.classes)) == (40, 20, 10)
        images, labels, _ = next(data.test.batches(torch.arange(5), 5))
        assert images.shape == (5, 1, 28, 28) and images.dtype == torch.float32
        assert labels.tolist() == [0, 1, 2, 3, 4]

    def test_resizes_and_repeats_channels_on_request(self, tmp_path: Path) -> None:
        data = open_data(write_fashion_mnist(tmp_path), image_size=(32, 24), channels=3)
        images, _, _ = next(data.test.batches(torch.arange(2), 2))
        assert images.shape == (2, 3, 32, 24)
        assert torch.equal(images[:, 0], images[:, 2])

    def test_finds_torchvisions_layout(self, tmp_path: Path) -> None:
        write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", suffix="")
        assert open_data(tmp_path).name == "Fashion-MNIST"

    @pytest.mark.parametrize("keep", [0, 1, 30, 200])
    def test_truncated_file_is_named(self, tmp_path: Path, keep: int) -> None:
        path = write_fashion_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz") as error:
            open_data(tmp_path)
        assert "\n" not in str(error.value)

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        (write_fashion_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte"):
            open_data(tmp_path)

    def test_labels_out_of_range_are_refused(self, tmp_path: Path) -> None:
        write_idx(write_fashion_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz", np.full(20, 11))
        with pytest.raises(ValueError, match="label 11"):
            open_data(tmp_path)

    def test_size_that_does_not_fit_the_header_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x-idx1-ubyte"
        write_idx(path, np.arange(9))
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ValueError, match=r"declares shape \(9,\) but holds 10"):
            read_idx(path)

    def test_no_network_and_no_files_is_a_clear_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError("no network")

        monkeypatch.setattr(fashion_mnist, "_DEBIAN", tmp_path / "nothing")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
        with pytest.raises(DataNotFoundError, match=r"dataset-fashion-mnist.*no network.*fashion-mnist-part"):
            open_data("fashion-mnist")


class TestPart:
    """The part of Fashion-MNIST that comes with equiflop."""

    sha256 = "0cba10b0f2e3ea49912a62b118b11c2c7f5aee0153b3cdb4a75bcfc62331fa2a"

    def test_holds_the_first_images_of_every_class(self) -> None:
        """Of the whole set where that is at hand; else the file is the one that was made from it."""
        whole = fashion_mnist.find_whole()
        content = (files("equiflop.data.fashion_mnist") / fashion_mnist.PART_FILE).read_bytes()
        if whole is None:
            assert hashlib.sha256(content).hexdigest() == self.sha256
            return
        for part, chosen in zip(fashion_mnist.read_part(), first_of_each_class(whole), strict=True):
            images, labels = part
            for label, expected in enumerate(chosen):
                assert torch.equal(images[labels == label, 0], expected)

    def test_what_is_packed_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fashion_mnist, "PART", (3, 2))
        monkeypatch.setattr("equiflop.data.fashion_mnist.make_part.PART", (3, 2))
        monkeypatch.setattr(fashion_mnist, "files", lambda package: tmp_path)
        train, test = first_of_each_class(write_fashion_mnist(tmp_path))
        (tmp_path / fashion_mnist.PART_FILE).write_bytes(fashion_mnist.pack(train, test))
        data = open_data("fashion-mnist-part")
        assert isinstance(data.train, MemorySplit) and isinstance(data.test, MemorySplit)
        assert torch.equal(data.train.images[4::10, 0], train[4]) and torch.equal(data.test.images[7::10, 0], test[7])

    def test_classes_take_turns(self) -> None:
        data = open_data("fashion-mnist-part", image_size=(32, 24), channels=3)
        assert (len(data.train), len(data.test), len(data.classes)) == (12_000, 5_000, 10)
        images, labels, _ = next(data.test.batches(torch.arange(20), 20))
        assert images.shape == (20, 3, 32, 24) and labels.tolist() == [*range(10), *range(10)]

    @pytest.mark.parametrize("keep", [0, 1000, 60_000])
    def test_a_damaged_file_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
        content = (files("equiflop.data.fashion_mnist") / fashion_mnist.PART_FILE).read_bytes()
        monkeypatch.setattr(fashion_mnist, "files", lambda package: tmp_path)
        (tmp_path / fashion_mnist.PART_FILE).write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"images\.xz: .*install equiflop anew"):
            open_data("fashion-mnist-part")

    def test_the_licence_lies_beside_it(self) -> None:
        text = (files("equiflop.data.fashion_mnist") / "LICENSE.txt").read_text(encoding="utf-8")
        assert "Zalando SE" in text and "The MIT License" in text


class TestExtras:
    """A package that is missing is named with the extra that brings it, in the same words everywhere."""

    @pytest.mark.parametrize(
        ("package", "extra", "source"), [("sklearn", "digits", "digits"), ("datasets", "hfds", "hfds/cifar100")]
    )
    def test_of_data(self, package: str, extra: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        without(monkeypatch, package)
        words = rf"data='{source}' needs {package}; install it with: pip install 'equiflop\[{extra}\]'"
        with pytest.raises(ImportError, match=words):
            open_data(source)

    def test_of_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without(monkeypatch, "tensorboard")
        with pytest.raises(ImportError, match=r"needs tensorboard; install it with: .*\[tensorboard\]"):
            check_tensorboard()


def png(red: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(content, "PNG")
    return content.getvalue()


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))


class TestColumns:
    """Of Hugging Face's data sets: their types decide, or a name does."""

    Image, ClassLabel, Value = (type(name, (), {}) for name in ("Image", "ClassLabel", "Value"))
    cifar100 = {"img": Image(), "fine_label": ClassLabel(), "coarse_label": ClassLabel()}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("features", "named", "expected"),
        [
            ({"image": Image(), "label": ClassLabel()}, "", ("image", "label")),
            ({"img": Image(), "label": ClassLabel(), "id": Value()}, "", ("img", "label")),
            ({"img": Image(), "fine_label": ClassLabel()}, "", ("img", "fine_label")),
            ({"image": Image(), "label": Value(), "kind": ClassLabel()}, "", ("image", "label")),
            (cifar100, ",label=fine_label", ("img", "fine_label")),
            ({"a": Image(), "b": Image(), "n": Value()}, ",label=n,image=b", ("b", "n")),
        ],
    )
    def test_are_found(self, features: dict[str, object], named: str, expected: tuple[str, str]) -> None:
        name, columns = split_name(f"hfds/some/set{named}")
        found = find_columns(features, columns, "hfds/some/set")
        assert name == "hfds/some/set" and (found["input_key"], found["target_key"]) == expected

    @pytest.mark.parametrize(
        ("features", "source", "message"),
        [
            (cifar100, "hfds/c", "holds the labels, fine_label or coarse_label.* this: hfds/c,label=fine_label$"),
            (cifar100, "hfds/c,label=lbl", "no column 'lbl'; there are img, fine_label, coarse_label$"),
            ({"text": Value()}, "hfds/c", "which column holds the images, text"),
            (cifar100, "hfds/c,labl=fine_label", "'labl=fine_label' is neither image=COLUMN nor label=COLUMN"),
        ],
    )
    def test_else_one_line_says_how_to_name_them(self, features: dict[str, object], source: str, message: str) -> None:
        with pytest.raises(DataNotFoundError, match=message):
            find_columns(features, split_name(source)[1], source)

    @pytest.mark.slow
    @pytest.mark.parametrize("labels", ["fine_label", "fine_label,coarse_label"])
    def test_of_a_set_on_the_disk(self, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets, pyarrow, parquet = map(pytest.importorskip, ("datasets", "pyarrow", "pyarrow.parquet"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        kinds = {name: datasets.ClassLabel(names=["cat", "dog"]) for name in labels.split(",")}
        features = datasets.Features({"img": datasets.Image(), **kinds})
        for split, size in (("train", 4), ("test", 2)):
            rows = [{"img": {"bytes": png(i), "path": None}, **dict.fromkeys(kinds, i % 2)} for i in range(size)]
            table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
            (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
        source = f"hfds/{tmp_path / 'set'}"
        if len(kinds) > 1:
            with pytest.raises(DataNotFoundError, match="fine_label or coarse_label"):
                open_data(source)
            source += ",label=coarse_label"
        data = open_data(source, image_size=(8, 8))
        assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (4, 2)
        assert next(data.test.batches(torch.arange(2), 2))[1].tolist() == [0, 1]


def test_digits_are_split_without_overlap_of_train_and_test() -> None:
    pytest.importorskip("sklearn")
    data = open_data("digits")
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert next(data.train.batches(torch.arange(3), 3))[0].shape == (3, 1, 28, 28)


class TestFolder:
    @pytest.mark.parametrize("test_name", ["test", "val", "validation"])
    def test_reads_classes_and_images(self, tmp_path: Path, test_name: str) -> None:
        data = open_data(write_image_folder(tmp_path, test_name), image_size=(16, 16))
        assert data.classes == ("blue", "red")
        images, labels, _ = next(data.test.batches(torch.tensor([0, 5]), 2))
        assert labels.tolist() == [0, 1]
        assert images.shape == (2, 3, 16, 16)
        assert images[0, 2].mean() > images[0, 0].mean() and images[1, 0].mean() > images[1, 2].mean()

    def test_a_class_missing_in_test_keeps_the_labels(self, tmp_path: Path) -> None:
        folder = write_image_folder(tmp_path)
        for path in (folder / "test" / "blue").iterdir():
            path.unlink()
        (folder / "test" / "blue").rmdir()
        _, labels, _ = next(open_data(folder).test.batches(torch.arange(3), 3))
        assert labels.tolist() == [1, 1, 1]

    def test_a_class_unknown_in_training_is_refused(self, tmp_path: Path) -> None:
        folder = write_image_folder(tmp_path)
        (folder / "test" / "green").mkdir()
        with pytest.raises(ValueError, match=r"green.*not a class"):
            open_data(folder)

    def test_unreadable_image_is_named_not_replaced(self, tmp_path: Path) -> None:
        folder = write_image_folder(tmp_path)
        broken = folder / "test" / "red" / "1.png"
        broken.write_bytes(broken.read_bytes()[:40])
        split = open_data(folder).test
        for workers in (0, 1):
            with pytest.raises(ValueError, match=r"red.1\.png"):
                list(split.batches(torch.arange(6), 2, workers=workers))

    def test_empty_folders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataNotFoundError, match="'train' or 'training'"):
            open_data(tmp_path)
        (tmp_path / "train" / "cat").mkdir(parents=True)
        with pytest.raises(ValueError, match="holds no images"):
            open_data(tmp_path)

    def test_unknown_source_names_the_built_in_sets(self) -> None:
        with pytest.raises(DataNotFoundError, match="fashion-mnist, fashion-mnist-part, digits"):
            open_data("no-such-set")


class TestReadImage:
    def save(self, image: Image.Image, path: Path, **options: Any) -> Path:
        image.save(path, **options)
        return path

    def test_sixteen_bits_are_scaled(self, tmp_path: Path) -> None:
        deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
        image = read_image(self.save(Image.fromarray(deep), tmp_path / "deep.png"))
        assert image.mode == "RGB"
        assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_floats_between_zero_and_one_are_scaled(self, tmp_path: Path) -> None:
        values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
        image = read_image(self.save(Image.fromarray(values), tmp_path / "float.tiff"), channels=1)
        assert np.asarray(image)[0].tolist() == [0, 128, 255]

    def test_transparency_is_laid_over_white(self, tmp_path: Path) -> None:
        pixels = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
        image = read_image(self.save(Image.fromarray(pixels), tmp_path / "alpha.png"))
        assert np.asarray(image)[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]

    def test_palette_with_a_transparent_entry(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        read = read_image(self.save(image, tmp_path / "palette.png", transparency=0))
        assert np.asarray(read)[0].tolist() == [[255, 255, 255], [200, 100, 50]]

    def test_cmyk(self, tmp_path: Path) -> None:
        read = read_image(self.save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "cmyk.jpg", quality=95))
        red, green, blue = np.asarray(read)[8, 8]
        assert red > 240 and green < 15 and blue < 15

    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = self.save(Image.new("RGB", (40, 30)), tmp_path / "turned.jpg", exif=exif)
        assert read_image(path).size == (30, 40)

    def test_one_pixel_and_bilevel(self, tmp_path: Path) -> None:
        assert read_image(self.save(Image.new("1", (1, 1), 1), tmp_path / "dot.png")).getpixel((0, 0)) == (255,) * 3

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken", b"\xff\xd8\xff\xe0 broken"])
    def test_anything_else_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "odd.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"odd\.png"):
            read_image(path)

    def test_missing_file_and_odd_channels(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such file"):
            read_image(tmp_path / "none.png")
        with pytest.raises(ValueError, match="channels=4"):
            read_image(tmp_path / "none.png", channels=4)
        with pytest.raises(ValueError, match="cannot be read"):
            read_image(tmp_path)
