"""Where a node comes from: module path, layer, and the line of Hugging Face modelling code."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')
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


def short_path(path: str) -> str:
    """A file path from its package folder down, so that no machine's layout shows."""
    for marker in ("site-packages/", "dist-packages/"):
        if marker in path:
            return path.split(marker, 1)[1]
    if not path.startswith("/"):
        return path
    return "/".join(path.split("/")[-2:])


def module_path_of(node: Node) -> tuple[str, str]:
    """Innermost module of a node as ``(path, class name)``; both empty at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    name = kind if isinstance(kind, str) else kind.__name__
    return path, name.rsplit(".", 1)[-1]


def layer_of(path: str) -> int | None:
    """Index of the decoder layer a module path lies in; None outside the layers."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def without_layer(path: str) -> str:
    """``path`` with its layer index replaced by ``*``, equal for the same place in every layer."""
    return _LAYER.sub(lambda m: m.group(0).replace(m.group(1), "*"), path)
