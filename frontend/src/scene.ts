/**
 * The picture: an SVG that holds only what is in view. Every change of view walks the layout from the top and
 * leaves out modules outside the frame or too small to read, so the work follows what is visible.
 */
import { letters, TITLE_HEIGHT, type Edge, type Inside, type Layout, type ModuleBox, type NodeBox } from "./layout.ts";

const NS = "http://www.w3.org/2000/svg";
/** Screen pixels below which a module's inside is not drawn. */
const SMALLEST = 18;
/** Scale below which text cannot be read. */
export const FAR = 0.42;

export interface Look {
  /** CSS class for the fill (a category, a diff state). */
  className: string;
  /** Fill that goes before the class's (an overlay's colour). */
  fill?: string;
  /** A short text in the corner (an overlay's number). */
  badge?: string;
  /** Lines of text. */
  lines: string[];
  /** After the second line, each in a class of its own: what changed in a closed module. */
  deltas?: { text: string; className: string }[];
  /** A bar at the foot of a closed module: what it is made of. */
  parts?: { share: number; className?: string; fill?: string }[];
  /** What a screen reader says. */
  title: string;
}

export interface SceneOptions {
  look(box: NodeBox | ModuleBox): Look;
  onSelect(key: string | null): void;
  onToggle(path: string): void;
  onHover(key: string | null, event: PointerEvent | null): void;
  /** The reader moved the view (not: it was moved to follow another pane). */
  onView?(view: View): void;
  /** The frame is another, and the whole picture was in it. */
  onRefit?(): void;
  /** A frame was drawn. */
  onDrawn?(): void;
}

/** A module that is drawn, and where its corner is on the screen. */
interface Said {
  box: ModuleBox;
  x: number;
  y: number;
}

/** What flows through a node: values that it gives, values that it takes, and the boxes around it, itself included. */
export interface Flow {
  out: ReadonlySet<number>;
  into: ReadonlySet<number>;
  trail: ReadonlySet<string>;
}

let scenes = 0;

export interface View {
  x: number;
  y: number;
  scale: number;
}

interface Placed {
  x: number;
  y: number;
  width: number;
  height: number;
}

export class Scene {
  readonly svg: SVGSVGElement;
  view: View = { x: 0, y: 0, scale: 1 };
  /** Boxes drawn at the last frame. */
  visible = 0;
  private readonly world: SVGGElement;
  /** Names of modules where the text in the boxes is too small: in pixels of the screen, none over another. */
  private readonly names: SVGGElement;
  private readonly layers: { modules: SVGGElement; edges: SVGGElement; nodes: SVGGElement };
  private elements = new Map<string, SVGElement>();
  private looks = new Map<string, string>();
  private readonly drawn = new WeakMap<SVGElement, Edge>();
  private layout: Layout | null = null;
  private scheduled = false;
  /** What is drawn may no longer be what its look says. */
  private stale = true;
  /** The whole picture was fitted into the frame, and the reader has not moved since. */
  fitted = false;
  private size = { width: 0, height: 0 };
  private readonly arrow: string;
  private selected: string | null = null;
  private marked = new Set<string>();
  private flow: Flow | null = null;
  private readonly observer: ResizeObserver;

  constructor(
    private readonly host: HTMLElement,
    private readonly options: SceneOptions,
  ) {
    this.svg = make("svg", { class: "adk-scene", role: "application", "aria-roledescription": "graph", "aria-label": "Graph: arrow keys follow inputs and users, Enter opens a module, plus and minus zoom", tabindex: "0" }) as SVGSVGElement;
    this.arrow = `adk-arrow-${scenes++}`;
    const defs = make("defs", {});
    const arrow = make("marker", { id: this.arrow, viewBox: "0 0 8 8", refX: "7", refY: "4", markerWidth: "6", markerHeight: "6", orient: "auto" });
    arrow.append(make("path", { d: "M0,0.5 L7.5,4 L0,7.5 z", class: "adk-arrow" }));
    const flowing = arrow.cloneNode(true) as SVGElement;
    flowing.id = `${this.arrow}-flows`;
    flowing.firstElementChild!.setAttribute("class", "adk-arrow adk-flows");
    defs.append(arrow, flowing);
    this.world = make("g", {}) as SVGGElement;
    this.layers = { modules: make("g", {}), edges: make("g", { class: "adk-edges" }), nodes: make("g", {}) } as Scene["layers"];
    this.world.append(this.layers.modules, this.layers.edges, this.layers.nodes);
    this.names = make("g", { class: "adk-names" }) as SVGGElement;
    this.svg.append(defs, this.world, this.names);
    host.append(this.svg);
    this.listen();
    this.observer = new ResizeObserver(() => this.resized());
    this.observer.observe(host);
  }

