"""The record's format, field by field: what `docs/record.md` explains and `record.schema.json` says in JSON.

Everything that repeats is stored once and named by index: texts, modules, source lines, values, calls. A
*row* is one version of a node (its arguments may change from pass to pass); a *graph* is a list of rows,
told as splices of the graph before it. Lists of lists are stored flat where they are long (:class:`Ragged`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 2
#: Versions that can be read; what version 2 added stays empty in one of version 1.
READ = (1, 2)

Index = Annotated[int, Field(ge=0)]
#: An index, or -1 for none.
Maybe = Annotated[int, Field(ge=-1)]
#: A page may put a colour into a style sheet, so it can be nothing else.
Colour = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
#: JSON without nesting limits of our own: configuration values.
Plain = dict[str, object]

OPS = ("placeholder", "get_attr", "call_function", "call_module", "call_method", "output")


class Part(BaseModel):
    """Common to all parts: unknown fields are refused, so that a newer format is not half read."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Ragged(Part):
    """A list of lists, flat: list ``k`` is ``items[starts[k]:starts[k + 1]]``."""

    starts: list[Index] = Field(default_factory=lambda: [0], description="One more than there are lists.")
    items: list[Index] = []

    def __getitem__(self, k: int) -> list[int]:
        return self.items[self.starts[k] : self.starts[k + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return (self[k] for k in range(len(self)))


class Modules(Part):
    """The module tree, a column each; entry 0 is the root. A parent stands before its children."""

    parent: list[Maybe] = Field(default=[], description="Index of the parent; -1 for the root.")
    name: list[Index] = Field(default=[], description="Last part of the dotted path (text).")
    path: list[Index] = Field(default=[], description="The dotted path (text).")
    type: list[Index] = Field(default=[], description="Class name (text); empty where no node told it.")
    layer: list[Maybe] = Field(default=[], description="Decoder layer that the module is or lies in.")


class Sources(Part):
    """Lines of modelling code, a column each; the last two are empty in a record of version 1."""

    file: list[Index] = Field(default=[], description="File, as a path below its package (text).")
    line: list[int] = []
    function: list[Index] = Field(default=[], description="Function that the line is in (text).")
    code: list[Index] = Field(default=[], description="The line itself (text).")
    context: list[Index] = Field(
        default=[],
        description="The line between its neighbours (text of up to three lines); empty where not readable.",
    )
    first: list[int] = Field(default=[], description="Number of the first line of context.")


class Value(Part):
    """What a node gives: ``shape`` of a tensor (open sizes by symbol), its ``dtype``, ``text`` for any value."""

    text: str
    shape: list[int | str] | None = None
    dtype: str = ""


class Target(Part):
    """What a call calls: full ``name``, ``short`` name for labels, ``schema`` of an operator."""

    name: str
    short: str
    signature: str = ""
    doc: str = ""


class Nodes(Part):
    """Every node of the whole walk, a column each, ascending ids."""

    id: list[Index] = []
    born: list[Index] = Field(default=[], description="Step that made the node.")
    gone: list[Maybe] = Field(default=[], description="Step that erased it; -1 where it stands to the end.")
    origins: Ragged = Field(default_factory=Ragged, description="Ids of the nodes that it replaced.")


class Rows(Part):
    """Every version of every node, a column each."""

    node: list[Index] = Field(default=[], description="Id of the node.")
    name: list[Index] = Field(default=[], description="FX name (text).")
    op: list[Annotated[int, Field(ge=0, lt=len(OPS))]] = Field(default=[], description=f"Index into {OPS}.")
    target: list[Index] = Field(default=[], description="Index into targets.")
    call: list[Index] = Field(
        default=[], description="Index into calls: the argument text around the inputs."
    )
    inputs: Ragged = Field(
        default_factory=Ragged, description="Ids of the nodes read, in order, with repeats."
    )
    value: list[Index] = Field(default=[], description="Index into values.")
    module: list[Index] = Field(
        default=[], description="Index into modules; of a parameter, the module that owns it."
    )
    source: list[Maybe] = Field(default=[], description="Index into sources.")
    category: list[Index] = Field(default=[], description="Index into categories.")


class Category(Part):
    """A kind of work: its name and two colours (fill, border) for a light page."""

    name: str
    fill: Colour
    border: Colour


class Block(Part):
    """One layer: positions in the graph, as runs (start, length, start, length...)."""

    layer: Index
    nodes: list[Index] = Field(description="Calls, in execution order.")
    leaves: list[Index] = Field(description="Parameters and inputs that nothing else reads.")


class Segment(Part):
    """A stretch of plain nodes, or a loop over layers.

    Blocks of one variant are equal: the k-th position of one stands for the k-th of every other.
    """

    nodes: list[Index] = Field(default=[], description="Positions as runs; empty for a loop.")
    variants: list[list[Block]] = []


class Line(Part):
    """One line of a program: depth of indentation, text, comment, the nodes it stands for (first layer's)."""

    depth: Index
    text: str
    comment: str = ""
    ids: list[Index] = []


class View(Part):
    """What makes a graph readable: its repeated layers, and itself as a program with the layers as loops."""

    folding: list[Segment] = []
    code: list[Line] = []


class Splice(Part):
    """At position ``at`` of the graph as edited so far, drop ``drop`` rows and put ``rows`` there."""

    at: Index
    drop: Index
    rows: list[Index]


class Graph(Part):
    """One graph of the walk, told from graph ``base`` (-1: from nothing)."""

    size: Index
    base: Maybe = Field(default=-1, description="Graph that the splices edit; always an earlier one.")
    splices: list[Splice] = []
    symbols: dict[str, str] = Field(default={}, description="Readable names of open sizes: s31 -> B.")
    view: View | None = Field(default=None, description="None only while a live record has not sent it.")


class Box(Part):
    """One box of a rewrite's picture; ``id`` is the node, -1 for a summary of several."""

    id: Maybe
    side: Literal["before", "after"]
    title: str
    category: str
    mark: str = Field(description="erased, created, changed, context (a neighbour), or empty.")
    detail: list[str] = []
    tooltip: str = ""


class Arrow(Part):
    """From box ``tail`` to box ``head`` (indices), labelled with the value's shape."""

    tail: Index
    head: Index
    label: str = ""


class Picture(Part):
    """One site before and after, with its neighbours in grey."""

    boxes: list[Box] = []
    arrows: list[Arrow] = []


class Rewrite(Part):
    """A rewrite class: sites of one shape."""

    text: str = Field(
        description="The class in one line: 65 x [6 nodes: ...] -> torch_rmsnorm (layers 0-31)."
    )
    label: str = Field(default="", description="What the pass calls it.")
    count: Index
    where: str
    before: list[str] = Field(default=[], description="Targets erased at each site, in execution order.")
    after: list[str] = Field(default=[], description="Targets created.")
    changed: list[str] = Field(default=[], description="Targets kept but changed.")
    module: list[Index] = Field(default=[], description="Of each site, where it is (module).")
    erased_ids: Ragged = Field(default_factory=Ragged, description="Of each site, ids erased.")
    created_ids: Ragged = Field(default_factory=Ragged, description="Of each site, ids created.")
    changed_ids: Ragged = Field(default_factory=Ragged, description="Of each site, ids changed.")
    picture: Picture | None = Field(default=None, description="The first site.")


class PassSource(Part):
    """The code of a pass, its patterns included."""

    file: str
    line: Index
    code: str


class Step(Part):
    """One pass of the pipeline."""

    name: str
    stage: str
    status: Literal["done", "skipped", "disabled", "failed", "pending"]
    doc: str = ""
    config: Plain = {}
    reason: str = ""
    summary: str = Field(default="", description="The step in one line.")
    matches: Index = 0
    details: Plain = {}
    log: list[str] = []
    seconds: float = 0.0
    record_seconds: float = 0.0
    memory_bytes: int = Field(default=0, description="Change of tensor memory on the device.")
    altered: list[str] = Field(default=[], description="Tensors whose data the pass changed.")
    before: Maybe = Field(default=-1, description="Graph before; -1 for none.")
    after: Maybe = Field(default=-1, description="Graph after; the same index where nothing changed.")
    created: Index = Field(default=0, description="How many nodes it made; which, nodes.born tells.")
    erased: Index = Field(default=0, description="How many nodes it erased; which, nodes.gone tells.")
    changed: list[Index] = Field(default=[], description="Ids kept whose target or arguments changed.")
    rewired: list[Index] = Field(
        default=[], description="Ids kept that only read a replacement of what they read."
    )
    moved: list[Index] = Field(default=[], description="Ids kept whose place among the kept ones changed.")
    rewrites: list[Rewrite] | None = Field(
        default=[], description="None only while a live record has not sent them."
    )
    source: PassSource | None = None


class Costs(Part):
    """Costs of every row under one workload: ``rows`` index ``table``, -1 where nothing is known."""

    name: str
    device: str
    sizes: dict[str, int]
    table: list[tuple[float, float, float, str]] = Field(
        default=[], description="FLOPs, bytes, roofline microseconds, bound by (compute, memory, nothing)."
    )
    rows: list[Maybe] = []


class Overlay(Part):
    """Values laid over nodes by id: numbers, or words (a shard, a placement) where ``words`` is given."""

    name: str
    unit: str = ""
    note: str = ""
    step: Maybe = Field(default=-1, description="The step whose graph the values belong to; -1 for any.")
    scale: Literal["linear", "log", "diverging", "words"] = "linear"
    ids: list[Index] = []
    values: list[float] = []
    words: list[str] = Field(default=[], description="With scale 'words', values index these.")


class Record(Part):
    """A whole walk."""

    adkit_record: Literal[1, 2] = 2
    name: str
    about: dict[str, str] = Field(
        default={}, description="Facts for the head: class, device, dtype, weights."
    )
    versions: dict[str, str] = {}
    config: str = Field(default="", description="The configuration as YAML.")
    note: str = Field(default="", description="What the reader must know, as that matching was best-effort.")
    texts: list[str] = []
    modules: Modules = Field(default_factory=Modules)
    sources: Sources = Field(default_factory=Sources)
    values: list[Value] = []
    targets: list[Target] = []
    calls: list[list[str]] = Field(
        default=[], description="Pieces of argument text; inputs stand between them."
    )
    categories: list[Category] = []
    nodes: Nodes = Field(default_factory=Nodes)
    rows: Rows = Field(default_factory=Rows)
    graphs: list[Graph] = []
    steps: list[Step] = []
    weights: dict[str, list[str]] = Field(
        default={}, description="Fused weights: the names each was made of."
    )
    costs: list[Costs] = []
    overlays: list[Overlay] = []
