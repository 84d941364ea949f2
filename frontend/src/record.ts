/** A record (docs/record.md) as something to ask: graphs told as splices become lists, indices become words. */
import { Graph, type GraphNode, type Repeat } from "./graph.ts";

interface Ragged {
  starts: number[];
  items: number[];
}

export interface Rewrite {
  text: string;
  label: string;
  count: number;
  where: string;
  before: number[];
  after: number[];
  changed: number[];
  module: number[];
  erased_ids: Ragged;
  created_ids: Ragged;
  changed_ids: Ragged;
  picture: Picture | null;
}

export interface Picture {
  boxes: { id: number; side: "before" | "after"; title: string; category: string; mark: string; detail: string[]; tooltip: string }[];
  arrows: { tail: number; head: number; label: string }[];
}

export interface Step {
  name: string;
  stage: string;
  status: string;
  doc: string;
  config: Record<string, unknown>;
  reason: string;
  summary: string;
  matches: number;
  details: Record<string, unknown>;
  log: string[];
  seconds: number;
  memory_bytes: number;
  altered: string[];
  before: number;
  after: number;
  created: number;
  erased: number;
  changed: number[];
  rewired: number[];
  moved: number[];
  rewrites: Rewrite[] | null;
  source: { file: string; line: number; code: string } | null;
}

interface Block {
  layer: number;
  nodes: number[];
  leaves: number[];
}

export interface Line {
  depth: number;
  text: string;
  comment: string;
  ids: number[];
}

interface GraphData {
  size: number;
  base: number;
  splices: { at: number; drop: number; rows: number[] }[];
  symbols: Record<string, string>;
  view: { folding: { nodes: number[]; variants: Block[][] }[]; code: Line[] } | null;
}

export interface Overlay {
  name: string;
  unit: string;
  note: string;
  step: number;
  scale: "linear" | "log" | "diverging" | "words";
  ids: number[];
  values: number[];
  words: string[];
}

interface Costs {
  name: string;
  device: string;
  sizes: Record<string, number>;
  table: [number, number, number, string][];
  rows: number[];
}

export interface RecordData {
  adkit_record: number;
  name: string;
  about: Record<string, string>;
  versions: Record<string, string>;
  config: string;
  note: string;
  texts: string[];
  modules: { parent: number[]; name: number[]; path: number[]; type: number[]; layer: number[] };
  sources: { file: number[]; line: number[]; function: number[]; code: number[]; context: number[]; first: number[] };
  values: { text: string; shape: (number | string)[] | null; dtype: string }[];
  targets: { name: string; short: string; signature: string; doc: string }[];
  calls: string[][];
  categories: { name: string; fill: string; border: string }[];
  nodes: { id: number[]; born: number[]; gone: number[]; origins: Ragged };
  rows: { node: number[]; name: number[]; op: number[]; target: number[]; call: number[]; inputs: Ragged; value: number[]; module: number[]; source: number[]; category: number[] };
  graphs: GraphData[];
  steps: Step[];
  weights: Record<string, string[]>;
  costs: Costs[];
  overlays: Overlay[];
}

export const OPS = ["placeholder", "get_attr", "call_function", "call_module", "call_method", "output"];

const EMPTY: Ragged = { starts: [0], items: [] };

/** Values with open sizes by their readable names: B for s44. */
function named(values: RecordData["values"], graphs: Partial<GraphData>[]): RecordData["values"] {
  const names = new Map(graphs.flatMap((g) => Object.entries(g.symbols ?? {})));
  const read = (text: string): string => text.replace(/\b[a-z]+\d+\b/g, (word) => names.get(word) ?? word);
  return values.map((v) => ({ ...v, text: read(v.text), shape: v.shape?.map((d) => (typeof d === "string" ? read(d) : d)) ?? null }));
}

