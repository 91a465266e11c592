"""Checks of inputs that symbolic tracing keeps as one step, where a comparison would stop it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def check_axis(x: Tensor, dim: int, name: str) -> None:
    """See that the last axis has ``dim`` entries.

    Raises:
        ValueError: if not; ``name`` says what needs them.
    """
    if has_torch_function_unary(x):
        handle_torch_function(check_axis, (x,), x, dim, name)
    elif x.shape[-1] != dim:
        raise ValueError(f"last axis of the input has length {x.shape[-1]}; {name} needs {dim}")


def check_images(x: Tensor, in_chans: int, img_size: Sequence[int] | None, patch_size: Sequence[int]) -> None:
    """See that ``x`` is a batch of floating-point images ``(B, in_chans, H, W)`` of whole patches.

    Raises:
        ValueError: if not; ``img_size`` is the only size accepted, None for any.
    """
    if has_torch_function_unary(x):
        handle_torch_function(check_images, (x,), x, in_chans, img_size, patch_size)
        return
    if x.ndim != 4:
        raise ValueError(
            f"input has shape {tuple(x.shape)}; a batch of images (batch, {in_chans}, height, width) is needed"
            + ("; add the batch axis by x.unsqueeze(0)" if x.ndim == 3 else "")
        )
    if x.shape[1] != in_chans:
        raise ValueError(f"input has {x.shape[1]} channels; this model has in_chans={in_chans}")
    if not x.is_floating_point():
        raise ValueError(
            f"input has dtype {str(x.dtype).removeprefix('torch.')}; images must be floating-point, normalised"
        )
    height, width = x.shape[-2:]
    if img_size is not None:
        if height != img_size[0] or width != img_size[1]:
            raise ValueError(
                f"input of {height}x{width} pixels does not match img_size {img_size[0]}x{img_size[1]}; "
                "call set_input_size or build the model with dynamic_img_size=True"
            )
    else:
        check_divisible(height, width, patch_size)


def check_divisible(height: int, width: int, patch_size: Sequence[int]) -> None:
    """See that an image is a whole number of patches.

    Raises:
        ValueError: if not; it names the sizes beside it that would be.
    """
    for side, pixels, patch in (("height", height, patch_size[0]), ("width", width, patch_size[1])):
        if pixels % patch or pixels < patch:
            fits = max(pixels // patch, 1) * patch
            raise ValueError(
                f"image {side} {pixels} is not a multiple of the patch {side} {patch}; use {fits} or {fits + patch}"
            )


def check_mirrored(x: Tensor, stride: int, patch: int, mirrors: tuple[bool, bool], group: str) -> None:
    """See that every feature map of a network that halves its resolution can be mirrored.

    Args:
        x: images, shape ``(B, C, H, W)``.
        stride: pixels per position of the last feature map.
        patch: pixels per position of the first.
        mirrors: whether the group mirrors rows, and columns.
        group: its name.

    Raises:
        ValueError: if a mirrored side is no multiple of ``stride``, the pixels per position of the last feature map.
    """
    if has_torch_function_unary(x):
        handle_torch_function(check_mirrored, (x,), x, stride, patch, mirrors, group)
        return
    for side, mirrored, pixels in zip(("height", "width"), mirrors, x.shape[-2:], strict=True):
        if (mirrored and pixels % stride) or pixels < patch:
            fits = max(pixels // stride, 1) * stride
            raise ValueError(
                f"image {side} {pixels} is not a multiple of {stride}, which group {group!r} "
                f"needs to mirror every feature map; use {fits} or {fits + stride}"
            )
