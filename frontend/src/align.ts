/**
 * Panes in step: which place of one picture is which place of another. Two graphs have other heights and widths, so
 * equal pixels are not equal places; boxes that stand in both are. Their tops and bottoms are knots, and between
 * two knots everything moves evenly, so that panning one pane never makes another jump.
 */
import { TITLE_HEIGHT, type Inside, type ModuleBox, type NodeBox } from "./layout.ts";

interface Knot {
  /** Height in the one picture and in the other. */
  a: number;
  b: number;
  /** How much further right the box stands in the other. */
  dx: number;
}

/** Boxes of one module that are compared at most; the tallest count. */
const MOST = 240;

export class Alignment {
  private readonly knots: Knot[] = [];

  constructor(a: Inside, b: Inside) {
    this.collect(a, b, 0, 0, 0, 0);
    this.knots.sort((p, q) => p.a - q.a || p.b - q.b);
    if (this.knots.length === 0) this.knots.push({ a: 0, b: 0, dx: (b.width - a.width) / 2 });
  }

  /** The place in b of a place in a. */
  map(x: number, y: number): { x: number; y: number } {
    const { knots } = this;
    let [low, high] = [0, knots.length];
    while (low < high) {
      const mid = (low + high) >> 1;
      if (knots[mid]!.a <= y) low = mid + 1;
      else high = mid;
    }
    const before = knots[low - 1];
    const after = knots[low];
    if (before === undefined) return { x: x + after!.dx, y: y + after!.b - after!.a };
    if (after === undefined) return { x: x + before.dx, y: y + before.b - before.a };
    const part = after.a === before.a ? 0 : (y - before.a) / (after.a - before.a);
    return { x: x + before.dx + part * (after.dx - before.dx), y: before.b + part * (after.b - before.b) };
  }

  /** Knots of boxes that both modules hold, as many as keep their order in both. */
  private collect(a: Inside, b: Inside, ax: number, ay: number, bx: number, by: number): void {
    const there = new Map(b.boxes.map((box) => [box.key, box]));
    const shared = a.boxes.map((box) => [box, there.get(box.key)] as const).filter((pair): pair is readonly [NodeBox | ModuleBox, NodeBox | ModuleBox] => pair[1] !== undefined);
    shared.sort((p, q) => q[0].height - p[0].height || p[0].y - q[0].y);
    const kept: (readonly [NodeBox | ModuleBox, NodeBox | ModuleBox])[] = [];
    for (const pair of shared.slice(0, MOST)) if (kept.every((k) => (above(k[0], pair[0]) && above(k[1], pair[1])) || (above(pair[0], k[0]) && above(pair[1], k[1])))) kept.push(pair);
    for (const [p, q] of kept) {
      const dx = bx + q.x + q.width / 2 - (ax + p.x + p.width / 2);
      this.knots.push({ a: ay + p.y, b: by + q.y, dx }, { a: ay + p.y + p.height, b: by + q.y + q.height, dx });
      if (p.kind !== "module" || q.kind !== "module" || p.inside === null || q.inside === null) continue;
      this.collect(p.inside, q.inside, ax + p.x + (p.width - p.inside.width) / 2, ay + p.y + TITLE_HEIGHT, bx + q.x + (q.width - q.inside.width) / 2, by + q.y + TITLE_HEIGHT);
    }
  }
}

function above(p: NodeBox | ModuleBox, q: NodeBox | ModuleBox): boolean {
  return p.y + p.height <= q.y;
}