  dispose(): void {
    this.observer.disconnect();
    this.svg.remove();
  }

  /** Draw another layout (or the same after a change); the view stays. */
  show(layout: Layout): void {
    this.layout = layout;
    this.stale = true;
    this.render();
  }

  /** Look where another pane looks. */
  follow(view: View): void {
    this.view = view;
    this.fitted = false;
    this.schedule();
  }

  /** Mark what is chosen, and the edges that its values come and go along. */
  select(key: string | null, marked: Iterable<string> = [], flow: Flow | null = null): void {
    this.selected = key;
    this.marked = new Set(marked);
    this.flow = flow;
    for (const [k, e] of this.elements) {
      e.classList.toggle("adk-selected", k === key);
      e.classList.toggle("adk-marked", this.marked.has(k));
      const edge = this.drawn.get(e);
      if (edge !== undefined) this.mark(e, edge);
    }
  }

  private mark(element: SVGElement, edge: Edge): void {
    const flows = this.flows(edge);
    element.setAttribute("class", flows ? "adk-edge adk-flows" : "adk-edge");
    element.setAttribute("marker-end", `url(#${this.arrow}${flows ? "-flows" : ""})`);
  }

  private flows(edge: Edge): boolean {
    const { flow, selected } = this;
    if (flow === null) return selected !== null && (edge.from === selected || edge.to === selected);
    return edge.sources.some((s) => flow.out.has(s)) || (flow.trail.has(edge.to) && edge.sources.some((s) => flow.into.has(s)));
  }

  /** The scale at which the whole picture is in the frame. */
  get whole(): number {
    const frame = this.frame();
    const root = this.layout?.root();
    if (root === undefined || frame.width === 0) return 1;
    return Math.min(1.1, Math.max(0.02, Math.min((frame.width * 0.96) / root.width, (frame.height * 0.96) / root.height)));
  }

  /** The whole picture in the frame, at its own scale or at a smaller one that others share. */
  fit(scale = this.whole): void {
    const frame = this.frame();
    const root = this.layout?.root();
    if (root === undefined || frame.width === 0) return;
    this.moveTo({ scale, x: (frame.width - root.width * scale) / 2, y: root.height * scale > frame.height * 0.9 ? 8 : (frame.height - root.height * scale) / 2 });
    this.fitted = true;
  }

  /** What stood in the middle stays there. */
  private resized(): void {
    const was = this.size;
    const { width, height } = (this.size = { width: this.host.clientWidth, height: this.host.clientHeight });
    if (was.width === 0 || width === 0 || (was.width === width && was.height === height)) return this.schedule();
    if (this.fitted) this.options.onRefit?.();
    else this.follow({ scale: this.view.scale, x: this.view.x + (width - was.width) / 2, y: this.view.y + (height - was.height) / 2 });
  }

  /** Bring a box into the frame without changing the scale more than needed. */
  reveal(key: string): void {
    const box = this.find(key);
    if (box === null) return;
    const frame = this.frame();
    const scale = Math.max(this.view.scale, 0.6);
    const [x, y] = [box.x * scale + this.view.x, box.y * scale + this.view.y];
    const inside = scale === this.view.scale && x >= 0 && y >= 0 && x + box.width * scale <= frame.width && y + box.height * scale <= frame.height;
    if (!inside) this.moveTo({ scale, x: frame.width / 2 - (box.x + box.width / 2) * scale, y: frame.height / 2 - (box.y + Math.min(box.height, frame.height / scale) / 2) * scale });
  }

  /** Keep a box where it is on the screen while the layout around it changes. */
  anchored(key: string, change: () => void): void {
    const before = this.find(key);
    change();
    this.stale = true;
    this.fitted = false;
    const after = this.find(key);
    if (before !== null && after !== null) {
      this.view = {
        scale: this.view.scale,
        x: this.view.x + (before.x + before.width / 2 - after.x - after.width / 2) * this.view.scale,
        y: this.view.y + (before.y - after.y) * this.view.scale,
      };
    }
    this.render();
  }

  moveTo(view: View): void {
    this.view = view;
    this.fitted = false;
    this.schedule();
    this.options.onView?.(view);
  }

