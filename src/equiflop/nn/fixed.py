"""Fixed tensors: constants of a module that are exact in every dtype and absent from its state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Write the constants on a device, floating-point ones in ``dtype``."""
        for name, source in self._fixed_sources.items():
            own = dtype if source.dtype.kind == "f" else self.get_buffer(name).dtype
            self._buffers[name] = torch.tensor(source, device=device, dtype=own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also writes the constants: memory that was allocated for them holds anything, and a model that was made on
        the meta device and is given its weights (``assign=True``) has no memory for them yet."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.init_non_persistent_buffers()
        weights = [value for value in state_dict.values() if isinstance(value, Tensor) and value.is_floating_point()]
        empty = any(buffer.is_meta for buffer in self.buffers(recurse=False))
        if empty and args[0].get("assign_to_params_buffers"):
            like = weights[0] if weights else torch.empty(0, device="cpu")
            self.settle(like.device, like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTensors:
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()
        return self


def settle_constants(model: nn.Module, incompatible_keys: object = None) -> None:
    """Bring all constants to the one device and dtype of a model's parameters; a hook after ``load_state_dict``.

    Weights that were assigned may lie elsewhere than the model was made; layers without weights cannot know where.
    """
    kinds = {(parameter.device, parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) != 1:
        return
    device, dtype = kinds.pop()
    for module in model.modules():
        own = module._buffers.items()
        empty = {name: buffer for name, buffer in own if buffer is not None and buffer.is_meta}
        if empty and device.type != "meta" and not isinstance(module, FixedTensors):  # timm's constants
            fill = getattr(module, "init_non_persistent_buffers", None)
            if callable(fill):
                for name, buffer in empty.items():
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                fill()
        if isinstance(module, FixedTensors) and device.type != "meta":
            buffers = [module.get_buffer(name) for name in module._fixed_sources]
            if any(b.device != device or (b.is_floating_point() and b.dtype != dtype) for b in buffers):
                module.settle(device, dtype)
