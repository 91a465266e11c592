"""Opening a data set by its name or its folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equiflop.data import fashion_mnist, hugging_face
from equiflop.data.idx import read_labelled_images
from equiflop.data.names import BUILT_IN, PREFIXES, DataNotFoundError
from equiflop.data.sources import DatasetImages, FolderImages, ShardImages
from equiflop.data.splits import ImageSplit, MemorySplit, Preprocessing, Split
from equiflop.extras import check_installed
from equiflop.files import cache_folder

_TRAIN_FOLDERS = ("train", "training")
_TEST_FOLDERS = ("test", "val", "validation", "valid", "eval")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Attributes:
        name: what it is called.
        origin: where it was found.
        classes: names of the classes, in the order of the labels.
        train: images to train on.
        test: images to measure on.
    """

    name: str
    origin: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become the network's input."""
        return self.test.preprocessing


def open_data(
    source: str | Path,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Open a built-in set by its name, or a folder.

    A folder holds either Fashion-MNIST's four idx files (plain or ``.gz``), or images as ``train/CLASS/*`` and
    ``test/CLASS/*`` (``val``, ``valid`` and ``validation`` are also understood). Besides, timm's names:
    ``torch/NAME`` of torchvision, ``hfds/NAME`` of Hugging Face (``hfds/NAME,image=COLUMN,label=COLUMN`` where the
    columns' names or types do not say which is which), and ``wds/FOLDER`` with WebDataset's tar files.

    Args:
        source: ``"fashion-mnist"``, ``"fashion-mnist-part"`` (what comes with equiflop), ``"digits"``, one of timm's
            names, or the path of a folder (``./digits`` for a folder of that name).
        image_size: (height, width) of the network's input; by default 28x28 for built-in sets and 224x224 for folders.
        channels: 1 (grey) or 3; by default 1 for built-in sets and 3 for folders.
        preprocessing: all of it, in place of ``image_size`` and ``channels``: what a trained network expects.

    Raises:
        DataNotFoundError: if there is no such set or folder.
        ValueError: if files are damaged or missing.
        ImportError: if a package is missing that reads the set.
    """
    if preprocessing is not None:
        channels, image_size = preprocessing.input_size[0], preprocessing.input_size[1:]
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels}: images have 1 or 3")
    small = _grey_preprocessing(image_size or (28, 28), channels or 1)
    clothes = preprocessing or small(fashion_mnist.MEAN, fashion_mnist.STD)
    if source == "fashion-mnist":
        return _fashion_mnist(fashion_mnist.fetch_whole(), clothes)
    if source == "fashion-mnist-part":
        return _fashion_mnist_part(clothes)
    if source == "digits":
        return _digits(preprocessing or small(0.3053, 0.3760))
    photos = preprocessing or _photo_preprocessing(image_size or (224, 224), channels or 3)
    kind, _, rest = str(source).partition("/")
    if kind in ("torch", "hfds") and rest and not Path(source).exists():
        return _timm_dataset(str(source), photos)
    if kind == "wds" and rest and not Path(source).exists():
        return _shards(_existing_folder(rest), photos)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataNotFoundError(
            f"data={str(source)!r} is neither a folder nor a built-in set ({', '.join(BUILT_IN)}); what else works: "
            + "; ".join(f"{prefix}{what}" for prefix, what in PREFIXES.items())
            + (". Unpack the file and give the folder" if folder.exists() else "")
        )
    found = fashion_mnist.idx_folder(folder)
    if found is not None:
        return _fashion_mnist(found, clothes)
    return _image_folder(folder, photos)


def _existing_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataNotFoundError(f"data='wds/{path}': there is no folder {folder}")
    return folder


def _fashion_mnist(folder: Path, preprocessing: Preprocessing) -> ImageData:
    train, test = (
        _in_memory(*read_labelled_images(folder, prefix, len(fashion_mnist.CLASSES)), preprocessing)
        for prefix in ("train", "t10k")
    )
    return ImageData("Fashion-MNIST", str(folder), fashion_mnist.CLASSES, train, test)


def _fashion_mnist_part(preprocessing: Preprocessing) -> ImageData:
    train, test = (_in_memory(*part, preprocessing) for part in fashion_mnist.read_part())
    return ImageData("Fashion-MNIST (part)", "equiflop", fashion_mnist.CLASSES, train, test)


def _digits(preprocessing: Preprocessing) -> ImageData:
    """The digits of scikit-learn: every fifth image is for testing."""
    check_installed("sklearn", "digits", "data='digits'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    train, test = (_in_memory(images[part], labels[part], preprocessing) for part in (~held_out, held_out))
    return ImageData("digits", "scikit-learn", tuple("0123456789"), train, test)


def _image_folder(folder: Path, preprocessing: Preprocessing) -> ImageData:
    train = FolderImages(_split_folder(folder, _TRAIN_FOLDERS))
    test = FolderImages(_split_folder(folder, _TEST_FOLDERS), train.classes)
    return ImageData(
        folder.resolve().name,
        str(folder),
        train.classes,
        ImageSplit(train, preprocessing),
        ImageSplit(test, preprocessing),
    )


def _shards(folder: Path, preprocessing: Preprocessing) -> ImageData:
    """WebDataset's tar files in ``train`` and ``val`` folders, or with these words in their names."""
    parts = []
    known = {path: _words(path.relative_to(folder)) for path in sorted(folder.rglob("*.tar"))}
    for path, words in known.items():
        if words & set(_TRAIN_FOLDERS) and words & set(_TEST_FOLDERS):
            raise ValueError(f"{path}: its name says that it is for training and for testing")
    for kinds in (_TRAIN_FOLDERS, _TEST_FOLDERS):
        shards = [path for path, words in known.items() if words & set(kinds)]
        if not shards:
            raise DataNotFoundError(f"{folder}: holds no .tar files with {kinds[0]!r} in their names")
        parts.append(ShardImages(shards))
    train, test = parts
    classes = tuple(str(label) for label in range(max(*train.labels, *test.labels) + 1))
    return ImageData(
        folder.resolve().name, str(folder), classes, ImageSplit(train, preprocessing), ImageSplit(test, preprocessing)
    )


def _words(path: Path) -> set[str]:
    return set(re.split("[^a-z]+", str(path).lower()))


def _timm_dataset(source: str, preprocessing: Preprocessing) -> ImageData:
    """A data set of torchvision (``torch/``) or Hugging Face (``hfds/``), downloaded once into the user's cache."""
    from timm.data import create_dataset

    name, named = source, dict[str, str]()
    if source.startswith("hfds/"):
        check_installed("datasets", "hfds", f"data={source!r}")
        name, named = hugging_face.split_name(source)
    cache = cache_folder() / name.replace("/", "-")
    splits = []
    tests: tuple[str, ...] = ("validation", "test") if name.startswith("hfds/") else ("validation",)
    for candidates in (("train",), tests):
        for split in candidates:
            try:
                columns = _columns(name, named, split, cache, source) if name.startswith("hfds/") else {}
                dataset = create_dataset(
                    name, root=str(cache), split=split, is_training=split == "train", download=True, **columns
                )
                break
            except DataNotFoundError:
                raise
            except ImportError as error:
                raise DataNotFoundError(f"data={source!r} needs another package: {error}") from error
            except Exception as error:  # whatever timm, torchvision or the hub raise, the data set cannot be had
                if split == candidates[-1]:
                    raise DataNotFoundError(
                        f"data={source!r} cannot be opened by timm ({_first_line(error)})"
                    ) from error
        splits.append(DatasetImages(dataset, _labels_of(dataset, name), f"{name} {split}"))
    dataset = splits[0].dataset
    class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    names = getattr(dataset, "classes", None) or sorted(class_to_idx, key=class_to_idx.__getitem__)
    names = names or range(max(splits[0].labels) + 1)
    train, test = (ImageSplit(source, preprocessing) for source in splits)
    return ImageData(name, str(cache), tuple(map(str, names)), train, test)


def _columns(name: str, named: dict[str, str], split: str, cache: Path, source: str) -> dict[str, str]:
    from datasets import load_dataset

    features = load_dataset(name.partition("/")[2], split=split, cache_dir=str(cache)).features
    return hugging_face.find_columns(features, named, source)


def _labels_of(dataset: Any, name: str) -> list[int]:
    """All labels without decoding an image: torchvision's ``targets``, or the column of a Hugging Face set."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = getattr(dataset, "labels", None)
    if targets is None:
        reader = getattr(dataset, "reader", None)
        column = getattr(reader, "label_key", "label")
        try:
            targets = reader.dataset[column]  # type: ignore[union-attr]
        except (AttributeError, KeyError, TypeError) as error:
            raise DataNotFoundError(f"data={name!r}: its labels cannot be listed") from error
    return [int(label) for label in targets]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise DataNotFoundError(
        f"{folder}: holds no folder {' or '.join(repr(name) for name in names)}; expected {folder}/{names[0]}/CLASS/*"
    )


def _grey_preprocessing(image_size: tuple[int, int], channels: int) -> Callable[[float, float], Preprocessing]:
    return lambda mean, std: Preprocessing((channels, *image_size), (mean,) * channels, (std,) * channels)


def _photo_preprocessing(image_size: tuple[int, int], channels: int) -> Preprocessing:
    if channels == 3:
        return Preprocessing((3, *image_size), _IMAGENET_MEAN, _IMAGENET_STD, crop_pct=0.9)
    return Preprocessing((1, *image_size), (sum(_IMAGENET_MEAN) / 3,), (sum(_IMAGENET_STD) / 3,), crop_pct=0.9)


def _in_memory(images: torch.Tensor, labels: torch.Tensor, preprocessing: Preprocessing) -> MemorySplit:
    return MemorySplit(images.expand(-1, preprocessing.input_size[0], -1, -1), labels, preprocessing)