/** What the writer leaves out because it is the default. */
function complete(given: Partial<RecordData>): RecordData {
  const step = { doc: "", config: {}, reason: "", summary: "", matches: 0, details: {}, log: [], seconds: 0, memory_bytes: 0, altered: [], before: -1, after: -1, created: 0, erased: 0, changed: [], rewired: [], moved: [], rewrites: [], source: null };
  return {
    adkit_record: 1,
    name: "",
    about: {},
    versions: {},
    config: "",
    note: "",
    texts: [],
    targets: [],
    calls: [],
    categories: [],
    weights: {},
    ...given,
    modules: { parent: [], name: [], path: [], type: [], layer: [], ...given.modules },
    sources: { file: [], line: [], function: [], code: [], context: [], first: [], ...given.sources },
    nodes: { id: [], born: [], gone: [], origins: EMPTY, ...given.nodes },
    rows: { node: [], name: [], op: [], target: [], call: [], inputs: EMPTY, value: [], module: [], source: [], category: [], ...given.rows },
    values: named(given.values ?? [], given.graphs ?? []),
    graphs: (given.graphs ?? []).map((g) => ({ ...{ base: -1, splices: [], symbols: {} }, ...g, view: g.view ? completeView(g.view) : null })),
    steps: (given.steps ?? []).map((s) => ({ ...step, ...s, rewrites: s.rewrites === null ? null : completeRewrites(s.rewrites ?? []) })),
    costs: completeCosts(given.costs ?? []),
    overlays: completeOverlays(given.overlays ?? []),
  };
}

type View = NonNullable<GraphData["view"]>;

function completeView(v: View): View {
  return { folding: (v.folding ?? []).map((s) => ({ ...{ nodes: [], variants: [] }, ...s })), code: (v.code ?? []).map((l) => ({ ...{ comment: "", ids: [] }, ...l })) };
}

function completeRewrites(given: Rewrite[]): Rewrite[] {
  const rewrite = { label: "", before: [], after: [], changed: [], module: [], erased_ids: EMPTY, created_ids: EMPTY, changed_ids: EMPTY, picture: null };
  return given.map((r) => ({
    ...rewrite,
    ...r,
    picture: r.picture ? { boxes: (r.picture.boxes ?? []).map((b) => ({ ...{ detail: [], tooltip: "" }, ...b })), arrows: (r.picture.arrows ?? []).map((a) => ({ ...{ label: "" }, ...a })) } : null,
  }));
}

function completeCosts(given: Costs[]): Costs[] {
  return given.map((c) => ({ ...{ table: [], rows: [] }, ...c }));
}

export function completeOverlays(given: Overlay[]): Overlay[] {
  return given.map((o) => ({ ...{ unit: "", note: "", step: -1, scale: "linear" as const, ids: [], values: [], words: [] }, ...o }));
}

/** A part that a record may leave out until it is asked for: a graph's view, a step's rewrite classes, all costs. */
export interface Part {
  kind: "view" | "rewrites" | "costs";
  index: number;
}

export interface NodeInfo {
  id: number;
  row: number;
  name: string;
  op: string;
  target: string;
  short: string;
  call: string;
  inputs: number[];
  value: string;
  shape: (number | string)[] | null;
  dtype: string;
  path: string;
  type: string;
  layer: number;
  source: { file: string; line: number; function: string; code: string; context: string; first: number } | null;
  category: number;
}

export interface Difference {
  created: Set<number>;
  erased: Set<number>;
  changed: Set<number>;
  moved: Set<number>;
}

export class Walk {
  readonly data: RecordData;
  private readonly lists = new Map<number, number[]>();
  private readonly graphs = new Map<number, Graph>();
  private readonly rowMaps = new Map<number, Map<number, number>>();
  private readonly place = new Map<number, number>();
  private readonly prefixes = new Map<string, string[]>();
  private readonly types = new Map<number, Map<string, string>>();
  private descendants: Map<number, number[]> | null = null;
  /** Asks for a part that the record left out; null where what is there is all there is. */
  ask: ((part: Part) => void) | null = null;

  constructor(given: Partial<RecordData>) {
    this.data = complete(given);
    this.data.nodes.id.forEach((id, k) => this.place.set(id, k));
  }

