"""Random numbers as a pure function of (seed, epoch, sample): no state, so the order of evaluation cannot matter."""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of 64-bit integers that mixes every bit into every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*words: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of a sequence of words; arrays among them broadcast."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _scramble(state + _GOLDEN + np.asarray(word).astype(np.uint64) * _GOLDEN)
    return state


def derive_seed(*words: int) -> int:
    """A seed below 2**63 that depends on every word and on their order."""
    return int(_hash(*words)[0] >> np.uint64(1))


def uniform(seed: int, epoch: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """One number in [0, 1) per sample: shape of ``samples``, float64. Different streams are independent.

    >>> import numpy as np
    >>> a = uniform(0, 3, np.array([5, 7]), stream=1)
    >>> b = uniform(0, 3, np.array([7]), stream=1)
    >>> bool(a[1] == b[0])
    True
    """
    return (_hash(seed, epoch, stream, samples) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """The order in which an epoch visits the samples: a permutation of 0..size-1, int64."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(size, generator=generator)
