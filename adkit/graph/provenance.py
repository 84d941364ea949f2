"""Where a node comes from: module path, layer, and the line of Hugging Face modelling code."""

from __future__ import annotations

import linecache
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from textwrap import dedent
from types import ModuleType

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')
_WIDTH = 160  # most characters of a line of context
_NO_MODULE = "_empty_nn_module_stack"  # how torch.export names the place of nodes that no module made
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Source:
    """One line of modelling code: file (as a path below its package), line number, function, text."""

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@lru_cache(maxsize=1 << 12)  # the layers of a model share their lines
def source_of(stack_trace: str | None) -> Source | None:
    """The innermost frame in modelling code of an FX ``stack_trace``; torch's own frames are passed over."""
    if not stack_trace:
        return None
    best: tuple[str, str, str, str] | None = None
    for frame in _FRAME.findall(stack_trace):
        path = frame[0]
        if short_path(path).startswith(("torch/", "adkit/")) or "/adkit/" in path:
            continue
        if "/modeling_" in path or best is None or "/modeling_" not in best[0]:
            best = frame
    if best is None:
        return None
    return Source(short_path(best[0]), int(best[1]), best[2], best[3].strip())


@dataclass(frozen=True, slots=True)
class Context:
    """Lines of code around one: ``text`` begins at line ``first`` of the file, without common indentation."""

    first: int
    text: str


def context_of(source: Source) -> Context | None:
    """A line with the lines before and after it, each cut at 160 characters.

    None where the code is not at hand: only files of modules that are loaded (and notebook cells) are read, and
    only if the line still says what the graph says of it.
    """
    file = _loaded_file(source.file)
    lines = linecache.getlines(file) if file else []
    at = source.line - 1
    if not 0 <= at < len(lines) or lines[at].strip() != source.code:
        return None
    first = max(0, at - 1)
    shown = dedent("\n".join(line.rstrip().expandtabs(4) for line in lines[first : at + 2]))
    cut = (line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…" for line in shown.split("\n"))
    return Context(first + 1, "\n".join(cut))


_FILES: dict[str, str] = {}  # what _loaded_file has found: it looks through thousands of modules


def _loaded_file(short: str) -> str | None:
    """The file whose :func:`short_path` is ``short``, if a loaded module or a notebook cell has it."""
    if short in _FILES:
        return _FILES[short]
    loaded = (vars(m).get("__file__") for m in list(sys.modules.values()) if isinstance(m, ModuleType))
    known = [*loaded, *linecache.cache]  # vars(), because getattr on a lazy module would import
    for file in known:
        if isinstance(file, str) and (file == short or file.endswith(f"/{short}")):
            _FILES[short] = file
            return file
    return None


def short_path(path: str) -> str:
    """A file path from its package folder down, so that no machine's layout shows."""
    for marker in ("site-packages/", "dist-packages/"):
        if marker in path:
            return path.split(marker, 1)[1]
    if not path.startswith("/"):
        return path
    return "/".join(path.split("/")[-2:])


def module_path_of(node: Node) -> tuple[str, str]:
    """Innermost module of a node as ``(path, class name)``; both empty for a node that no module made."""
    stack = node.meta.get("nn_module_stack") or {}
    inner = next((v for v in reversed(stack.values()) if not v[0].startswith(_NO_MODULE)), None)
    if inner is None:
        return "", ""
    path, kind = inner
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    name = kind if isinstance(kind, str) else kind.__name__
    return path, name.rsplit(".", 1)[-1]


@lru_cache(maxsize=1 << 16)  # asked of every node of every step, of a few paths
def layer_of(path: str) -> int | None:
    """Index of the decoder layer a module path lies in; None outside the layers."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


@lru_cache(maxsize=1 << 16)
def without_layer(path: str) -> str:
    """``path`` with its layer index replaced by ``*``, equal for the same place in every layer."""
    return _LAYER.sub(lambda m: m.group(0).replace(m.group(1), "*"), path)
