"""Official files recognised by their keys and shapes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import official_networks as official
from equiflop.checksums import checksum_file, verify
from equiflop.classify.weights import load_model
from equiflop.cli.main import main
from equiflop.convert.recognise import recognise
from official_octic import octic_state
from oracles import relative_error
from small_models import VIT, small_model
from test_convert import golden, random_state

HYBRID, EARLY = "flop_hybrid_deit3_base_patch16_224", "flop_inv_deit3_base_patch16_224"
#: Recordings of the official code: what is recognised, and what the user has to say beside.
GOLDENS: dict[str, tuple[str, list[str], str | None]] = {
    "flop_vit": ("flop_deit3_", ["--set", "num_heads=2"], None),
    "flop_vit_hybrid": ("flop_hybrid_deit3_", ["--set", "num_heads=2"], "hybrid_deit_small_patch16_LS"),
    "flop_resmlp": ("flop_resmlp_", [], None),
    "flop_convnext": ("flop_convnext_tiny", [], None),
    "flop_convnext_isotropic": ("flop_convnext_isotropic_small", [], None),
    "octic_vit_hybrid": ("octic_hybrid_deit3_", ["--set", "num_heads=2"], None),
    "octic_vit_invariant": ("octic_inv_deit3_", ["--set", "num_heads=2"], None),
}


def convert(source: Path, output: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["convert", str(source), "-o", str(output), *arguments])


def refused(result: Result, output: Path, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    assert all(word in result.output for word in words), result.output
    assert not output.exists() and not checksum_file(output).exists()


def test_every_recording_is_there() -> None:
    assert set(GOLDENS) == {path.stem for path in (Path(__file__).parent / "goldens").glob("*.safetensors")}


@pytest.mark.parametrize("name", GOLDENS)
def test_recordings_are_recognised_and_converted(name: str, tmp_path: Path) -> None:
    prefix, arguments, trained_as = GOLDENS[name]
    _, state, images, _, logits = golden(name)
    source, output = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    noted = argparse.Namespace(model=trained_as, output_dir=tmp_path)  # as the official scripts save them
    torch.save({"model": state, "epoch": 399, "args": noted}, source)
    result = convert(source, output, *arguments)
    assert result.exit_code == 0, result.output
    assert f"{source}: {prefix}" in result.output
    trained = load_model(output)
    assert relative_error(trained.model.double()(images.double()), logits) < 1e-6
    size = images.shape[1:] if "convnext" not in name else (3, 224, 224)
    assert trained.spec.preprocessing.input_size == tuple(size)
    assert trained.spec.preprocessing.crop_pct == (0.875 if "convnext" in name else 1.0)
    verify(output)


def full_size(make: Callable[..., dict[str, Tensor]], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """A state dict of a published size, without memory."""
    with FakeTensorMode():
        return make(*args, **kwargs)


PUBLISHED: dict[str, Callable[[], dict[str, Tensor]]] = {
    "flop_deit3_small_patch16_224": lambda: full_size(random_state, 384, 12, 6, (16, 16), (14, 14), classes=1000),
    "flop_deit3_huge_patch14_224": lambda: full_size(random_state, 1280, 32, 16, (14, 14), (16, 16), classes=1000),
    "octic_hybrid_deit3_large_patch16_224": lambda: full_size(octic_state, 1024, 24, 12, 16, 14, classes=1000),
    "octic_inv_deit3_huge_patch14_224": lambda: full_size(
        octic_state, 1280, 32, 16, 14, 16, classes=1000, invariant=True
    ),
    "octic_hybrid_deit3_huge_patch14_224 --set patch_size=16 --set num_classes=0": lambda: full_size(
        octic_state, 1280, 32, 16, 16, 14, classes=0, dino=True
    ),
    "flop_resmlp_24_224": lambda: full_size(official.resmlp_state, 224, 16, 384, 24, 1000, False),
    'flop_resmlp_large_24_224 --set invariants="norm"': lambda: full_size(
        official.resmlp_state, 224, 16, 1280, 24, 1000, True
    ),
    "flop_convnext_base": lambda: full_size(
        official.convnext_state, (3, 3, 27, 3), (128, 256, 512, 1024), 1000, True, False
    ),
    "flop_convnext_isotropic_large": lambda: full_size(
        official.isotropic_convnext_state, 16, 36, 1024, 1000, False, False
    ),
    "flop_deit3_base_patch16_224 --set img_size=384 --set num_classes=10": lambda: full_size(
        random_state, 768, 12, 12, (16, 16), (24, 24), classes=10
    ),
    "flop_deit3_huge_patch14_224 --set depth=52": lambda: full_size(
        random_state, 1280, 52, 16, (14, 14), (16, 16), classes=1000
    ),
}


@pytest.mark.parametrize("wanted", PUBLISHED)
def test_published_sizes(wanted: str) -> None:
    assert str(recognise(PUBLISHED[wanted]())) == wanted


@pytest.mark.parametrize("wanted", ["flop_deit3_small_patch16_224", "octic_hybrid_deit3_large_patch16_224"])
def test_heads_follow_from_the_width(wanted: str) -> None:
    found = recognise(PUBLISHED[wanted]())
    assert f"{timm.create_model(wanted, device='meta').blocks[0].attn.num_heads} heads" in found.description


def test_hybrid_and_early_invariant_files_hold_the_same_entries() -> None:
    state = full_size(random_state, 768, 12, 12, (16, 16), (14, 14), classes=1000, design="hybrid")
    with pytest.raises(ValueError, match=f"say which: --model {HYBRID} or --model {EARLY}$"):
        recognise(state)
    assert recognise(state, trained_as="hybrid_deit_base_patch16_LS").name == HYBRID
    assert recognise(state, trained_as="d2_inv_early_deit_base_patch16_LS").name == EARLY
    with pytest.raises(ValueError, match="say which"):
        recognise(state, trained_as="d2_deit_base_patch16_LS")  # not what the keys say
    deeper = full_size(random_state, 768, 12, 12, (16, 16), (14, 14), classes=1000)
    plain = {name: value for name, value in state.items() if name.startswith(("blocks.8", "blocks.9", "blocks.1"))}
    uneven = {
        name: value for name, value in deeper.items() if not name.startswith(("blocks.8.", "blocks.9.", "blocks.1"))
    }
    uneven |= {name: value for name, value in plain.items() if not name.startswith("blocks.1.")}
    uneven |= {name: value for name, value in deeper.items() if name.startswith("blocks.1.")}
    found = recognise(uneven, trained_as="hybrid_deit_base_patch16_LS")
    assert found.keywords == {"equivariant_depth": 8}


@pytest.fixture(scope="module")
def resmlp() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.contiguous() for name, value in official.resmlp_state(32, 8, 16, 2, 7, False).items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {}, ["official.pth", "holds no state dict"]),
        (lambda state: {"a": torch.ones(2), "b.c": torch.ones(2)}, ["none of the official", "2 tensors ('a', 'b.c'"]),
        (
            lambda state: {k: v for k, v in state.items() if k != "head.weight"},
            ["E(ResMLP)", "'head.weight' is missing"],
        ),
        (lambda state: {**state, "head.weight": torch.ones(3)}, ["'head.weight' has shape (3,)"]),
        (lambda state: {**state, "head.bias": torch.ones(3)}, ["does not fit flop_resmlp_12_224", "'head.bias'"]),
        (lambda state: {**state, "blocks.0.attn.lin_sym.weight": torch.ones(7, 7)}, ["14 tokens", "no square"]),
        (lambda state: timm.create_model("deit3_small_patch16_224", depth=1).state_dict(), ["plain network"]),
        (lambda state: small_model(VIT).state_dict(), ["weights of equiflop already"]),
        (lambda state: {k: v for k, v in state.items() if "blocks" not in k}, ["E(ViT)", "'pos_embed.0' is missing"]),
    ],
)
def test_what_is_not_recognised(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: list[str],
    resmlp: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors"
    torch.save(change(resmlp), source)
    refused(convert(source, output), output, *words)


class Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_damaged_files_and_code_are_refused_without_a_name_too(resmlp: dict[str, Tensor], tmp_path: Path) -> None:
    output, trace = tmp_path / "out" / "ours.safetensors", tmp_path / "trace"
    empty, cut, evil = (tmp_path / name for name in ("empty.pth", "cut.safetensors", "evil.pth"))
    empty.touch()
    refused(convert(empty, output), output, "empty.pth", "not a readable PyTorch file")
    save_file(resmlp, cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(convert(cut, output), output, "cut.safetensors", "not a readable safetensors file")
    torch.save({"model": resmlp, "args": Payload(trace)}, evil)
    refused(convert(evil, output), output, "evil.pth", "run code")
    assert not trace.exists()


def test_a_wrong_model_is_told_what_the_file_is(resmlp: dict[str, Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors"
    torch.save(resmlp, source)
    sizes = "--set embed_dim=16 --set num_blocks=2 --set patch_size=8 --set img_size=32 --set num_classes=7"
    refused(convert(source, output, "--model", "flop_resmlp_24_224"), output, f"the file is flop_resmlp_12_224 {sizes}")
    result = convert(source, output, "--model", "flop_resmlp_12_224", *sizes.split())
    assert result.exit_code == 0, result.output
    assert load_file(output)["head.weight"].shape == (7, 8)
    output.unlink()
    checksum_file(output).unlink()
    torch.save(timm.create_model("deit3_small_patch16_224", depth=1).state_dict(), source)
    refused(convert(source, output, "--model", "flop_deit3_small_patch16_224"), output, "weights of a plain network")


def test_polynomial_invariants_of_octic_networks_are_refused(tmp_path: Path) -> None:
    state = octic_state(invariant=True)
    state["invariant_proj.weight"] = torch.ones(32, 4 * 32)
    with pytest.raises(ValueError, match="see 128 invariants; only the 24 norms"):
        recognise(state, {"num_heads": 2})
    source, output = tmp_path / "official.pth", tmp_path / "out" / "ours.safetensors"
    torch.save(state, source)
    sizes = "--set embed_dim=32 --set depth=2 --set patch_size=4 --set img_size=16 --set num_heads=2"
    name = "octic_inv_deit3_small_patch16_224"
    result = convert(source, output, "--model", name, *sizes.split(), "--set", "invariants=polynomial")
    refused(result, output, "invariants='polynomial' are not those of the official networks")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dino": True, "classes": 0, "registers": 3}, {"num_classes": 0, "reg_tokens": 3}),
        ({"class_token": False}, {"num_classes": 5, "class_token": False, "global_pool": "avg"}),
        ({"layer_scale": False}, {"num_classes": 5, "init_values": 0}),
        ({"octic_blocks": 2}, {"num_classes": 5, "equivariant_depth": 2}),
        ({"chans": 1}, {"num_classes": 5, "in_chans": 1}),
    ],
)
def test_options_of_octic_networks(options: dict[str, Any], expected: dict[str, Any]) -> None:
    found = recognise(octic_state(**options), {"num_heads": 2})
    sizes = {"embed_dim": 32, "depth": 2, "patch_size": 4, "img_size": 16, "num_heads": 2}
    assert found.keywords == {**sizes, **expected}
