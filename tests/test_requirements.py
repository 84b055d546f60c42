"""What is installed, pinned and declared agrees: pyproject.toml, requirements/ and the imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What a module is called by where it is not called by its distribution.
DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "huggingface_hub": "huggingface-hub"}
# Extras that are not in the development environment: their packages have no pin.
APART = {"vllm", "bitsandbytes", "trl"}


def declared(*extras: str) -> dict[str, Requirement]:
    """The requirements of the package and of some of its extras, by name."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): each for each in found}


def pins(name: str) -> dict[str, tuple[Version, int]]:
    """The versions of a requirements file and how many hashes each has."""
    found: dict[str, tuple[Version, int]] = {}
    last = ""
    for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines():
        pin = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+!]+)", line)
        if pin is not None:
            last = canonicalize_name(pin[1])
            found[last] = Version(pin[2]), 0
        elif line.strip().startswith("--hash=sha256:"):
            found[last] = found[last][0], found[last][1] + 1
    return found


def imported() -> dict[str, set[str]]:
    """The packages of others that this package imports, each with the files that do."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "sdft_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                if package not in sys.stdlib_module_names and package != "sdft_lightning":
                    found.setdefault(package, set()).add(path.name)
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    known = declared(*PROJECT["optional-dependencies"])
    found = imported()
    assert {"pyarrow", "tokenizers", "markupsafe", "nltk", "torch"} <= found.keys()
    missing = {
        name: files
        for name, files in found.items()
        if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in known
    }
    assert missing == {}


def test_what_is_used_privately_has_a_ceiling_and_the_tested_version_is_below_it() -> None:
    known = declared("vllm")
    for name, next_one in (("lightning", "2.7"), ("lm-eval", "0.4.14"), ("vllm", "0.33")):
        assert not known[name].specifier.contains(next_one), name
    assert known["lightning"].specifier.contains("2.6.6")
    assert known["vllm"].specifier.contains("0.32.0")


@pytest.mark.parametrize("file", ["tested.txt", "min.txt"])
def test_pins_are_versions_that_pyproject_allows(file: str) -> None:
    pinned = pins(file)
    ours = declared(*set(PROJECT["optional-dependencies"]) - {"vllm", "qlora", "perf"})
    for name, requirement in ours.items():
        if name == "sdft-lightning" or (file == "tested.txt" and name == "torch"):
            continue
        assert requirement.specifier.contains(pinned[name][0], prereleases=True), name
    assert len(pinned) > 100


def test_tested_versions_have_hashes_and_are_those_that_are_installed() -> None:
    pinned = pins("tested.txt")
    assert all(hashes > 0 for _, hashes in pinned.values())
    assert not any(name == "torch" or name.startswith("nvidia-") for name in pinned)
    other = {}
    for name, (wanted, _) in pinned.items():
        try:
            if Version(version(name)) != wanted:
                other[name] = version(name)
        except PackageNotFoundError:  # of another system, by its marker
            continue
    chosen = Path(sys.prefix) / ".requirements"
    if chosen.is_file() and chosen.read_text(encoding="utf-8").strip() != "tested":
        pytest.skip("this environment was made with SDFT_REQUIREMENTS=latest")
    assert other == {}, "`scripts/lock.sh` writes what is installed"


def test_setup_installs_the_tested_versions_by_default_and_refuses_other_words() -> None:
    script = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert "case ${SDFT_REQUIREMENTS:-tested} in" in script
    assert "--require-hashes --requirement requirements/tested.txt" in script
    torch = re.search(r"^torch_version=([\d.]+)", script, re.MULTILINE)
    assert torch is not None
    assert declared()["torch"].specifier.contains(torch[1])
