"""Where a node comes from: its module, its line, and the lines around that."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.fx import Graph, Node

from adkit.graph.provenance import Source, context_of, module_path_of
from tests.graph.samples import sample


def node(stack: dict[str, tuple[str, str]] | None) -> Node:
    made = Graph().placeholder("x")
    if stack is not None:
        made.meta["nn_module_stack"] = stack
    return made


def test_the_module_is_the_innermost_one() -> None:
    stack = {"a": ("L['self'].model", "m.Model"), "b": ("L['self'].model.layers.3.mlp", "m.MLP")}
    assert module_path_of(node(stack)) == ("model.layers.3.mlp", "MLP")


@pytest.mark.parametrize("stack", [None, {}])
def test_no_stack_is_the_root(stack: dict[str, tuple[str, str]] | None) -> None:
    assert module_path_of(node(stack)) == ("", "")


def test_exports_name_for_no_module_is_no_module() -> None:
    none = "_empty_nn_module_stack_from_metadata_hook"
    assert module_path_of(node({none: (none, none)})) == ("", "")
    assert module_path_of(node({"a": ("model", "m.Model"), none: (none, none)})) == ("model", "Model")


def test_every_module_of_an_exported_graph_is_one_of_the_models() -> None:
    paths = {n.module_path for n in sample("llama")["export_to_gm"].after}
    assert "" in paths
    assert {p.split(".")[0] for p in paths - {""}} == {"model", "lm_head"}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A loaded module; its fifth line is long."""
    path = tmp_path / "some_model.py"
    path.write_text("import math\n\ndef f(x):\n    y = x + 1\n    return " + "1 + " * 100 + "y\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("some_model")
    yield path
    del sys.modules["some_model"]
    linecache.clearcache()


def at(path: Path, line: int, code: str) -> Source:
    return Source(f"{path.parent.name}/{path.name}", line, "f", code)


def test_context_is_a_line_between_its_neighbours(module: Path) -> None:
    found = context_of(at(module, 4, "y = x + 1"))
    assert found is not None
    before, line, after = found.text.split("\n")
    assert (found.first, before, line) == (3, "def f(x):", "    y = x + 1")
    assert (len(after), after[:10], after[-1]) == (160, "    return", "…")


def test_context_ends_where_the_file_does(module: Path) -> None:
    found = context_of(at(module, 1, "import math"))
    assert found is not None
    assert (found.first, found.text) == (1, "import math\n")


def test_no_context_where_the_file_says_something_else(module: Path) -> None:
    assert context_of(at(module, 4, "y = x + 2")) is None
    assert context_of(at(module, 99, "y = x + 1")) is None


def test_only_files_of_loaded_modules_are_read(module: Path) -> None:
    other = module.with_name("never_loaded.py")
    other.write_text("y = x + 1\n")
    assert context_of(at(other, 1, "y = x + 1")) is None
