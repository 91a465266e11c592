"""Reading one image file, whatever its colour mode, depth and orientation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_WHITE = (255, 255, 255, 255)


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Read an image file as 8-bit RGB (3 channels) or grey (1 channel).

    Deep images (16 and 32 bits) are scaled, not clipped; transparent parts are laid over white; the orientation that a
    camera noted in the EXIF data is applied; of an animation the first frame is taken.

    Raises:
        ValueError: if the file is missing, cannot be read or is not an image, or ``channels`` is not 1 or 3.
    """
    return _read(path, channels, str(path))


def decode_image(content: bytes | Image.Image, channels: int, name: str) -> Image.Image:
    """The same for the content of a file, or for an image of Pillow.

    Args:
        content: what the file holds.
        channels: 1 or 3.
        name: what to call it in a message.

    Raises:
        ValueError: as above.
    """
    return _read(io.BytesIO(content) if isinstance(content, bytes) else content, channels, name)


def _read(source: str | Path | io.BytesIO | Image.Image, channels: int, name: str) -> Image.Image:
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: image files are read with 1 or 3 channels")
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such file") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow can read") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise ValueError(f"{name}: cannot be read as an image ({error})") from error
    return _to_eight_bit(upright).convert("RGB" if channels == 3 else "L")


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """An opaque image of one of Pillow's 8-bit modes."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scaled = np.rint(values * (255.0 / _full_scale(image.mode, values)))
        return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, _WHITE), coloured)
    return image


def _full_scale(mode: str, values: np.ndarray) -> float:
    """The value that stands for white: by the mode for 16 bits, else the smallest usual one that holds the values."""
    if mode.startswith("I;16"):
        return 65535.0
    scales = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    return next((scale for scale in scales if values.max() <= scale), float(values.max()))
