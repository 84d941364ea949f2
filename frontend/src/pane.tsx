/** One graph on the screen: the scene and its minimap, kept in step with the store and with the other panes. */
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Alignment } from "./align.ts";
import { isLight } from "./colour.ts";
import { TITLE_HEIGHT, type Inside, type ModuleBox, type NodeBox } from "./layout.ts";
import type { Walk } from "./record.ts";
import { FAR, Scene, type Flow, type Look, type View } from "./scene.ts";
import type { Marks, Point, Store, Touched } from "./store.ts";

interface Props {
  store: Store;
  points: Point[];
  /** Which of the points it shows. */
  n: number;
  group: Group;
}

/** The scenes on the screen, which move together: each with the graph that it shows now. */
export type Group = Map<Scene, number>;

export function Pane({ store, points, n, group }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const tip = useRef<HTMLDivElement>(null);
  const scene = useRef<Scene | null>(null);
  const drawn = useRef(() => {});
  const shown = useRef<{ walk: Walk; graph: number } | null>(null);
  const { graph, title, step } = points[n]!;
  const current = useRef({ points, n });
  current.current = { points, n };
  const ready = graph >= 0 && store.walk.ready(graph);

  useLayoutEffect(() => {
    const focus = (): void => {
      const at = current.current.points[current.current.n]!.step;
      if (store.state.panes.length > 0) store.set({ step: at });
    };
    const made = new Scene(host.current!, {
      look: (box) => look(store, current.current.points, current.current.n, box),
      onSelect: (key) => {
        focus();
        choose(store, key);
      },
      onToggle: (path) => store.toggle(path),
      onHover: (key, event) => hover(tip.current!, host.current!, store, current.current.points[current.current.n]!.graph, key, event),
      onView: () => follow(store, group, made),
      onRefit: () => fit(store, group),
      onDrawn: () => drawn.current(),
    });
    scene.current = made;
    made.svg.addEventListener("focus", () => made.svg.matches(":focus-visible") && focus());
    made.svg.addEventListener("keydown", (e) => keys(e, store, made, () => fit(store, group, 0)));
    const stop = store.subscribe((changed) => {
      const { graph } = current.current.points[current.current.n]!;
      if (!changed.has("open") || graph < 0 || !store.walk.ready(graph)) return;
      const layout = store.layout(graph);
      if (store.anchor !== null) made.anchored(`m:${layout.stands(store.anchor)}`, () => made.show(layout));
      else made.show(layout);
    });
    return () => {
      stop();
      group.delete(made);
      made.dispose();
    };
  }, []);

  useLayoutEffect(() => {
    const s = scene.current!;
    if (!ready) {
      group.delete(s);
      return;
    }
    group.set(s, graph);
    const layout = store.layout(graph);
    const was = shown.current;
    if (was !== null && !s.fitted && was.walk === store.walk && was.graph !== graph) s.view = same(s.view, s.frame(), s.frame(), store.alignment(was.graph, graph));
    s.show(layout);
    if (s.frame().width > 0) {
      shown.current = { walk: store.walk, graph };
      const leader = [...group.keys()].find((other) => other !== s);
      if (was === null) {
        if (leader === undefined || leader.fitted) {
          fit(store, group);
          // Opened at a node: it is what the reader came for.
          const at = store.inspected === undefined ? undefined : layout.trail(store.inspected).at(-1);
          if (at !== undefined && graph === store.graph) s.reveal(at);
        } else follow(store, group, leader);
      } else if (s.fitted && was.graph !== graph) fit(store, group);
    }
    const { selection, module } = store.state;
    const marked = selection.map((id) => layout.trail(id)).filter((t) => t.length > 0).map((t) => t[t.length - 1]!);
    const first = store.inspected === undefined ? undefined : layout.trail(store.inspected).at(-1);
    const chosen = module !== null ? `m:${layout.stands(module)}` : (first ?? marked[0] ?? null);
    s.select(chosen, marked, module === null && selection.length > 0 ? flow(store, graph, selection) : null);
  });

  const one = points.length === 1;
  return (
    <section class={`adk-pane ${!one && step === store.state.step ? "adk-focus" : ""}`} aria-label={title}>
      <header>
        <select class="adk-point" aria-label={`Point shown in pane ${n + 1}`} title={title} value={title.startsWith("before") ? "before" : step} onChange={(e) => store.setPoint(n, Number(e.currentTarget.value))}>
          {title.startsWith("before") && <option value="before">{title}</option>}
          {store.walk.steps.map((s, k) => s.after >= 0 && <option key={k} value={k}>after {s.name}</option>)}
        </select>
        <span class="adk-tools">
          <button type="button" onClick={() => scene.current?.zoom(1.3)} title="Zoom in (+)" aria-label="Zoom in">+</button>
          <button type="button" onClick={() => scene.current?.zoom(1 / 1.3)} title="Zoom out (-)" aria-label="Zoom out">−</button>
          <button type="button" onClick={() => fit(store, group, 0)} title="Fit the graph (0)">fit</button>
          {!one && <button type="button" onClick={() => store.closePane(n)} title="Close this pane" aria-label={`Close ${title}`}>×</button>}
        </span>
      </header>
      <div class="adk-canvas" ref={host}>{graph >= 0 && !ready && <p class="adk-waiting" role="status">Reading this graph from the kernel …</p>}</div>
      <Minimap store={store} graph={ready ? graph : -1} scene={scene} drawn={drawn} />
      <div class="adk-tip" ref={tip} role="tooltip" hidden />
    </section>
  );
}