  /** What the head says: the model's name, or else its class. */
  get name(): string {
    return this.data.name || this.data.about["class"] || "graph";
  }

  get steps(): Step[] {
    return this.data.steps;
  }

  /** Whether graph k can be drawn as it should be; asks for what it lacks. */
  ready(k: number): boolean {
    const lacks = this.ask !== null && this.data.graphs[k]?.view === null;
    if (lacks) this.ask!({ kind: "view", index: k });
    return !lacks;
  }

  /** Rewrite classes of a step, null while they are not here; asks for them then. */
  rewrites(k: number): Rewrite[] | null {
    const found = this.data.steps[k]?.rewrites ?? null;
    if (found === null && this.ask !== null) this.ask({ kind: "rewrites", index: k });
    return found;
  }

  /** What the record lacks, the parts around a step first; costs last, since a kernel that counts them answers nothing else. */
  lacking(near: number): Part[] {
    const parts: (Part & { far: number })[] = [];
    this.steps.forEach((s, k) => {
      const far = Math.abs(k - near);
      if (s.rewrites === null) parts.push({ kind: "rewrites", index: k, far: far + 0.5 });
      for (const g of [s.after, s.before]) if (this.data.graphs[g]?.view === null) parts.push({ kind: "view", index: g, far });
    });
    const seen = new Set<string>();
    const ordered = parts.sort((a, b) => a.far - b.far).filter((p) => !seen.has(`${p.kind}${p.index}`) && seen.add(`${p.kind}${p.index}`));
    const costs: Part[] = this.data.costs.length === 0 ? [{ kind: "costs", index: 0 }] : [];
    return [...ordered, ...costs];
  }

  /** Whether a part is still to come. */
  lacks({ kind, index }: Part): boolean {
    const { graphs, steps, costs } = this.data;
    return kind === "view" ? graphs[index]?.view === null : kind === "rewrites" ? steps[index]?.rewrites === null : costs.length === 0;
  }

  /** Take in a part that was asked for. */
  fill({ kind, index }: Part, data: unknown): void {
    if (kind === "view") {
      this.data.graphs[index]!.view = completeView(data as View);
      this.graphs.delete(index);
    } else if (kind === "rewrites") this.data.steps[index]!.rewrites = completeRewrites(data as Rewrite[]);
    else this.data.costs = completeCosts(data as Costs[]);
  }

  text(k: number): string {
    return this.data.texts[k] ?? "";
  }

  /** Rows of graph k in execution order. */
  rows(k: number): number[] {
    const known = this.lists.get(k);
    if (known !== undefined) return known;
    const graph = this.data.graphs[k];
    if (graph === undefined) return [];
    const rows = graph.base < 0 ? [] : [...this.rows(graph.base)];
    for (const s of graph.splices) rows.splice(s.at, s.drop, ...s.rows);
    keep(this.lists, k, rows, 24);
    return rows;
  }

  /** Row of each node of graph k. */
  rowOf(k: number): Map<number, number> {
    const known = this.rowMaps.get(k);
    if (known !== undefined) return known;
    const node = this.data.rows.node;
    const made = new Map(this.rows(k).map((r) => [node[r]!, r]));
    keep(this.rowMaps, k, made, 10);
    return made;
  }

  inputs(row: number): number[] {
    const { starts, items } = this.data.rows.inputs;
    return items.slice(starts[row], starts[row + 1]);
  }