  zoom(factor: number, at?: { x: number; y: number }): void {
    const frame = this.frame();
    const p = at ?? { x: frame.width / 2, y: frame.height / 2 };
    const scale = Math.min(4, Math.max(0.02, this.view.scale * factor));
    const f = scale / this.view.scale;
    this.moveTo({ scale, x: p.x - (p.x - this.view.x) * f, y: p.y - (p.y - this.view.y) * f });
  }

  /** Where a box stands in world coordinates, drawn or not. */
  find(key: string): Placed | null {
    return this.layout === null ? null : findIn(this.layout.root(), key, 0, 0);
  }

  /** Whether nothing of the picture lies outside the frame. */
  get complete(): boolean {
    const root = this.layout?.root();
    const frame = this.frame();
    const { x, y, scale } = this.view;
    return root === undefined || (x >= -2 && y >= -2 && x + root.width * scale <= frame.width + 2 && y + root.height * scale <= frame.height + 2);
  }

  /** Size of the frame, known from the observer: reading it from the page would make the browser lay it out. */
  frame(): { width: number; height: number } {
    if (this.size.width === 0) this.size = { width: this.host.clientWidth, height: this.host.clientHeight };
    return this.size;
  }

  private schedule(): void {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.render();
    });
  }

  /** Bring the SVG in line with the layout and the view. */
  render(): void {
    if (this.layout === null) return;
    const { x, y, scale } = this.view;
    this.world.setAttribute("transform", `translate(${x.toFixed(2)},${y.toFixed(2)}) scale(${scale.toFixed(4)})`);
    const far = scale < FAR;
    const said: Said[] = [];
    this.svg.classList.toggle("adk-far", far);
    const frame = this.frame();
    const margin = 60 / scale;
    const seen = { left: -x / scale - margin, top: -y / scale - margin, right: (frame.width - x) / scale + margin, bottom: (frame.height - y) / scale + margin };
    const kept = new Set<string>();
    this.visible = 0;
    const walk = (inside: Inside, dx: number, dy: number): void => {
      for (const edge of inside.edges) this.edge(edge, dx, dy, seen, kept);
      for (const box of inside.boxes) {
        const [bx, by] = [box.x + dx, box.y + dy];
        if (bx > seen.right || by > seen.bottom || bx + box.width < seen.left || by + box.height < seen.top) continue;
        this.visible++;
        kept.add(box.key);
        const open = box.kind === "module" && box.inside !== null && box.height * scale > SMALLEST;
        this.box(box, bx, by, open);
        if (far && box.kind === "module") said.push({ box, x: bx * scale + x, y: by * scale + y });
        if (open) walk((box as ModuleBox).inside!, bx + (box.width - (box as ModuleBox).inside!.width) / 2, by + TITLE_HEIGHT);
      }
    };
    walk(this.layout.root(), 0, 0);
    this.stale = false;
    this.name(said, scale, frame);
    for (const [key, element] of this.elements) {
      if (kept.has(key)) continue;
      element.remove();
      this.elements.delete(key);
      this.looks.delete(key);
    }
    this.options.onDrawn?.();
  }

  /** From afar: the names of the modules that have room for them, outer ones first. */
  private name(said: Said[], scale: number, frame: { width: number; height: number }): void {
    const taken: { left: number; top: number; right: number; bottom: number }[] = [];
    const made: SVGElement[] = [];
    for (const { box, x, y } of said) {
      const told = `${box.module.name}${box.count > 1 ? ` ×${box.count}` : ""}`;
      const [width, room] = [told.length * 6.4 + 6, box.width * scale];
      if (width > room || box.height * scale < 15 || y < -2 || y > frame.height) continue;
      const free = [x + 3, x + room - width].find((left) => taken.every((t) => left > t.right || left + width < t.left || y > t.bottom || y + 14 < t.top));
      if (free === undefined) continue;
      taken.push({ left: free, top: y, right: free + width, bottom: y + 14 });
      made.push(text(told, free, y + 12, "adk-name"));
    }
    this.names.replaceChildren(...made);
  }

  private box(box: NodeBox | ModuleBox, x: number, y: number, open: boolean): void {
    // Moving the view changes no box: only a new one, or one that opens by coming nearer, is drawn then.
    if (!this.stale && this.looks.get(box.key)?.startsWith(`${open}|`)) return;
    const look = this.options.look(box);
    const state = `${open}|${box.width}|${box.height}|${look.className}|${look.fill ?? ""}|${look.badge ?? ""}|${look.lines.join("\n")}|${look.deltas?.map((d) => d.text).join() ?? ""}|${look.parts?.map((p) => `${p.className ?? p.fill}${p.share.toFixed(3)}`).join() ?? ""}`;
    let element = this.elements.get(box.key);
    if (element === undefined || this.looks.get(box.key) !== state) {
      const made = draw(box, look, open);
      made.classList.toggle("adk-selected", box.key === this.selected);
      made.classList.toggle("adk-marked", this.marked.has(box.key));
      // In its place: a module drawn anew must not cover the modules inside it.
      if (element !== undefined) element.replaceWith(made);
      else (box.kind === "module" ? this.layers.modules : this.layers.nodes).append(made);
      this.elements.set(box.key, made);
      this.looks.set(box.key, state);
      element = made;
    }
    element.setAttribute("transform", `translate(${x.toFixed(1)},${y.toFixed(1)})`);
  }

  private edge(edge: Edge, dx: number, dy: number, seen: { left: number; top: number; right: number; bottom: number }, kept: Set<string>): void {
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const p of edge.points) {
      left = Math.min(left, p.x);
      right = Math.max(right, p.x);
      top = Math.min(top, p.y);
      bottom = Math.max(bottom, p.y);
    }
    if (left + dx > seen.right || top + dy > seen.bottom || right + dx < seen.left || bottom + dy < seen.top) return;
    const key = `${edge.from}>${edge.to}`;
    kept.add(key);
    let element = this.elements.get(key);
    if (element === undefined) {
      element = make("path", {});
      this.layers.edges.append(element);
      this.elements.set(key, element);
    } else if (!this.stale) return;
    this.drawn.set(element, edge);
    this.mark(element, edge);
    element.setAttribute("d", curve(edge.points, dx, dy));
  }

  private listen(): void {
    let drag: { x: number; y: number; view: View; moved: boolean } | null = null;
    this.svg.addEventListener("pointerdown", (e) => {
      if (e.button !== 0) return;
      drag = { x: e.clientX, y: e.clientY, view: this.view, moved: false };
    });
    this.svg.addEventListener("pointermove", (e) => {
      if (drag === null) {
        this.options.onHover(keyOf(e.target), e);
        return;
      }
      const [mx, my] = [e.clientX - drag.x, e.clientY - drag.y];
      if (!drag.moved && Math.hypot(mx, my) < 4) return;
      if (!drag.moved) {
        drag.moved = true;
        this.svg.setPointerCapture(e.pointerId);
        this.svg.classList.add("adk-dragging");
      }
      this.moveTo({ scale: drag.view.scale, x: drag.view.x + mx, y: drag.view.y + my });
    });
    const end = (e: PointerEvent): void => {
      const was = drag;
      drag = null;
      this.svg.classList.remove("adk-dragging");
      if (was === null || was.moved || e.type !== "pointerup") return;
      const target = e.target as Element;
      const key = keyOf(target);
      if (key?.startsWith("m:") && target.closest(".adk-fold") !== null) this.options.onToggle(key.slice(2));
      else this.options.onSelect(key);
    };
    this.svg.addEventListener("pointerup", end);
    this.svg.addEventListener("pointercancel", end);
    this.svg.addEventListener("pointerleave", () => this.options.onHover(null, null));
    this.svg.addEventListener("dblclick", (e) => {
      const key = keyOf(e.target);
      if (key?.startsWith("m:")) this.options.onToggle(key.slice(2));
    });
    this.svg.addEventListener(
      "wheel",
      (e) => {
        // The page scrolls until the graph has been clicked: a notebook must stay scrollable.
        if (!e.ctrlKey && !e.metaKey && !this.svg.matches(":focus")) return;
        e.preventDefault();
        const box = this.svg.getBoundingClientRect();
        if (e.shiftKey) this.moveTo({ ...this.view, x: this.view.x - e.deltaY });
        else this.zoom(Math.exp(-e.deltaY * (e.deltaMode === 1 ? 0.05 : 0.0016)), { x: e.clientX - box.left, y: e.clientY - box.top });
      },
      { passive: false },
    );
  }
}

