/** What is being looked at: one object that the picture, the panels and Python read and set. */
import { scaleOf, type Scale } from "./colour.ts";
import { Layout, type Shown } from "./layout.ts";
import type { Graph, GraphNode } from "./graph.ts";
import { Walk, type Difference, type Overlay } from "./record.ts";

export type Mode = "graph" | "compare" | "code";

export interface State {
  /** Index of the step shown. */
  step: number;
  /** Index of the step it is compared with: its graph after; -1 for the graph before the step shown. */
  against: number;
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
  playing: boolean;
}

/** Inputs that so many nodes read are drawn as words: lines from them would cover everything. */
const WIDELY_READ = 6;

export class Store {
  state: State;
  private readonly listeners = new Set<(changed: ReadonlySet<keyof State>) => void>();
  private readonly layouts = new Map<string, Layout>();
  private known: { key: string; difference: Difference } = { key: "", difference: { created: new Set(), erased: new Set(), changed: new Set(), moved: new Set() } };
  private laid: { key: string; found: ReturnType<Store["overlay"]> } = { key: "", found: null };

  constructor(
    readonly walk: Walk,
    start: Partial<State> = {},
  ) {
    const last = walk.steps.reduce((found, s, k) => (s.after >= 0 && s.before !== s.after ? k : found), Math.max(0, walk.steps.findIndex((s) => s.after >= 0)));
    this.state = { step: last, against: -1, mode: "graph", selection: [], module: null, overlay: "", search: "", tab: "step", rewrite: -1, site: 0, open: new Set(), leaves: false, playing: false, ...start };
    this.state = { ...this.state, open: start.open ?? this.opened() };
  }

  set(change: Partial<State>): void {
    const changed = new Set<keyof State>();
    for (const [key, value] of Object.entries(change) as [keyof State, unknown][]) if (this.state[key] !== value) changed.add(key);
    if (changed.size === 0) return;
    this.state = { ...this.state, ...change };
    for (const listener of [...this.listeners]) listener(changed);
  }

  subscribe(listener: (changed: ReadonlySet<keyof State>) => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Graph of the step shown. */
  get graph(): number {
    return this.walk.steps[this.state.step]?.after ?? -1;
  }

  /** Graph it is compared with. */
  get before(): number {
    const { step, against } = this.state;
    return against < 0 ? (this.walk.steps[step]?.before ?? -1) : (this.walk.steps[against]?.after ?? -1);
  }

  /** What differs between the two graphs compared. */
  difference(): Difference {
    const key = `${this.before}>${this.graph}`;
    if (this.known.key !== key) this.known = { key, difference: this.walk.difference(this.before, this.graph) };
    return this.known.difference;
  }

  /** The overlay shown, and its value by node. */
  overlay(): { overlay: Overlay; values: Map<number, number>; scale: Scale } | null {
    if (this.state.overlay === "") return null;
    const key = `${this.graph}|${this.state.overlay}`;
    if (this.laid.key !== key) {
      const overlay = overlays(this.walk, this.graph).find((o) => o.name === this.state.overlay);
      this.laid = { key, found: overlay === undefined ? null : { overlay, values: new Map(overlay.ids.map((id, n) => [id, overlay.values[n]!])), scale: scaleOf(overlay) } };
    }
    return this.laid.found;
  }

  /** The layout of a graph with the modules that are open now. */
  layout(k: number): Layout {
    const key = `${k}|${this.state.leaves}`;
    let layout = this.layouts.get(key);
    if (layout === undefined) {
      const graph = this.walk.graph(k);
      layout = new Layout(graph, this.shown(graph, k));
      this.layouts.set(key, layout);
      if (this.layouts.size > 6) this.layouts.delete(this.layouts.keys().next().value!);
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
      title: (module) => this.walk.title(module.path),
      label: (node) => [node.target || node.name, this.walk.info(this.walk.rowOf(k).get(node.id) ?? 0).value],
    };
  }

  /** Open or close a module, in every pane: layers that one layer stands for elsewhere are as open as it is. */
  toggle(path: string): void {
    const next = new Set(this.state.open);
    const same = [this.graph, this.before].flatMap((k) => (k < 0 ? [] : equals(this.walk.graph(k), path)));
    if (same.some((p) => next.has(p))) for (const p of same) next.delete(p);
    else next.add(path);
    for (const p of same) this.forget(p);
    this.set({ open: next });
  }

  /** Open every module around a node, so that it is drawn. */
  reveal(id: number, k = this.graph): void {
    const graph = this.walk.graph(k);
    const node = graph.nodes.get(id);
    if (node === undefined) return;
    const layout = this.layout(k);
    const next = new Set(this.state.open);
    for (const m of graph.ancestors(layout.stands(node.path))) next.add(m.path);
    if (next.size !== this.state.open.size) {
      for (const l of this.layouts.values()) l.clear();
      this.set({ open: next });
    }
  }

  openAll(within: string | null): void {
    const graph = this.walk.graph(this.graph);
    const next = new Set(this.state.open);
    for (const m of graph.modules.values()) if (m.size < 400 && (within === null || m.path.startsWith(within))) next.add(m.path);
    for (const l of this.layouts.values()) l.clear();
    this.set({ open: next });
  }

  closeAll(): void {
    for (const l of this.layouts.values()) l.clear();
    this.set({ open: this.opened() });
  }

  forget(path: string): void {
    for (const l of this.layouts.values()) l.touch(path);
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

  /** Choose nodes; Python and every pane follow. */
  select(ids: number[], module: string | null = null): void {
    this.set({ selection: ids, module, tab: ids.length > 0 || module !== null ? "node" : this.state.tab });
  }
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

/** Read by many modules: drawn as a word at each reader. */
function far(graph: Graph, node: GraphNode): boolean {
  const users = graph.users.get(node.id) ?? [];
  if (users.length < WIDELY_READ) return false;
  const homes = new Set(users.map((u) => graph.home.get(u)?.path));
  return homes.size >= WIDELY_READ;
}

/** Overlays for graph k: those of the record, and its costs. */
export function overlays(walk: Walk, k: number): Overlay[] {
  const found: Overlay[] = [];
  for (const costs of walk.data.costs) {
    const ids: number[] = [];
    const columns: [string, string, number[]][] = [
      ["FLOPs", "FLOP", []],
      ["bytes", "B", []],
      ["roofline time", "µs", []],
    ];
    for (const [id, row] of walk.rowOf(k)) {
      const cost = costs.table[costs.rows[row] ?? -1];
      if (cost === undefined || cost[2] === 0) continue;
      ids.push(id);
      columns.forEach(([, , values], n) => values.push(cost[n] as number));
    }
    if (ids.length === 0) continue;
    for (const [name, unit, values] of columns) found.push({ name: `${name} (${costs.name})`, unit, note: `${costs.device}; ${Object.entries(costs.sizes).map(([n, v]) => `${n} ${v}`).join(", ")}`, step: -1, scale: "log", ids, values, words: [] });
  }
  for (const o of walk.data.overlays) if (o.step < 0 || walk.steps[o.step]?.after === k || o.ids.some((i) => walk.rowOf(k).has(i))) found.push(o);
  return found;
}
