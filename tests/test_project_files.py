"""What others look for in a project: citation, workflow, templates, a place to develop in."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import sdft_lightning

ROOT = Path(__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == sdft_lightning.__version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2601.19897"
    assert len(paper["authors"]) == 4


def test_workflow_runs_the_whole_check_on_each_python() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert jobs["whole"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    commands = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert commands["whole"] == ["PYTHON=python${{ matrix.python }} bash .ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.R_OK)
    assert commands["oldest"] == ["make test-min"]
    assert "\ntest-min:" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_template_asks_for_something(name: str) -> None:
    template = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert template["name"]
    assert any(part.get("validations", {}).get("required") for part in template["body"])


def test_devcontainer_sets_up_as_the_readme_does() -> None:
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
    assert json.loads(text)["postCreateCommand"] == "make setup"


def test_metadata_names_the_paper() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Paper"] == "https://arxiv.org/abs/2601.19897"