/** Bring a node into view in every pane that has it. */
export function reveal(store: Store, group: Group, id: number): void {
  store.reveal(id, store.walk.rowOf(store.graph).has(id) ? store.graph : store.before);
  requestAnimationFrame(() => {
    const panes = [...group].sort(([, a], [, b]) => Number(b === store.graph) - Number(a === store.graph));
    for (const [scene, graph] of panes) {
      if (!store.walk.ready(graph)) continue;
      const trail = store.layout(graph).trail(id);
      const last = trail[trail.length - 1];
      if (last === undefined) continue;
      scene.reveal(last);
      return;
    }
  });
}

/** What the chosen nodes give and take, told by the nodes that are drawn for them. */
function flow(store: Store, k: number, selection: number[]): Flow {
  const graph = store.walk.graph(k);
  const layout = store.layout(k);
  const drawn = (id: number): number => graph.representative.get(id) ?? id;
  const chosen = selection.map((id) => graph.nodes.get(drawn(id))).filter((n) => n !== undefined);
  return {
    out: new Set(chosen.map((n) => n.id)),
    into: new Set(chosen.flatMap((n) => n.inputs)),
    trail: new Set(selection.flatMap((id) => layout.trail(id))),
  };
}

/** Every graph whole, all at the scale that the largest needs; unless asked for, not so small that nothing can be read. */
export function fit(store: Store, group: Group, least = FAR): void {
  const scale = Math.max(least, Math.min(...[...group.keys()].map((s) => s.whole)));
  // The largest leads: with its middle in the middle most of all of them is seen.
  const [leader] = [...group.keys()].sort((a, b) => a.whole - b.whole);
  leader?.fit(scale);
  for (const s of group.keys()) s.fitted = true;
}

/** The other panes look at the same place: what stands in the middle of the one that moved. */
function follow(store: Store, group: Group, from: Scene): void {
  const graph = group.get(from);
  if (graph === undefined || group.size < 2) return;
  for (const [scene, other] of group) if (scene !== from) scene.follow(same(from.view, from.frame(), scene.frame(), other === graph ? null : store.alignment(graph, other)));
}

interface Size {
  width: number;
  height: number;
}

/** The view that has the same place in the middle of another frame and graph. */
function same({ x, y, scale }: View, from: Size, to: Size, alignment: Alignment | null): View {
  const middle = { x: (from.width / 2 - x) / scale, y: (from.height / 2 - y) / scale };
  const there = alignment?.map(middle.x, middle.y) ?? middle;
  return { scale, x: to.width / 2 - there.x * scale, y: to.height / 2 - there.y * scale };
}

function choose(store: Store, key: string | null): void {
  if (key === null) store.select([]);
  else if (key.startsWith("m:")) store.select([], key.slice(2));
  else if (key.startsWith("n:")) store.select([Number(key.slice(2))]);
}

