"""A record as one file: the explorer with its record inside, no network.

Nothing in a record can run: it stands in the page as base64, and the page's policy lets only the bundle
itself run, told by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import re
from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from adkit.viz.files import write_atomically
from adkit.viz.record.format import Record
from adkit.viz.static import static_html


@cache
def asset(name: str) -> str:
    """A built file of the explorer (made of ``frontend/``)."""
    return files("adkit.viz").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def write_page(
    record: Record, path: str | os.PathLike[str], *, completions: Iterable[Any] = (), title: str = ""
) -> Path:
    """Write the explorer with ``record`` as one HTML file, whole or not at all; returns its path.

    ``completions``: (prompt, text) pairs, or objects with ``.prompt`` and ``.text``, shown below it.
    """
    target = Path(path)
    write_atomically(target, page(record, completions=completions, title=title).encode())
    return target


def page(record: Record, *, completions: Iterable[Any] = (), title: str = "") -> str:
    """The text of :func:`write_page`'s file."""
    name = title or record.name or record.about.get("class", "") or "walk"
    data = base64.b64encode(gzip.compress(record.model_dump_json().encode(), 9, mtime=0)).decode()
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    told_twice = ' class="told"' if name == record.name else ""
    said = [_completion(c) for c in completions]
    told = "".join(
        f"<details open><summary>{escape(prompt)}</summary><pre>{escape(text)}</pre></details>"
        for prompt, text in said
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{_PAGE_CSS}{asset('explorer.css')}</style></head>"
        f'<body><main><h1{told_twice}>{escape(name)}</h1><div id="adkit-explorer"></div>'
        f"<noscript>{static_html(record)}</noscript>"
        + (f"<section><h2>Generated text</h2>{told}</section>" if told else "")
        + f'</main><script type="text/plain" id="adkit-record">{data}</script>'
        f'<script type="module">{script}</script></body></html>\n'
    )


_PAGE_CSS = (
    "body{margin:0;font:14px/1.45 system-ui,sans-serif;color-scheme:light dark;background:Canvas;color:CanvasText}"
    "main{padding:8px}h2{font-size:15px}pre{white-space:pre-wrap}"
    "h1{font-size:16px;margin:0 4px 6px;height:22px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}"
    # The explorer's bar says the record's name already: the heading is for who hears the page.
    "h1.told{position:absolute;width:1px;height:1px;clip-path:inset(50%)}"
    "#adkit-explorer{--adk-height:max(480px,calc(100vh - 16px));min-height:var(--adk-height)}"
    "h1:not(.told)+#adkit-explorer{--adk-height:max(480px,calc(100vh - 44px))}"
)


@cache
def _script() -> str:
    """The bundle, followed by what mounts it on the page."""
    bundle = asset("explorer.js").strip()
    local = re.search(r"export\{[^}]*?\b([\w$]+) as standalone\b[^}]*\};?$", bundle)
    if local is None:
        raise RuntimeError("assets/explorer.js exports no `standalone`; build it again (frontend/)")
    start = (
        f'{local[1]}(document.getElementById("adkit-explorer"),'
        'document.getElementById("adkit-record").textContent);'
    )
    return f"{bundle}\n{start}".replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _completion(item: Any) -> tuple[str, str]:
    if isinstance(item, tuple):
        return str(item[0]), str(item[1])
    return str(getattr(item, "prompt", "") or ""), str(item.text)


__all__ = ["asset", "page", "write_page"]
