"""The version is the same wherever it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import equiflop

ROOT = Path(__file__).parents[1]
#: What `make oldest` installs first.
EXTRAS = ("demo", "digits", "tensorboard", "onnx", "openvino", "test")


def test_all_say_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert equiflop.__version__ == cited["version"] == project["version"]
    assert cited["license"] in project["license"].split(" AND ")  # the other is that of the images
    assert cited["abstract"] == project["description"]
    headings = re.findall(
        r"^## \[(.+)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == ("Unreleased", "")
    if len(headings) == 1:  # nothing is released yet
        assert "date-released" not in cited
    else:
        assert headings[1] == (project["version"], str(cited["date-released"]))


def bounds(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)[=>]=([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def test_constraints_are_the_lower_bounds() -> None:
    """Whatever is allowed is named in its oldest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    oldest, adapters = (
        bounds((ROOT / "tests" / name).read_text(encoding="utf-8").splitlines())
        for name in ("oldest.txt", "oldest-adapters.txt")
    )
    own = bounds([*project["dependencies"], *(line for name in EXTRAS for line in extras[name])])
    assert oldest.keys() == own.keys()
    assert adapters.keys() == {"huggingface-hub", "litserve", "peft", "torchao", "transformers"}
    tools = bounds([*extras["dev"], *extras["torchao"]])
    for pins, allowed in ((oldest, own), (adapters, tools)):
        for name in pins.keys() & allowed.keys():
            assert f"{pins[name]}.".startswith(f"{allowed[name]}."), name
