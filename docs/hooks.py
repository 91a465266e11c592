"""What `make docs` does beyond Markdown: changelog, the help of commands, links into the repository, docstrings.

MkDocs calls the functions (``hooks`` in mkdocs.yml), mkdocstrings loads :class:`Docstrings`.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Where docs/commands.md takes the help of all commands.
PLACE = "<!-- the help of every command -->"
_LINK = re.compile(r"(?<!!)\[(?P<text>[^]]+)\]\((?P<target>\.\./[^)#]+)\)")
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*)", re.MULTILINE)
_SHAPE = re.compile(r"^Shape: ", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, which lies beside the folder of the docs."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the help of commands, and name files of the repository: links, if it has an address."""

    def named(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), match["target"]))
        if path.startswith("docs/"):
            return match[0]
        if config.repo_url:
            return f"[{match['text']}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return f"`{path}`" if match["text"] in path else f"{match['text']} (`{path}`)"

    if PLACE in markdown:
        markdown = markdown.replace(PLACE, _help_of_commands())
    return _LINK.sub(named, markdown)


def _help_of_commands() -> str:
    import click

    from equiflop.cli.main import COMMANDS, main

    whole = click.Context(main, info_name="equiflop", max_content_width=80, terminal_width=80)
    parts = []
    for name in COMMANDS:
        command = main.get_command(whole, name)
        assert command is not None
        context = click.Context(command, parent=whole, info_name=name, max_content_width=80, terminal_width=80)
        parts.append(f"## equiflop {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: roles become code, doctests become blocks, and "Shape:" begins a paragraph."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
            obj.docstring.value = _SHAPE.sub("**Shape:** ", text)
