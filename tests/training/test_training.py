"""Training: exact resume, files that survive accidents, and measurements that count what they say."""

import contextlib
import errno
import os
import pickle
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from equiflop.classify import ClassifierTrainer, MirrorAveraged, ModelSpec, TrainConfig, evaluate, load_model
from equiflop.classify.weights import save_weights
from equiflop.data import ImageData, MemorySplit, Preprocessing
from equiflop.files import remove, remove_leftovers, replace_folder, sole_user
from equiflop.runtime.device import pick_device
from equiflop.runtime.interrupt import StopRequest
from equiflop.training import CheckpointError, Loaded, NonFiniteLossError, TrainingInterrupted
from equiflop.training.state import load_state, saved_states

GREY = Preprocessing((1, 28, 28), (0.3,), (0.35,))
CPU = torch.device("cpu")


def toy_data(train: int = 70, test: int = 30) -> ImageData:
    """Ten classes of noise around one pattern each: learnable, and in memory."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (10, 1, 28, 28), generator=generator)

    def split(size: int) -> MemorySplit:
        labels = torch.arange(size) % 10
        noise = torch.randint(0, 56, (size, 1, 28, 28), generator=generator)
        return MemorySplit((patterns[labels] + noise).to(torch.uint8), labels, GREY)

    return ImageData("toy", "memory", tuple("abcdefghij"), split(train), split(test))


def config_for(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        model="flop_deit3_tiny_patch16_224",
        data="toy",
        out=str(out),
        model_kwargs={"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1.0},
        epochs=3,
        batch_size=8,
        lr=5e-3,
        warmup_epochs=0.5,
        drop_path=0.3,
        device="cpu",
    )
    return replace(config, **changes)  # type: ignore[arg-type]


class StopAfter(StopRequest):
    """Asks to stop once it has been asked ``steps`` times whether to."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def requested(self) -> signal.Signals | None:
        self.left -= 1
        return signal.SIGINT if self.left < 0 else None


def fingerprint(trainer: ClassifierTrainer) -> Iterator[Tensor]:
    yield from trainer.model.state_dict().values()
    for entry in trainer.learner.optimizer.state_dict()["state"].values():
        yield from (torch.as_tensor(value) for value in entry.values())


def assert_same_outcome(one: ClassifierTrainer, other: ClassifierTrainer) -> None:
    for a, b in zip(fingerprint(one), fingerprint(other), strict=True):
        assert torch.equal(a, b)
    timing = {"seconds", "samples_per_second"}
    for mine, theirs in zip(one.history, other.history, strict=True):
        ours, others = mine.to_dict(), theirs.to_dict()
        assert ours.keys() == others.keys() and all(ours[key] == others[key] for key in ours.keys() - timing)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> ClassifierTrainer:
    trainer = ClassifierTrainer(config_for(tmp_path_factory.mktemp("whole")), toy_data())
    trainer.run()
    return trainer


def test_learns(tmp_path: Path) -> None:
    config = config_for(tmp_path, epochs=20, warmup_epochs=2, drop_path=0.0, shift=0, label_smoothing=0.0)
    history = ClassifierTrainer(config, toy_data()).run()
    assert history[-1].train_loss < history[0].train_loss - 1
    assert history[-1].metrics["test_accuracy"] > 0.7


