"""Every registered model at its full size: MACs and parameters as published, and what importing and building costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
import timm
import torch
from torch import nn

import equiflop

# MACs in units of 10^9 at 224 px and batch 1: plain, equivariant; parameters in millions.
FULLY_EQUIVARIANT: dict[str, tuple[float | None, float | None, float]] = {
    "flop_deit3_tiny_patch16_224": (None, None, 2.866),
    "flop_deit3_small_patch16_224": (4.599, 2.478, 11.040),
    "flop_deit3_medium_patch16_224": (7.991, 4.234, 19.438),
    "flop_deit3_base_patch16_224": (17.564, 9.140, 43.312),
    "flop_deit3_large_patch16_224": (61.555, 31.731, 152.238),
    "flop_deit3_huge_patch14_224": (167.295, 86.353, 316.146),
    "flop_resmlp_12_224": (3.010, 1.505, 7.693),
    "flop_resmlp_24_224": (5.961, 2.981, 15.045),
    "flop_resmlp_big_24_224": (23.021, 11.510, 57.936),
    "flop_resmlp_large_24_224": (63.030, 31.515, 159.163),
    "flop_convnext_tiny": (4.456, 2.280, 14.302),
    "flop_convnext_small": (8.684, 4.428, 25.126),
    "flop_convnext_base": (15.355, 7.792, 44.315),
    "flop_convnext_large": (34.361, 17.352, 98.912),
    "flop_convnext_xlarge": (60.921, 30.689, 175.136),
    "flop_convnext_isotropic_small": (4.286, 2.176, 11.158),
    "flop_convnext_isotropic_base": (16.896, 8.515, 43.549),
    "flop_convnext_isotropic_large": (59.699, 30.027, 152.972),
}
HALF_EQUIVARIANT = {
    "small_patch16": 16.553, "base_patch16": 64.955, "large_patch16": 228.315, "huge_patch14": 474.186
}  # fmt: skip

# Plain MACs, MACs with the symmetries of the square in every block, their ratio; parameters in millions.
OCTIC = {
    "small": (4.599, 1.153, 3.99, 2.770),
    "medium": (7.991, 1.886, 4.24, 4.873),
    "base": (17.564, 3.874, 4.53, 10.848),
    "large": (61.555, 13.091, 4.70, 38.110),
    "huge": (167.295, 35.764, 4.68, 79.120),
}


def on_meta(name: str, **kwargs: object) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def registered(name: str) -> bool:
    return name in equiflop.equivariant_models()


def test_every_flop_model_has_a_row_here() -> None:
    halves = {f"flop_{half}_deit3_{size}_224" for half in ("hybrid", "inv") for size in HALF_EQUIVARIANT}
    halves |= {f"flop_{half}_deit3_{size}_patch16_224" for half in ("hybrid", "inv") for size in ("tiny", "medium")}
    found = {name for name in equiflop.equivariant_models() if name.startswith("flop_")}
    assert found == set(FULLY_EQUIVARIANT) | halves


@pytest.mark.parametrize("name", FULLY_EQUIVARIANT)
def test_macs_and_parameters(name: str) -> None:
    plain, equivariant, parameters = FULLY_EQUIVARIANT[name]
    model = on_meta(name)
    assert trainable(model) / 1e6 == pytest.approx(parameters, abs=0.0005001)
    if plain is None or equivariant is None:
        return
    found = equiflop.macs(model, (224, 224))
    assert isinstance(found, int)
    assert found / 1e9 == pytest.approx(equivariant, abs=0.0005001)
    twin, overrides = equiflop.plain_twin(name)
    assert equiflop.macs(on_meta(twin, **overrides), (224, 224)) / 1e9 == pytest.approx(plain, abs=0.0005001)


@pytest.mark.parametrize("half", ["hybrid", "inv"])
@pytest.mark.parametrize("size", HALF_EQUIVARIANT)
def test_half_equivariant_models(half: str, size: str) -> None:
    """Parameters as published."""
    assert trainable(on_meta(f"flop_{half}_deit3_{size}_224")) / 1e6 == pytest.approx(
        HALF_EQUIVARIANT[size], abs=0.0005001
    )


@pytest.mark.parametrize("group", ["flop", "octic"])
@pytest.mark.parametrize("half", ["hybrid", "inv"])
@pytest.mark.parametrize("size", HALF_EQUIVARIANT)
def test_macs_of_half_equivariant_models(group: str, half: str, size: str) -> None:
    """Half way between the plain network's and E's, but for the patches, the head and the change between the halves."""
    model = on_meta(f"{group}_{half}_deit3_{size}_224")
    plain, full = (equiflop.macs(on_meta(f"{name}deit3_{size}_224"), (224, 224)) for name in ("", f"{group}_"))
    tokens, width = model.patch_embed.num_patches, model.embed_dim
    pixels = 3 * model.patch_embed.patch_size[0] ** 2 * tokens * width
    patches, head = (pixels // 2, width // 2) if group == "flop" else (3 * pixels // 16, width // 8)
    blocks = (plain - pixels - 1000 * width + full - patches - 1000 * head) // 2
    projection = (tokens + 1) * (6 * width // 8) * width if (group, half) == ("octic", "inv") else 0
    assert equiflop.macs(model, (224, 224)) == blocks + patches + 1000 * width + projection


@pytest.mark.parametrize("size", OCTIC)
def test_octic_in_every_block(size: str) -> None:
    plain, expected, ratio, parameters = OCTIC[size]
    model = on_meta(f"octic_deit3_{size}_patch{14 if size == 'huge' else 16}_224")
    found = equiflop.macs(model, (224, 224))
    assert found / 1e9 == pytest.approx(expected, abs=0.0005001)
    assert plain * 1e9 / found == pytest.approx(ratio, abs=0.00501)
    assert trainable(model) / 1e6 == pytest.approx(parameters, rel=1e-3)


@pytest.mark.slow
def test_import_adds_at_most_half_of_timms_own() -> None:
    """Both in one fresh interpreter, so that other load on the machine strikes both; the best of three."""
    program = (
        "import time; start = time.perf_counter(); import timm; between = time.perf_counter(); "
        "import equiflop; print((time.perf_counter() - between) / (between - start))"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["flop_deit3_small_patch16_224", "flop_deit3_base_patch16_224", "flop_inv_deit3_small_patch16_224"]
)
def test_building_takes_at_most_half_as_long_again_as_the_twins(name: str) -> None:
    def best(name: str, **kwargs: object) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            timm.create_model(name, **kwargs)
            times.append(time.perf_counter() - start)
        return min(times)

    twin, overrides = equiflop.plain_twin(name)
    best(name)  # the group's tables are made once
    assert best(name) <= 1.5 * best(twin, **overrides)


def test_importing_makes_no_models_and_touches_no_defaults() -> None:
    code = (
        "import json, torch; state = lambda: (str(torch.get_default_dtype()), torch.initial_seed()); before = state(); "
        "import equiflop; print(json.dumps([before, state(), torch.cuda.is_initialized()]))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after, cuda = json.loads(run.stdout)
    assert before == after and cuda is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "eva02_small_patch14_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "vit_base_patch16_siglip_224",
        "samvit_base_patch16_224",
        "naflexvit_base_patch16_gap",
    ],
)
def test_twins_at_full_size_in_float32(name: str) -> None:
    report = equiflop.check(equiflop.twin(name))
    assert report.passed and report.max_error < 1e-5
