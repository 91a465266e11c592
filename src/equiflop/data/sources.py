"""Where images that are not in memory come from: folders, archives, and the data sets that timm has names for."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from equiflop.data.decode import decode_image, read_image

_IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageSource(Protocol):
    """Labelled images that can be read one at a time, in any order."""

    @property
    def labels(self) -> Sequence[int]:
        """The label of every image."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def read(self, index: int, channels: int) -> Image.Image:
        """One image, as :func:`equiflop.data.decode.read_image` gives it.

        Raises:
            ValueError: if it cannot be read.
        """
        ...


class FolderImages:
    """Image files in one sub-folder per class. Files and folders whose names begin with a dot do not count.

    Args:
        root: the folder that holds a folder per class (images may lie in folders below it).
        classes: names of the classes, in the order of their labels; by default the names of the sub-folders, sorted.

    Raises:
        ValueError: if there is no image, if a sub-folder is not among ``classes``, or if it decides itself what the
            classes are and one has no image.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name))
        self.classes = tuple(names if classes is None else classes)
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            raise ValueError(f"{root / unknown[0]}: {unknown[0]!r} is not a class of the training images")
        files = [(path, label) for label, name in enumerate(self.classes) for path in _image_files(root / name)]
        if not files:
            raise ValueError(f"{root}: holds no images (expected {root}/CLASS/*.jpg or other image files)")
        empty = sorted(set(range(len(self.classes))) - {label for _, label in files})
        if classes is None and empty:
            folder = root / self.classes[empty[0]]
            raise ValueError(f"{folder}: holds no images, so there is no such class; remove the folder")
        self.files = [path for path, _ in files]
        self.labels = [label for _, label in files]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The file."""
        return self.files[index]

    def read(self, index: int, channels: int) -> Image.Image:
        """See :class:`ImageSource`."""
        return read_image(self.files[index], channels)


class ShardImages:
    """Images in WebDataset's tar files: ``KEY.jpg`` beside ``KEY.cls``, which holds the label as a number.

    The members are found once, by their headers alone; then any image can be read by itself, so that training can stop
    and go on anywhere. Labels in JSON (``KEY.json`` with ``"label"``) are understood as well.

    Args:
        shards: the tar files.

    Raises:
        ValueError: if a shard is damaged, or holds an image without a label or no image at all.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.members: list[tuple[Path, str, int, int]] = []
        self.labels: list[int] = []
        for shard in shards:
            self._index(shard)
        if not self.members:
            raise ValueError(f"{', '.join(map(str, shards)) or 'no shard'}: holds no images")

    def _index(self, shard: Path) -> None:
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, base = os.path.split(member.name)
                    stem, dot, extension = base.partition(".")  # as WebDataset does
                    key, extension = os.path.join(folder, stem), dot + extension.lower()
                    if extension in _IMAGE_EXTENSIONS:
                        images[key] = (member.name, member.offset_data, member.size)
                    elif extension == ".cls" or (extension == ".json" and key not in labels):
                        content = archive.extractfile(member)
                        label = _label(content.read() if content else b"", extension)
                        if label is not None:
                            labels[key] = label
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{shard}: not a readable tar file ({error})") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{shard}: {member.name} is not a label ({error})") from error
        for key, (name, offset, size) in images.items():
            if key not in labels:
                raise ValueError(f"{shard}: {name} has no label ({key}.cls)")
            self.members.append((shard, name, offset, size))
            self.labels.append(labels[key])

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Shard and member."""
        shard, name, _, _ = self.members[index]
        return f"{shard}:{name}"

    def read(self, index: int, channels: int) -> Image.Image:
        """See :class:`ImageSource`."""
        shard, _, offset, size = self.members[index]
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise ValueError(f"{self.name(index)}: cannot be read ({error})") from error
        return decode_image(content, channels, self.name(index))


class DatasetImages:
    """A data set of torchvision or Hugging Face, as timm opens it: ``dataset[i]`` is (image, label).

    Args:
        dataset: the data set; its images are not transformed.
        labels: the label of every image.
        title: what to call it.
    """

    def __init__(self, dataset: Any, labels: Sequence[int], title: str) -> None:
        self.dataset = dataset
        self.labels = labels
        self.title = title

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Data set and number."""
        return f"{self.title}[{index}]"

    def read(self, index: int, channels: int) -> Image.Image:
        """See :class:`ImageSource`."""
        try:
            reader = getattr(self.dataset, "reader", None)
            if reader is None:
                image = self.dataset[index][0]
            else:  # timm's own data set would give the next image in place of one that cannot be read
                with reader[index][0] as file:
                    image = file.read()
        except Exception as error:  # whatever the library behind it raises, the image cannot be read
            raise ValueError(f"{self.name(index)}: cannot be read ({error})") from error
        return decode_image(image, channels, self.name(index))


def _label(content: bytes, extension: str) -> int | None:
    if extension == ".json":
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if "label" not in values:
            return None
        label = int(values["label"])
    else:
        label = int(content.decode().strip())
    if label < 0:
        raise ValueError(f"{label} is negative")
    return label


def _image_files(folder: Path) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [
            os.path.join(place, name)
            for name in names
            if os.path.splitext(name)[1].lower() in _IMAGE_EXTENSIONS and not _hidden(name)
        ]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".")
