/**
 * Where everything stands. Each open module is laid out by itself, its closed children as plain boxes and its
 * open ones as boxes of the size their own layout takes; so opening one module computes that module and the
 * sizes above it, and nothing else. Positions are relative to the module; the scene adds them up.
 */
import * as dagre from "@dagrejs/dagre";
import type { Graph, GraphNode, Module } from "./graph.ts";

export interface Box {
  key: string;
  x: number;
  y: number;
  width: number;
  height: number;
}

export interface NodeBox extends Box {
  kind: "node";
  node: GraphNode;
  /** Short names of inputs drawn as words instead of long lines. */
  chips: string[];
}

export interface ModuleBox extends Box {
  kind: "module";
  module: Module;
  /** How many modules of equal structure it stands for. */
  count: number;
  /** Layout of what is inside, when open. */
  inside: Inside | null;
}

export interface Edge {
  from: string;
  to: string;
  /** Nodes whose values flow along it. */
  sources: number[];
  points: { x: number; y: number }[];
}

export interface Inside {
  width: number;
  height: number;
  boxes: (NodeBox | ModuleBox)[];
  edges: Edge[];
}

export interface Shown {
  isOpen(path: string): boolean;
  /** Leaves (weights, inputs) that are drawn as chips rather than nodes. */
  isHidden(node: GraphNode): boolean;
  /** The node's lines of text, for its width. */
  label(node: GraphNode): string[];
  /** An input that is drawn as a word, as `reader` would call it. */
  chip(input: GraphNode, reader: GraphNode): string;
  /** The module's title, for its width. */
  title(module: Module): string;
}

/** Pixels of a letter: of a node's name, and of the line below it. */
const LETTER = 6.95;
const SMALL_LETTER = 6.05;
const WIDEST = 250;
const TITLE_LETTER = 7;
/** Of a closed module: room for how many nodes it has and what changed in it. */
const LEAST = 150;
const HEADER = 26;
const PADDING = 14;
const NODE_HEIGHT = 36;
const CHIP_HEIGHT = 13;

interface Draft {
  item: Module | GraphNode;
  key: string;
  count: number;
  inside: Inside | null;
  chips: string[];
  width: number;
  height: number;
}

export class Layout {
  private readonly cache = new Map<string, Inside>();
  private lifted: Map<string, Map<string, { from: string; to: string; sources: Set<number> }>> | null = null;
  private hiddenBy = new Map<string, string>();
  private readonly standing = new Map<string, string>();
  private readonly held = new Map<string, boolean>();

  constructor(
    readonly graph: Graph,
    readonly shown: Shown,
  ) {
    for (const repeat of graph.repeats.values()) for (const path of repeat.members) if (path !== repeat.path) this.hiddenBy.set(path, repeat.path);
  }

  /** The whole picture. */
  root(): Inside {
    return this.inside(this.graph.root);
  }

  /** Forget what changes when a module opens or closes: it and everything around it. */
  touch(path: string): void {
    for (const m of this.graph.ancestors(path)) this.cache.delete(m.path);
    this.cache.delete("");
  }

  clear(): void {
    this.cache.clear();
  }

  /** The box that stands for a node: its own, or the closed module it is in; as keys from the outside in. */
  trail(id: number): string[] {
    const node = this.graph.nodes.get(id);
    if (node === undefined) return [];
    const keys: string[] = [];
    for (const m of this.graph.ancestors(node.path)) {
      const path = this.stands(m.path);
      keys.push(`m:${path}`);
      if (!this.shown.isOpen(path)) return keys;
    }
    keys.push(`n:${this.graph.representative.get(id) ?? id}`);
    return keys;
  }

  /** Path of the module drawn for this one (a repeated layer is drawn once). */
  stands(path: string): string {
    let known = this.standing.get(path);
    if (known === undefined) this.standing.set(path, (known = this.standsFor(path)));
    return known;
  }