function look(store: Store, points: Point[], n: number, box: NodeBox | ModuleBox): Look {
  const { walk } = store;
  const marks = store.marks(n, points);
  const laid = store.overlay(points[n]!.graph);
  if (box.kind === "module") {
    const { path } = box.module;
    const closed = box.inside === null;
    const said = closed ? (laid?.of(path) ?? null) : null;
    const touched = marks.modules.get(path);
    const parts = !closed || said?.fill !== undefined ? undefined : laid === null ? shares(store.kinds(points[n]!.graph, path)) : said?.parts;
    return {
      ...(said?.fill === undefined ? {} : { fill: said.fill }),
      ...(touched === undefined || !closed || laid !== null ? {} : { deltas: deltas(touched) }),
      ...(parts === undefined ? {} : { parts }),
      className: `adk-level${Math.min(4, path.split(".").length)} ${touched === undefined ? "" : "adk-touched"} ${said?.fill === undefined ? "" : filled(said.fill)}`,
      lines: [walk.title(points[n]!.graph, path), closed ? `${said === null ? nodes(box.module.size) : said.text}` : ""],
      title: `${box.module.path || "model"}${box.count > 1 ? `, ${box.count} times` : ""}, ${nodes(box.module.size)}; double-click to ${box.inside === null ? "open" : "close"}`,
    };
  }
  const row = walk.rowOf(points[n]!.graph).get(box.node.id);
  if (row === undefined) return { className: "", lines: [box.node.target], title: box.node.name };
  const info = walk.info(row);
  const mark = markOf(marks, info.id);
  const result: Look = {
    className: `adk-c${info.category} ${mark && `adk-${mark}`}`,
    lines: [walk.called(info), info.value],
    title: `${info.name}: ${info.op === "call_function" || info.op === "call_module" ? info.target : info.op}, ${info.value}${mark && `, ${TOLD[mark]}`}`,
  };
  if (laid !== null) {
    const value = laid.values.get(info.id);
    result.className += ` ${value === undefined ? "adk-overlaid" : filled(laid.scale.colour(value))}`;
    if (value !== undefined) {
      result.fill = laid.scale.colour(value);
      result.badge = laid.scale.text(value);
    }
  }
  return result;
}

/** What a closed module is made of, by kind of work, the most frequent first. */
function shares(kinds: ReadonlyMap<number, number>): { share: number; className: string }[] {
  const all = [...kinds.values()].reduce((sum, n) => sum + n, 0);
  return [...kinds].sort((a, b) => b[1] - a[1]).map(([k, n]) => ({ share: n / all, className: `adk-c${k}` }));
}

function deltas({ created, erased, changed }: Touched): { text: string; className: string }[] {
  return [[created, "+", "adk-plus"], [erased, "−", "adk-minus"], [changed, "~", "adk-tilde"]].flatMap(([n, sign, className]) => (n === 0 ? [] : [{ text: `${sign}${n}`, className: String(className) }]));
}

/** Classes of a box with an overlay's colour: which text can be read on it. */
function filled(colour: string): string {
  return `adk-overlaid ${isLight(colour) ? "adk-light" : "adk-dark-fill"}`;
}

function nodes(n: number): string {
  return n === 1 ? "1 node" : `${n} nodes`;
}

const TOLD = { created: "added", erased: "removed by the next", changed: "changed", moved: "moved" };

function markOf({ left, right }: Marks, id: number): keyof typeof TOLD | "" {
  if (left?.created.has(id)) return "created";
  if (right?.erased.has(id)) return "erased";
  if (left?.changed.has(id) || (left === null && right?.changed.has(id))) return "changed";
  return left?.moved.has(id) ? "moved" : "";
}

