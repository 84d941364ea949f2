"""A record from a file, checked: whatever is wrong with it is one error that says so, and nothing runs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from adkit.viz.files import write_atomically
from adkit.viz.record.format import READ, Graph, Ragged, Record, Segment, Sources
from adkit.viz.record.splice import apply_splices

#: Bytes of JSON that are read at most; llama-3.1-405b takes under 4 MB.
MOST_BYTES = 256 << 20


class RecordError(ValueError):
    """A file is not a record that this version of adkit can show."""


def load_record(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> Record:
    """Read a record (``.json`` or ``.json.gz``; told by its content).

    Raises RecordError for a file that is missing, cut short, larger than ``most_bytes`` once unpacked, of
    another version, or that contradicts itself.
    """
    file = Path(path)
    try:
        if file.stat().st_size > most_bytes:
            raise RecordError(f"{file.name} is larger than {most_bytes:,} bytes; raise most_bytes to read it")
        data = file.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"there is no record at {str(path)!r}; wb.record(path) writes one") from None
    except OSError as error:
        raise RecordError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    return parse_record(data, file.name, most_bytes=most_bytes)


def parse_record(data: bytes, name: str = "the record", *, most_bytes: int = MOST_BYTES) -> Record:
    """A record from bytes, gzipped or not; raises RecordError as :func:`load_record` does."""
    if data[:2] == b"\x1f\x8b":
        data = _unpack(data, name, most_bytes)
    try:
        record = Record.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise RecordError(_told(error, data, name)) from None
    except (RecursionError, UnicodeDecodeError) as error:
        raise RecordError(f"{name} is not a record: {type(error).__name__}") from None
    try:
        check_record(record)
    except RecordError as error:
        raise RecordError(f"{name} contradicts itself: {error}; write it again") from None
    return record


def _unpack(data: bytes, name: str, most: int) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    try:
        plain = unzip.decompress(data, most + 1)
    except zlib.error as error:
        raise RecordError(f"{name} is damaged: {error}; write it again") from None
    if len(plain) > most:
        raise RecordError(f"{name} unpacks to more than {most:,} bytes; raise most_bytes to read it")
    if not unzip.eof:
        raise RecordError(f"{name} is cut short; copy or write it again")
    return plain


def _told(error: ValidationError, data: bytes, name: str) -> str:
    import json

    try:
        head = json.loads(data)
        version = head.get("adkit_record") if isinstance(head, dict) else None
    except (ValueError, RecursionError):
        return f"{name} is not a record, or is cut short (it is no whole JSON document); write it again"
    if version is None:
        if isinstance(head, dict) and "adkit_run" in head:
            return (
                f"{name} is a saved run, which wb.save writes: Workbench.load(path) reads it; what load_record and "
                "`adkit view` read is written by wb.record"
            )
        return f"{name} is not a record (it has no adkit_record); wb.record(path) writes one"
    if version not in READ:
        known = " and ".join(map(str, READ))
        return f"{name} has record version {str(version)[:20]!r}; this version of adkit reads {known}"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(p)[:40] for p in first["loc"])
    return f"{name} is a damaged record: {where}: {first['msg']} ({error.error_count()} such); write it again"


def check_record(r: Record) -> None:
    """Every index must lead somewhere, columns be of one length, graphs add up; raises RecordError."""
    texts, rows = len(r.texts), len(r.rows.node)
    for name, table in (("modules", r.modules), ("sources", r.sources), ("rows", r.rows), ("nodes", r.nodes)):
        columns = dict(table)
        if r.adkit_record == 1 and isinstance(table, Sources):
            del columns["context"], columns["first"]
        lengths = {k: len(v) for k, v in columns.items()}
        if len(set(lengths.values())) > 1:
            raise RecordError(f"the columns of {name} differ in length")
    m, s = r.modules, r.sources
    for column in (m.name, m.path, m.type, s.file, s.function, s.code, s.context):
        _below(column, texts, "texts")
    if any(p >= k for k, p in enumerate(m.parent)) or (m.parent and m.parent[0] != -1):
        raise RecordError("a module stands before its parent")
    for ragged in (r.rows.inputs, r.nodes.origins):
        _ragged(ragged)
    _below(r.rows.name, texts, "texts")
    _below(r.rows.target, len(r.targets), "targets")
    _below(r.rows.call, len(r.calls), "calls")
    _below(r.rows.value, len(r.values), "values")
    _below(r.rows.module, len(m.name), "modules")
    _below(r.rows.source, len(s.file), "sources")
    _below(r.rows.category, len(r.categories), "categories")
    if any(len(r.calls[c]) != len(i) + 1 for c, i in zip(r.rows.call, r.rows.inputs, strict=True)):
        raise RecordError("a call has another number of inputs than its text")
    ids = set(r.nodes.id)
    if len(ids) != len(r.nodes.id) or not ids.issuperset(r.rows.node):
        raise RecordError("a row belongs to no node, or a node stands twice")
    _below([*r.nodes.born, *r.nodes.gone], len(r.steps), "steps")
    for made in graph_rows(r):
        if len(set(made)) != len(made):
            raise RecordError("a graph holds a row twice")
    for step in r.steps:
        _below((step.before, step.after), len(r.graphs), "graphs")
        for w in step.rewrites or ():
            _below(w.module, len(m.name), "modules")
            for ragged in (w.erased_ids, w.created_ids, w.changed_ids):
                _ragged(ragged)
                if len(ragged) != len(w.module):
                    raise RecordError("a rewrite class lists ids for another number of sites")
            if w.picture is not None:
                ends = [e for a in w.picture.arrows for e in (a.tail, a.head)]
                _below(ends, len(w.picture.boxes), "boxes")
    for cost in r.costs:
        if len(cost.rows) != rows:
            raise RecordError("costs are given for another number of rows")
        _below(cost.rows, len(cost.table), "a cost table")
    for o in r.overlays:
        if len(o.ids) != len(o.values):
            raise RecordError(f"overlay {o.name[:40]!r} has another number of values than of ids")
        if o.scale == "words" and any(v != int(v) or not 0 <= v < len(o.words) for v in o.values):
            raise RecordError(f"overlay {o.name[:40]!r} names a word that it does not have")


def graph_rows(r: Record) -> list[list[int]]:
    """The rows of every graph; raises RecordError where a splice does not fit."""
    found: list[list[int]] = []
    for k, g in enumerate(r.graphs):
        if g.base >= k:
            raise RecordError(f"graph {k} is told from a later one")
        rows = [] if g.base < 0 else found[g.base]
        grown = len(rows)
        for e in g.splices:
            if e.at + e.drop > grown:
                raise RecordError(f"a splice of graph {k} lies beyond its end")
            grown += len(e.rows) - e.drop
            _below(e.rows, len(r.rows.node), "rows")
        if grown != g.size:
            raise RecordError(f"graph {k} has {grown} rows, not the {g.size} that it names")
        found.append(apply_splices(rows, g.splices))
        if g.view is not None:
            _folding(g, g.view.folding)
    return found


def _folding(g: Graph, folding: Sequence[Segment]) -> None:
    for s in folding:
        for flat in (s.nodes, *(x for v in s.variants for b in v for x in (b.nodes, b.leaves))):
            if len(flat) % 2 or any(a + n > g.size for a, n in zip(flat[::2], flat[1::2], strict=True)):
                raise RecordError("a layer lies outside its graph")
        for v in s.variants:
            if not v or len({(sum(b.nodes[1::2]), sum(b.leaves[1::2])) for b in v}) != 1:
                raise RecordError("layers that are said to be equal differ in size")


def _below(indices: Iterable[int], limit: int, of: str) -> None:
    if max(indices, default=-1) >= limit:
        raise RecordError(f"an index into {of} leads beyond the {limit} there are")


def _ragged(r: Ragged) -> None:
    s = r.starts
    if not s or s[0] != 0 or s[-1] != len(r.items) or any(a > b for a, b in pairwise(s)):
        raise RecordError("the starts of a list of lists do not fit it")


def dump_record(record: Record, path: str | os.PathLike[str]) -> Path:
    """Write a record as ``.json`` or ``.json.gz``, whole or not at all; returns the path."""
    import gzip

    target = Path(path)
    if not target.name.endswith((".json", ".json.gz")):
        raise RecordError(f"cannot write a record as {target.name!r}: the name must end in .json or .json.gz")
    data = record.model_dump_json().encode()
    write_atomically(target, gzip.compress(data, 6, mtime=0) if target.name.endswith(".gz") else data)
    return target


__all__ = [
    "MOST_BYTES",
    "RecordError",
    "check_record",
    "dump_record",
    "graph_rows",
    "load_record",
    "parse_record",
]
