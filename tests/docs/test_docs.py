"""README and docs: links lead somewhere, Python runs, commands exist with these options, and the site builds."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from equiflop.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
#: Blocks of Python that no test here runs, each with its reason in a comment above it.
NOT_RUN = 2

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^]]*\]\(([^()\s]+)\)")
_SKIPPED = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
_CODE = re.compile(r"`(equiflop(?: [^`]+)?)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles)


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str | None]]:
    """The blocks in these languages, and why they are not run, if they are not."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] in languages:
            skipped = _SKIPPED.search(text[: found.start()])
            yield found[3], skipped["reason"] if skipped else None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve()), link


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to be in, with the file and the picture that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("onnxruntime")
    from PIL import Image

    import equiflop

    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    equiflop.export("flop_deit3_tiny_patch16_224", "net.onnx", settings=settings, dynamic_batch=True, images=2)
    Image.effect_noise((40, 30), 60).save("picture.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if [*blocks(page, "python")]], ids=name_of)
def test_python_runs(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's blocks one after the other, in one module."""
    to_run = [block for block, skipped in blocks(page, "python") if skipped is None]
    if any("net.onnx" in block for block in to_run):
        request.getfixturevalue("exported")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("a_page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for i, block in enumerate(to_run):
        exec(compile(block, f"{name_of(page)}, block {i}", "exec"), module.__dict__)


def test_little_is_left_out() -> None:
    reasons = [(name_of(page), reason) for page in PAGES for _, reason in blocks(page, "python") if reason is not None]
    assert len(reasons) == NOT_RUN, reasons


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The calls of ``equiflop`` on a page as lists of arguments, and whether all that is required must be there."""
    for block, _ in blocks(page, "sh", "bash", "console", ""):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*(\$ )?(torchrun .* -m (?=equiflop ))?", "", line)
            if line.startswith("equiflop "):
                yield shlex.split(line, comments=True)[1:], True
    for code in _CODE.findall(prose(page)):
        yield shlex.split(code)[1:], False


def parse(args: list[str], whole: bool = True) -> None:
    """See that click takes the arguments."""
    if not args or args[0].startswith("-") or args[0] == "COMMAND":
        return
    name, command, rest = main.resolve_command(click.Context(main, info_name="equiflop"), args)
    assert command is not None
    try:
        command.make_context(name, [arg for arg in rest if arg != "--help"])
    except click.MissingParameter:
        if whole:
            raise


@pytest.fixture
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether files exist does not matter."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    for args, whole in commands(page):
        try:
            parse(args, whole)
        except click.ClickException as error:
            pytest.fail(f"equiflop {shlex.join(args)}: {error.format_message()}")


@pytest.mark.usefixtures("any_path")
def test_a_wrong_option_is_noticed() -> None:
    parse(["check", "net", "--img-size", "224"])
    for wrong in (["check", "net", "--image-size", "224"], ["chek", "net"], ["train", "--lr", "much"]):
        with pytest.raises(click.UsageError):
            parse(wrong)
    assert sum(1 for page in PAGES for _ in commands(page)) > 50


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_parse(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.help is not None
    text = re.sub(r"\\\n\s*", " ", command.help)
    examples = re.findall(
        r"^ *(?:Examples?: )?(?:torchrun .* -m )?equiflop (\w+ .*?)(?: {2,}\(.*)?$", text, re.MULTILINE
    )
    assert examples
    for example in examples:
        parse(shlex.split(example))


@pytest.mark.usefixtures("any_path")
def test_the_job_script_parses() -> None:
    script = (ROOT / "docs" / "train.slurm").read_text(encoding="utf-8").replace("\\\n", " ")
    parse(shlex.split(script.partition("-m equiflop ")[2]))


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module as they would be shown, with ``...`` for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    paths = sorted((ROOT / "src").rglob("*.py"))
    said = "\n".join(text for path in paths for text in texts(ast.parse(path.read_text(encoding="utf-8"))))
    assert len(messages) >= 15
    for message in messages:
        assert re.search(re.escape(message).replace(re.escape("..."), ".*"), said), message


def exported_names(package: str) -> list[str]:
    module = importlib.import_module(package)
    return [name for name in module.__all__ if isinstance(getattr(module, name), (type, types.FunctionType))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, with all that the packages export, and with nothing to be fetched by the reader."""
    if any(importlib.util.find_spec(package) is None for package in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("mkdocs is not installed: pip install 'equiflop[docs]'")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    for package in (
        "groups",
        "nn",
        "models",
        "kernels",
        "convert",
        "data",
        "training",
        "classify",
        "distill",
        "runtime",
        "deploy",
    ):
        shown = re.findall(r'id="equiflop\.([\w.]+)"', pages[f"api/{package}.html"])
        last = {name.rpartition(".")[2] for name in shown}
        assert not set(exported_names(f"equiflop.{package}")) - last
    for name in COMMANDS:
        assert f"Usage: equiflop {name} " in pages["commands.html"]
    for page, html in pages.items():
        assert not re.search(r'<(?:script|link rel="(?:stylesheet|preconnect)"|img|iframe)[^>]*"https?://', html), page