  private standsFor(path: string): string {
    const direct = this.hiddenBy.get(path);
    if (direct !== undefined) return direct;
    const cut = path.lastIndexOf(".");
    if (cut < 0) return path;
    const parent = path.slice(0, cut);
    const above = this.stands(parent);
    return above === parent ? path : above + path.slice(cut);
  }

  /** The repeated layer around a path, or null. */
  private repeated(path: string): string | null {
    for (let at = path; at !== ""; at = at.slice(0, Math.max(0, at.lastIndexOf(".")))) if (this.graph.repeats.has(at)) return at;
    return null;
  }

  private inside(module: Module): Inside {
    const known = this.cache.get(module.path);
    if (known !== undefined) return known;
    const drafts = this.drafts(module);
    const edges = this.edges(module, drafts);
    const made = place(drafts, edges);
    this.cache.set(module.path, made);
    return made;
  }

  /** Whether anything in a module is drawn: one that holds weights alone is no box. */
  private holds(module: Module): boolean {
    let known = this.held.get(module.path);
    if (known === undefined) this.held.set(module.path, (known = module.items.some((item) => (typeof item === "number" ? !this.shown.isHidden(this.graph.nodes.get(item)!) : this.holds(item)))));
    return known;
  }

  private drafts(module: Module): Map<string, Draft> {
    const drafts = new Map<string, Draft>();
    for (const item of module.items) {
      if (typeof item === "number") {
        const node = this.graph.nodes.get(item)!;
        if (this.shown.isHidden(node)) continue;
        const lines = this.shown.label(node);
        const chips = node.inputs
          .map((i) => this.graph.nodes.get(i))
          .filter((n): n is GraphNode => n !== undefined && this.shown.isHidden(n))
          .map((n) => this.shown.chip(n, node));
        const longest = Math.max((lines[0]?.length ?? 0) * LETTER, (lines[1]?.length ?? 0) * SMALL_LETTER, 52);
        drafts.set(`n:${item}`, {
          item: node,
          key: `n:${item}`,
          count: 1,
          inside: null,
          chips,
          width: Math.min(WIDEST, longest + 20),
          height: NODE_HEIGHT + (chips.length > 0 ? CHIP_HEIGHT : 0),
        });
        continue;
      }
      if (this.hiddenBy.has(item.path) || !this.holds(item)) continue;
      const count = this.graph.repeats.get(item.path)?.count ?? 1;
      const inside = this.shown.isOpen(item.path) ? this.inside(item) : null;
      const title = this.shown.title(item).length + (count > 1 ? 5 : 0);
      drafts.set(`m:${item.path}`, {
        item,
        key: `m:${item.path}`,
        count,
        inside,
        chips: [],
        width: Math.max(inside?.width ?? LEAST, title * TITLE_LETTER + 44),
        height: inside === null ? NODE_HEIGHT : inside.height + HEADER,
      });
    }
    return drafts;
  }

  /** Data flow between the items of a module: flows inside an item, from outside and to outside are left out. */
  private edges(module: Module, drafts: Map<string, Draft>): { from: string; to: string; sources: number[] }[] {
    this.lifted ??= this.lift();
    const level = this.lifted.get(module.path);
    if (level === undefined) return [];
    return [...level.values()]
      .filter((e) => drafts.has(e.from) && drafts.has(e.to))
      .map((e) => ({ from: e.from, to: e.to, sources: [...e.sources] }));
  }

