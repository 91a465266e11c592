"""Reading the state dicts of the official repositories."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class OfficialWeights:
    """An official state dict that remembers which entries were used; values come out in float64.

    Args:
        state_dict: names to tensors.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._entries = dict(state_dict)
        self._used: set[str] = set()
        #: Entries that are known but have no place in our models, with the reason.
        self.left_out: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def take(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """The entry ``name`` in float64.

        Raises:
            ValueError: if it is absent, is not a tensor, has another shape than ``shape``, or holds NaN or infinity.
        """
        value = self._entry(name)
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name!r} has shape {tuple(value.shape)} where the model needs {tuple(shape)}")
        value = value.detach().to("cpu", torch.float64, copy=True)
        if not torch.isfinite(value).all():
            raise ValueError(f"{name!r} holds NaN or infinity; the checkpoint is damaged")
        return value

    def drop(self, name: str, expected: Tensor, why: str) -> None:
        """Leave out an entry that must equal ``expected``; ``why`` completes "... is not <why>".

        Raises:
            ValueError: if it is absent or differs.
        """
        value = self._entry(name)
        if tuple(value.shape) != tuple(expected.shape) or not torch.equal(
            value.to("cpu", torch.float64), expected.double()
        ):
            raise ValueError(f"{name!r} is not {why}, so this checkpoint is not one that the model can represent")

        self.left_out[name] = f"always {why}"

    def ignore(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        """Leave out an entry whose values do not matter.

        Raises:
            ValueError: see :meth:`take`.
        """
        self.take(name, shape)
        self.left_out[name] = reason

    def leave_out(self, prefixes: tuple[str, ...], reason: str) -> None:
        """Leave out all entries whose names start with one of the prefixes."""
        for name in self._entries:
            if name.startswith(prefixes):
                self._used.add(name)
                self.left_out[name] = reason

    def finish(self) -> None:
        """Check that every entry was used.

        Raises:
            ValueError: naming the first entry that was not.
        """
        left = [name for name in self._entries if name not in self._used]
        if left:
            raise ValueError(f"{left[0]!r} has no place in the model ({len(left)} such entries)")

    def _entry(self, name: str) -> Tensor:
        if name not in self._entries:
            raise ValueError(f"{name!r} is missing from the official state dict")
        self._used.add(name)
        value = self._entries[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
        return value
