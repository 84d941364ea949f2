/** What is being looked at: one object that the picture, the panels and Python read and set. */
import { Alignment } from "./align.ts";
import { scaleOf, type Scale } from "./colour.ts";
import { Layout, type Shown } from "./layout.ts";
import type { Graph, GraphNode } from "./graph.ts";
import { NOTHING, type Live } from "./live.ts";
import { OPS, Walk, type Difference, type Overlay, type Part } from "./record.ts";

export type Mode = "graph" | "compare" | "code";

export interface State {
  /** Index of the step looked at: the timeline, the panels and the search speak of it. */
  step: number;
  /** Index of the step it is compared with: its graph after; -1 for the graph before the step looked at. */
  against: number;
  /** Steps side by side while comparing, left to right, `step` among them; empty for `against` and `step`. */
  panes: number[];
  mode: Mode;
  /** Ids of the nodes chosen, the first one inspected. */
  selection: number[];
  /** Path of the module chosen, or null. */
  module: string | null;
  overlay: string;
  search: string;
  tab: "step" | "node" | "rewrites" | "about";
  /** Rewrite class of the step chosen, and the site in it. */
  rewrite: number;
  site: number;
  open: ReadonlySet<string>;
  /** Draw weights and inputs as nodes of their own. */
  leaves: boolean;
  /** The panel with details is shown. */
  side: boolean;
  playing: boolean;
  live: Live;
}

/** One pane: the graph after `step` (-1 where that is no step's), and what stands in its title. */
export interface Point {
  step: number;
  graph: number;
  title: string;
}

/** What a pane marks: against the pane on its left, and what the one on its right does without. */
export interface Marks {
  left: Difference | null;
  right: Difference | null;
  /** By path of a module: how much is marked in it. */
  modules: ReadonlyMap<string, Touched>;
}

/** Nodes of a module that came, go (or went, where one graph is shown alone) and changed. */
export interface Touched {
  created: number;
  erased: number;
  changed: number;
}

/** An overlay on one graph: the value of each node, and of a module what its nodes come to. */
export class Laid {
  readonly values: Map<number, number>;
  private modules: Map<string, Map<number, number>> | null = null;

  constructor(
    readonly overlay: Overlay,
    readonly scale: Scale,
    private readonly graph: Graph,
  ) {
    this.values = new Map(overlay.ids.map((id, n) => [id, overlay.values[n]!]));
  }

  /** What all nodes come to, where values add up. */
  get total(): number | null {
    return this.adds ? [...this.values.values()].reduce((sum, v) => sum + v, 0) : null;
  }

  /** Whether values add up (work, bytes, times), or the largest speaks for all (errors). */
  private get adds(): boolean {
    return /^(FLOPs?|B|bytes|[nuµm]?s)$/.test(this.overlay.unit);
  }

  /** What is said of a closed module: a sum, the largest value, or its words; with a fill where one value stands for it. */
  of(path: string): { text: string; fill?: string; parts?: { share: number; fill: string }[] } | null {
    this.modules ??= this.collect();
    const found = this.modules.get(path);
    if (found === undefined) return null;
    const { overlay, scale } = this;
    if (overlay.scale === "words") {
      const words = [...found].sort((a, b) => b[1] - a[1]).map(([w]) => w);
      const all = [...found.values()].reduce((sum, n) => sum + n, 0);
      return {
        text: words.slice(0, 2).map((w) => scale.text(w)).join(", ") + (words.length > 2 ? ", …" : ""),
        ...(words.length === 1 ? { fill: scale.colour(words[0]!) } : { parts: words.map((w) => ({ share: found.get(w)! / all, fill: scale.colour(w) })) }),
      };
    }
    const values = [...found.keys()];
    if (this.adds) return { text: scale.text([...found].reduce((sum, [v, n]) => sum + v * n, 0)) };
    const largest = values.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
    return { text: `≤ ${scale.text(largest)}`, fill: scale.colour(largest) };
  }

  /** By module: how often each value occurs in it and below it. */
  private collect(): Map<string, Map<number, number>> {
    const found = new Map<string, Map<number, number>>();
    for (const [id, value] of this.values) {
      for (let m = this.graph.home.get(id) ?? null; m !== null; m = m.parent) {
        let counts = found.get(m.path);
        if (counts === undefined) found.set(m.path, (counts = new Map()));
        counts.set(value, (counts.get(value) ?? 0) + 1);
      }
    }
    return found;
  }
}

