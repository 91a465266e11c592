"""Steering: a plain network that is equivariant in a hidden basis gives back an equivariant one that computes it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from hidden_networks import hidden
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor

import equiflop
from equiflop.distill.steer import fit_stream, observe, steer
from equiflop.distill.steer.involution import _chosen, best_involution, contrasts, share_kept
from equiflop.distill.steer.observe import Moments
from equiflop.distill.steer.pairing import pair
from equiflop.grids import named_image_group
from equiflop.models import EquivariantVisionTransformer
from oracles import relative_error, scramble

SETTINGS: dict[str, Any] = {
    "img_size": 24, "patch_size": 6, "in_chans": 2, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5,
    "init_values": 0.1,
}  # fmt: skip


def network(seed: int = 0, **settings: Any) -> Any:
    made = EquivariantVisionTransformer(**{**SETTINGS, **settings}).double().eval()
    return scramble(made, seed)


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    own = ("heads", "group", "multiplicities")
    return {"no_embed_class": True, **{k: v for k, v in {**SETTINGS, **settings}.items() if k not in own}}


def images(count: int = 60) -> list[Tensor]:
    return list(torch.randn(count, 2, 24, 24, dtype=torch.float64).split(20))


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": "coupled", "num_heads": 3},
        {"heads": "regular"},
        {"heads": "coupled", "num_heads": 2, "multiplicities": (14, 10)},
        {"heads": "regular", "global_pool": "avg", "class_token": False, "init_values": None},
        {"heads": "regular", "group": "updown", "reg_tokens": 2, "no_embed_class": False, "mlp_ratio": 2.0},
        {"heads": "coupled", "num_heads": 1, "fc_norm": False, "global_pool": "avg", "patch_size": 3, "depth": 2},
    ],
    ids=["coupled", "regular", "14 and 10", "average of patches", "updown, registers", "norm before the average"],
)
def test_gives_back_what_was_hidden(settings: dict[str, Any]) -> None:
    made = network(**settings)
    teacher = hidden(made, plain_settings(settings))
    x = torch.randn(6, 2, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(teacher(x), made(x)) < 1e-10, "it is the same function"
        student = network(seed=1, **settings)
        assert relative_error(student(x), made(x)) > 1e-2
        found = steer(student, teacher, images())
        assert relative_error(student(x), made(x)) < 1e-9
    assert min(found.stream.kept.values()) > 1 - 1e-12 and min(found.units) > 1 - 1e-12 and min(found.heads) > 1 - 1e-12


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_gives_back_an_embedding(pool: str) -> None:
    """Of a teacher without a classifier, in its own channels and averaged over the views."""
    teacher = hidden(network(global_pool=pool), plain_settings({"global_pool": pool}))
    teacher.reset_classifier(0)
    student = network(seed=1, global_pool=pool, num_classes=teacher.embed_dim)
    steer(student, teacher, images())
    x = torch.randn(6, 2, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(student(x), (teacher(x) + teacher(x.flip(-1))) / 2) < 1e-9


@pytest.mark.parametrize("heads", ["coupled", "regular"])
def test_a_wider_student_computes_the_same(heads: str) -> None:
    """But for the eps of its norms, which weighs otherwise: more channels, wider heads, more hidden units."""
    made = network(heads=heads, num_heads=2)
    teacher = hidden(made, plain_settings({"num_heads": 2}))
    student = network(seed=1, heads=heads, num_heads=2, embed_dim=40, mlp_ratio=6.0)
    x = torch.randn(6, 2, 24, 24, dtype=torch.float64)
    steer(student, teacher, images())
    assert relative_error(student(x), made(x)) < 1e-5


def test_of_a_plain_network_most_is_kept() -> None:
    """One that was never trained to mirror: the student is equivariant, and most alike where it has all channels."""
    torch.manual_seed(1)
    teacher: Any = VisionTransformer(**plain_settings({"init_values": None})).double().eval()
    x = torch.randn(6, 2, 24, 24, dtype=torch.float64)
    kept = []
    for width in (8, 16, 24):
        student = network(heads="coupled", embed_dim=width, init_values=None)
        found = steer(student, teacher, images())
        assert equiflop.check(student, input_size=(24, 24), randomize=False).rows[1].error < 1e-12
        kept.append(min(found.stream.kept.values()))
        assert torch.isfinite(student(x)).all()
    assert kept == sorted(kept) and 0.5 < kept[-1] <= 1


def test_how_images_and_networks_come_makes_no_difference() -> None:
    """Images in other numbers, one batch or several; a teacher in training mode, a student with frozen parts."""
    teacher: Any = VisionTransformer(**plain_settings({"drop_path_rate": 0.5, "patch_drop_rate": 0.5})).double().eval()
    x = torch.cat(images()).float()
    first, second = network(seed=1), network(seed=1).train()
    second.blocks[1].eval()
    steer(first, teacher, list(x.double().split(20)))
    steer(second, teacher.train(), x)
    assert teacher.blocks[0].drop_path1.training and second.training and not second.blocks[1].attn.training
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight)


class TestChoices:
    def test_directions_are_the_best_choice(self) -> None:
        """Compared with all choices there are."""
        for _ in range(20):
            gains = torch.rand(2, 6, dtype=torch.float64)
            kinds = _chosen(torch.cat([gains, torch.zeros(1, 6)]), (2, 3))
            value = sum(float(gains[kind, i]) for i, kind in enumerate(kinds) if kind < 2)
            best = 0.0
            for even in itertools.combinations(range(6), 2):
                rest = [i for i in range(6) if i not in even]
                odd = sorted(float(gains[1, i]) for i in rest)[-3:]
                best = max(best, sum(float(gains[0, i]) for i in even) + sum(odd))
            assert value == pytest.approx(best)

    @pytest.mark.parametrize("channels", [1, 2, 7])
    def test_contrasts_are_orthonormal_and_centred(self, channels: int) -> None:
        found = contrasts(channels)
        torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))
        assert channels == 1 or found.sum(0).abs().max() < 1e-12

    def test_pairs(self) -> None:
        alike = torch.tensor([[0.1, 0.9, 0.8, 0.0], [0.9, 0.2, 0.95, 0.0], [0.8, 0.95, 0.0, 0.1], [0.0, 0.0, 0.1, 0.6]])
        found = pair(alike, torch.tensor([4.0, 1.0, 1.0, 3.0]), 2)
        assert (found.first.tolist(), found.second.tolist()) == ([0, 3], [0, 3])
        assert found.covered == pytest.approx(7 / 9) and found.alone.all()
        found = pair(alike, torch.tensor([4.0, 9.0, 1.0, 3.0]), 3)
        assert (found.first.tolist(), found.second.tolist()) == ([1, 0, 3], [2, 0, 3])

    def test_pairs_of_equals(self) -> None:
        """Ties around a circle end too, and every unit is taken once."""
        found = pair(torch.ones(5, 5), torch.ones(5), 5)
        units = sorted({*found.first.tolist(), *found.second.tolist()})
        assert units == list(range(5))


class TestStream:
    def test_share_of_a_mirrored_feature(self) -> None:
        """1 for features that change by an involution, far below 0 for independent ones; the mean does not count."""
        turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        involution = turn * torch.tensor([1.0, 1, 1, -1, -1, -1]) @ turn.T
        x, other = torch.randn(2, 5000, 6, dtype=torch.float64)
        mean = 3 * (torch.ones(6, dtype=torch.float64) + involution @ torch.ones(6, dtype=torch.float64))
        half = (x + x @ involution) / 2 + 0.5 * (x - x @ involution) / 2 + 0.5 * (other - other @ involution) / 2
        shares = []
        for y in (x @ involution, x, other, half @ involution):
            moments = Moments.empty(6, torch.float64, torch.device("cpu"))
            moments.add(x + mean, y + mean)
            shares.append(share_kept(moments))
        assert shares[:2] == pytest.approx([1, 1]) and -1 < shares[2] < -0.8 and 0.4 < shares[3] < 0.9
        moments = Moments.empty(6, torch.float64, torch.device("cpu"))
        moments.add(x + mean, x @ involution + mean)
        found = best_involution([moments])
        torch.testing.assert_close(found, involution)
        assert share_kept(moments, found) == pytest.approx(1)

    def test_the_basis_is_centred(self) -> None:
        teacher: Any = VisionTransformer(**plain_settings({})).double().eval()
        seen = observe(teacher, images(), named_image_group("flop"))
        assert list(seen.stream) == [f"blocks.{i}.norm{k}" for i in range(3) for k in (1, 2)] + ["norm"]
        stream = fit_stream(seen.stream, 10, 6)
        assert stream.basis.sum(1).abs().max() < 1e-10
        assert max(stream.basis[:10].sum(0).abs().max(), stream.basis[10:].sum(0).abs().max()) < 1e-10
        assert torch.linalg.matrix_rank(stream.basis) == 14


class TestRefusals:
    @pytest.mark.parametrize(
        ("teacher", "settings", "message"),
        [
            (
                {},
                {"group": "octic", "heads": "coupled", "num_heads": 1},
                "flop or updown, not 'octic'; choose --init random",
            ),
            ({"qk_norm": True}, {}, "cannot read module blocks.0.attn.q_norm"),
            ({"qkv_bias": False}, {}, "cannot read module blocks.0.attn.qkv, which has no bias, of the teacher"),
            ({"pre_norm": True}, {}, "cannot read module norm_pre"),
            ({"norm_layer": RmsNorm}, {}, "blocks.0.norm1 .RmsNorm."),
            ({"block_fn": ParallelScalingBlock}, {}, "ParallelScalingBlock"),
            ({}, {"depth": 2}, "the student has depth=2, the teacher depth=3; init='steer' needs the same"),
            ({}, {"invariants": "norm"}, "invariants='norm'"),
            ({}, {"global_pool": "avg"}, "student has global_pool='avg', the teacher global_pool='token'"),
            ({}, {"pre_norm": True}, "student has norm_pre=True, the teacher norm_pre=False"),
            ({}, {"final_norm": False}, "student has norm=False, the teacher norm=True"),
            ({}, {"scale_mlp_norm": True}, "student has blocks.0.mlp.norm=True"),
            ({}, {"act_layer": "silu"}, "blocks.0.mlp.act of the student is another function"),
            ({}, {"pos_embed": "none"}, "student has pos_embed=False, the teacher pos_embed=True"),
            ({}, {"no_embed_class": False}, "student has no_embed_class=False"),
            ({}, {"num_classes": 7}, "student has num_classes=7, the teacher num_classes=5"),
            ({}, {"multiplicities": (24, 0), "heads": "coupled"}, "needs channels of both kinds"),
            ({}, {"design": "hybrid"}, "design='hybrid'"),
            ({}, {"qkv_bias": False}, "blocks.0.attn.qkv of the student has no bias"),
        ],
    )
    def test_in_one_line(self, teacher: dict[str, Any], settings: dict[str, Any], message: str) -> None:
        plain = VisionTransformer(**{**plain_settings({}), **teacher}).double().eval()
        with pytest.raises(ValueError, match=message) as refused:
            steer(network(**settings), plain, images(2))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_of_numbers_that_are_none(self, value: float) -> None:
        student = network()
        before = {name: weight.clone() for name, weight in student.state_dict().items()}
        with pytest.raises(ValueError, match="images: hold NaN or infinite numbers"):
            steer(student, VisionTransformer(**plain_settings({})).double(), torch.full((3, 2, 24, 24), value))
        for name, weight in student.state_dict().items():
            assert torch.equal(weight, before[name]), name

    def test_of_no_images(self) -> None:
        with pytest.raises(ValueError, match="images: there are none to look at"):
            steer(network(), VisionTransformer(**plain_settings({})).double().eval(), [])

    def test_other_classes(self) -> None:
        with pytest.raises(ValueError, match="twins of timm's VisionTransformer, not a Linear"):
            steer(torch.nn.Linear(1, 1), None, [])
        other = timm.create_model("eva02_tiny_patch14_224", depth=1)
        with pytest.raises(ValueError, match="reads timm's VisionTransformer, and the teacher is a Eva"):
            steer(network(), other, [])
