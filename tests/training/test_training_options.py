"""What the papers' recipes are made of, each part against what it should do."""

from __future__ import annotations

import copy
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from timm.layers import DropPath
from timm.optim import list_optimizers

import equiflop
from equiflop.classify import ClassifierTrainer, TrainConfig, evaluate, load_model
from equiflop.classify.neighbours import nearest_neighbour_accuracy
from equiflop.classify.objective import ClassifierObjective
from equiflop.classify.recipe import load_recipe, recipe_names
from equiflop.cli.main import main
from equiflop.data import Augmentation, ImageData, ImageSplit, MemorySplit, Preprocessing, open_data
from equiflop.data.sources import DatasetImages
from equiflop.files import sole_user
from equiflop.training import CheckpointError, TrainingInterrupted
from equiflop.training.samples import seed_everything
from equiflop.training.state import load_state, saved_states
from test_training import CPU, GREY, StopAfter, assert_same_outcome, config_for, toy_data


def write_pictures(folder: Path, count: int = 24, size: int = 20) -> Path:
    """Two classes, dark and bright, with every colour mode among them."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, brightness in (("dark", 0), ("light", 155)):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray((brightness + rng.integers(0, 100, (size, size, 3))).astype(np.uint8))
                mode = ("RGB", "L", "CMYK", "P")[i % 4]
                image.convert(mode).save(place / f"{i:02d}.{'tiff' if mode == 'CMYK' else 'png'}")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def picture_config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": "flop_deit3_tiny_patch16_224",
        "data": str(data),
        "out": str(out),
        "model_kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "init_values": 1.0},
        "image_size": (16, 16),
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
    }
    return TrainConfig(**{**options, **changes})


class TestRecipes:
    @pytest.mark.parametrize("name", recipe_names())
    def test_recipe_makes_a_configuration_of_a_registered_model(self, name: str) -> None:
        options = load_recipe(name)
        config = TrainConfig.from_dict({"data": "folder", "out": "runs", **options})
        assert timm.is_model(config.model) and config.optimizer in list_optimizers()

    def test_published_numbers(self) -> None:
        """README of DeiT III; table 5 of ConvNeXt."""
        small, base, huge = (load_recipe(f"deit3-{size}") for size in ("small", "base", "huge"))
        assert (small["lr"], base["lr"], huge["lr"]) == (4e-3, 3e-3, 3e-3)
        assert (small["drop_path"], base["drop_path"], huge["drop_path"]) == (0.05, 0.2, 0.6)
        for recipe in (small, base, huge):
            assert (recipe["optimizer"], recipe["loss"], recipe["repeats"], recipe["epochs"]) == ("lamb", "bce", 3, 800)
            assert (recipe["mixup"], recipe["cutmix"], recipe["auto_augment"]) == (0.8, 1.0, "3a")
        convnext = load_recipe("convnext")
        assert convnext["ema_decay"] == 0.9999 and convnext["random_erasing"] == 0.25

    def test_command_line_goes_before_the_recipe(self, pictures: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(
            "model: flop_deit3_tiny_patch16_224\nepochs: 9\nlr: 5.0e-4\nimage_size: [16, 16]\n"
            "model_kwargs: {patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}\n"
        )
        arguments = ["train", "--recipe", str(tmp_path / "mine.yaml"), "--data", str(pictures), "--epochs", "1"]
        arguments += ["--set", "depth=1", "--out", str(tmp_path / "run"), "--device", "cpu"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert written["epochs"] == 1 and written["lr"] == 5e-4
        assert written["model_kwargs"] == {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}

    def test_every_field_is_an_option(self) -> None:
        text = CliRunner().invoke(main, ["train", "--help"]).output
        for name in TrainConfig.describe():
            if name not in ("model", "model_kwargs", "image_size"):
                assert "--" + name.replace("_", "-") in text


class TestObjective:
    def objective(self, tmp_path: Path, **changes: Any) -> ClassifierObjective:
        return ClassifierObjective(config_for(tmp_path, **changes), tuple("abcdefghij"), GREY)

    def test_binary_cross_entropy(self, tmp_path: Path) -> None:
        logits, labels = torch.randn(4, 10), torch.tensor([1, 0, 9, 3])
        found = self.objective(tmp_path, loss="bce", label_smoothing=0.0).loss_of(
            logits, labels, torch.zeros(4, 1, 28, 28)
        )
        truth = F.one_hot(labels, 10).float()
        expected = -(truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits)).mean()
        assert torch.allclose(found, expected)

    def test_mixing_is_a_function_of_its_seed_and_mixes_labels_as_images(self, tmp_path: Path) -> None:
        objective = self.objective(tmp_path, mixup=0.8, label_smoothing=0.0)
        labels = torch.arange(4)
        images = labels.view(-1, 1, 1, 1).expand(4, 10, 4, 4).float().contiguous()
        images = F.one_hot(labels, 10).float()[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
        results = []
        for seed in (7, 7, 8):
            seed_everything(seed)
            results.append(objective.mix(images.clone(), labels))
        (mixed, targets), (again, _), (other, _) = results
        assert torch.equal(mixed, again) and not torch.equal(mixed, other)
        assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-6), "an image that shows its label is its target"

    def test_cutmix_takes_the_share_of_the_area(self, tmp_path: Path) -> None:
        objective = self.objective(tmp_path, cutmix=1.0, label_smoothing=0.0)
        labels = torch.arange(4)
        images = F.one_hot(labels, 10).float()[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
        mixed, targets = objective.mix(images, labels)
        assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-6) and 0 < float(targets.max()) <= 1

    def test_hard_and_soft_distillation(self, tmp_path: Path) -> None:
        teacher = ClassifierTrainer(config_for(tmp_path / "teacher", epochs=1), toy_data())
        teacher.run()
        images, labels = torch.randn(6, 1, 28, 28), torch.arange(6)
        logits = torch.randn(6, 10)
        answers = teacher.model.eval()(images).detach()
        plain = F.cross_entropy(logits, labels, label_smoothing=0.1)
        options = {"teacher": str(tmp_path / "teacher"), "distillation_weight": 0.3}
        hard = self.objective(tmp_path, **options).loss_of(logits, labels, images)
        assert torch.allclose(hard, 0.7 * plain + 0.3 * F.cross_entropy(logits, answers.argmax(1)), atol=1e-6)
        options |= {"distillation": "soft", "distillation_temperature": 2.0}
        soft = self.objective(tmp_path, **options).loss_of(logits, labels, images)
        p = (answers / 2).softmax(1)
        divergence = (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        assert torch.allclose(soft, 0.7 * plain + 0.3 * 4 * divergence, atol=1e-5)

    def test_a_teacher_of_other_classes_is_refused(self, tmp_path: Path) -> None:
        ClassifierTrainer(config_for(tmp_path / "teacher", epochs=1), toy_data()).run()
        with pytest.raises(ValueError, match="knows other classes"):
            ClassifierObjective(config_for(tmp_path, teacher=str(tmp_path / "teacher")), ("x", "y"), GREY)


class TestTraining:
    def test_averaged_weights(self, tmp_path: Path) -> None:
        """Against the recursion, step by step."""
        trainer = ClassifierTrainer(config_for(tmp_path, epochs=1, ema_decay=0.9), toy_data())
        average = copy.deepcopy(trainer.model).state_dict()
        original = trainer._train_step

        def step(batches: Any) -> None:
            original(batches)
            for key, value in trainer.model.state_dict().items():
                average[key] = average[key] + 0.1 * (value - average[key])

        trainer._train_step = step  # type: ignore[method-assign]
        (record,) = trainer.run()
        assert trainer.ema is not None and "ema_accuracy" in record.metrics
        for key, value in trainer.ema.state_dict().items():
            assert torch.allclose(value, average[key], atol=1e-6), key
        saved = load_state(saved_states(tmp_path / "checkpoints")[0])
        assert saved.ema is not None and all(torch.equal(saved.ema[k], v) for k, v in trainer.ema.state_dict().items())

    @pytest.mark.parametrize("options", [{"accumulate": 2, "batch_size": 4}, {"grad_checkpointing": True}])
    def test_the_same_gradient_another_way(self, tmp_path: Path, options: dict[str, Any]) -> None:
        common = {"drop_path": 0.0, "epochs": 2}
        one = ClassifierTrainer(config_for(tmp_path / "a", **common), toy_data())
        other = ClassifierTrainer(config_for(tmp_path / "b", **common, **options), toy_data())
        for mine, theirs in zip(one.run(), other.run(), strict=True):
            assert math.isclose(mine.train_loss, theirs.train_loss, rel_tol=1e-5)

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_low_precision_learns_and_resumes(self, tmp_path: Path, precision: str) -> None:
        options = {"epochs": 3, "precision": precision, "shift": 0}
        whole = ClassifierTrainer(config_for(tmp_path / "a", **options), toy_data())
        history = whole.run()
        assert history[-1].train_loss < history[0].train_loss
        first = ClassifierTrainer(config_for(tmp_path / "b", **options), toy_data())
        first.run_epoch()
        first.save()
        second = ClassifierTrainer(config_for(tmp_path / "b", **options), toy_data())
        second.resume()
        second.run()
        assert_same_outcome(second, whole)

    def test_constant_stochastic_depth(self, tmp_path: Path) -> None:
        keywords = {"patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 2}
        for model in ("flop_deit3_tiny_patch16_224", "deit3_small_patch16_224"):
            rates = {}
            for schedule in ("linear", "constant"):
                config = config_for(
                    tmp_path, model=model, model_kwargs=keywords, drop_path=0.3, drop_path_schedule=schedule
                )
                modules = ClassifierTrainer(config, toy_data()).model.modules()
                rates[schedule] = [module.drop_prob for module in modules if isinstance(module, DropPath)]
            assert rates["constant"] == [0.3] * 8
            assert np.allclose(rates["linear"], [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])

    def test_repeated_augmentation(self, tmp_path: Path) -> None:
        """Three versions of a third of the images, in an epoch that is no longer."""
        trainer = ClassifierTrainer(config_for(tmp_path, repeats=3), toy_data())
        samples = trainer._samples()
        assert len(samples) == 64 and len(samples.unique()) == 64
        assert sorted(torch.bincount(samples % 70).tolist())[-21:] == [3] * 21

    def test_learning_rate(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path, schedule="constant", warmup_epochs=1.0, lr=1e-2), toy_data())
        history = trainer.run()
        assert [record.lr for record in history[1:]] == [1e-2, 1e-2] and history[0].lr < 1e-2

    def test_fine_tuning_at_another_resolution(self, pictures: Path, tmp_path: Path) -> None:
        ClassifierTrainer(picture_config(pictures, tmp_path / "small")).run()
        options = {"start_from": str(tmp_path / "small"), "image_size": (32, 24)}
        trainer = ClassifierTrainer(picture_config(pictures, tmp_path / "large", **options))
        assert equiflop.check(trainer.model, input_size=(32, 24), randomize=False).passed
        source = load_state(saved_states(tmp_path / "small" / "checkpoints")[0]).model
        weight = "blocks.0.mlp.fc1.weight_a"
        found = trainer.model.state_dict()
        assert any(torch.equal(found[key], source[key]) for key in source if "mlp.fc1" in key), weight
        trainer.run()

    def test_linear_probe_moves_nothing_but_the_classifier(self, pictures: Path, tmp_path: Path) -> None:
        ClassifierTrainer(picture_config(pictures, tmp_path / "first")).run()
        options = {"start_from": str(tmp_path / "first"), "freeze_backbone": True}
        trainer = ClassifierTrainer(picture_config(pictures, tmp_path / "probe", **options))
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.run()
        moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == {"head.weight", "head.bias"}

    @pytest.mark.slow
    def test_workers_change_nothing(self, pictures: Path, tmp_path: Path) -> None:
        options = {
            "auto_augment": "3a",
            "color_jitter": 0.3,
            "random_erasing": 0.5,
            "crop_mode": "rkrc",
            "mixup": 0.8,
            "cutmix": 1.0,
            "repeats": 3,
            "drop_path": 0.2,
        }
        trainers = []
        for workers in (0, 1, 3):
            trainer = ClassifierTrainer(picture_config(pictures, tmp_path / str(workers), workers=workers, **options))
            trainer.run()
            trainers.append(trainer)
        for other in trainers[1:]:
            assert_same_outcome(other, trainers[0])

    @pytest.mark.parametrize("policy", ["3a", "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"])
    def test_policies_of_timm_depend_on_seed_epoch_and_sample_alone(self, pictures: Path, policy: str) -> None:
        split = open_data(pictures, (16, 16)).train
        augmentation = Augmentation(0.5, 0, 0.5, 0, 1, auto_augment=policy, color_jitter=0.3, random_erasing=0.3)
        (together,) = split.batches(torch.tensor([3, 17, 5 + 48]), 3, augmentation)
        (alone,) = split.batches(torch.tensor([5 + 48]), 1, augmentation)
        assert torch.equal(together.images[2], alone.images[0])
        (version,) = split.batches(torch.tensor([5]), 1, augmentation)
        assert not torch.equal(version.images, alone.images) and torch.equal(version.labels, alone.labels)


class TestMeasurements:
    def test_calibration_and_classes(self) -> None:
        """A classifier that says 0.8 and is right in half of the cases is off by 0.3."""

        class Sure(torch.nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return torch.tensor([math.log(0.8), math.log(0.2)]).expand(len(images), 2)

        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        split = MemorySplit(torch.zeros(6, 1, 28, 28, dtype=torch.uint8), labels, GREY)
        result = evaluate(Sure(), split, 4, CPU, classes=2)
        assert result.per_class == ((3, 3), (3, 0)) and result.top1 == 0.5
        assert result.calibration_error is not None and math.isclose(result.calibration_error, 0.3, abs_tol=1e-6)

    def test_nearest_neighbours(self) -> None:
        class Pixels(torch.nn.Module):
            def forward_features(self, images: torch.Tensor) -> torch.Tensor:
                return images.flatten(1)

            def forward_head(self, features: torch.Tensor, pre_logits: bool) -> torch.Tensor:
                return features

        data = toy_data(200, 50)
        found = nearest_neighbour_accuracy(Pixels(), data.train, data.test, 5, CPU, batch_size=32)
        assert found == 1.0
        with pytest.raises(ValueError, match="neighbours=201"):
            nearest_neighbour_accuracy(Pixels(), data.train, data.test, 201, CPU)

    def test_plot_and_eval_commands(self, pictures: Path, tmp_path: Path) -> None:
        for seed in (0, 1):
            ClassifierTrainer(picture_config(pictures, tmp_path / f"run{seed}", seed=seed, ema_decay=0.5)).run()
        figure = tmp_path / "runs.png"
        result = CliRunner().invoke(
            main, ["plot", *(str(tmp_path / f"run{i}") for i in (0, 1)), "--output", str(figure)]
        )
        assert result.exit_code == 0 and "run1" in result.output, result.output
        assert Image.open(figure).size[0] > 500
        arguments = ["eval", str(tmp_path / "run0"), "--per-class", "--neighbours", "3", "--device", "cpu"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0 and "dark" in result.output and "3 neighbours" in result.output, result.output


class TestSources:
    def test_a_data_set_of_another_library(self) -> None:
        """What ``torch/`` and ``hfds/`` names open: (image, label) by index."""
        items = [(Image.new("P", (5, 7)), 1), (Image.new("RGBA", (6, 6)), 0), ("not an image", 0)]
        split = ImageSplit(DatasetImages(items, [1, 0, 0], "things"), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
        (batch,) = split.batches(torch.arange(3), 3, skip_unreadable=True)
        assert batch.labels.tolist() == [1, 0] and batch.problems[0].startswith("things[2]")

    def test_torchvision_by_the_name_of_timm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """CIFAR-10 in torchvision's own layout, as a download leaves it."""
        import pickle

        import torchvision.datasets.cifar as cifar

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        folder = tmp_path / "equiflop" / "torch-cifar10" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            pixels = rng.integers(0, 255, (4, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
        names = [f"class{i}" for i in range(10)]
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr(cifar, "check_integrity", lambda *arguments: True)
        data: ImageData = open_data("torch/cifar10", (32, 32))
        assert (len(data.train), len(data.test), data.classes[9]) == (20, 4, "class9")
        (batch,) = data.test.batches(torch.arange(4), 4)
        assert batch.images.shape == (4, 3, 32, 32) and batch.labels.tolist() == [0, 1, 2, 9]

    def test_a_data_set_of_timm_never_gives_the_next_image(self) -> None:
        """As timm's ImageDataset reads Hugging Face's: a file by index, whose failure it would hide."""
        whole = io.BytesIO()
        Image.new("RGB", (6, 6)).save(whole, "PNG")

        class Files:
            def __init__(self) -> None:
                self.reader = [(io.BytesIO(whole.getvalue()), 0), (io.BytesIO(b"junk"), 1)]

        split = ImageSplit(DatasetImages(Files(), [0, 1], "hub"), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
        (batch,) = split.batches(torch.arange(2), 2, skip_unreadable=True)
        assert batch.labels.tolist() == [0] and batch.problems == ["hub[1]: not an image that Pillow can read"]

    def test_shards_are_told_apart_by_words(self, tmp_path: Path) -> None:
        for name in ("latest-train-000.tar", "interval-val-000.tar"):
            with tarfile.open(tmp_path / name, "w") as archive:
                for key, content in (("x.cls", b"0"), ("x.png", b"junk")):
                    member = tarfile.TarInfo(key)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        data = open_data(f"wds/{tmp_path}", (16, 16))
        assert (len(data.train), len(data.test)) == (1, 1)
        (tmp_path / "train-val.tar").write_bytes(b"")
        with pytest.raises(ValueError, match="for training and for testing"):
            open_data(f"wds/{tmp_path}", (16, 16))


class TestWhatIsKept:
    def test_a_checkpoint_with_an_average_gives_the_average(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path, epochs=1, ema_decay=0.5), toy_data())
        trainer.run()
        assert trainer.ema is not None
        loaded = load_model(saved_states(tmp_path / "checkpoints")[0]).model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in trainer.ema.state_dict().items())

    def test_starting_anew_removes_what_would_be_taken_for_the_new_run(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path, epochs=1), toy_data())
        trainer.run()
        trainer.remove_checkpoints()
        (tmp_path / "unreadable.txt").write_text("old\n")
        assert (tmp_path / "model.safetensors").is_file()
        anew = ClassifierTrainer(config_for(tmp_path, epochs=1, seed=1), toy_data())
        anew.start_anew()
        assert (tmp_path / "log.csv").is_file()  # nothing goes before a step has succeeded
        with pytest.raises(TrainingInterrupted):
            anew.run_epoch(StopAfter(1))
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {"config.json", ".lock", "log.csv", "log.jsonl", "step-00000001.pt"}
        with sole_user(tmp_path), pytest.raises(ValueError, match="another process"):
            anew.run()

    def test_other_data_is_not_resumed(self, tmp_path: Path) -> None:
        ClassifierTrainer(config_for(tmp_path, epochs=1), toy_data()).run()
        with pytest.raises(CheckpointError, match="70 training images there, 64 here"):
            ClassifierTrainer(config_for(tmp_path, epochs=1), toy_data(64)).resume()

    def test_an_image_without_a_partner_keeps_its_label(self, tmp_path: Path) -> None:
        objective = ClassifierObjective(config_for(tmp_path, mixup=0.8, label_smoothing=0.1), tuple("abcdefghij"), GREY)
        images, targets = objective.mix(torch.randn(5, 1, 28, 28), torch.arange(5))
        assert images.shape == (5, 1, 28, 28) and targets.shape == (5, 10)
        assert torch.allclose(targets[4], F.one_hot(torch.tensor(4), 10) * 0.9 + 0.01)
        assert torch.allclose(targets.sum(1), torch.ones(5))
