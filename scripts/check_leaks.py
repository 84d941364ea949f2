"""Refuse files that carry a trace of the machine they were made on, and notebooks that did not run.

    python scripts/check_leaks.py            # every tracked file
    python scripts/check_leaks.py FILE...    # these files

A trace is an absolute path into a home, temporary or working folder, or the address of a package index.
What belongs to this machine (the checkout's own place, the home folder, the index that pip is set up
with) is worked out when the script runs, so it never has to be written down. A notebook is looked at
cell by cell: sources and outputs, without the bytes of pictures. Prints one line a finding,
`file: what: text`, and exits 1 if there is any.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]

# A path starts here: not in the middle of a relative path, a URL's path or a word.
_START = r"(?<![\w.~*)}-])"
_GENERAL = {
    "home folder": _START + r"(?:(?:/home|/Users)/[\w.-]+|/root)(?=/)|[A-Z]:\\+Users\\+\w+",
    "temporary folder": _START + r"(?:/tmp|/var/folders)/\w[\w.-]*",
    "package index": r"https?://[^\s\"'<>]*/simple(?=/|\b)",
}
# Too common as a first folder to say anything about a machine.
_COMMON = {"app", "bin", "build", "data", "dev", "etc", "home", "lib", "mnt", "opt", "proc", "root"}
_COMMON |= {"srv", "src", "tmp", "usr", "var", "Users"}
_PICTURE = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")


def machine_patterns(root: Path = ROOT) -> dict[str, str]:
    """Regular expressions, by name, for what may not appear in a file made in the checkout `root`."""
    patterns = dict(_GENERAL)
    places = {root, Path.home(), Path(tempfile.gettempdir())}
    places |= {parent for parent in root.parents if len(parent.parts) > 2}
    places = {place for place in places if len(place.parts) > 2}
    named = [re.escape(str(place)) for place in sorted(places, reverse=True)]
    if len(root.parts) > 2 and root.parts[1] not in _COMMON:
        named.append(re.escape(f"/{root.parts[1]}") + r"(?=/)")
    if named:
        patterns["path of this machine"] = _START + "(?:" + "|".join(named) + r")(?![\w-])"
    hosts = sorted(index_hosts())
    if hosts:
        patterns["package index host"] = r"(?<![\w.-])(?:" + "|".join(map(re.escape, hosts)) + r")(?![\w-])"
    return patterns


def index_hosts() -> set[str]:
    """Hosts that pip would install from: its default ones and those it is configured with."""
    hosts: set[str] = set()
    try:
        from pip._internal.models import index as pip_indexes
    except ImportError:  # an environment without pip, or a pip that moved it: the other patterns remain
        pass
    else:
        for known in vars(pip_indexes).values():
            if isinstance(known, pip_indexes.PackageIndex):
                hosts |= {known.netloc, known.file_storage_domain}
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    for word in re.findall(r"https?://[^\s'\"]+", listing.stdout):
        hosts.add(urlsplit(word).hostname or "")
    return {host for host in hosts if host and host != "localhost"}


def find_leaks(path: Path, patterns: dict[str, str]) -> Iterator[str]:
    """Yield one `what: text` a finding in `path`; a notebook that did not run is a finding too."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return
    text = data.decode("utf-8", errors="replace")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        yield from _notebook_state(cells)
        text = "\n".join(_notebook_texts(cells))
    text = _PICTURE.sub("", text)
    for what, pattern in patterns.items():
        for found in sorted({match.group() for match in re.finditer(pattern, text)}):
            yield f"{what}: {found}"


def _notebook_state(cells: list[dict]) -> Iterator[str]:
    """Yield what shows that a notebook was not run from top to bottom without an error."""
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    if code and not any(cell["outputs"] for cell in code):
        yield "notebook without outputs: run `make notebooks`"
    for number, cell in enumerate(code, start=1):
        if cell.get("execution_count") is None and not _is_skipped(cell):
            yield f"code cell {number} was never run: run `make notebooks`"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"code cell {number} ends in an error: {output.get('ename')}"


def _is_skipped(cell: dict) -> bool:
    return "nbval-skip" in cell.get("metadata", {}).get("tags", [])


def _notebook_texts(cells: list[dict]) -> Iterator[str]:
    """Yield each piece of text that a notebook shows: sources, streams, tracebacks, text of rich outputs."""
    for cell in cells:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", []))
            yield "\n".join(output.get("traceback", []))
            for mime, value in output.get("data", {}).items():
                if mime.startswith("image/") and mime != "image/svg+xml":
                    continue
                # nbformat keeps text as one string or a list of lines, and JSON types as they are.
                yield json.dumps(value) if mime.endswith("json") else "".join(value)


def tracked_files(root: Path = ROOT) -> list[Path]:
    """Files under version control in `root`, as absolute paths. Raises `CalledProcessError` outside git."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]


def main(arguments: Sequence[str]) -> int:
    files = [Path(argument) for argument in arguments] or tracked_files()
    patterns = machine_patterns()
    findings = 0
    for path in files:
        shown = os.path.relpath(path)
        for finding in find_leaks(path, patterns):
            print(f"{shown}: {finding}")
            findings += 1
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