  info(row: number): NodeInfo {
    const { rows, targets, values, modules, sources } = this.data;
    const target = targets[rows.target[row]!];
    const value = values[rows.value[row]!];
    const module = rows.module[row]!;
    const source = rows.source[row]!;
    return {
      id: rows.node[row]!,
      row,
      name: this.text(rows.name[row]!),
      op: OPS[rows.op[row]!] ?? "call_function",
      target: target?.name ?? "",
      short: target?.short ?? "",
      call: "",
      inputs: this.inputs(row),
      value: value?.text ?? "",
      shape: value?.shape ?? null,
      dtype: value?.dtype ?? "",
      path: this.text(modules.path[module]!),
      type: this.text(modules.type[module]!),
      layer: modules.layer[module] ?? -1,
      source: source < 0 ? null : { file: this.text(sources.file[source]!), line: sources.line[source]!, function: this.text(sources.function[source]!), code: this.text(sources.code[source]!), context: this.text(sources.context[source] ?? 0), first: sources.first[source] ?? 0 },
      category: rows.category[row]!,
    };
  }

  /** Paths of the modules around a node of graph k, from the outside in, the model itself first. */
  around(k: number, id: number): string[] {
    const row = this.rowOf(k).get(id);
    const path = row === undefined ? "" : this.text(this.data.modules.path[this.data.rows.module[row]!]!);
    let known = this.prefixes.get(path);
    if (known === undefined) {
      const names = path === "" ? [] : path.split(".");
      this.prefixes.set(path, (known = ["", ...names.map((_, n) => names.slice(0, n + 1).join("."))]));
    }
    return known;
  }

  /** What a node's box says first: what it calls; of an input or a parameter its name. */
  called(n: NodeInfo): string {
    return n.op === "call_function" ? n.short : n.op === "call_module" ? n.type || n.short : n.name;
  }

  /** A module's name and its class in graph k, as its title says them. */
  title(k: number, path: string): string {
    const [name, type] = [path.slice(path.lastIndexOf(".") + 1), this.typesIn(k).get(path)];
    return type ? `${name}: ${type}` : name;
  }

  /** Classes of modules by path: those that graph k's calls tell, as another graph may have another there. */
  private typesIn(k: number): Map<string, string> {
    const known = this.types.get(k);
    if (known !== undefined) return known;
    const { modules, rows } = this.data;
    const made = new Map(modules.path.map((p, m) => [this.text(p), this.text(modules.type[m]!)]));
    for (const r of this.rows(k)) {
      const m = rows.module[r]!;
      if (modules.type[m] !== 0 && OPS[rows.op[r]!] !== "get_attr") made.set(this.text(modules.path[m]!), this.text(modules.type[m]!));
    }
    keep(this.types, k, made, 10);
    return made;
  }

  /** The call as text, inputs by their names in graph k. */
  call(k: number, row: number): string {
    const pieces = this.data.calls[this.data.rows.call[row]!] ?? [""];
    const at = this.rowOf(k);
    const names = this.inputs(row).map((i) => {
      const r = at.get(i) ?? this.lastRow(i) ?? undefined;
      return r === undefined ? `%${i}` : this.text(this.data.rows.name[r]!);
    });
    return pieces.map((p, n) => p + (n < pieces.length - 1 ? (names[n] ?? "") : "")).join("");
  }

  /** Graph k as the picture takes it. */
  graph(k: number): Graph {
    const known = this.graphs.get(k);
    if (known !== undefined) return known;
    const { rows, modules, targets } = this.data;
    const list = this.rows(k);
    const nodes = new Map<number, GraphNode>();
    for (const r of list) {
      const id = rows.node[r]!;
      nodes.set(id, { id, name: this.text(rows.name[r]!), op: OPS[rows.op[r]!]!, target: targets[rows.target[r]!]?.short ?? "", path: this.text(modules.path[rows.module[r]!]!), inputs: this.inputs(r) });
    }
    const [repeats, representative] = this.repeats(k, list);
    const made = new Graph(nodes, repeats, representative);
    keep(this.graphs, k, made, 10);
    return made;
  }

