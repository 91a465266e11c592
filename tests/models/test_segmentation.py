"""Maps that move with the image: the head against a dense matrix, whole networks against moved images, and `check`."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equiflop
from equiflop import ImageGroup, Rep
from equiflop.grids import grid_decomposition
from equiflop.groups import FiniteGroup, Irrep
from equiflop.models import EquivariantVisionTransformer
from equiflop.models.segmentation import PatchDecoder, Segmenter
from oracles import IMAGE_GROUPS, action, dense_linear, image_group, move_image, move_tensor, relative_error, scramble

#: MACs of a map between regular Reps over those of a dense one, sum of d^3 / (e |G|^2).
SHARE = {"flop": 1 / 2, "updown": 1 / 2, "flips": 1 / 4, "rot4": 3 / 8, "octic": 3 / 16}


def small_backbone(group: str | ImageGroup = "flop", **options: Any) -> EquivariantVisionTransformer:
    defaults = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return EquivariantVisionTransformer(**{**defaults, **options}, group=group)


def small_segmenter(group: str | ImageGroup = "flop", head: dict[str, Any] | None = None, **options: Any) -> Segmenter:
    return Segmenter(small_backbone(group, **options), 5, **(head or {})).double().eval()


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain head": ({}, {}),
    "tokens": ({}, {"resolution": "tokens"}),
    "mlp": ({}, {"mlp_ratio": 2.0}),
    "no class token": ({"class_token": False, "global_pool": "avg"}, {}),  # the norm is timm's fc_norm
    "registers": ({"reg_tokens": 2}, {}),
    "no norm": ({"final_norm": False}, {}),
    "odd patch and grid": ({"patch_size": 5, "img_size": 15}, {}),
    "one pixel": ({"patch_size": 1, "img_size": 5}, {}),
    "one token": ({"img_size": 4}, {}),
}


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")  # patches of one pixel
@pytest.mark.parametrize("group", IMAGE_GROUPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_segmenters_are_equivariant(group: str, variant: str) -> None:
    backbone, head = VARIANTS[variant]
    model = small_segmenter(group, head, **backbone)
    report = equiflop.check(model)
    assert report.passed and report.max_error < 1e-12, str(report)
    compared = {row.what for row in report.rows}
    assert {"output", "features 0", "features 1"} <= compared
    assert any("tokens" in what for what in compared) == (model.num_prefix_tokens > 0)
    assert len(report.errors) == image_group(group).order


@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_logits_move_with_the_image(group: str) -> None:
    """By numpy's flips and turns, without the tester; images that are not square where the group allows."""
    swaps = image_group(group).swaps_axes
    options = {"dynamic_img_size": True} if swaps else {"patch_size": (4, 6), "img_size": (12, 30)}
    model: Any = scramble(small_segmenter(group, **options))
    images = torch.randn(2, 3, 12, 20 if swaps else 30, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 5, *images.shape[-2:])
        assert (logits[0] - logits[1]).abs().max() > 0.1 * logits.abs().max()
        for a in range(image_group(group).order):
            assert relative_error(model(move_tensor(group, a, images)), move_tensor(group, a, logits)) < 1e-12
    assert equiflop.check(model, input_size=(12, 20 if swaps else 30)).passed


def dense_decoder(decoder: PatchDecoder, group: ImageGroup) -> tuple[Tensor, Tensor]:
    """The matrix, shape ``(points * channels, rep.dim)``, and the bias of a token's patch, points in raster order."""
    weight, bias = dense_linear(decoder.proj)
    basis = torch.from_numpy(grid_decomposition(group, *decoder.patch_size).matrix)
    to_points = torch.kron(basis.T.contiguous(), torch.eye(decoder.channels, dtype=torch.float64))
    return to_points @ weight, to_points @ bias


