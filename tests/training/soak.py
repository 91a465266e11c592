"""Kill training again and again, and see that it ends with the same bits.

    python tests/training/soak.py --kills 30

Trains a small network with SIGKILL at random moments, half of them while a checkpoint is being written, going on after
each, with one process, with two, and with two that share the parameters out (FSDP2). sha256 of weights, optimiser,
averaged weights and measurements must equal those of a run that nobody disturbed. Exit code 1 if they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from equiflop.classify import ClassifierTrainer, TrainConfig
from equiflop.data import ImageData, MemorySplit, Preprocessing
from equiflop.runtime.processes import leave
from equiflop.training.state import CHECKPOINT_FOLDER, load_state, saved_states

_TIMES = ("seconds", "samples_per_second")


@dataclass
class Tally:
    """What happened to a run.

    Attributes:
        kills: SIGKILLs that met a living process.
        while_saving: of them, while a file of a checkpoint was being written.
    """

    kills: int = 0
    while_saving: int = 0


@dataclass(frozen=True)
class Setting:
    """Which processes train."""

    count: int
    fsdp: bool = False

    def __str__(self) -> str:
        return f"{self.count} process(es){' with FSDP2' if self.fsdp else ''}"


SETTINGS = (Setting(1), Setting(2), Setting(2, fsdp=True))


def config(out: Path, fsdp: bool) -> TrainConfig:
    """A short run that saves after every step."""
    return TrainConfig(
        model="flop_deit3_tiny_patch16_224",
        data="noise",
        out=str(out),
        model_kwargs={"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1.0},
        epochs=3,
        batch_size=8,
        lr=5e-3,
        drop_path=0.3,
        ema_decay=0.9,
        mixup=0.8,
        cutmix=1.0,
        device="cpu",
        save_minutes=1e-9,
        keep_checkpoints=3,
        fsdp=fsdp,
    )


def images() -> ImageData:
    """Ten classes of noise around one pattern each."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 200, (10, 1, 28, 28), generator=generator)

    def split(size: int) -> MemorySplit:
        labels = torch.arange(size) % 10
        noise = torch.randint(0, 56, (size, 1, 28, 28), generator=generator)
        return MemorySplit(
            (patterns[labels] + noise).to(torch.uint8), labels, Preprocessing((1, 28, 28), (0.3,), (0.35,))
        )

    return ImageData("noise", "memory", tuple("abcdefghij"), split(200), split(40))


def digest(folder: Path) -> str:
    """sha256 of the newest state in a run's folder, without the times."""
    path = saved_states(folder / CHECKPOINT_FOLDER)[0]
    state = load_state(path)
    shards = {file.name: load_file(file) for file in path.glob("*.safetensors")} if path.is_dir() else {}
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                if key not in _TIMES:
                    sha.update(str(key).encode())
                    add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    for part in (state.model, state.ema, state.optimizer, state.history, state.epoch, state.step, shards):
        add(part)
    return sha.hexdigest()


def start(folder: Path, setting: Setting) -> list[int]:
    """Train in child processes; their ids."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    children = []
    for rank in range(setting.count):
        child = os.fork()
        if child == 0:
            _train(folder, rank, setting, port)
        children.append(child)
    return children


def _train(folder: Path, rank: int, setting: Setting, port: str) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        log = os.open(folder.parent / f"{folder.name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setting.count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        trainer = ClassifierTrainer(config(folder, setting.fsdp), images())
        trainer.resume()
        trainer.run()
        leave()
        code = 0
    finally:
        os._exit(code)


def disturb(folder: Path, children: list[int], moment: float, while_saving: bool, tally: Tally) -> bool:
    """Wait for the end, or kill all children at a moment; whether they ended by themselves."""
    deadline = time.monotonic() + moment
    checkpoints = folder / CHECKPOINT_FOLDER
    while True:
        late = time.monotonic() >= deadline
        saving = late and while_saving and any(checkpoints.glob(f".step-*.{children[0]}"))
        if late and (saving or not while_saving):
            break
        if not while_saving or late:
            time.sleep(0.0002)
        else:
            time.sleep(0.005)
        ended = [os.waitpid(child, os.WNOHANG) for child in children]
        if any(child for child, _ in ended):
            return _end(children, ended)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    tally.kills += 1
    tally.while_saving += saving
    return False


def _end(children: list[int], ended: list[tuple[int, int]]) -> bool:
    codes = [status if child else os.waitpid(children[i], 0)[1] for i, (child, status) in enumerate(ended)]
    if any(codes):
        raise RuntimeError(f"training ended with {codes} by itself")
    return True


def soak(folder: Path, setting: Setting, kills: int, seed: int, reference: str, seconds: float) -> tuple[Tally, int]:
    """Kill runs until there were enough kills.

    Args:
        folder: where runs go.
        setting: processes of a run.
        kills: how many SIGKILLs at least.
        seed: decides the moments.
        reference: sha256 of the undisturbed run.
        seconds: how long that took; the kills come within 0.6 times as long after a start.

    Returns:
        what happened, and how many runs were finished.

    Raises:
        RuntimeError: if a run ends with other bits, or by an error of its own.
    """
    moments = random.Random(seed)
    tally, runs = Tally(), 0
    while tally.kills < kills:
        run = folder / f"run{runs}"
        runs += 1
        shutil.rmtree(run, ignore_errors=True)
        finished = False
        while not finished:
            while_saving = moments.random() < 0.5
            finished = disturb(run, start(run, setting), moments.uniform(0.05, 0.6 * seconds), while_saving, tally)
        found = digest(run)
        if found != reference:
            raise RuntimeError(f"{run}: {found} after {tally.kills} kills, {reference} without")
        shutil.rmtree(run)
    return tally, runs


def undisturbed(folder: Path, setting: Setting) -> str:
    """sha256 of a run that nobody kills."""
    run = folder / f"reference {setting}"
    disturb(run, start(run, setting), float("inf"), False, Tally())
    return digest(run)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="for each setting")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for setting in SETTINGS:
            begin = time.monotonic()
            reference = undisturbed(Path(place), setting)
            seconds = time.monotonic() - begin
            print(f"{setting}, undisturbed: {seconds:.1f} s, sha256 {reference}", flush=True)
            try:
                tally, runs = soak(Path(place), setting, options.kills, options.seed, reference, seconds)
            except RuntimeError as error:
                print(f"FAILED: {error}", flush=True)
                return 1
            print(
                f"{setting}: {tally.kills} SIGKILLs, {tally.while_saving} of them while saving, {runs} runs "
                "finished, all with the same sha256",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