function hover(tip: HTMLElement, host: HTMLElement, store: Store, graph: number, key: string | null, event: PointerEvent | null): void {
  if (key === null || event === null || !key.startsWith("n:")) {
    tip.hidden = true;
    return;
  }
  const row = store.walk.rowOf(graph).get(Number(key.slice(2)));
  if (row === undefined) return;
  const info = store.walk.info(row);
  tip.replaceChildren();
  for (const [tag, content] of [["b", info.name], ["div", info.op === "call_function" ? `${info.short}(${store.walk.call(graph, row)})` : info.op === "call_module" ? `${info.op} ${info.target}` : info.op], ["div", info.value], ["small", info.source === null ? info.path : `${info.path}  ${info.source.file}:${info.source.line}`]] as const) {
    const e = document.createElement(tag);
    e.textContent = content.length > 300 ? `${content.slice(0, 300)}…` : content;
    tip.append(e);
  }
  const frame = host.getBoundingClientRect();
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX - frame.left + 14, frame.width - 300)}px`;
  tip.style.top = `${Math.min(event.clientY - frame.top + 40, frame.height - 60)}px`;
}

function keys(e: KeyboardEvent, store: Store, scene: Scene, fitted: () => void): void {
  const { module } = store.state;
  const k = store.graph;
  const graph = store.walk.graph(k);
  const at = store.inspected ?? null;
  const go = (id: number | undefined): void => {
    if (id === undefined) return;
    store.select([id]);
    const trail = store.layout(k).trail(id);
    scene.reveal(trail[trail.length - 1]!);
  };
  switch (e.key) {
    case "+": case "=": scene.zoom(1.25); break;
    case "-": scene.zoom(0.8); break;
    case "0": fitted(); break;
    case "ArrowDown": go(at === null ? graph.nodes.keys().next().value : graph.users.get(at)?.[0]); break;
    case "ArrowUp": go(at === null ? undefined : graph.nodes.get(at)?.inputs[0]); break;
    case "ArrowRight": case "ArrowLeft": {
      const ids = [...graph.nodes.keys()];
      const place = at === null ? -1 : ids.indexOf(at);
      go(ids[place + (e.key === "ArrowRight" ? 1 : -1)]);
      break;
    }
    case "Enter": case " ":
      if (module !== null) store.toggle(module);
      else if (at !== null) {
        const trail = store.layout(k).trail(at);
        const last = trail[trail.length - 1]!;
        if (last.startsWith("m:")) store.toggle(last.slice(2));
      }
      break;
    case "Escape": store.select([]); break;
    default: return;
  }
  e.preventDefault();
  e.stopPropagation();
}

function Minimap({ store, graph, scene, drawn }: { store: Store; graph: number; scene: { current: Scene | null }; drawn: { current: () => void } }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  drawn.current = () => {
    const [s, c] = [scene.current, canvas.current];
    if (s !== null && c !== null && graph >= 0) {
      c.classList.toggle("adk-unneeded", s.complete);
      if (!s.complete) paint(c, store.layout(graph).root(), s);
    }
  };
  const go = (e: PointerEvent): void => {
    const [s, c] = [scene.current, canvas.current];
    if (s === null || c === null || e.buttons === 0 || graph < 0) return;
    const box = c.getBoundingClientRect();
    const f = factor(store.layout(graph).root()) * (box.width / c.width);
    const view = s.frame();
    s.moveTo({ scale: s.view.scale, x: view.width / 2 - ((e.clientX - box.left) / f) * s.view.scale, y: view.height / 2 - ((e.clientY - box.top) / f) * s.view.scale });
  };
  return <canvas class="adk-minimap" ref={canvas} onPointerDown={go} onPointerMove={go} aria-hidden="true" />;
}

/** The frame of a minimap: as wide as the picture is, within this. */
const MINIMAP = { width: 120, height: 160, least: 26 };

function factor(root: Inside): number {
  return Math.min(MINIMAP.width / root.width, MINIMAP.height / root.height);
}

function paint(c: HTMLCanvasElement, root: Inside, s: Scene): void {
  const g = c.getContext("2d")!;
  const f = factor(root);
  const [width, height] = [Math.max(MINIMAP.least, Math.round(root.width * f)), Math.max(MINIMAP.least, Math.round(root.height * f))];
  if (c.width !== width || c.height !== height) Object.assign(c, { width, height });
  g.clearRect(0, 0, c.width, c.height);
  const style = getComputedStyle(c);
  g.fillStyle = style.color;
  g.globalAlpha = 0.28;
  for (const b of root.boxes) {
    g.fillRect(b.x * f, b.y * f, Math.max(1, b.width * f), Math.max(1, b.height * f));
    if (b.kind === "module" && b.inside !== null) for (const i of b.inside.boxes) g.fillRect((b.x + i.x) * f, (b.y + i.y + TITLE_HEIGHT) * f, Math.max(1, i.width * f), Math.max(1, i.height * f));
  }
  g.globalAlpha = 1;
  g.strokeStyle = style.borderColor;
  g.lineWidth = 2;
  const { x, y, scale } = s.view;
  const view = s.frame();
  g.strokeRect((-x / scale) * f, (-y / scale) * f, (view.width / scale) * f, (view.height / scale) * f);
}