const SAME: Difference = { created: new Set(), erased: new Set(), changed: new Set(), moved: new Set() };

/** Inputs that so many nodes read are drawn as words: lines from them would cover everything. */
const WIDELY_READ = 6;
/** Side by side at most: a fifth would be too narrow to read. */
export const MOST_PANES = 4;

export class Store {
  state: State;
  private readonly listeners = new Set<(changed: ReadonlySet<keyof State | "walk">) => void>();
  private readonly layouts = new Map<string, Layout>();
  private readonly differences = new Map<string, Difference>();
  private readonly marked = new Map<string, Marks>();
  private readonly aligned = new Map<string, { a: Layout; b: Layout; turn: number; found: Alignment }>();
  private readonly composed = new Map<string, Map<string, Map<number, number>>>();
  private turn = 0;
  private readonly laid = new Map<string, Laid | null>();
  /** Path of the module that was opened or closed last: it stays where it is on the screen. */
  anchor: string | null = null;

  constructor(
    public walk: Walk,
    start: Partial<State> = {},
  ) {
    this.state = { step: lastChange(walk), against: -1, panes: [], mode: "graph", selection: [], module: null, overlay: "", search: "", tab: "step", rewrite: -1, site: 0, open: new Set(), leaves: false, side: true, playing: false, live: NOTHING, ...start };
    this.state = { ...this.state, open: start.open ?? this.opened() };
  }

  set(given: Partial<State>): void {
    const change = this.settled(given);
    const changed = new Set<keyof State>();
    for (const [key, value] of Object.entries(change) as [keyof State, unknown][]) if (this.state[key] !== value) changed.add(key);
    if (changed.size === 0) return;
    this.state = { ...this.state, ...change };
    this.tell(changed);
  }

  /** The step looked at is one of the panes: a change of the one changes the other. */
  private settled(change: Partial<State>): Partial<State> {
    const { step, panes } = this.state;
    if (change.panes !== undefined) {
      const at = change.step ?? step;
      return change.panes.length === 0 || change.panes.includes(at) ? change : { ...change, step: change.panes[change.panes.length - 1]! };
    }
    if (change.against !== undefined && change.against !== this.state.against && panes.length > 0) return { ...change, panes: [] };
    if (change.step === undefined || panes.length === 0 || panes.includes(change.step)) return change;
    return { ...change, panes: panes.map((p) => (p === step ? change.step! : p)) };
  }

  private tell(changed: ReadonlySet<keyof State | "walk">): void {
    for (const listener of [...this.listeners]) listener(changed);
  }

  /** The walk went on, or a part of it came: what was drawn from it is drawn anew, what is looked at stays. */
  renew(walk: Walk = this.walk): void {
    const changed = new Set<keyof State | "walk">(["walk"]);
    if (walk !== this.walk) {
      const { name = "", after = -1 } = this.walk.steps[this.state.step] ?? {};
      const failed = name === this.state.live.error?.step;
      const follows = !failed && (after < 0 || this.state.step === lastChange(this.walk));
      this.walk = walk;
      const again = follows ? -1 : walk.steps.findIndex((s) => s.name === name && (s.after >= 0 || failed));
      const step = again < 0 ? lastChange(walk) : again;
      const known = (k: number): boolean => k < walk.steps.length;
      this.state = { ...this.state, step, against: known(this.state.against) ? this.state.against : -1, panes: this.state.panes.every(known) && this.state.panes.includes(step) ? this.state.panes : [], rewrite: -1 };
      changed.add("step");
    }
    if (this.state.open.size <= 1) {
      this.state = { ...this.state, open: this.opened() };
      changed.add("open");
    }
    for (const cache of [this.layouts, this.differences, this.marked, this.aligned, this.laid, this.composed]) cache.clear();
    this.tell(changed);
  }

  /** A part of the walk came: what is drawn without it stays as it is. */
  filled({ kind, index }: Part): void {
    if (kind === "view") for (const leaves of [true, false]) this.layouts.delete(`${index}|${leaves}`);
    if (kind === "costs") this.laid.clear();
    if (kind === "view" && this.state.open.size <= 1 && index === this.graph) this.state = { ...this.state, open: this.opened() };
    const { step } = this.state;
    const seen = kind === "costs" || (kind === "view" ? this.points().some((p) => p.graph === index) || index === this.before : index === step);
    if (seen) this.tell(new Set(["walk"]));
  }

