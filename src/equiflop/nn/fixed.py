"""Fixed tensors: constants of a module that are exact in every dtype and absent from its state dict."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class FixedTensors(nn.Module):
    """A module with constants: non-persistent buffers that are written anew from a float64 source whenever it moves.

    A buffer that is merely cast, say from float32 to float64, would carry the rounding error of float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed_sources: dict[str, np.ndarray] = {}

    def fix(
        self,
        name: str,
        source: np.ndarray,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register the constant ``name``; integer sources keep an integer dtype, others take ``dtype``."""
        self._fixed_sources[name] = source
        if source.dtype.kind in "iu":
            dtype = torch.int64
        elif dtype is None:
            dtype = torch.get_default_dtype()
        self.register_buffer(name, torch.tensor(source, device=device, dtype=dtype), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Write the constants again, in the dtype and on the device their buffers have (a hook timm knows)."""
        for name, source in self._fixed_sources.items():
            buffer = self.get_buffer(name)
            if buffer.device.type != "meta":
                self._buffers[name] = torch.tensor(source, device=buffer.device, dtype=buffer.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTensors:
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self
