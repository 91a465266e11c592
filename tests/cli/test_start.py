"""How the command starts and stops: help without PyTorch, Ctrl-C at any moment, and what the shell completes."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import equiflop
import equiflop.data
import equiflop.training
from equiflop.cli import completion
from equiflop.cli.main import COMMANDS
from equiflop.image_group import NAMED_IMAGE_GROUPS

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "timm", "torchvision", "numpy", "PIL", "matplotlib"}
AS_MODULE = ["-m", "equiflop"]
AS_SCRIPT = ["-c", "from equiflop_command import main; main()"]
_IMPORT = re.compile(r"^import time:.*\| +(\S+)$", re.MULTILINE)


def run(how: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose standard error lists what it imported."""
    command = [sys.executable, "-X", "importtime", *how, *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    return {name.split(".")[0] for name in _IMPORT.findall(result.stderr)}


class TestHelp:
    @pytest.mark.parametrize("how", [AS_MODULE, AS_SCRIPT, ["-mequiflop"]], ids=["module", "script", "short"])
    @pytest.mark.parametrize("option", ["--help", "--version"])
    def test_starts_without_pytorch(self, how: list[str], option: str) -> None:
        result = run(how, option)
        assert result.returncode == 0 and "equiflop" in result.stdout
        assert "click" in imported(result) and not imported(result) & HEAVY

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_of_every_command_too(self, name: str) -> None:
        result = run(AS_SCRIPT, name, "--help")
        assert result.returncode == 0 and result.stdout.startswith(f"Usage: equiflop {name} ")
        assert not imported(result) & HEAVY

    @pytest.mark.parametrize(
        "arguments", ["trian", "train", "train --lr fast", "predict", "train --recipe deit --data x"]
    )
    def test_mistakes_are_found_without_pytorch(self, arguments: str) -> None:
        result = run(AS_SCRIPT, *arguments.split())
        assert result.returncode == 2 and not imported(result) & HEAVY

    def test_the_installed_command_starts_like_this(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert project["project"]["scripts"] == {"equiflop": "equiflop_command:main"}
        assert project["tool"]["setuptools"]["py-modules"] == ["equiflop_command"]


class TestNames:
    def test_the_package_offers_the_same_names_when_they_are_imported_late(self) -> None:
        for package in (equiflop, equiflop.training, equiflop.data):
            find: Callable[[str], object] = vars(package)["__getattr__"]
            eager = {name: vars(package).get(name) for name in package.__all__}
            for name, value in eager.items():
                if value is None or package is not equiflop:
                    assert getattr(package, name) is not None
                else:
                    assert find(name) is value
            with pytest.raises(AttributeError, match=r"has no attribute 'nosuch'"):
                find("nosuch")

    def test_in_the_command_all_names_are_there(self) -> None:
        code = "import sys, equiflop_command, equiflop; assert 'torch' not in sys.modules; "
        code += "print(all(callable(getattr(equiflop, n)) or n in sys.modules['equiflop'].__dict__ "
        code += "for n in equiflop.__all__))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "True\n"

    def test_import_registers_the_models_in_a_module_run_by_its_name(self, tmp_path: Path) -> None:
        """Python's option -m is no sign of our command."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "__init__.py").write_text("import equiflop")
        (tmp_path / "mine" / "__main__.py").write_text(
            "import timm; print(timm.is_model('flop_deit3_small_patch16_224'))"
        )
        result = subprocess.run(
            [sys.executable, "-m", "mine", "-m", "equiflop"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert result.stdout == "True\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
class TestInterrupt:
    """``equiflop models``: seconds of imports, then lines of a table."""

    def start(self, how: list[str], *python: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", *python, *how, "models"]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
        )

    def assert_one_line(self, process: subprocess.Popen[str]) -> None:
        _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("import time:")]
        assert lines == ["equiflop: interrupted"] and process.returncode == 130

    @pytest.mark.parametrize("how", [AS_MODULE, AS_SCRIPT], ids=["module", "script"])
    @pytest.mark.parametrize("module", ["click", "equiflop.cli.main", "numpy", "torch._C", "torch.nn", "torch", "timm"])
    def test_while_it_imports(self, how: list[str], module: str) -> None:
        process = self.start(how, "-X", "importtime")
        assert process.stderr is not None
        for line in process.stderr:
            if _IMPORT.sub(r"\1", line.rstrip()) == module:
                break
        process.send_signal(signal.SIGINT)
        self.assert_one_line(process)

    def test_while_it_works(self) -> None:
        process = self.start(AS_MODULE)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("flop_deit3_small"):
                break
        process.send_signal(signal.SIGINT)
        self.assert_one_line(process)

    @pytest.mark.parametrize("delay", [0.3, 0.8, 1.5, 2.5, 4.0])
    def test_after_a_while(self, delay: float) -> None:
        """Counted from where Python itself has started."""
        process = self.start(AS_MODULE, "-X", "importtime")
        assert process.stderr is not None
        for line in process.stderr:
            if line.rstrip().endswith(" click"):
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=delay)
        process.send_signal(signal.SIGINT)
        self.assert_one_line(process)


def completed(words: str, **environment: str) -> list[str]:
    """What bash would offer for the last word."""
    count = len(words.split(" ")) - 1
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_EQUIFLOP_COMPLETE": "bash_complete", **environment}
    result = run(AS_SCRIPT, **variables)
    assert result.returncode == 0 and not (imported(result) & HEAVY and "models" not in environment), result.stderr
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


class TestCompletion:
    def test_bash_takes_the_script(self) -> None:
        script = run(AS_SCRIPT, _EQUIFLOP_COMPLETE="bash_source").stdout
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert "complete " in script and "equiflop" in script and checked.returncode == 0, checked.stderr

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("equiflop pre", ["predict"]),
            ("equiflop train --rec", ["--recipe"]),
            ("equiflop train --recipe deit3-f", ["deit3-finetune"]),
            ("equiflop train --data fash", ["fashion-mnist", "fashion-mnist-part"]),
            ("equiflop eval --data h", ["hfds/"]),
            ("equiflop check net --group f", ["flop", "flips"]),
            ("equiflop bench --device c", ["cpu", "cuda"]),
            ("equiflop export net --to a", ["aoti"]),
        ],
    )
    def test_names(self, words: str, expected: list[str]) -> None:
        assert completed(words) == expected

    @pytest.mark.slow
    def test_names_of_models(self, tmp_path: Path) -> None:
        """The first time by importing timm, then from the cache."""
        cache = {"XDG_CACHE_HOME": str(tmp_path)}
        assert completed("equiflop bench flop_deit3_sm", models="", **cache) == ["flop_deit3_small_patch16_224"]
        assert completed("equiflop train deit3_small_patch16_2", **cache) == ["deit3_small_patch16_224"]
        assert completed("equiflop convert in --model flop_resmlp_1", **cache) == ["flop_resmlp_12_224"]
        assert completed("equiflop predict --model flop_convnext_t", **cache) == ["flop_convnext_tiny"]
        assert completed("equiflop check twin:vit_small_patch16_dinov3_", **cache) == [
            "twin:vit_small_patch16_dinov3_qkvb"
        ]
        empty = completed("equiflop check ", **cache)
        assert set(equiflop.equivariant_models()) < set(empty) and "resnet50" not in empty

    def test_the_groups_are_those_that_exist(self) -> None:
        assert set(completion.GROUPS) == set(NAMED_IMAGE_GROUPS)
