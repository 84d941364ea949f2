"""environment.yml asks conda for what pyproject.toml asks pip for; constraints.txt stays within both."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import adkit

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

# Where conda-forge uses another name. None: not asked for, because another package brings it.
CONDA_NAMES = {
    "torch": "pytorch",
    "graphviz": "python-graphviz",
    "playwright": "playwright-python",
    "ray": "ray-core",
    "triton": None,  # pytorch brings it, on the platforms that have it
    "axe-playwright-python": None,  # conda-forge does not have it: ONLY_PIP
}
#: What conda's pip installs, since conda-forge does not have it.
ONLY_PIP = ("axe-playwright-python",)
# What only conda needs to be told: the interpreter, the build tools, and the `dot` program.
CONDA_ONLY = {"python", "pip", "setuptools", "graphviz"}

Wanted = dict[str, SpecifierSet]


def requirements(lines: list[str]) -> Wanted:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


def pip_side() -> Wanted:
    project = PROJECT["project"]
    return requirements(project["dependencies"] + project["optional-dependencies"]["dev"])


def conda_side() -> Wanted:
    return requirements([line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)])


def test_conda_and_pip_ask_for_the_same_packages():
    expected = {CONDA_NAMES.get(name, name) for name in pip_side()} - {None}
    assert conda_side().keys() - CONDA_ONLY == expected


@pytest.mark.parametrize("name", sorted(pip_side()))
def test_conda_and_pip_ask_for_the_same_versions(name: str):
    conda_name = CONDA_NAMES.get(name, name)
    if conda_name is not None:
        assert conda_side()[conda_name] == pip_side()[name]


def test_conda_gets_the_interpreter_build_tool_and_dot():
    conda = conda_side()
    assert conda["python"] == SpecifierSet(PROJECT["project"]["requires-python"])
    assert conda["setuptools"] == requirements(PROJECT["build-system"]["requires"])["setuptools"]
    assert "graphviz" in conda
    wanted = [f"{name}{pip_side()[name]}" for name in ONLY_PIP]
    assert {"pip": ["-e .", *wanted]} in ENVIRONMENT["dependencies"]


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.11.0"), ("torch", "2.13.0"), ("transformers", "5.17.0"), ("transformers", "5.23.0")],
)
def test_both_ends_of_the_supported_range_are_allowed(package: str, version: str):
    assert Version(version) in pip_side()[package]


def test_constraints_pin_only_what_is_asked_for_and_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = requirements([line for line in lines if line and not line.startswith("#")])
    asked = pip_side()
    assert pins.keys() <= asked.keys()
    for name, specifier in pins.items():
        (pin,) = specifier
        lowest = Version(pin.version.removesuffix(".*"))
        if len(lowest.release) > 1:  # `numpy==2.*` names no version to compare
            assert lowest in asked[name], f"{name}: {pin} is outside {asked[name]}"


def test_torch_pin_is_exact():
    """A looser pin makes pip prefer the newest CUDA build to the CPU build that it was given."""
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_version_is_the_same_everywhere():
    assert PROJECT["project"]["version"] == adkit.__version__
