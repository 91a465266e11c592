"""Official weights on their way into a model."""

from __future__ import annotations

from torch import Tensor, nn

from equiflop.convert.official import OfficialWeights


class Mapping:
    """Entries of an official state dict taken, entries of ours filled in.

    Args:
        official: where they come from.
    """

    def __init__(self, official: OfficialWeights) -> None:
        self.official = official
        self.out: dict[str, Tensor] = {}

    def plain(self, module: nn.Module, source: str, target: str) -> None:
        """A module that is the same on both sides."""
        for name, parameter in module.named_parameters():
            self.out[f"{target}.{name}"] = self.official.take(f"{source}.{name}", parameter.shape)

    def plain_block(self, block: nn.Module, source: str, target: str) -> None:
        """A plain transformer block of DeiT III, or of timm, whose layer scales have another name."""
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            self.plain(block.get_submodule(part), f"{source}.{part}", f"{target}.{part}")
        for branch in ("1", "2"):
            for _, gamma in block.get_submodule(f"ls{branch}").named_parameters():
                names = (f"{source}.gamma_{branch}", f"{source}.ls{branch}.gamma")
                found = self.official.take(next((n for n in names if n in self.official), names[0]), gamma.shape)
                self.out[f"{target}.ls{branch}.gamma"] = found