@pytest.mark.parametrize("group", IMAGE_GROUPS)
@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (2, 3)])
def test_decoder_is_the_general_equivariant_map(group: str, patch: tuple[int, int]) -> None:
    g = image_group(group)
    if g.swaps_axes and patch[0] != patch[1]:
        with pytest.raises(ValueError, match="does not act on a 2x3 grid"):
            PatchDecoder(Rep.regular(g, 2), g, patch, 3)
        return
    points, channels = math.prod(patch), 3
    rep = Rep.regular(g, 2)
    decoder: Any = scramble(PatchDecoder(rep, g, patch, channels, dtype=torch.float64))
    matrix, bias = dense_decoder(decoder, g)
    x = torch.randn(2, 3, 2, rep.dim, dtype=torch.float64)
    expected = torch.zeros(2, channels, 3 * patch[0], 2 * patch[1], dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            values = (x[:, row, column] @ matrix.T + bias).view(2, *patch, channels)
            top, left = row * patch[0], column * patch[1]
            expected[:, :, top : top + patch[0], left : left + patch[1]] = values.permute(0, 3, 1, 2)
    assert relative_error(decoder(x), expected) < 1e-12

    dimension = 0.0
    for a in range(g.order):
        image = move_image(group, a, np.arange(points).reshape(patch))
        permutation = np.eye(points)[image.ravel()]  # (moved patch)[i] = patch[image[i]]
        pixels = torch.from_numpy(np.kron(permutation, np.eye(channels)))
        rho = torch.from_numpy(action(rep, a))
        assert (pixels @ matrix - matrix @ rho).abs().max() < 1e-12
        assert (pixels @ bias - bias).abs().max() < 1e-12
        dimension += channels * np.trace(permutation) * np.trace(action(rep, a)) / g.order
    assert sum(weight.numel() for _, weight in decoder.proj.weights()) == round(dimension)


@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_decoder_undoes_a_patch_embedding_with_the_same_weights(group: str) -> None:
    """The decoder is the transpose: <decode(t), image> = <t, embed(image)> when the weights are each other's."""
    g = image_group(group)
    rep = Rep.regular(g, 2)
    embed = equiflop.nn.PatchEmbed(rep, g, 12, 4, 3, bias=False, output_fmt="NHWC", dtype=torch.float64)
    decoder = PatchDecoder(rep, g, 4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for (irrep, theirs), (_, ours) in zip(embed.proj.weights(), decoder.proj.weights(), strict=True):
            if irrep.endomorphism_dim == 1:
                ours.copy_(theirs.T)
            else:  # the transpose of J_0 W_0 + J_1 W_1 is J_0 W_0^T - J_1 W_1^T
                real, imaginary = theirs.chunk(2)
                ours.copy_(torch.cat([real.T, -imaginary.T]))
    tokens = torch.randn(2, 3, 3, rep.dim, dtype=torch.float64)
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert torch.allclose((decoder(tokens) * image).sum(), (tokens * embed(image)).sum(), rtol=1e-12)


@pytest.mark.parametrize("group", IMAGE_GROUPS)
@pytest.mark.parametrize("patch", [4, 3])
@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
def test_macs_of_the_head_by_hand(group: str, patch: int) -> None:
    width, tokens, classes = 32, 9, 5
    backbone = small_backbone(group, img_size=3 * patch, patch_size=patch, embed_dim=width)
    without = equiflop.macs(backbone, (3 * patch, 3 * patch))
    share = SHARE[group]
    if patch % 2 and group == "octic":
        share -= 1 / (16 * patch**2)
    model = Segmenter(backbone, classes)
    head = equiflop.macs(model, (3 * patch, 3 * patch)) - without
    if group == "rot4":  # the middle of an odd patch has no part in two of the three irreps
        share -= (patch % 2) / (8 * patch**2)
    assert head == tokens * classes * width * patch**2 * share
    assert head == sum(tokens * irrep.dim * weight.numel() for irrep, weight in model.head.proj.weights())


def test_macs_in_numbers() -> None:
    """flop, 16 tokens of 4x4 pixels: half of 16 tokens * 32 channels * 16 pixels * 5 classes."""
    backbone = small_backbone("flop")
    assert equiflop.macs(Segmenter(small_backbone("flop"), 5), (16, 16)) - equiflop.macs(backbone, (16, 16)) == 20480
    tokens = Segmenter(small_backbone("flop"), 5, resolution="tokens")
    assert equiflop.macs(tokens, (16, 16)) - equiflop.macs(backbone, (16, 16)) == 16 * 16 * 5
    mlp = Segmenter(small_backbone("flop"), 5, mlp_ratio=2)
    assert equiflop.macs(mlp, (16, 16)) - equiflop.macs(backbone, (16, 16)) == 20480 + 16 * 2 * 32 * 64 // 2


def test_group_whose_transform_is_a_matrix_product() -> None:
    """Symmetries of the square with an irrep in an oblique basis: equivariant, and the products count."""
    octic = image_group("octic")
    turn = np.array([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    irreps = [i if i.dim == 1 else Irrep(i.name, 2, i.type, turn @ i.matrices @ turn.T) for i in octic.irreps]
    group = ImageGroup(FiniteGroup(octic.table, irreps, "oblique D4"), octic.matrices)
    model = small_segmenter(group, img_size=12)
    assert model.head.transform.plan is None and model.head.macs_per_token == 5 * 16 * 16
    report = equiflop.check(model)
    assert report.passed, str(report)
    head = equiflop.macs(model, (12, 12)) - equiflop.macs(small_backbone(group, img_size=12), (12, 12))
    assert head == 9 * 5 * (32 * 16 * 3 // 16 + 16 * 16)


class PlainSegmenter(nn.Module):
    """timm's ViT with a linear map to the pixels of every patch."""

    img_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "deit3_small_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0
        )
        self.head = nn.Linear(32, 5 * 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.head(self.backbone.forward_features(x)[:, 1:])
        return F.pixel_shuffle(tokens.mT.unflatten(-1, (4, 4)), 4)


class Pointwise(nn.Module):
    """A function of every pixel alone: equivariant to everything."""

    img_size = 8

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.exp(), x.square()], dim=1)


class PixelsWeighed(Pointwise):
    """A map that stays in its place: pixel weights that no mirror leaves as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[-1], dtype=x.dtype)


class Shifted(Pointwise):
    """A function of every pixel alone, one pixel off along both axes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll((1, 1), (-2, -1))


class Pooled(Pointwise):
    """The same at all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True).expand_as(x)


class ConstantMap(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, x.shape[-1], dtype=x.dtype).expand(x.shape)


class FixedShape(Pointwise):
    """A map of 8 rows and 4 columns from any image: height and width do not change places."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4].roll(1, -2)


@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_check_of_maps(group: str) -> None:
    assert equiflop.check(Pointwise(), group=group).passed
    assert equiflop.check(Pointwise(), group=group, input_size=(6, 10)).passed
    for broken in (PlainSegmenter(), Shifted(), FixedShape()):
        report = equiflop.check(broken, group=group)
        assert not report.passed and report.max_error > 1e-2, broken
        assert report.errors[0] == 0.0
    assert equiflop.check(PixelsWeighed(), group=group).passed == (group == "updown")
    assert equiflop.check(FixedShape(), group="octic").max_error == math.inf


@pytest.mark.parametrize(("network", "words"), [(Pooled, "at all pixels"), (ConstantMap, "for all images")])
def test_worthless_maps_fail(network: type[nn.Module], words: str) -> None:
    report = equiflop.check(network(), group="updown")
    assert not report.passed
    assert [problem for problem in report.problems if words in problem] == list(report.problems) != []


def test_one_wrong_pixel_is_found() -> None:
    model = small_segmenter("flop")

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0, 3, 2] *= 1 + 1e-6
        return output

    model.head.register_forward_hook(hook)
    report = equiflop.check(model)
    assert not report.passed and max(row.error for row in report.rows if row.what != "output") < 1e-12


class Gradient(nn.Module):
    """Differences along x, a map whose one channel changes its sign under the mirror."""

    img_size = 8

    def __init__(self, output_rep: Rep | None) -> None:
        super().__init__()
        self.output_rep = output_rep

    def forward(self, x: Tensor) -> Tensor:
        difference = x.roll(-1, -1) - x.roll(1, -1)
        return difference.sum(1, keepdim=True)


class Lean(Gradient):
    """One number per image that changes its sign under the mirror: what is right minus what is left."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., 4:] - x[..., :4]).mean((1, 2, 3))[:, None]


def test_output_rep_of_channels_that_transform() -> None:
    flop = image_group("flop")
    odd = Rep(flop, [0, 1])
    assert equiflop.check(Gradient(odd)).passed
    assert not equiflop.check(Gradient(Rep.trivial(flop, 1))).passed
    assert not equiflop.check(Gradient(None)).passed
    assert equiflop.check(Lean(odd)).passed
    assert not equiflop.check(Lean(None)).passed
    with pytest.raises(ValueError, match=r"output_rep=Rep\(C2: 2 B\) does not describe an output of shape"):
        equiflop.check(Gradient(Rep(flop, [0, 2])))
    with pytest.raises(ValueError, match="group='octic' is not the group of the model's output_rep"):
        equiflop.check(Gradient(odd), group="octic")


def test_other_groups_than_the_models_own() -> None:
    """The output of an octic segmenter is equivariant to a mirror alone, too; one of flop is not octic."""
    report = equiflop.check(small_segmenter("octic"), group="flop")
    assert report.passed and {row.what for row in report.rows} == {"output"}
    report = equiflop.check(small_segmenter("flop"), group="octic")
    assert not report.passed and report.errors[4] < 1e-12 < 1e-3 < report.errors[1]


def test_nothing_compared_is_a_failure() -> None:
    hybrid = EquivariantVisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, design="hybrid", group="flop"
    )
    report = equiflop.check(hybrid, group="octic")
    assert not report.passed and "nothing was compared" in report.problems[0]


def test_other_input_sizes() -> None:
    model = small_segmenter("flop")
    before = model.head.state_dict()
    model.set_input_size((12, 28))
    assert model.img_size == (12, 28)
    assert model(torch.randn(1, 3, 12, 28, dtype=torch.float64)).shape == (1, 5, 12, 28)
    assert equiflop.check(model).passed
    assert all(torch.equal(before[key], value) for key, value in model.head.state_dict().items())
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        model.set_input_size((12, 30))
    with pytest.raises(ValueError, match="not square"):
        small_segmenter("octic").set_input_size((12, 28))
    dynamic = small_segmenter("flop", {"resolution": "tokens"}, dynamic_img_size=True)
    assert dynamic(torch.randn(1, 3, 20, 8, dtype=torch.float64)).shape == (1, 5, 5, 2)


@pytest.mark.parametrize("group", ["flop", "octic"])
def test_low_precision(group: str) -> None:
    model = small_segmenter(group, {"mlp_ratio": 2}).bfloat16()
    assert model(torch.randn(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16
    assert equiflop.check(model).passed
    assert equiflop.check(model.double()).passed, "the constants must be exact again"


def test_construction_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Segmenter(small_backbone("octic"), 5, mlp_ratio=2)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert equiflop.macs(model, (16, 16)) == equiflop.macs(Segmenter(small_backbone("octic"), 5, mlp_ratio=2), (16, 16))
    real = model.to_empty(device="cpu")
    real.init_weights()
    assert equiflop.check(real, randomize=False).max_error < 1e-5
    other = Segmenter(small_backbone("octic"), 5, mlp_ratio=2)
    other.load_state_dict(real.state_dict())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(real.eval()(images), other.eval()(images))


def test_state_dict_holds_weights_alone() -> None:
    model = Segmenter(small_backbone("flop", num_classes=10), 5)
    keys = set(model.state_dict())
    assert keys == {name for name, _ in model.named_parameters()}
    assert {key for key in keys if not key.startswith("backbone.")} == {
        "head.proj.A.weight",
        "head.proj.B.weight",
        "head.proj.A.bias",
    }
    assert not any(key.startswith("backbone.head") for key in keys)
    assert "backbone.cls_token" in model.no_weight_decay()


@pytest.mark.parametrize("resolution", ["pixels", "tokens"])
def test_every_parameter_takes_part(resolution: Any) -> None:
    """No weight is without a gradient, also behind drop path, dropout and recomputed activations."""
    backbone = small_backbone("octic", num_classes=10, reg_tokens=1, drop_rate=0.1, drop_path_rate=0.1)
    model = Segmenter(backbone, 5, resolution=resolution, mlp_ratio=1)
    model.set_grad_checkpointing()
    logits = model(torch.randn(8, 3, 16, 16))
    F.cross_entropy(logits, torch.zeros_like(logits[:, 0]).long()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_fresh_logits_are_small() -> None:
    """As in timm's heads: uniform predictions at first, and no class preferred by a bias."""
    model = Segmenter(small_backbone("octic", img_size=64, embed_dim=128, init_values=None), 20).eval()
    logits = model(torch.randn(4, 3, 64, 64))
    assert 0.02 < logits.std() < 0.5
    assert model.head.proj.bias is not None and not model.head.proj.bias.any()
    loss = F.cross_entropy(logits, torch.randint(20, (4, 64, 64)))
    assert abs(loss - math.log(20)) < 0.05


def test_tokens_are_means_of_nothing_else() -> None:
    """At token resolution only the trivial irrep is read."""
    model = small_segmenter("octic", {"resolution": "tokens"})
    features = torch.randn(1, 4, 4, 32, dtype=torch.float64)
    other = features.clone()
    other[..., 4:] = 0.0
    assert torch.equal(model.forward_head(features), model.forward_head(other))
    assert model.head.proj.macs_per_vector == 4 * 5


@pytest.mark.parametrize("group", ["flop", "octic"])
def test_compiles_in_one_graph(group: str) -> None:
    model = small_segmenter(group, {"mlp_ratio": 2}, depth=1)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(compiled(images), model(images)) < 1e-12
    assert equiflop.check(compiled).passed


def test_exports() -> None:
    model = small_segmenter("flop", depth=1)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    exported = torch.export.export(model, (images,)).module()
    assert relative_error(exported(images), model(images)) < 1e-12


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="backbone=Linear is no equivariant vision transformer"):
        Segmenter(nn.Linear(2, 2), 5)  # type: ignore[arg-type]
    for design in ("hybrid", "invariant"):
        with pytest.raises(ValueError, match=f"design='{design}'.*use design='equivariant'"):
            Segmenter(small_backbone(design=design), 5)
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.2.*use 0\.0"):
        Segmenter(small_backbone(patch_drop_rate=0.2), 5)
    with pytest.raises(ValueError, match="num_classes=0 is not positive"):
        Segmenter(small_backbone(), 0)
    with pytest.raises(ValueError, match="resolution='pixel' is unknown; choose from pixels, tokens"):
        Segmenter(small_backbone(), 5, resolution="pixel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mlp_ratio=-1\.0 is negative"):
        Segmenter(small_backbone(), 5, mlp_ratio=-1.0)
    with pytest.raises(ValueError, match=r"mlp_ratio \* embed_dim=3 is not divisible by \|G\|=2"):
        Segmenter(small_backbone(), 5, mlp_ratio=0.1)
    with pytest.raises(ValueError, match="channels=0 is not positive"):
        PatchDecoder(Rep.regular(image_group("flop"), 1), image_group("flop"), 2, 0)
    backbone = small_backbone(num_classes=10)
    with pytest.raises(ValueError, match="num_classes"):
        Segmenter(backbone, -1)
    with pytest.raises(ValueError, match="mlp_ratio"):
        Segmenter(backbone, 2, mlp_ratio=0.1)
    assert isinstance(backbone.head, nn.Linear), "a refused backbone keeps its classifier"
    with pytest.raises(ValueError, match="does not match img_size"):
        small_segmenter()(torch.zeros(1, 3, 20, 20, dtype=torch.float64))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "segmentation.py"
    sys.path.append(str(path.parent))  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location("segmentation_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_scenes_of_the_example(example: ModuleType) -> None:
    """Drawn again alike from a seed; every class occurs; the scores are those of the definition."""
    images, labels = example.draw_scenes(40, seed=3)
    again, _ = example.draw_scenes(40, seed=3)
    assert torch.equal(images, again)
    assert images.shape == (40, 3, 64, 64) and labels.unique().tolist() == list(range(6))
    perfect = example.scores(labels, labels)
    assert perfect == {"pixel_accuracy": 1.0, "mean_iou": 1.0}
    wrong = labels.clone()
    wrong[labels == 1] = 2  # disc taken for square
    squares, discs = (labels == 2).sum(), (labels == 1).sum()
    expected = (4 + 0 + squares / (squares + discs)) / 6
    assert abs(example.scores(wrong, labels)["mean_iou"] - expected) < 1e-6


@pytest.mark.slow
def test_example_runs(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    output, figure = tmp_path / "results.json", tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["segmentation.py", "--quick", "--output", str(output), "--figure", str(figure)])
    example.main()
    networks = json.loads(output.read_text())["networks"]
    flop, octic, plain = (networks[name] for name in example.NETWORKS)
    assert flop["scores"]["mirrored"]["changed_pixels"] < 1e-3
    assert octic["scores"]["turned"]["changed_pixels"] < 1e-3
    assert plain["scores"]["mirrored"]["changed_pixels"] > 1e-2
    assert octic["macs"] < flop["macs"] < plain["macs"]
    assert figure.read_bytes()[:4] == b"\x89PNG"
