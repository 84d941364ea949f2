/** One program as the picture needs it: nodes, and the tree of modules they belong to. */

export interface GraphNode {
  id: number;
  name: string;
  op: string;
  target: string;
  path: string;
  inputs: number[];
}

/** A module of the model: its own nodes and its children, in the order of first appearance. */
export interface Module {
  path: string;
  name: string;
  parent: Module | null;
  items: (Module | number)[];
  /** Nodes in it and below it. */
  size: number;
}

/** Modules that are drawn as one: `path` stands for `count` modules of equal structure. */
export interface Repeat {
  path: string;
  count: number;
  /** Every path it stands for, itself first. */
  members: string[];
}

export class Graph {
  readonly root: Module;
  readonly modules = new Map<string, Module>();
  readonly users = new Map<number, number[]>();
  /** The module a node is drawn in. */
  readonly home = new Map<number, Module>();

  /**
   * `nodes` in execution order; `repeats` by path of the module that is drawn; `representative` gives, for a node of
   * a repeated module, its counterpart in the one that is drawn.
   */
  constructor(
    readonly nodes: Map<number, GraphNode>,
    readonly repeats: Map<string, Repeat> = new Map(),
    readonly representative: Map<number, number> = new Map(),
  ) {
    this.root = this.module("");
    for (const node of nodes.values()) {
      const home = this.module(node.path);
      home.items.push(node.id);
      this.home.set(node.id, home);
      for (const i of node.inputs) {
        const users = this.users.get(i);
        if (users === undefined) this.users.set(i, [node.id]);
        else if (users[users.length - 1] !== node.id) users.push(node.id);
      }
      for (let m: Module | null = home; m !== null; m = m.parent) m.size++;
    }
  }

  private module(path: string): Module {
    const known = this.modules.get(path);
    if (known !== undefined) return known;
    const cut = path.lastIndexOf(".");
    const parent = path === "" ? null : this.module(cut < 0 ? "" : path.slice(0, cut));
    const made: Module = { path, name: path.slice(cut + 1), parent, items: [], size: 0 };
    this.modules.set(path, made);
    parent?.items.push(made);
    return made;
  }

  /** Modules from the root's child down to the one with this path. */
  ancestors(path: string): Module[] {
    const found: Module[] = [];
    for (let m: Module | null = this.modules.get(path) ?? null; m !== null && m.parent !== null; m = m.parent) found.push(m);
    return found.reverse();
  }
}
