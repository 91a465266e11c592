"""Images with labels: built-in sets by name, or a folder with one sub-folder per class."""

from typing import TYPE_CHECKING

from equiflop.data.names import BUILT_IN, DataNotFoundError
from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.data.catalog import ImageData, open_data
    from equiflop.data.decode import read_image
    from equiflop.data.splits import Augmentation, Batch, ImageSplit, MemorySplit, Preprocessing, Split

__all__ = [
    "BUILT_IN",
    "Augmentation",
    "Batch",
    "DataNotFoundError",
    "ImageData",
    "ImageSplit",
    "MemorySplit",
    "Preprocessing",
    "Split",
    "open_data",
    "read_image",
]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.data.catalog": ["ImageData", "open_data"],
        "equiflop.data.decode": ["read_image"],
        "equiflop.data.splits": ["Augmentation", "Batch", "ImageSplit", "MemorySplit", "Preprocessing", "Split"],
    },
)
