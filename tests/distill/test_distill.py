"""Distillation: a plain teacher, an equivariant student that learns to agree with it, and what is refused."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from hidden_networks import hidden
from PIL import Image
from safetensors.torch import save_file

import equiflop
from equiflop.classify import ClassifierTrainer, ModelSpec, TrainConfig, load_model
from equiflop.classify.weights import save_weights
from equiflop.cli.main import main
from equiflop.data import Preprocessing
from equiflop.distill import DistillConfig, DistillTrainer, PlainTeacher
from equiflop.distill.loading import load_teacher
from equiflop.distill.objective import Reader, Student
from equiflop.grids import named_image_group
from equiflop.groups import Rep
from equiflop.models import EquivariantVisionTransformer
from equiflop.nn import Linear
from equiflop.training import TrainingInterrupted
from equiflop.training.state import CheckpointError
from oracles import move_tokens, scramble
from test_processes import command, environment, rows
from test_training import GREY, StopAfter, assert_same_outcome, toy_data

NAME = "deit3_tiny_patch16_224"
SPEC_OF_MAPS = ModelSpec("convnext_tiny", {}, tuple("abcdefghij"), Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
SMALL: dict[str, Any] = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a plain network that knows the toy data well."""
    out = tmp_path_factory.mktemp("teacher")
    config = TrainConfig(
        model=NAME, data="toy", out=str(out), model_kwargs=SMALL, epochs=12, batch_size=10, lr=5e-3, mirror=0.0,
        shift=0, label_smoothing=0.0, device="cpu",
    )  # fmt: skip
    history = ClassifierTrainer(config, toy_data()).run()
    assert history[-1].metrics["test_accuracy"] > 0.5
    return str(out)