  subscribe(listener: (changed: ReadonlySet<keyof State | "walk">) => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Graph of the step looked at. */
  get graph(): number {
    return this.graphOf(this.state.step);
  }

  /** Graph after a step; of the one that failed the graph that it was given. */
  private graphOf(step: number): number {
    const { steps } = this.walk;
    const at = steps[step];
    if (at === undefined || at.after >= 0 || at.name !== this.state.live.error?.step) return at?.after ?? -1;
    for (let k = step - 1; k >= 0; k--) if (steps[k]!.after >= 0) return steps[k]!.after;
    return -1;
  }

  /** What stands side by side: one point, or what is compared, left to right. */
  points(): Point[] {
    const { step, against, mode, panes } = this.state;
    const at = (k: number): Point => ({ step: k, graph: this.graphOf(k), title: `${(this.walk.steps[k]?.after ?? -1) < 0 ? "before" : "after"} ${this.walk.steps[k]?.name ?? ""}` });
    if (mode === "graph") return [at(step)];
    if (panes.length > 0) return panes.map(at);
    if (against >= 0) return against === step ? [at(step)] : [at(against), at(step)];
    const before = this.walk.steps[step]?.before ?? -1;
    if (before < 0 || before === this.graph) return [at(step)];
    return [{ step: this.makerOf(before, step), graph: before, title: `before ${this.walk.steps[step]?.name ?? ""}` }, at(step)];
  }

  /** The step before another that made a graph: of those that end with it the first one. */
  private makerOf(graph: number, before: number): number {
    let found = -1;
    for (let k = before - 1; k >= 0; k--) {
      if (this.walk.steps[k]!.after === graph) found = k;
      else if (found >= 0) break;
    }
    return found;
  }

  /** Which pane shows the step looked at. */
  focus(points = this.points()): number {
    return Math.max(0, points.findIndex((p) => p.step === this.state.step));
  }

  /** Graph that the step looked at is compared with: the pane on its left; of the first, the one on its right. */
  get before(): number {
    const { step, against, mode, panes } = this.state;
    if (panes.length > 0 && mode !== "graph") {
      const at = panes.indexOf(step);
      return this.walk.steps[panes[at > 0 ? at - 1 : at + 1]!]?.after ?? -1;
    }
    return against < 0 ? (this.walk.steps[step]?.before ?? -1) : (this.walk.steps[against]?.after ?? -1);
  }

  /** What differs between the two graphs compared. */
  difference(): Difference {
    const { mode, panes, step } = this.state;
    if (this.before < 0 || this.graph < 0) return SAME;
    return panes.length > 0 && mode !== "graph" && panes[0] === step ? this.between(this.graph, this.before) : this.between(this.before, this.graph);
  }

  private between(a: number, b: number): Difference {
    return remember(this.differences, `${a}>${b}`, 8, () => this.walk.difference(a, b));
  }

  /** What pane n marks. */
  marks(n: number, points = this.points()): Marks {
    const graph = points[n]!.graph;
    const left = points.length === 1 ? this.before : (points[n - 1]?.graph ?? -1);
    const right = points[n + 1]?.graph ?? -1;
    return remember(this.marked, `${left}>${graph}>${right}|${points.length === 1}`, 8, () => {
      const marks = { left: left < 0 || left === graph ? null : this.between(left, graph), right: right < 0 || right === graph ? null : this.between(graph, right) };
      const modules = new Map<string, Touched>();
      const count = (ids: Iterable<number> | undefined, at: number, kind: keyof Touched): void => {
        for (const id of ids ?? []) {
          for (const path of this.walk.around(at, id)) {
            let touched = modules.get(path);
            if (touched === undefined) modules.set(path, (touched = { created: 0, erased: 0, changed: 0 }));
            touched[kind]++;
          }
        }
      };
      if (graph >= 0) {
        count(marks.left?.created, graph, "created");
        count(marks.left?.changed ?? marks.right?.changed, graph, "changed");
        // What is gone has no box here: its module says so.
        if (points.length === 1 && marks.left !== null) count(marks.left.erased, left, "erased");
        else count(marks.right?.erased, graph, "erased");
      }
      return { ...marks, modules };
    });
  }

  /** Show one more point beside the others: the one given, or the nearest change that is not shown yet. */
  addPane(step: number | null = null): void {
    const shown = this.state.mode === "compare" ? this.points() : [{ step: this.state.step }];
    const steps = shown.map((p) => p.step);
    if (step === null && this.state.mode !== "compare" && this.before >= 0 && this.before !== this.graph) return this.set({ mode: "compare" });
    const next = step ?? this.beside(steps);
    if (next === null || steps.includes(next) || steps.length >= MOST_PANES) return;
    const panes = [...steps.filter((s) => s >= 0), next].sort((a, b) => a - b);
    this.set({ panes, mode: "compare", against: -1, step: step === null ? this.state.step : next });
  }

  /** The change nearest to the step looked at that no pane shows: a later one first. */
  private beside(shown: number[]): number | null {
    const { steps } = this.walk;
    const graphs = new Set(shown.map((k) => steps[k]?.after));
    const fits = (k: number): boolean => steps[k]!.after >= 0 && steps[k]!.before !== steps[k]!.after && !graphs.has(steps[k]!.after);
    for (let k = this.state.step + 1; k < steps.length; k++) if (fits(k)) return k;
    for (let k = this.state.step - 1; k >= 0; k--) if (fits(k)) return k;
    return null;
  }

  get canAddPane(): boolean {
    const shown = this.state.mode === "compare" ? this.points().map((p) => p.step) : [this.state.step];
    return shown.length < MOST_PANES && this.beside(shown) !== null;
  }

  closePane(n: number): void {
    const steps = this.points().map((p) => p.step);
    const rest = steps.filter((_, k) => k !== n);
    const step = rest.includes(this.state.step) ? this.state.step : rest[Math.min(n, rest.length - 1)]!;
    if (rest.length < 2) this.set({ mode: "graph", panes: [], against: -1, step });
    else this.set({ panes: rest, step });
  }

  /** Look at another point in pane n; one that another pane shows already is gone to instead. */
  setPoint(n: number, step: number): void {
    const steps = this.points().map((p) => p.step);
    if (this.state.panes.length === 0) return this.set(n === 0 && steps.length > 1 && step !== this.state.step ? { against: step } : { step });
    if (steps.includes(step)) return this.set({ step });
    this.set({ panes: steps.map((s, k) => (k === n ? step : s)), step });
  }

  /** Which place of graph a is which of graph b, with the modules that are open now. */
  alignment(a: number, b: number): Alignment {
    const [from, to] = [this.layout(a), this.layout(b)];
    const key = `${a}>${b}`;
    const known = this.aligned.get(key);
    if (known !== undefined && known.a === from && known.b === to && known.turn === this.turn) return known.found;
    const found = new Alignment(from.root(), to.root());
    this.aligned.set(key, { a: from, b: to, turn: this.turn, found });
    return found;
  }

  /** The overlay chosen as it lies over graph k; one scale for all panes, so that equal colours are equal values. */
  overlay(k = this.graph): Laid | null {
    const name = this.state.overlay;
    if (name === "" || k < 0) return null;
    const graphs = this.points().map((p) => p.graph).filter((g) => g >= 0);
    return remember(this.laid, `${k}|${graphs.join()}|${name}`, 8, () => {
      const own = overlays(this.walk, k, name)[0];
      if (own === undefined) return null;
      const all = [...new Set(graphs)].flatMap((g) => (g === k ? [own] : overlays(this.walk, g, name)));
      return new Laid(own, scaleOf({ ...own, values: all.flatMap((o) => o.values) }), this.walk.graph(k));
    });
  }

  /** How many nodes of each kind (calls alone) a module of graph k holds: category -> nodes. */
  kinds(k: number, path: string): ReadonlyMap<number, number> {
    const all = remember(this.composed, `${k}`, 8, () => {
      const found = new Map<string, Map<number, number>>();
      const { category, op } = this.walk.data.rows;
      for (const [id, row] of this.walk.rowOf(k)) {
        if (OPS[op[row]!] === "get_attr" || OPS[op[row]!] === "placeholder") continue;
        for (const around of this.walk.around(k, id)) {
          let counts = found.get(around);
          if (counts === undefined) found.set(around, (counts = new Map()));
          counts.set(category[row]!, (counts.get(category[row]!) ?? 0) + 1);
        }
      }
      return found;
    });
    return all.get(path) ?? new Map();
  }

  /** The layout of a graph with the modules that are open now. */
  layout(k: number): Layout {
    const key = `${k}|${this.state.leaves}`;
    let layout = this.layouts.get(key);
    if (layout === undefined) {
      const graph = this.walk.graph(k);
      layout = new Layout(graph, this.shown(graph, k));
      this.layouts.set(key, layout);
      if (this.layouts.size > 10) this.layouts.delete(this.layouts.keys().next().value!);
    }
    return layout;
  }

  private shown(graph: Graph, k: number): Shown {
    const hidden = new Map<number, boolean>();
    return {
      isOpen: (path) => equals(graph, path).some((p) => this.state.open.has(p)),
      isHidden: (node) => {
        let known = hidden.get(node.id);
        if (known === undefined) {
          known = !this.state.leaves && (node.op === "get_attr" || (node.op === "placeholder" && !nearTheTop(graph, node)) || far(graph, node));
          hidden.set(node.id, known);
        }
        return known;
      },
      title: (module) => this.walk.title(k, module.path),
      label: (node) => {
        const info = this.walk.info(this.walk.rowOf(k).get(node.id) ?? 0);
        return [node.op === "call_module" ? this.walk.called(info) : node.target || node.name, info.value];
      },
      chip: (input, reader) => {
        if (input.op === "get_attr") return tail(input.target || input.name, reader.path);
        const value = this.walk.info(this.walk.rowOf(k).get(input.id) ?? 0);
        // A size by its letter: view(x, B, S) says more than view(x, sym_size_int_7).
        return value.shape === null && /^\w{1,3}$/.test(value.value) ? value.value : input.name;
      },
    };
  }

  /** Open or close a module, in every pane: layers that one layer stands for elsewhere are as open as it is. */
  toggle(path: string): void {
    const next = new Set(this.state.open);
    const graphs = this.points().map((p) => p.graph).filter((k) => k >= 0);
    const same = [...new Set([path, ...graphs.flatMap((k) => equals(this.walk.graph(k), path))])];
    if (same.some((p) => next.has(p))) for (const p of same) next.delete(p);
    else next.add(path);
    for (const l of this.layouts.values()) for (const p of same) l.touch(p);
    this.turn++;
    this.anchor = path;
    this.set({ open: next });
  }

  /** Open every module around a node, so that it is drawn. */
  reveal(id: number, k = this.graph): void {
    if (k < 0 || !this.walk.ready(k)) return;
    const graph = this.walk.graph(k);
    const node = graph.nodes.get(id);
    if (node === undefined) return;
    const layout = this.layout(k);
    const next = new Set(this.state.open);
    for (const m of graph.ancestors(layout.stands(node.path))) next.add(m.path);
    if (next.size !== this.state.open.size) {
      this.unfold(next);
    }
  }

  /** Open exactly these modules. */
  unfold(open: ReadonlySet<string>): void {
    for (const l of this.layouts.values()) l.clear();
    this.turn++;
    this.anchor = null;
    this.set({ open });
  }

  openAll(within: string | null): void {
    const graph = this.walk.graph(this.graph);
    const next = new Set(this.state.open);
    for (const m of graph.modules.values()) if (m.size < 400 && (within === null || m.path.startsWith(within))) next.add(m.path);
    this.unfold(next);
  }

  /** Open what holds a change, and choose nothing else: the way from a step to what it did. */
  openChanged(): void {
    const next = new Set(this.opened());
    const points = this.points();
    points.forEach(({ graph }, n) => {
      if (graph < 0 || !this.walk.ready(graph)) return;
      const layout = this.layout(graph);
      for (const path of this.marks(n, points).modules.keys()) next.add(layout.stands(path));
    });
    this.unfold(next);
  }

  closeAll(): void {
    this.unfold(this.opened());
  }

  /** What is open at first: everything above the layers, so that the first picture is the model's outline. */
  private opened(): ReadonlySet<string> {
    const graph = this.walk.graph(this.graph);
    const open = new Set<string>([""]);
    const visit = (items: readonly unknown[]): void => {
      for (const item of items as { path: string; items: unknown[]; size: number }[]) {
        if (typeof item === "number") continue;
        if (item.size <= 2 || /(^|\.)\d+$/.test(item.path)) continue;
        if (graph.root.items.length > 3 && !/layers|blocks|\bh$|model|transformer|decoder/.test(item.path)) continue;
        if (item.items.some((i) => typeof i !== "number") && item.size > 12) {
          open.add(item.path);
          visit(item.items);
        }
      }
    };
    visit(graph.root.items);
    return open;
  }

  /** Of the nodes chosen the one that the panel tells of: the first that computes, for weights are drawn only on demand. */
  get inspected(): number | undefined {
    const { selection } = this.state;
    const rows = this.graph < 0 ? undefined : this.walk.rowOf(this.graph);
    const computes = (id: number): boolean => {
      const op = OPS[this.walk.data.rows.op[rows?.get(id) ?? -1] ?? -1];
      return op !== undefined && op !== "get_attr" && op !== "placeholder";
    };
    return selection.find(computes) ?? selection[0];
  }

  /** Choose nodes; Python and every pane follow. */
  select(ids: number[], module: string | null = null): void {
    this.set({ selection: ids, module, tab: ids.length > 0 || module !== null ? "node" : this.state.tab });
  }
}

/** The last step that changed the graph: where a reader starts. */
function lastChange(walk: Walk): number {
  return walk.steps.reduce((found, s, k) => (s.after >= 0 && s.before !== s.after ? k : found), Math.max(0, walk.steps.findIndex((s) => s.after >= 0)));
}

/** This path, and the same place in every layer that the one around it stands for. */
function equals(graph: Graph, path: string): string[] {
  for (const { path: drawn, members } of graph.repeats.values()) {
    const around = members.find((m) => path === m || path.startsWith(`${m}.`)) ?? (path === drawn ? drawn : undefined);
    if (around !== undefined) return members.map((m) => m + path.slice(around.length));
  }
  return [path];
}

/** An input that something outside the repeated layers reads once; a layer's cache is drawn as a word in the layer. */
function nearTheTop(graph: Graph, node: GraphNode): boolean {
  const users = graph.users.get(node.id) ?? [];
  return users.length === 1 && !/(^|\.)\d+(\.|$)/.test(graph.home.get(users[0]!)?.path ?? "");
}

/** A weight's name without what its reader's module says already: `weight` in model.layers.0.mlp.up_proj. */
function tail(target: string, path: string): string {
  const [names, around] = [target.split("."), path.split(".")];
  let same = 0;
  while (same < names.length - 1 && names[same] === around[same]) same++;
  return names.slice(Math.max(same, names.length - 3)).join(".");
}

/** Read by many modules: drawn as a word at each reader. */
function far(graph: Graph, node: GraphNode): boolean {
  const users = graph.users.get(node.id) ?? [];
  if (users.length < WIDELY_READ) return false;
  const homes = new Set(users.map((u) => graph.home.get(u)?.path));
  return homes.size >= WIDELY_READ;
}

const COSTS = [["FLOPs", "FLOP"], ["bytes", "B"], ["roofline time", "µs"]] as const;

/** Names of the overlays that say something of graph k: the record's costs, and what was laid over it. */
export function overlayNames(walk: Walk, k: number): string[] {
  const rows = walk.rows(k);
  const costs = walk.data.costs.filter((c) => rows.some((row) => (c.table[c.rows[row] ?? -1]?.[2] ?? 0) > 0));
  return [...costs.flatMap((c) => COSTS.map(([name]) => `${name} (${c.name})`)), ...walk.data.overlays.filter((o) => speaks(walk, o, k)).map((o) => o.name)];
}

function speaks(walk: Walk, o: Overlay, k: number): boolean {
  return o.step < 0 || walk.steps[o.step]?.after === k || o.ids.some((i) => walk.rowOf(k).has(i));
}

/** Overlays of graph k, or the one of that name. */
export function overlays(walk: Walk, k: number, only: string | null = null): Overlay[] {
  const found: Overlay[] = [];
  for (const costs of walk.data.costs) {
    const note = `${costs.device}; ${Object.entries(costs.sizes).map(([n, v]) => `${n} ${v}`).join(", ")}`;
    COSTS.forEach(([kind, unit], n) => {
      const name = `${kind} (${costs.name})`;
      if (only !== null && only !== name) return;
      const made: Overlay = { name, unit, note, step: -1, scale: "log", ids: [], values: [], words: [] };
      for (const [id, row] of walk.rowOf(k)) {
        const cost = costs.table[costs.rows[row] ?? -1];
        if (cost === undefined || cost[2] === 0) continue;
        made.ids.push(id);
        made.values.push(cost[n] as number);
      }
      if (made.ids.length > 0) found.push(made);
    });
  }
  for (const o of walk.data.overlays) if ((only === null || only === o.name) && speaks(walk, o, k)) found.push(o);
  return found;
}

function remember<V>(cache: Map<string, V>, key: string, most: number, make: () => V): V {
  const known = cache.get(key);
  if (known !== undefined) return known;
  const made = make();
  cache.set(key, made);
  if (cache.size > most) cache.delete(cache.keys().next().value!);
  return made;
}