  private repeats(k: number, list: number[]): [Map<string, Repeat>, Map<number, number>] {
    const repeats = new Map<string, Repeat>();
    const representative = new Map<number, number>();
    const { rows, modules } = this.data;
    const pathOf = new Map<number, string>();
    for (let m = 0; m < modules.path.length; m++) {
      const layer = modules.layer[m]!;
      const parent = modules.parent[m]!;
      if (layer >= 0 && (parent < 0 || modules.layer[parent]! < 0)) pathOf.set(layer, this.text(modules.path[m]!));
    }
    for (const segment of this.data.graphs[k]?.view?.folding ?? []) {
      for (const blocks of segment.variants) {
        const first = blocks[0];
        if (first === undefined || blocks.length < 2) continue;
        const path = pathOf.get(first.layer);
        const members = blocks.map((b) => pathOf.get(b.layer));
        if (path === undefined || members.some((m) => m === undefined)) continue;
        repeats.set(path, { path, count: blocks.length, members: members as string[] });
        const ids = [...expand(first.nodes), ...expand(first.leaves)].map((p) => rows.node[list[p]!]!);
        for (const block of blocks) {
          let n = 0;
          for (const p of [...expand(block.nodes), ...expand(block.leaves)]) representative.set(rows.node[list[p]!]!, ids[n++]!);
        }
      }
    }
    return [repeats, representative];
  }

  /** Exactly what differs between graphs a and b, by node identity. */
  difference(a: number, b: number): Difference {
    const [from, to] = [this.rowOf(a), this.rowOf(b)];
    const found: Difference = { created: new Set(), erased: new Set(), changed: new Set(), moved: new Set() };
    for (const id of to.keys()) if (!from.has(id)) found.created.add(id);
    for (const id of from.keys()) if (!to.has(id)) found.erased.add(id);
    const between = this.steps.filter((s) => s.before !== s.after && Math.min(a, b) <= s.before && s.after <= Math.max(a, b));
    for (const step of between) {
      for (const id of step.changed) if (from.has(id) && to.has(id)) found.changed.add(id);
      for (const id of step.moved) if (from.has(id) && to.has(id)) found.moved.add(id);
    }
    return found;
  }

  born(id: number): number {
    return this.data.nodes.born[this.place.get(id) ?? -1] ?? -1;
  }

  gone(id: number): number {
    return this.data.nodes.gone[this.place.get(id) ?? -1] ?? -1;
  }

  /** Nodes that this one replaced. */
  origins(id: number): number[] {
    const k = this.place.get(id);
    return k === undefined ? [] : list(this.data.nodes.origins, k);
  }

  /** Nodes that replaced this one. */
  became(id: number): number[] {
    if (this.descendants === null) {
      this.descendants = new Map();
      this.data.nodes.id.forEach((made, k) => {
        for (const o of list(this.data.nodes.origins, k)) {
          const d = this.descendants!.get(o);
          if (d === undefined) this.descendants!.set(o, [made]);
          else d.push(made);
        }
      });
    }
    return this.descendants.get(id) ?? [];
  }

  /** The last row of a node that may no longer stand in the graph shown. */
  lastRow(id: number): number | null {
    const node = this.data.rows.node;
    for (let r = node.length - 1; r >= 0; r--) if (node[r] === id) return r;
    return null;
  }

  /** The step whose graph still has this node, nearest to the given one. */
  stepWith(id: number, near: number): number | null {
    const here = this.steps[near];
    if (here !== undefined && here.after >= 0 && this.rowOf(here.after).has(id)) return near;
    const [born, gone] = [this.born(id), this.gone(id)];
    if (born < 0) return null;
    return gone >= 0 ? Math.max(born, gone - 1) : born;
  }
}

export function list(ragged: Ragged, k: number): number[] {
  return ragged.items.slice(ragged.starts[k], ragged.starts[k + 1]);
}

/** Runs (start, length, start, length...) as positions. */
export function expand(runs: number[]): number[] {
  const found: number[] = [];
  for (let n = 0; n + 1 < runs.length; n += 2) for (let p = 0; p < runs[n + 1]!; p++) found.push(runs[n]! + p);
  return found;
}

/** Remember the last few. */
function keep<V>(cache: Map<number, V>, key: number, value: V, most: number): void {
  cache.set(key, value);
  if (cache.size > most) cache.delete(cache.keys().next().value!);
}