def config_for(teacher: str, out: Path, **changes: Any) -> DistillConfig:
    config = DistillConfig(
        model=NAME, teacher=teacher, data="toy", out=str(out), epochs=3, batch_size=8, lr=3e-3, warmup_epochs=0.5,
        shift=1, device="cpu",
    )  # fmt: skip
    return replace(config, **changes)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["distill", *arguments])


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a plain ConvNeXt for Fashion-MNIST."""
    settings = {"in_chans": 1, "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}
    normalisation = Preprocessing((1, 32, 32), (0.286,), (0.353,))
    spec = ModelSpec("convnext_tiny", settings, tuple("abcdefghij"), normalisation)
    place = tmp_path_factory.mktemp("convnext") / "net.safetensors"
    save_weights(place, spec.build().state_dict(), spec)
    return str(place)


@pytest.fixture(scope="module")
def uninterrupted(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> DistillTrainer:
    trainer = DistillTrainer(config_for(teacher, tmp_path_factory.mktemp("student"), drop_path=0.1), toy_data())
    trainer.run()
    return trainer


class TestLearning:
    def test_the_loss_falls_and_agreement_rises(self, teacher: str, tmp_path: Path) -> None:
        config = config_for(teacher, tmp_path, epochs=10, batch_size=10, lr=5e-3, shift=0, warmup_epochs=1.0)
        trainer = DistillTrainer(config, toy_data(300))
        before = trainer.measurement.of(trainer.learner.networks)
        history = trainer.run()
        after = history[-1].metrics
        assert history[-1].train_loss < history[0].train_loss
        assert after["test_error"] < 0.5 * before["test_error"]
        assert after["test_agreement"] > before["test_agreement"] + 0.4
        assert after["test_accuracy"] > 0.6

    def test_where_labels_alone_teach_accuracy_tells_the_best(self, teacher: str, tmp_path: Path) -> None:
        weights = dict.fromkeys(("class_weight", "patch_weight", "middle_weight", "logits_weight"), 0.0)
        trainer = DistillTrainer(config_for(teacher, tmp_path, **weights, label_weight=1.0), toy_data())
        metrics = [record.metrics for record in trainer.run()]
        assert all("test_error" not in each and "test_agreement" in each for each in metrics)
        best = max(each["test_accuracy"] for each in metrics)
        assert trainer.measurement.score(max(trainer.history, key=trainer.measurement.score)) == best

    def test_the_student_is_a_network_of_its_own(self, uninterrupted: DistillTrainer) -> None:
        trained = load_model(uninterrupted.out)
        assert trained.spec.name == f"twin:{NAME}" and trained.spec.kwargs["group"] == "flop"
        assert not any("read" in key for key in trained.model.state_dict())
        assert isinstance(trained.config, DistillConfig)
        report = equiflop.check(trained.model, input_size=(28, 28), randomize=False)
        assert report.passed, str(report)
        images = torch.randn(4, 1, 28, 28)
        own = uninterrupted.model.get_submodule("student").eval()
        assert torch.equal(trained.model(images), own(images))

    def test_checkpoints_are_read_too(self, uninterrupted: DistillTrainer) -> None:
        newest = sorted((uninterrupted.out / "checkpoints").glob("step-*.pt"))[-1]
        state = load_model(newest).model.state_dict()
        final = load_model(uninterrupted.out).model.state_dict()
        assert all(torch.equal(state[key], final[key]) for key in final)

    def test_octic_students_and_narrower_ones(self, teacher: str, tmp_path: Path) -> None:
        changes: dict[str, Any] = {
            "model_kwargs": {"group": "octic", "embed_dim": 16, "num_heads": 1, "heads": "coupled"}
        }
        config = config_for(teacher, tmp_path, epochs=1, logits_loss="mse", label_weight=0.5, ema_decay=0.9, **changes)
        trainer = DistillTrainer(config, toy_data())
        trainer.run()
        trained = load_model(tmp_path)
        report = equiflop.check(trained.model, input_size=(28, 28), randomize=False)
        assert len(report.rows) >= 16 and all(row.error < 1e-6 for row in report.rows), str(report)
        assert trained.model.rep == Rep.regular(named_image_group("octic"), 2)

    @pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
    def test_other_teachers(self, kind: str, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 16, "depth": 1}
        settings |= {"num_heads": 2}
        settings |= {"global_pool": "avg"} if kind.startswith("vit") else {}
        spec = ModelSpec(kind, settings, tuple("abcdefghij"), GREY)
        save_weights(tmp_path / "teacher.safetensors", spec.build().state_dict(), spec)
        config = config_for(str(tmp_path / "teacher.safetensors"), tmp_path / "out", model=kind, epochs=1)
        assert DistillTrainer(config, toy_data()).run()[-1].train_loss > 0

    @pytest.mark.parametrize("pool", ["map", "avg"])
    def test_embeddings(self, pool: str, tmp_path: Path) -> None:
        """Of a teacher without a classifier, the student gives the embedding; every part of it learns."""
        settings = {**SMALL, "img_size": 28, "in_chans": 1, "global_pool": pool, "class_token": False}
        spec = ModelSpec("vit_small_patch16_224", settings, (), GREY)
        plain: Any = spec.build()
        save_weights(tmp_path / "plain.safetensors", plain.state_dict(), spec)
        file = str(tmp_path / "plain.safetensors")
        config = config_for(file, tmp_path / "out", model=spec.name, epochs=12, batch_size=10, lr=5e-3, shift=0)
        trainer = DistillTrainer(config, toy_data(300))
        first = {name: value.clone() for name, value in trainer.model.named_parameters()}
        history = trainer.run()
        assert history[-1].metrics["test_error"] < 0.6 * history[0].metrics["test_error"]
        assert "test_agreement" not in history[-1].metrics
        same = [name for name, value in trainer.model.named_parameters() if torch.equal(value, first[name])]
        assert same == []
        student = load_model(tmp_path / "out")
        x = next(iter(toy_data(300).test.batches(torch.arange(20), 20))).images
        with torch.no_grad():
            wanted = (plain.eval()(x) + plain(x.flip(-1))) / 2
            found, untrained = student.model(x), DistillTrainer(config, toy_data(300)).model.get_submodule("student")(x)
        assert student.spec.classes == () and found.shape == wanted.shape == (20, 32)
        assert (found - wanted).norm() < 0.5 * (untrained - wanted).norm()
        assert equiflop.check(student.model, input_size=(28, 28), randomize=False).passed

    def test_registers_are_no_class_tokens(self) -> None:
        counts = {}
        for name in ("vit_medium_patch16_reg4_gap_256", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"):
            model = timm.create_model(name, depth=1, embed_dim=16, num_heads=2, img_size=32)
            spec = ModelSpec(name, {}, (), Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
            counts[name] = (PlainTeacher(spec, model, "it").prefix_tokens, PlainTeacher(spec, model, "it").class_tokens)
        assert list(counts.values()) == [(4, 0), (2, 2), (1, 1)]

    def test_what_regularised_the_teacher_does_not_regularise_the_student(self, tmp_path: Path) -> None:
        rates = {"patch_drop_rate": 0.5, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
        settings = {**SMALL, "img_size": 28, "in_chans": 1}
        spec = ModelSpec(NAME, {**settings, **rates}, tuple("abcdefghij"), GREY)
        save_weights(tmp_path / "teacher.safetensors", spec.build().state_dict(), spec)
        trainer = DistillTrainer(config_for(str(tmp_path / "teacher.safetensors"), tmp_path / "out"), toy_data())
        trainer.run_epoch()
        assert not rates.keys() & trainer.spec.kwargs.keys()

    @pytest.mark.slow
    def test_compiled_teacher_and_student_make_the_same_losses(self, teacher: str, tmp_path: Path) -> None:
        trainers = [
            DistillTrainer(config_for(teacher, tmp_path / str(compiled), epochs=1, compile=compiled), toy_data())
            for compiled in (False, True)
        ]
        eager, compiled = (trainer.run()[-1] for trainer in trainers)
        assert compiled.train_loss == pytest.approx(eager.train_loss, rel=1e-4)
        assert compiled.metrics["test_error"] == pytest.approx(eager.metrics["test_error"], rel=1e-3)
        assert trainers[1].teacher.look._compiled_call_impl is not None


class TestSteered:
    def test_starts_nearer_to_the_teacher(self, teacher: str, tmp_path: Path) -> None:
        errors, agreements = [], []
        for init in ("random", "steer"):
            trainer = DistillTrainer(config_for(teacher, tmp_path, init=init, init_images=70), toy_data(300))
            found = trainer.measurement.of(trainer.learner.networks)
            errors.append(found["test_error"])
            agreements.append(found["test_agreement"])
        assert trainer.steering is not None and "steered" in str(trainer.steering)
        assert errors[1] < 0.7 * errors[0] and agreements[1] >= agreements[0]

    @pytest.mark.parametrize(
        ("keywords", "heads"),
        [
            ({}, "coupled"),
            ({"heads": "regular"}, "regular"),
            ({"embed_dim": 20, "num_heads": 4}, "regular"),  # 10 channels of a kind for 4 heads
            ({"group": "updown"}, "coupled"),
        ],
    )
    def test_heads_are_coupled_where_sizes_allow_it(
        self, teacher: str, tmp_path: Path, keywords: dict[str, Any], heads: str
    ) -> None:
        config = config_for(teacher, tmp_path, init="steer", init_images=10, model_kwargs=keywords)
        trainer = DistillTrainer(config, toy_data())
        student: Any = trainer.model.get_submodule("student")
        assert student.blocks[0].attn.heads == heads
        assert trainer.spec.kwargs.get("heads", "regular") == heads

    def test_readers_give_the_features_of_a_teacher_that_mirrors(self, tmp_path: Path) -> None:
        settings = {**SMALL, "img_size": 28, "in_chans": 1, "num_classes": 10, "embed_dim": 32}
        own = {**settings, "heads": "regular"}
        made = scramble(EquivariantVisionTransformer(**own).double().eval())
        plain = hidden(made, {**settings, "no_embed_class": True}).float()
        spec = ModelSpec(NAME, {**SMALL, "img_size": 28, "in_chans": 1}, tuple("abcdefghij"), GREY)
        save_weights(tmp_path / "plain.safetensors", plain.state_dict(), spec)
        config = config_for(str(tmp_path / "plain.safetensors"), tmp_path / "out", init="steer", init_images=70)
        trainer = DistillTrainer(config, toy_data())
        found = trainer.measurement.of(trainer.learner.networks)
        assert found["test_agreement"] == 1.0 and found["test_error"] < 0.5

    def test_without_training(self, teacher: str, tmp_path: Path) -> None:
        """The steered student as it is, measured and written; what an earlier run left is not mixed with it."""
        arguments = ["--teacher", teacher, "--data", "fashion-mnist-part", "--out", str(tmp_path / "out")]
        arguments += ["--init", "steer", "--device", "cpu", "--init-images", "64"]
        result = run(*arguments, "--epochs", "0")
        assert result.exit_code == 0, result.output
        assert "agreement" in result.stdout and "best" not in result.stdout
        first = load_model(tmp_path / "out")
        assert equiflop.check(first.model, input_size=(28, 28), randomize=False).passed
        assert CliRunner().invoke(main, ["publish", str(tmp_path / "out"), "-o", str(tmp_path / "net")]).exit_code == 0
        card = (tmp_path / "net" / "README.md").read_text()
        assert "without training" in card and "adamw" not in card
        plotted = CliRunner().invoke(main, ["plot", str(tmp_path / "out"), "--output", str(tmp_path / "runs.png")])
        assert plotted.exit_code == 2 and len(plotted.stderr.splitlines()) == 1

        trained = run(*arguments, "--epochs", "1", "--batch-size", "4000")
        assert trained.exit_code == 0, trained.output
        refused = run(*arguments, "--epochs", "0")
        assert refused.exit_code == 2 and "epochs=1 there, epochs=0 here" in refused.stderr
        again = run(*arguments, "--epochs", "0", "--resume", "never", "--json")
        assert again.exit_code == 0, again.output
        assert 0 < json.loads(again.stdout[again.stdout.index("{") :])["test_agreement"] <= 1
        assert not (tmp_path / "out" / "log.csv").exists()
        found = load_model(tmp_path / "out").model.state_dict()
        for name, value in first.model.state_dict().items():
            assert torch.equal(found[name], value), name

    def test_then_trained_on_labels(self, teacher: str, tmp_path: Path) -> None:
        """By the ordinary trainer, which takes the network of the run that it starts from."""
        steered, out = str(tmp_path / "steered"), str(tmp_path / "out")
        options = ["--data", "fashion-mnist-part", "--device", "cpu"]
        done = run("--teacher", teacher, *options, "--init", "steer", "--epochs", "0", "--out", steered)
        assert done.exit_code == 0, done.output
        options += ["--batch-size", "4000", "--epochs", "1", "--out", out, "--start-from", steered]
        trained = CliRunner().invoke(main, ["train", *options, "--set", "drop_path_rate=0.1", "--lr", "1e-5"])
        assert trained.exit_code == 0, trained.output
        first, last = load_model(steered), load_model(out)
        assert last.spec.name == first.spec.name
        assert last.spec.kwargs == {**first.spec.kwargs, "drop_path_rate": 0.1}
        weights = first.model.state_dict()
        assert all(torch.allclose(value, weights[name], atol=1e-3) for name, value in last.model.state_dict().items())
        refused = CliRunner().invoke(main, ["train", "--data", "fashion-mnist-part", "--start-from", "nosuch"])
        assert refused.exit_code == 2 and "nosuch: no such file" in refused.stderr

    def test_resumes_exactly(self, teacher: str, tmp_path: Path) -> None:
        outcomes = []
        for stop in (True, False):
            config = config_for(teacher, tmp_path / str(stop), init="steer", init_images=20, epochs=1, ema_decay=0.9)
            trainer = DistillTrainer(config, toy_data())
            if stop:
                with pytest.raises(TrainingInterrupted):
                    trainer.run_epoch(StopAfter(2))
                trainer = DistillTrainer(config, toy_data())
                assert trainer.resume() is not None and trainer.steering is None
            trainer.run()
            outcomes.append(trainer)
        assert_same_outcome(*outcomes)
        anew = DistillTrainer(config, toy_data())  # in the folder of a finished run
        anew.start_anew()
        anew.run()
        assert anew.steering is not None
        assert_same_outcome(outcomes[0], anew)


class TestResume:
    @pytest.mark.parametrize("steps", [0, 3])
    def test_is_exact(self, uninterrupted: DistillTrainer, teacher: str, tmp_path: Path, steps: int) -> None:
        config = config_for(teacher, tmp_path, drop_path=0.1)
        first = DistillTrainer(config, toy_data())
        first.run_epoch()
        first.save()
        with pytest.raises(TrainingInterrupted):
            first.run_epoch(StopAfter(steps))
        second = DistillTrainer(config, toy_data())
        assert second.resume() is not None and (second.epoch, second.step) == (1, steps)
        second.run()
        assert_same_outcome(second, uninterrupted)

    def test_a_teacher_is_known_by_its_weights(self, teacher: str, tmp_path: Path) -> None:
        """Wherever its file lies; and others in its place do not go on."""
        trained = load_model(teacher)
        weights = trained.model.state_dict()
        for name, factor in (("here", 1.0), ("there", 1.0), ("other", 0.5)):
            changed = {**weights, "head.weight": factor * weights["head.weight"]}
            save_weights(tmp_path / f"{name}.safetensors", changed, trained.spec)
        config = config_for(str(tmp_path / "here.safetensors"), tmp_path / "out")
        first = DistillTrainer(config, toy_data())
        first.run_epoch()
        first.save()
        moved = replace(config, teacher=str(tmp_path / "there.safetensors"))
        assert DistillTrainer(moved, toy_data()).resume() is not None
        with pytest.raises(CheckpointError, match="another teacher; take another folder"):
            DistillTrainer(replace(config, teacher=str(tmp_path / "other.safetensors")), toy_data()).resume()


class TestOtherCommands:
    def test_publish_and_plot_know_distilled_runs(self, uninterrupted: DistillTrainer, tmp_path: Path) -> None:
        run = str(uninterrupted.out)
        published = CliRunner().invoke(main, ["publish", run, "-o", str(tmp_path / "net")])
        assert published.exit_code == 0, published.output
        card = (tmp_path / "net" / "README.md").read_text()
        assert "By `equiflop distill` on toy, distilled from another network" in card
        found = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
        images = torch.randn(2, 1, 28, 28)
        torch.testing.assert_close(found(images), load_model(run).model(images))
        plotted = CliRunner().invoke(main, ["plot", run, "--output", str(tmp_path / "runs.png")])
        assert plotted.exit_code == 0, plotted.output

    def test_runs_without_labels(self, teacher: str, tmp_path: Path) -> None:
        """Images of one folder, in whose place no class of the teacher stands."""
        for split, count in (("train", 24), ("test", 8)):
            folder = tmp_path / "photos" / split / "all"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((33, 40), 40 + i).save(folder / f"{i}.png")
        out = tmp_path / "out"
        arguments = ["--data", str(tmp_path / "photos"), "--out", str(out), "--batch-size", "8", "--device", "cpu"]
        result = run("--teacher", teacher, *arguments, "--epochs", "1", "--init", "steer", "--init-images", "8")
        assert result.exit_code == 0, result.output
        assert "agreement" in result.stdout and "accuracy" not in result.stdout and "next:" not in result.stdout
        published = CliRunner().invoke(main, ["publish", str(out), "-o", str(tmp_path / "net")])
        assert published.exit_code == 0, published.output
        plotted = CliRunner().invoke(main, ["plot", str(out), "--output", str(tmp_path / "runs.png")])
        assert plotted.exit_code == 2 and "no accuracy was measured" in plotted.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["steered", "embedding"])
    def test_two_processes_train_as_one(self, kind: str, teacher: str, tmp_path: Path) -> None:
        losses = []
        given = ["--teacher", teacher, "--init", "steer", "--init-images", "32"]
        if kind == "embedding":
            sizes: dict[str, Any] = {**SMALL, "img_size": 28, "global_pool": "map", "class_token": False}
            network: Any = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=0, **sizes)
            save_file(network.state_dict(), str(tmp_path / "net.safetensors"))
            given = ["vit_tiny_patch16_224", "--teacher-checkpoint", str(tmp_path / "net.safetensors")]
            given += [f"--teacher-set={name}={value}" for name, value in sizes.items()]
        for count in (1, 2):
            out = tmp_path / str(count)
            launch = command(count, model=[])
            launch[launch.index("train")] = "distill"
            options = [*given, "--data", "fashion-mnist-part", "--out", str(out), "--epochs", "1"]
            options += ["--batch-size", str(2000 // count), "--device", "cpu"]
            done = subprocess.run(
                [*launch, *options], capture_output=True, text=True, timeout=240, env=environment(), check=False
            )
            assert done.returncode == 0, done.stderr
            losses.append([float(row["train_loss"]) for row in rows(out)])
            losses[-1] += [float(row["test_error"]) for row in rows(out)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class TestTargets:
    @pytest.mark.parametrize("name", ["flop", "octic", "rot4", "flips"])
    def test_the_teachers_views_are_a_regular_feature(self, teacher: str, name: str) -> None:
        group = named_image_group(name)
        trained = load_model(teacher)
        plain = PlainTeacher(trained.spec, trained.model.double(), "it").double()
        images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
        reference = plain.views(images, group)
        rep = Rep.regular(group, plain.widths[0])
        to_irreps = Linear(rep, rep, bias=False, in_order="group").double()
        to_irreps.init_weights(lambda weight, e: weight.copy_(torch.eye(*weight.shape)))

        def typed(x: torch.Tensor) -> torch.Tensor:
            typed: torch.Tensor = to_irreps(x).detach()
            return typed

        for a in range(group.order):
            moved = plain.views(group.act_on_image(a, images), group)
            expected = move_tokens(name, rep, a, typed(reference.tokens), (4, 4), 1)
            torch.testing.assert_close(typed(moved.tokens), expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(moved.logits, reference.logits, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", ["flop", "flips"])
    def test_views_of_maps_are_a_regular_feature_too(self, name: str) -> None:
        """Of a ConvNeXt, behind the last stage and behind the one before, which have other grids and other widths."""
        group = named_image_group(name)
        settings = {"depths": [1, 1, 2, 1], "dims": [4, 4, 8, 12], "num_classes": 10, "ls_init_value": 1.0}
        plain = PlainTeacher(SPEC_OF_MAPS, timm.create_model("convnext_tiny", **settings).double(), "it").double()
        images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        reference = plain.views(images, group)
        assert plain.widths == (12, 8)
        for a in range(group.order):
            moved = plain.views(group.act_on_image(a, images), group)
            for found, wanted, grid in (
                (moved.tokens, reference.tokens, (2, 3)),
                (moved.middle, reference.middle, (4, 6)),
            ):
                places = torch.from_numpy(group.act_on_grid(a, *grid))
                copies = [group.multiply(group.inverse(a), k) for k in range(group.order)]
                placed = torch.empty_like(wanted)
                placed[:, places] = wanted
                placed = placed.unflatten(-1, (group.order, -1))[..., copies, :].flatten(-2)
                torch.testing.assert_close(found, placed, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(moved.logits, reference.logits, rtol=1e-10, atol=1e-10)

    def test_students_without_class_tokens_are_read(self) -> None:
        """What is read has the shapes of the teacher's features, in ResMLP and ConvNeXt."""
        for name, settings in (
            ("resmlp_12_224", {"img_size": 32}),
            ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}),
        ):
            plain = PlainTeacher(SPEC_OF_MAPS, timm.create_model(name, num_classes=10, **settings), "it")
            student = Student(equiflop.twin(name, num_classes=10, **settings), plain.widths)
            images = torch.randn(2, 3, 32, 32)
            wanted = plain.views(images, student.group)
            shapes = [part.shape for part in (wanted.tokens, wanted.middle, wanted.logits)]
            assert [part.shape for part in student(images)] == shapes
            assert plain.prefix_tokens == 0 and student.no_weight_decay() == set()

    def test_images_are_normalised_in_the_teachers_way(self, teacher: str) -> None:
        trained = load_model(teacher)
        plain = PlainTeacher(trained.spec, trained.model, "it")
        pixels = torch.rand(2, 1, 28, 28)
        expected = plain(pixels / 0.35 - 0.3 / 0.35)
        plain.take(Preprocessing((1, 28, 28), (0.5,), (0.25,)))
        torch.testing.assert_close(plain((pixels - 0.5) / 0.25), expected)

    def test_readers_give_such_a_feature(self) -> None:
        group = named_image_group("octic")
        rep = Rep.regular(group, 2)
        reader = Reader(rep, 3).double()
        x = torch.randn(5, rep.dim, dtype=torch.float64)
        for a in range(group.order):
            permuted = reader(x).unflatten(-1, (group.order, 3))
            places = [group.multiply(group.inverse(a), k) for k in range(group.order)]
            torch.testing.assert_close(reader(rep.act(a, x)), permuted[:, places].flatten(-2))