  /**
   * Every edge, at the module where its two ends part. One pass over what is drawn: a repeated layer is drawn once, and
   * what one layer hands to the next one that it stands for too is no edge inside it.
   */
  private lift() {
    const found = new Map<string, Map<string, { from: string; to: string; sources: Set<number> }>>();
    const chains = new Map<string, string[]>();
    const chain = (path: string): string[] => {
      let c = chains.get(path);
      if (c === undefined) chains.set(path, (c = this.graph.ancestors(path).map((m) => m.path)));
      return c;
    };
    for (const node of this.graph.nodes.values()) {
      if (this.shown.isHidden(node)) continue;
      if (this.stands(node.path) !== node.path) continue;
      const to = chain(node.path);
      for (const i of node.inputs) {
        const source = this.graph.nodes.get(i);
        if (source === undefined || this.shown.isHidden(source)) continue;
        const stands = this.stands(source.path);
        if (stands !== source.path && this.repeated(stands) === this.repeated(node.path)) continue;
        const from = chain(stands);
        let at = 0;
        while (at < to.length && at < from.length && to[at] === from[at]) at++;
        const a = at < from.length ? `m:${from[at]}` : `n:${this.graph.representative.get(i) ?? i}`;
        const b = at < to.length ? `m:${to[at]}` : `n:${this.graph.representative.get(node.id) ?? node.id}`;
        if (a === b) continue;
        const level = at === 0 ? "" : to[at - 1]!;
        let edges = found.get(level);
        if (edges === undefined) found.set(level, (edges = new Map()));
        const edge = edges.get(`${a}>${b}`);
        if (edge === undefined) edges.set(`${a}>${b}`, { from: a, to: b, sources: new Set([i]) });
        else edge.sources.add(i);
      }
    }
    return found;
  }
}

type Placed = { width: number; height: number; at: Map<string, { x: number; y: number }>; points: { x: number; y: number }[][] };

/** Modules of equal content are placed once: most steps change few of them. */
const placed = new Map<string, Placed>();
const MOST_PLACED = 400;

function place(drafts: Map<string, Draft>, edges: { from: string; to: string; sources: number[] }[]): Inside {
  const key = `${[...drafts.values()].map((d) => `${d.key} ${d.width.toFixed(1)} ${d.height.toFixed(1)}`).join(",")}|${edges.map((e) => `${e.from}>${e.to}`).join(",")}`;
  let known = placed.get(key);
  if (known === undefined) known = arrange(drafts, edges);
  else placed.delete(key);
  placed.set(key, known);
  if (placed.size > MOST_PLACED) placed.delete(placed.keys().next().value!);
  const boxes: (NodeBox | ModuleBox)[] = [];
  for (const d of drafts.values()) {
    const at = known.at.get(d.key)!;
    const box = { key: d.key, x: at.x - d.width / 2, y: at.y - d.height / 2, width: d.width, height: d.height };
    if ("op" in d.item) boxes.push({ ...box, kind: "node", node: d.item, chips: d.chips });
    else boxes.push({ ...box, kind: "module", module: d.item, count: d.count, inside: d.inside });
  }
  return { width: known.width, height: known.height, boxes, edges: edges.map((e, n) => ({ ...e, points: known.points[n]! })) };
}

function arrange(drafts: Map<string, Draft>, edges: { from: string; to: string }[]): Placed {
  const graph = new dagre.graphlib.Graph({ multigraph: false, compound: false });
  graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 26, edgesep: 8, marginx: PADDING, marginy: PADDING, ranker: drafts.size > 20 ? "longest-path" : "network-simplex" });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const d of drafts.values()) graph.setNode(d.key, { width: d.width, height: d.height });
  for (const e of edges) graph.setEdge(e.from, e.to, {});
  dagre.layout(graph);
  const size = graph.graph() as { width?: number; height?: number };
  return {
    width: Number.isFinite(size.width) ? size.width! : 2 * PADDING,
    height: Number.isFinite(size.height) ? size.height! : 2 * PADDING,
    at: new Map([...drafts.keys()].map((k) => [k, graph.node(k) as unknown as { x: number; y: number }])),
    points: edges.map((e) => (graph.edge(e.from, e.to) as unknown as { points: { x: number; y: number }[] }).points),
  };
}

/** Letters of a name that fit into a width. */
export function letters(width: number): number {
  return Math.floor((width - 8) / LETTER);
}

/** Height of an open module's title, above its inside. */
export const TITLE_HEIGHT = HEADER;
