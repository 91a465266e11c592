"""Which image sizes a group allows."""

from __future__ import annotations

from equiflop.grids import ImageGroup


def check_image_size(group: ImageGroup, img_size: int | tuple[int, int], dynamic_img_size: bool = False) -> None:
    """See that a group that swaps height and width gets a square image, or a network that takes any size.

    Raises:
        ValueError: if not; it names the alternative.
    """
    if group.swaps_axes and not dynamic_img_size and not isinstance(img_size, int) and img_size[0] != img_size[1]:
        raise ValueError(
            f"img_size={tuple(img_size)} is not square, which group {group.name!r} needs since it swaps height and "
            "width; use group 'flips', or dynamic_img_size=True where the model has it"
        )