class TestRefusals:
    def refused(self, result: Result, *words: str) -> None:
        assert result.exit_code == 2, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 or lines[0].startswith("Usage"), result.stderr
        assert all(word in lines[-1] for word in words), lines[-1]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["flop_deit3_tiny_patch16_224"], ["equivariant already", "plain network"]),
            (["twin:vit_small_patch16_224"], ["equivariant already"]),
            (["deit3_tiny_patch16_224"], ["no weights", "--teacher-checkpoint"]),
            (["vit_smal_patch16_224"], ["unknown", "did you mean"]),
            (["vit_small_patch16_224", "--teacher-checkpoint", "nosuch.pth"], ["nosuch.pth", "no such file"]),
            ([], ["NAME", "--teacher"]),
            ([NAME, "--class-weight=0", "--patch-weight=0", "--middle-weight=0", "--logits-weight=0"], ["above 0"]),
            (["vit_small_patch16_224.bogus"], ["vit_small_patch16_224.bogus", "no weights of this tag", "augreg_in1k"]),
            ([NAME, "--epochs", "0"], ["epochs=0 trains nothing", "steer"]),
            ([NAME, "--init", "guess"], ["init='guess'", "random, steer"]),
            ([NAME, "--teacher-set", "in_chans=1"], ["in_chans=1", "--channels"]),
            ([NAME, "--teacher-set", "num_classes=7"], ["num_classes=7", "its embedding teaches"]),
            ([NAME, "--teacher", "runs/x", "--teacher-set", "img_size=32"], ["exclude each other", "img_size"]),
        ],
    )
    def test_in_one_line(self, arguments: list[str], words: list[str]) -> None:
        self.refused(run(*arguments, "--data", "fashion-mnist-part"), *words)

    def test_of_another_size(self, teacher: str) -> None:
        result = run("--teacher", teacher, "--data", "fashion-mnist-part", "--img-size", "56")
        self.refused(result, "1x28x28", "1x56x56", "--img-size")

    def test_of_a_recipes_size(self, teacher: str) -> None:
        result = run("--teacher", teacher, "--data", "fashion-mnist-part", "--recipe", "deit3-small")
        self.refused(result, "takes images of 1x28x28", "--img-size 28x28 --channels 1", "--recipe")

    def test_of_dropped_patches(self, teacher: str) -> None:
        result = run("--teacher", teacher, "--data", "fashion-mnist-part", "--set", "patch_drop_rate=0.5")
        self.refused(result, "patch_drop_rate=0.5", "every patch")

    def test_of_a_loss_without_a_term(self, convnext: str) -> None:
        zero = [f"--{name}-weight=0" for name in ("patch", "middle", "logits")]
        result = run("--teacher", convnext, "--data", "fashion-mnist-part", *zero)
        self.refused(result, "class_weight=1.0", "has no class token", "patch_weight")

    def test_of_a_figure_before_looking(self, teacher: str) -> None:
        result = run("--teacher", teacher, "--data", "nosuch", "--report", "--plot", "x.txt")
        self.refused(result, "plot='x.txt'", ".png")

    def test_steering_with_normed_queries(self, tmp_path: Path) -> None:
        settings = {**SMALL, "img_size": 28, "in_chans": 1, "qk_norm": True}
        spec = ModelSpec("vit_small_patch16_224", settings, tuple("abcdefghij"), GREY)
        save_weights(tmp_path / "net.safetensors", spec.build().state_dict(), spec)
        result = run("--teacher", str(tmp_path / "net.safetensors"), "--data", "fashion-mnist-part", "--init", "steer")
        self.refused(result, "cannot read module blocks.0.attn.q_norm", "--init random")

    def test_of_other_classes_where_labels_are_used(self, teacher: str) -> None:
        result = run("--teacher", teacher, "--data", "fashion-mnist-part", "--label-weight", "1")
        self.refused(result, "label_weight=1.0", "10 classes", "leave label_weight at 0")

    def test_of_other_classes_of_network(self, tmp_path: Path) -> None:
        spec = ModelSpec("resnet18", {"in_chans": 1}, tuple("abcdefghij"), GREY)
        save_weights(tmp_path / "net.safetensors", spec.build().state_dict(), spec)
        result = run("--teacher", str(tmp_path / "net.safetensors"), "--data", "fashion-mnist-part")
        self.refused(result, "ResNet", "VisionTransformer", "ConvNeXt")

    def test_steering_a_convnext(self, convnext: str) -> None:
        arguments = ["--teacher", convnext, "--data", "fashion-mnist-part"]
        self.refused(run(*arguments, "--init", "steer"), "reads timm's VisionTransformer", "ConvNeXt", "--init random")

    @pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")  # that a pixel alone has no flipping part
    def test_of_other_maps(self, convnext: str) -> None:
        arguments = ["--teacher", convnext, "--data", "fashion-mnist-part", "--set", "patch_size=1"]
        self.refused(run(*arguments), "a place per", "leave patch_size")

    def test_of_a_run_of_another_name(self, teacher: str) -> None:
        result = run("vit_small_patch16_224", "--teacher", teacher, "--data", "fashion-mnist-part")
        self.refused(result, "not of vit_small_patch16_224", "leave out NAME")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"freeze_backbone": True}, "freeze_backbone"),
            ({"distillation": "soft"}, "--logits-loss"),
            ({"teacher_checkpoint": "x.pth"}, "exclude each other"),
        ],
    )
    def test_settings_that_do_not_apply(self, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=words):
            config_for("run", tmp_path, **settings)

    def test_steering_octic_students(self, teacher: str) -> None:
        arguments = ["--teacher", teacher, "--data", "fashion-mnist-part", "--init", "steer", "--group", "octic"]
        self.refused(
            run(*arguments, "--set", "heads=coupled", "--set", "num_heads=1"), "flop or updown", "--init random"
        )

    def test_of_other_patches(self, teacher: str) -> None:
        arguments = ["--teacher", teacher, "--data", "fashion-mnist-part", "--set", "patch_size=4"]
        self.refused(run(*arguments), "4x4 pixels in 7x7 patches", "7x7 pixels in 4x4 patches", "leave patch_size")

    def test_of_no_heads(self, teacher: str) -> None:
        arguments = ["--teacher", teacher, "--data", "fashion-mnist-part", "--init", "steer", "--set", "num_heads=0"]
        self.refused(run(*arguments), "cannot be made with", "'num_heads': 0")

    def test_of_a_group_that_does_not_exist(self, teacher: str) -> None:
        self.refused(run("--teacher", teacher, "--data", "fashion-mnist-part", "--group", "d8"), "d8", "octic")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (NAME, {"num_classes": 3}),
        (NAME, {"in_chans": 1}),
        (NAME, {"in_chans": 4, "img_size": 96}),
        (NAME, {"global_pool": "avg"}),
        (NAME, {"num_classes": 0}),
        (NAME, {"num_classes": 0, "global_pool": "avg"}),
        ("convnext_atto", {"num_classes": 3}),
        ("vit_medium_patch16_reg4_gap_256", {"img_size": 64}),
    ],
)
def test_a_file_of_weights_teaches(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever its classes, colours, image size and pooling are, which the weights show."""
    network: Any = timm.create_model(name, **settings)
    save_file(network.state_dict(), str(tmp_path / "net.safetensors"))
    found = load_teacher(
        replace(config_for("", tmp_path), model=name, teacher_checkpoint=str(tmp_path / "net.safetensors"))
    )
    channels, size = settings.get("in_chans", 3), network.default_cfg["input_size"][1:]
    size = (settings["img_size"],) * 2 if "img_size" in settings else size
    image = torch.randn(1, channels, *size)
    torch.testing.assert_close(found.model(image), network.eval()(image))
    preprocessing = found.spec.preprocessing
    assert preprocessing.input_size == (channels, *size)
    assert len(preprocessing.mean) == len(preprocessing.std) == channels
    assert found.spec.classes == tuple(map(str, range(settings.get("num_classes", network.num_classes))))
    found.spec.build().load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("name", "settings", "given", "outputs"),
    [
        (NAME, {"init_values": 1e-5, "qkv_bias": False}, {"qkv_bias": False}, 192),
        (NAME, {"num_heads": 6}, {"num_heads": 6}, 192),
        ("vit_tiny_patch16_224", {"img_size": 64}, {"num_classes": 0, "img_size": 96}, 192),
        (NAME, {"patch_size": 8, "img_size": 64}, {"patch_size": 8}, 192),
        ("convnext_atto", {"num_classes": 3}, {"num_classes": 0}, 320),
        ("vit_base_patch16_clip_224.openai", {"depth": 1}, {"depth": 1}, 512),
        ("vit_base_patch16_clip_224", {"depth": 1, "num_classes": 512}, {"depth": 1}, 512),
        ("vit_base_patch16_clip_224.openai", {"depth": 1, "num_classes": 7}, {"depth": 1}, 7),
    ],
)
def test_keywords_of_a_teacher(
    name: str, settings: dict[str, Any], given: dict[str, Any], outputs: int, tmp_path: Path
) -> None:
    """What the weights do not show can be said; the image towers of CLIP teach an embedding."""
    network: Any = timm.create_model(name, **settings)
    save_file(network.state_dict(), str(tmp_path / "net.safetensors"))
    file = str(tmp_path / "net.safetensors")
    found = load_teacher(replace(config_for("", tmp_path), model=name, teacher_checkpoint=file, teacher_kwargs=given))
    embeds = given.get("num_classes") == 0 or outputs == 512
    assert found.classifies is not embeds
    assert found.outputs == (outputs if embeds or outputs == 7 else 1000)
    if given.get("num_classes") == 0:
        network.reset_classifier(0)
    if "img_size" in given:
        network.set_input_size((given["img_size"],) * 2)
    size = network.patch_embed.img_size if hasattr(network, "patch_embed") else (224, 224)
    assert found.spec.preprocessing.input_size == (3, *size)
    image = torch.randn(1, 3, *size)
    torch.testing.assert_close(found.model(image), network.eval()(image))
    found.spec.build().load_state_dict(found.model.state_dict())


def test_an_image_tower_teaches_its_embedding(tmp_path: Path) -> None:
    """timm calls the channels of CLIP's embedding classes; nobody agrees about them."""
    name = "vit_base_patch16_clip_224.openai"
    sizes: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
    save_file(timm.create_model(name, **sizes).state_dict(), str(tmp_path / "net.safetensors"))
    arguments = [
        name,
        *(f"--teacher-set={key}={value}" for key, value in sizes.items()),
        "--data",
        "fashion-mnist-part",
    ]
    arguments += ["--teacher-checkpoint", str(tmp_path / "net.safetensors"), "--img-size=32", "--channels=3"]
    result = run(*arguments, "--out", str(tmp_path / "out"), "--epochs", "1", "--batch-size", "2000", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "agreement" not in result.stdout
    student = load_model(tmp_path / "out")
    assert student.spec.classes == () and student.model(torch.zeros(1, 3, 32, 32)).shape == (1, 512)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (NAME, {"dept": 2}, "dept=2 is nothing that deit3_tiny_patch16_224 takes; did you mean depth"),
        (NAME, {"pretrained_strict": False}, "pretrained_strict=False is nothing that"),
        (NAME, {"features_only": True}, "features_only=True is nothing that"),
        (NAME, {"device": "meta"}, "device='meta' is nothing that .*; say --device"),
        (NAME, {"depth": 0.5}, "cannot be made with {'depth': 0.5}"),
        (NAME, {"norm_layer": "foo"}, "cannot be made with {'norm_layer': 'foo'}"),
        (NAME, {"img_size": "abc"}, "cannot be made with {'img_size': 'abc'}"),
        (NAME, {"img_size": [32]}, r"cannot be made with {'img_size': \[32\]}"),
        (NAME, {"depth": 2}, r"net.safetensors': holds no weights of .* with teacher_kwargs={'depth': 2}"),
        (NAME, {"global_pool": ""}, r"answers an image with numbers of shape \(.*\); a teacher gives 1000 in a row"),
        (NAME, {"num_classes": False}, "num_classes=False: the teacher's weights decide it"),
        (NAME, {"num_classes": "x"}, "num_classes='x': the teacher's weights decide it"),
        (f"{NAME}.nonsense", {"depth": 1}, "timm knows no weights of this tag"),
        (f"flop_{NAME}", {"depth": 1}, "is equivariant already"),
        ("convnext_tiny", {"img_size": 64}, "img_size=64 is nothing that convnext_tiny takes; say --img-size"),
        ("convnext_tiny", {"dims": [16]}, r"cannot be made with {'dims': \[16\]}"),
        ("resmlp_12_224", {"img_size": 64}, "holds no weights of resmlp_12_224 with teacher_kwargs={'img_size': 64}"),
    ],
)
def test_keywords_that_do_not_fit(name: str, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {} if name.startswith(("convnext", "resmlp")) else {"depth": 1}
    network = timm.create_model(name.removesuffix(".nonsense"), **sizes)
    save_file(network.state_dict(), str(tmp_path / "net.safetensors"))
    file = str(tmp_path / "net.safetensors")
    config = config_for("", tmp_path, model=name, teacher_checkpoint=file, teacher_kwargs={**sizes, **given})
    with pytest.raises(ValueError, match=message.replace("{", r"\{(?:'depth': 1, )?")) as refused:
        load_teacher(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [[64, 32], [128, 32], [32, 32]])
def test_images_of_a_file_that_are_not_square(size: list[int], tmp_path: Path) -> None:
    """Their size cannot be seen in the weights; where it is said they are taken as they are, or else resampled."""
    name = "vit_tiny_patch16_224"
    network: Any = timm.create_model(name, img_size=[128, 32], depth=1, patch_size=8)
    save_file(network.state_dict(), str(tmp_path / "net.safetensors"))
    config = config_for("", tmp_path, model=name, teacher_checkpoint=str(tmp_path / "net.safetensors"))
    found = load_teacher(replace(config, teacher_kwargs={"patch_size": 8, "depth": 1, "img_size": size}))
    assert found.spec.preprocessing.input_size == (3, *size)
    if size == [128, 32]:
        torch.testing.assert_close(found.model.pos_embed, network.pos_embed)
    odd = timm.create_model(name, img_size=[64, 32], depth=1)
    save_file(odd.state_dict(), str(tmp_path / "odd.safetensors"))
    config = replace(config, teacher_checkpoint=str(tmp_path / "odd.safetensors"), teacher_kwargs={"depth": 1})
    with pytest.raises(ValueError, match=r"9 places: 1 for other tokens leave 8 patches, .* img_size=.HEIGHT,WIDTH."):
        load_teacher(config)
    found = load_teacher(replace(config, teacher_kwargs={"depth": 1, "img_size": [64, 32]}))
    torch.testing.assert_close(found.model.pos_embed, odd.pos_embed)


def test_keywords_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    save_file(timm.create_model(NAME, img_size=64, depth=1).state_dict(), str(tmp_path / "net.safetensors"))
    given = {"img_size": None, "num_classes": None, "depth": 1}
    config = config_for("", tmp_path, teacher_checkpoint=str(tmp_path / "net.safetensors"), teacher_kwargs=given)
    assert load_teacher(config).spec.preprocessing.input_size == (3, 64, 64)
    with pytest.raises(TypeError, match=r"teacher_kwargs=.* holds what is no number"):
        replace(config, teacher_kwargs={"depth": torch})


def test_a_convnext_teaches_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "all").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (40 * number, 100, 7)).save(tmp_path / name / "all" / f"{number}.png")
    sizes: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}
    save_file(timm.create_model("convnext_tiny", **sizes).state_dict(), str(tmp_path / "net.safetensors"))
    arguments = [
        "convnext_tiny",
        *(f"--teacher-set={name}={value}" for name, value in sizes.items()),
        "--teacher-checkpoint",
        str(tmp_path / "net.safetensors"),
        "--data",
        str(tmp_path),
    ]
    arguments += ["--img-size", "64x32", "--out", str(tmp_path / "out"), "--epochs", "1", "--batch-size", "2"]
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert load_model(tmp_path / "out").spec.preprocessing.input_size == (3, 64, 32)


