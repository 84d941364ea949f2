"""A record's graphs for other programs: Model Explorer's JSON graph format, and graphviz's DOT."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adkit.viz.dot import quoted
from adkit.viz.files import write_atomically
from adkit.viz.record.format import OPS, Record
from adkit.viz.record.read import RecordError, graph_rows


def row_text(r: Record, row: int) -> str:
    """A row's call as text: ``mul.Tensor(%3, %4)``."""
    pieces, inputs = r.calls[r.rows.call[row]], r.rows.inputs[row]
    told = "".join(f"%{i}{p}" for i, p in zip(inputs, pieces[1:], strict=True))
    return f"{r.targets[r.rows.target[row]].short}({pieces[0]}{told})"


def model_explorer(r: Record) -> dict[str, Any]:
    """Every distinct graph as a graph of Model Explorer's collection, modules as namespaces, labelled by its step."""
    graphs: list[dict[str, Any]] = []
    rows_of = graph_rows(r)
    shown: set[int] = set()
    for s in r.steps:
        if s.after < 0 or s.after in shown:
            continue
        shown.add(s.after)
        nodes = [_explorer_node(r, row) for row in rows_of[s.after]]
        graphs.append({"id": f"{len(graphs):02d} {s.name}", "nodes": nodes})
    return {"label": r.name, "graphs": graphs}


def _explorer_node(r: Record, row: int) -> dict[str, Any]:
    rows = r.rows
    value = r.values[rows.value[row]]
    source = rows.source[row]
    attrs = {
        "name": r.texts[rows.name[row]],
        "op": OPS[rows.op[row]],
        "target": r.targets[rows.target[row]].name,
        "call": row_text(r, row),
    }
    if source >= 0:
        t = r.sources
        attrs["source"] = f"{r.texts[t.file[source]]}:{t.line[source]}  {r.texts[t.code[source]]}"
    return {
        "id": str(rows.node[row]),
        "label": r.targets[rows.target[row]].short,
        "namespace": r.texts[r.modules.path[rows.module[row]]].replace(".", "/"),
        "incomingEdges": [
            {"sourceNodeId": str(i), "sourceNodeOutputId": "0", "targetNodeInputId": str(k)}
            for k, i in enumerate(rows.inputs[row])
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": value.text}]}],
        "attrs": [{"key": k, "value": v} for k, v in attrs.items()],
    }


def dot(r: Record, step: int = -1) -> str:
    """One step's graph as DOT, modules as nested clusters; the last graph unless told otherwise."""
    steps = [s for s in r.steps if s.after >= 0] if step == -1 else [r.steps[step]]
    if not steps or steps[-1].after < 0:
        raise RecordError("there is no graph at this step to export")
    rows = graph_rows(r)[steps[-1].after]
    inside: dict[int, list[int]] = {}
    children: dict[int, list[int]] = {}
    for row in rows:
        inside.setdefault(r.rows.module[row], []).append(row)
    for k, parent in enumerate(r.modules.parent):
        children.setdefault(parent, []).append(k)
    out = ["digraph {", '  node [shape=box, style="rounded,filled", fontname="Helvetica"];']

    def cluster(m: int, depth: int) -> list[str]:
        pad = "  " * depth
        body: list[str] = []
        for row in inside.get(m, ()):
            label = r.targets[r.rows.target[row]].short + "\n" + r.values[r.rows.value[row]].text
            fill = r.categories[r.rows.category[row]].fill
            body.append(f"{pad}n{r.rows.node[row]} [label={quoted(label)}, fillcolor={quoted(fill)}];")
        for child in children.get(m, ()):
            found = cluster(child, depth + 1)
            if found:
                name = quoted(r.texts[r.modules.path[child]])
                body += [f"{pad}subgraph cluster_{child} {{", f"{pad}  label={name};", *found, f"{pad}}}"]
        return body

    for root in children.get(-1, ()):
        out += cluster(root, 1)
    here = {r.rows.node[row] for row in rows}
    for row in rows:
        for i in dict.fromkeys(r.rows.inputs[row]):
            if i in here:
                out.append(f"  n{i} -> n{r.rows.node[row]};")
    return "\n".join([*out, "}"]) + "\n"


def export(r: Record, path: str | os.PathLike[str]) -> Path:
    """Write ``.dot`` (the last graph) or ``.json`` (Model Explorer, every graph); RecordError for other names."""
    target = Path(path)
    if target.suffix == ".dot":
        text = dot(r)
    elif target.suffix == ".json":
        text = json.dumps(model_explorer(r), separators=(",", ":"))
    else:
        raise RecordError(f"cannot export to {target.name!r}: .dot, or .json for Model Explorer")
    write_atomically(target, text.encode())
    return target


__all__ = ["dot", "export", "model_explorer", "row_text"]