class TestResume:
    def test_after_an_epoch(self, uninterrupted: ClassifierTrainer, tmp_path: Path) -> None:
        first = ClassifierTrainer(config_for(tmp_path), toy_data())
        first.run_epoch()
        first.save()
        second = ClassifierTrainer(config_for(tmp_path), toy_data())
        torch.manual_seed(12345)
        assert second.resume() is not None and second.epoch == 1
        second.run()
        assert_same_outcome(second, uninterrupted)

    @pytest.mark.parametrize("steps", [0, 1, 5, 8])
    def test_in_the_middle_of_an_epoch(self, uninterrupted: ClassifierTrainer, tmp_path: Path, steps: int) -> None:
        first = ClassifierTrainer(config_for(tmp_path), toy_data())
        first.run_epoch()
        first.save()
        with pytest.raises(TrainingInterrupted) as stopped:
            first.run_epoch(StopAfter(steps))
        assert stopped.value.checkpoint.is_file()
        second = ClassifierTrainer(config_for(tmp_path), toy_data())
        second.resume()
        assert (second.epoch, second.step) == (1, steps)
        second.run()
        assert_same_outcome(second, uninterrupted)

    def test_a_real_signal_leaves_a_usable_checkpoint(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path, epochs=50), toy_data())
        original, seen = trainer._train_step, []

        def step_and_signal(batches: list[Loaded]) -> None:
            original(batches)
            seen.append(1)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGTERM)

        trainer._train_step = step_and_signal  # type: ignore[method-assign]
        with pytest.raises(TrainingInterrupted, match="epoch 1 after step 3") as stopped:
            trainer.run()
        assert stopped.value.signal_number == signal.SIGTERM
        assert load_model(tmp_path).spec.classes == tuple("abcdefghij")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        assert ClassifierTrainer(config_for(tmp_path), toy_data()).resume() is None

    def test_finished_run_stays_finished(self, uninterrupted: ClassifierTrainer) -> None:
        again = ClassifierTrainer(uninterrupted.config, toy_data())
        again.resume()
        assert again.finished

    def test_another_run_is_refused_with_the_difference(self, uninterrupted: ClassifierTrainer) -> None:
        with pytest.raises(CheckpointError, match=r"lr=0\.005 there, lr=0\.5 here"):
            ClassifierTrainer(replace(uninterrupted.config, lr=0.5), toy_data()).resume()

    def test_damaged_newest_checkpoint_is_named_and_the_previous_one_used(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path), toy_data())
        trainer.run()
        newest, previous = saved_states(tmp_path / "checkpoints")
        whole = newest.read_bytes()
        for share in range(0, 100, 7):
            newest.write_bytes(whole[: len(whole) * share // 100])
            again = ClassifierTrainer(config_for(tmp_path), toy_data())
            assert again.resume() == previous
            assert newest.name in capsys.readouterr().err
        previous.write_bytes(b"")
        with pytest.raises(CheckpointError, match=newest.name):
            ClassifierTrainer(config_for(tmp_path), toy_data()).resume()


class TestFiles:
    def test_final_weights_give_the_same_logits(self, uninterrupted: ClassifierTrainer) -> None:
        trained = load_model(uninterrupted.config.out)
        assert trained.path.name == "model.safetensors"
        assert trained.config == uninterrupted.config
        images, _, _ = next(uninterrupted.data.test.batches(torch.arange(5), 5))
        with torch.no_grad():
            assert torch.equal(trained.model(images), uninterrupted.model.eval()(images))

    def test_log_has_a_row_for_each_epoch(self, uninterrupted: ClassifierTrainer) -> None:
        rows = (Path(uninterrupted.config.out) / "log.csv").read_text().splitlines()
        assert rows[0].startswith("epoch,lr,train_loss") and [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3"]

    def test_only_the_newest_checkpoints_stay(self, uninterrupted: ClassifierTrainer) -> None:
        names = [path.name for path in saved_states(Path(uninterrupted.config.out) / "checkpoints")]
        assert names == ["step-00000024.pt", "step-00000016.pt"]

    def test_a_full_disk_leaves_the_previous_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path), toy_data())
        trainer.run_epoch()
        before = trainer.save()
        trainer.run_epoch()

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*intact"):
            trainer.save()
        assert {path.name for path in before.parent.iterdir()} == {before.name, "best.pt"}, "no half-written file stays"
        assert load_state(before).epoch == 1

    def test_a_disk_that_fills_up_while_writing(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        trainer = ClassifierTrainer(config_for(tmp_path), toy_data())
        trainer.run_epoch()
        before = trainer.save()
        trainer.run_epoch()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (before.stat().st_size // 2, limits[1]))
        try:
            with pytest.raises(OSError, match=r"cannot write.*intact") as error:
                trainer.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.filename is not None and error.value.filename.endswith("step-00000016.pt")
        assert {path.name for path in before.parent.iterdir()} == {before.name, "best.pt"}
        assert load_state(before).epoch == 1

    def test_a_second_training_in_the_same_folder_is_refused(self, tmp_path: Path) -> None:
        with sole_user(tmp_path), pytest.raises(ValueError, match="another process is training there"):
            ClassifierTrainer(config_for(tmp_path), toy_data()).run()
        assert saved_states(tmp_path / "checkpoints") == []

    def test_half_written_files_of_killed_processes_go(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
        kept = [f".step-00000001.pt.new.{os.getppid()}", ".hidden.txt", ".not.ours.7"]
        for name in [f".step-00000001.pt.new.{dead}", f".step-00000001.pt.new.{os.getpid()}", *kept]:
            (folder / name).write_bytes(b"half")
        (folder / f".step-00000002.gone.{dead}").mkdir()
        remove_leftovers(folder)
        assert {path.name for path in folder.iterdir()} == set(kept)

    @pytest.mark.parametrize("renames", range(4))
    def test_a_folder_that_is_being_replaced_is_never_lost(
        self, renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed before every one of the renames: the old content or the new, whole."""

        def fill(place: Path) -> None:
            place.mkdir()
            (place / "content").write_text("new")

        path = tmp_path / "best"
        path.mkdir()
        (path / "content").write_text("old")
        left = [renames]
        replace, killed = os.replace, KeyboardInterrupt

        def dying(source: Path, target: Path) -> None:
            if left[0] == 0:
                raise killed
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        monkeypatch.setattr("equiflop.files._delete", lambda path: None)  # nor was there time for that
        with contextlib.suppress(killed):
            replace_folder(path, fill)
        monkeypatch.undo()
        remove_leftovers(tmp_path)
        assert [place.name for place in tmp_path.iterdir()] == ["best"]
        assert (path / "content").read_text() == ("new" if renames > 1 else "old")

    def test_the_best_state_is_kept(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path, keep_checkpoints=1), toy_data())
        trainer.run()
        best = max(trainer.history, key=lambda record: record.metrics["test_accuracy"])
        assert load_state(tmp_path / "checkpoints" / "best.pt").epoch == best.epoch

    def test_tensorboard_shows_what_the_log_says_after_a_resume_as_well(self, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        config = config_for(tmp_path, tensorboard=True, ema_decay=0.9)
        first = ClassifierTrainer(config, toy_data())
        first.run_epoch()
        first.save()
        first.run_epoch()
        first.save()
        remove(saved_states(tmp_path / "checkpoints")[0])  # epoch 2 is done again
        trainer = ClassifierTrainer(config, toy_data())
        trainer.resume()
        history = trainer.run()
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        for name in ("train_loss", "test_accuracy", "ema_accuracy", "lr"):
            shown = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
            assert shown == [(record.epoch, pytest.approx(record.to_dict()[name], rel=1e-6)) for record in history]

    def test_others_may_read_what_the_umask_lets_them(self, uninterrupted: ClassifierTrainer) -> None:
        reference = Path(uninterrupted.config.out) / "reference"
        reference.write_text("")
        assert (Path(uninterrupted.config.out) / "model.safetensors").stat().st_mode == reference.stat().st_mode
        reference.unlink()

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
    @pytest.mark.parametrize("name", ["step-00000001.pt", "model.safetensors"])
    def test_files_of_another_kind_are_refused_by_name(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as error:
            load_model(tmp_path / name)
        assert "\n" not in str(error.value)

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

        (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(CheckpointError, match=r"evil\.pt"):
            load_model(tmp_path / "evil.pt")
        torch.save(Payload(), tmp_path / "evil.pt")
        with pytest.raises(CheckpointError, match=r"evil\.pt"):
            load_model(tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()

    def test_foreign_weights_are_refused(self, tmp_path: Path) -> None:
        torch.save({"model": {}}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of equiflop train"):
            load_model(tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="no such file"):
            load_model(tmp_path / "none.pt")
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor a checkpoint"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"embed_dim": 48}, "has shape"),
            ({"depth": 3}, "missing"),
            ({"depth": 1}, "unexpected"),
            ({"embed_dim": 15}, "cannot be made"),
            ({"no_such": 1}, "no_such"),
        ],
    )
    def test_weights_that_do_not_fit_their_description(
        self, uninterrupted: ClassifierTrainer, tmp_path: Path, change: dict[str, int], message: str
    ) -> None:
        spec = uninterrupted.spec
        wrong = ModelSpec(spec.name, {**spec.kwargs, **change}, spec.classes, spec.preprocessing)
        save_weights(tmp_path / "wrong.safetensors", uninterrupted.model.state_dict(), wrong)
        with pytest.raises(CheckpointError, match=rf"wrong\.safetensors.*{message}"):
            load_model(tmp_path / "wrong.safetensors")

    def test_nan_weights_are_refused(self, uninterrupted: ClassifierTrainer, tmp_path: Path) -> None:
        model = uninterrupted.spec.build()
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = float("nan")
        save_weights(tmp_path / "nan.safetensors", model.state_dict(), uninterrupted.spec)
        with pytest.raises(CheckpointError, match="NaN"):
            load_model(tmp_path / "nan.safetensors")


class TestErrors:
    def test_a_loss_that_is_not_finite_names_the_step(self, tmp_path: Path) -> None:
        trainer = ClassifierTrainer(config_for(tmp_path), toy_data())
        trainer.run_epoch()
        with torch.no_grad():
            trainer.model.get_parameter("head.weight").fill_(float("inf"))
        with pytest.raises(NonFiniteLossError, match="epoch 2, step 1 "):
            trainer.run_epoch()

    @pytest.mark.parametrize(
        "change",
        [{"epochs": 0}, {"lr": -1.0}, {"drop_path": 1.5}, {"mirror": -0.1}, {"warmup_epochs": 9}, {"lr": float("nan")}],
    )
    def test_values_out_of_range_are_named(self, tmp_path: Path, change: dict[str, float]) -> None:
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            config_for(tmp_path, **change)

    def test_unknown_model_suggests_close_names(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"did you mean .*flop_deit3_small_patch16_224"):
            ClassifierTrainer(config_for(tmp_path, model="flop_deit3_smal_patch16_224"), toy_data())

    def test_unknown_keyword_and_device(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="embed_dimm"):
            ClassifierTrainer(config_for(tmp_path, model_kwargs={"embed_dimm": 1}), toy_data())
        with pytest.raises(ValueError, match="device='tpu9'"):
            pick_device("tpu9")

    def test_config_survives_json_and_refuses_unknown_fields(self, tmp_path: Path) -> None:
        config = config_for(tmp_path, image_size=(28, 28))
        assert TrainConfig.from_dict(config.to_dict()) == config
        with pytest.raises(ValueError, match="unknown training option 'lrr'"):
            TrainConfig.from_dict({**config.to_dict(), "lrr": 1})


class ByBrightness(nn.Module):
    """Logits that depend on the brightness of the left half only, so mirroring matters."""

    def forward(self, images: Tensor) -> Tensor:
        left, right = images.float().chunk(2, dim=-1)
        return torch.stack([left.mean((1, 2, 3)), torch.zeros(len(images)), right.mean((1, 2, 3)) * 0 - 9], dim=1)


class TestEvaluation:
    def split(self) -> MemorySplit:
        """Left half bright or dark: class 0 if the left half is brighter than grey, else class 1."""
        images = torch.full((7, 1, 2, 4), 100, dtype=torch.uint8)
        images[:4, ..., :2] = 200
        images[4:, ..., :2] = 20
        images[:3, ..., 2:] = 20
        images[3:, ..., 2:] = 200
        labels = torch.tensor([0, 0, 1, 0, 1, 1, 0])
        return MemorySplit(images, labels, Preprocessing((1, 2, 4), (0.5,), (1.0,)))

    @pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
    def test_counts(self, batch_size: int) -> None:
        result = evaluate(ByBrightness(), self.split(), batch_size, CPU)
        assert (result.images, result.correct, result.correct_top5) == (7, 5, 7)
        assert (result.changed, result.changed_with_ties) == (6, 6)
        assert result.top1 == 5 / 7 and result.changed_share == 6 / 7

    def test_a_tie_is_not_a_change_but_is_reported(self) -> None:
        class AlmostTied(ByBrightness):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images) * 1e-6

        result = evaluate(AlmostTied(), self.split(), 4, CPU)
        assert (result.changed, result.changed_with_ties) == (0, 6)

    def test_averaging_both_views_is_invariant(self) -> None:
        result = evaluate(MirrorAveraged(ByBrightness()), self.split(), 4, CPU)
        assert (result.changed, result.changed_with_ties) == (0, 0)

    def test_equivariant_model_never_changes_its_mind(self, uninterrupted: ClassifierTrainer) -> None:
        assert evaluate(uninterrupted.model, uninterrupted.data.test, 8, CPU).changed == 0

    def test_infinite_logits_are_an_error_and_the_mode_is_restored(self) -> None:
        linear = nn.Linear(8, 3)
        model = nn.Sequential(nn.Flatten(), linear)
        nn.init.constant_(linear.weight, float("inf"))
        with pytest.raises(ValueError, match="not finite"):
            evaluate(model, self.split(), 4, CPU)
        assert model.training

    def test_skipping_the_mirrored_images(self) -> None:
        result = evaluate(ByBrightness(), self.split(), 4, CPU, mirrored=False)
        assert result.correct == 5 and result.changed is None and result.changed_share is None