def test_whether_data_have_the_teachers_classes(teacher: str) -> None:
    trained = load_model(teacher)
    own = trained.spec.classes
    named = PlainTeacher(trained.spec, trained.model, "it")
    assert named.knows(own) and not named.knows(own[::-1]) and not named.knows(own[1:])
    published = PlainTeacher(trained.spec, trained.model, "it", names_classes=False)
    assert published.knows(own) and published.knows(tuple("ABCDEFGHIJ"))
    assert not published.knows(own[::-1]) and not published.knows(own[1:])


def test_command(teacher: str, tmp_path: Path) -> None:
    """On other data than the teacher's, so without accuracy; the same command again has nothing left to do."""
    arguments = ["--teacher", teacher, "--data", "fashion-mnist-part", "--out", str(tmp_path / "out")]
    arguments += ["--epochs", "1", "--batch-size", "4000", "--width", "16", "--device", "cpu"]
    for _ in range(2):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "agreement" in result.stdout and "accuracy" not in result.stdout
    checked = CliRunner().invoke(main, ["check", str(tmp_path / "out")])
    assert checked.exit_code == 0, checked.output


def test_command_with_a_convnext(convnext: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = ["--teacher", convnext, "--data", "fashion-mnist-part", "--batch-size", "4000", "--device", "cpu"]
    result = run(*arguments, "--epochs", "1", "--out", out)
    assert result.exit_code == 0 and "agreement" in result.stdout, result.output
    student = load_model(out)
    assert student.spec.name == "twin:convnext_tiny"
    assert equiflop.check(student.model, input_size=(32, 32), randomize=False).passed
    looked = run(*arguments, "--report", "--init-images", "20")
    assert looked.exit_code == 0 and "stage 3 block 0" in looked.stdout, looked.output
