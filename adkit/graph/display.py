"""How objects draw themselves: a registry that ``adkit.viz`` fills and everything else only reads.

Without viz (or without graphviz) every object still has its text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_HTML: dict[type, Callable[[Any], str]] = {}


def register_html(kind: type) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Decorator: the function renders instances of ``kind`` as an HTML fragment."""

    def add(fn: Callable[[Any], str]) -> Callable[[Any], str]:
        _HTML[kind] = fn
        return fn

    return add


def html_of(obj: Any) -> str | None:
    """The HTML fragment of an object, or None when nothing draws its type."""
    for kind in type(obj).__mro__:
        if kind in _HTML:
            return _HTML[kind](obj)
    return None


def mimebundle(obj: Any) -> dict[str, str]:
    """Jupyter's display bundle: the object's text, and its HTML where a renderer is registered."""
    bundle = {"text/plain": repr(obj)}
    html = html_of(obj)
    if html is not None:
        bundle["text/html"] = html
    return bundle