function keyOf(target: EventTarget | null): string | null {
  return (target as Element | null)?.closest?.("[data-key]")?.getAttribute("data-key") ?? null;
}

function draw(box: NodeBox | ModuleBox, look: Look, open: boolean): SVGGElement {
  const g = make("g", { "data-key": box.key, class: `adk-${box.kind} ${open ? "adk-open" : ""} ${look.className}` }) as SVGGElement;
  const title = make("title", {});
  title.textContent = look.title;
  const rect = make("rect", { width: box.width.toFixed(1), height: box.height.toFixed(1), rx: box.kind === "module" ? "7" : "4" });
  if (look.fill !== undefined) (rect as SVGElement).style.fill = look.fill;
  g.append(title, rect);
  if (box.kind === "module") {
    const fold = make("g", { class: "adk-fold" });
    fold.append(make("rect", { x: "5", y: "6", width: "16", height: "16", rx: "3" }), make("path", { d: open ? "M9,14 h8" : "M9,14 h8 M13,10 v8" }));
    const [name, type] = (look.lines[0] ?? "").split(/(?=: )/, 2);
    const told = text(name ?? "", 27, open ? 18 : 16, "adk-name");
    if (type !== undefined) {
      const more = make("tspan", { class: "adk-type" });
      more.textContent = type;
      told.append(more);
    }
    g.append(fold, told);
    if (box.count > 1) g.append(text(`×${box.count}`, box.width - 8, 18, "adk-count", "end"));
    if (!open && look.lines[1] !== undefined) {
      const detail = text(look.lines[1], 27, 28, "adk-detail");
      for (const delta of look.deltas ?? []) {
        const more = make("tspan", { class: delta.className, dx: "5" });
        more.textContent = delta.text;
        detail.append(more);
      }
      g.append(detail);
    }
    if (!open && look.parts !== undefined) bar(g, look.parts, 27, 31.5, box.width - 35);
  } else {
    const two = (look.lines[1] ?? "") !== "";
    g.append(text(clip(look.lines[0] ?? "", letters(box.width)), box.width / 2, two ? 15 : 22, "adk-name", "middle"));
    if (two) g.append(text(clip(look.lines[1]!, box.width / 6.1), box.width / 2, 29, "adk-detail", "middle"));
    if (box.chips.length > 0) g.append(text(clip(box.chips.join(", "), box.width / 5.7), box.width / 2, 43, "adk-chips", "middle"));
  }
  if (look.badge !== undefined) g.append(text(look.badge, box.width - 4, -3, "adk-badge", "end"));
  return g;
}

/** Shares of a whole, side by side. */
function bar(g: SVGElement, parts: NonNullable<Look["parts"]>, x: number, y: number, width: number): void {
  const strip = make("g", { class: "adk-parts" });
  for (const { share, className, fill } of parts) {
    const part = make("rect", { x: x.toFixed(1), y: String(y), width: (share * width).toFixed(1), height: "2.6", ...(className === undefined ? {} : { class: className }) });
    if (fill !== undefined) part.style.fill = fill;
    strip.append(part);
    x += share * width;
  }
  g.append(strip);
}

function clip(value: string, letters: number): string {
  return value.length > letters ? `${value.slice(0, Math.max(1, letters - 1))}…` : value;
}

function text(value: string, x: number, y: number, className: string, anchor = "start"): SVGElement {
  const t = make("text", { x: x.toFixed(1), y: String(y), class: className, "text-anchor": anchor });
  t.textContent = value;
  return t;
}

function make(tag: string, attributes: Record<string, string>): SVGElement {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  return e;
}

function curve(points: { x: number; y: number }[], dx: number, dy: number): string {
  const p = points.map((q) => `${(q.x + dx).toFixed(1)},${(q.y + dy).toFixed(1)}`);
  if (p.length < 3) return `M${p.join(" L")}`;
  let d = `M${p[0]}`;
  for (let i = 1; i < points.length - 1; i++) {
    const [a, b] = [points[i]!, points[i + 1]!];
    d += ` Q${p[i]} ${((a.x + b.x) / 2 + dx).toFixed(1)},${((a.y + b.y) / 2 + dy).toFixed(1)}`;
  }
  return `${d} L${p[p.length - 1]}`;
}

function findIn(inside: Inside, key: string, dx: number, dy: number): Placed | null {
  for (const box of inside.boxes) {
    if (box.key === key) return { x: box.x + dx, y: box.y + dy, width: box.width, height: box.height };
    if (box.kind !== "module" || box.inside === null) continue;
    // A module's path is a prefix of everything in it; nodes carry no path in their key, so look into all.
    if (key.startsWith("m:") && !key.startsWith(`${box.key}.`)) continue;
    const found = findIn(box.inside, key, box.x + dx + (box.width - box.inside.width) / 2, box.y + dy + TITLE_HEIGHT);
    if (found !== null) return found;
  }
  return null;
}
