/** One graph on the screen: the scene, its minimap and legend, kept in step with the store. */
import { useEffect, useRef } from "preact/hooks";
import { isLight } from "./colour.ts";
import type { ModuleBox, NodeBox } from "./layout.ts";
import { Scene, type Look, type View } from "./scene.ts";
import type { Store } from "./store.ts";

interface Props {
  store: Store;
  /** Graph drawn. */
  graph: number;
  /** Which side of the comparison it is. */
  side: "before" | "after";
  title: string;
  /** Scenes that move together. */
  group: Set<Scene>;
  diff: boolean;
}

export function Pane({ store, graph, side, title, group, diff }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const tip = useRef<HTMLDivElement>(null);
  const scene = useRef<Scene | null>(null);
  const shown = useRef({ graph: -1, fitted: false });
  const current = useRef({ graph, side, diff });
  current.current = { graph, side, diff };

  useEffect(() => {
    const made = new Scene(host.current!, {
      look: (box) => look(store, current.current, box),
      onSelect: (key) => choose(store, key),
      onToggle: (path) => {
        for (const s of group) {
          s.anchored(`m:${path}`, () => {});
        }
        store.toggle(path);
      },
      onHover: (key, event) => hover(tip.current!, host.current!, store, current.current.graph, key, event),
      onView: (view) => follow(group, made, view),
    });
    scene.current = made;
    group.add(made);
    made.svg.addEventListener("keydown", (e) => keys(e, store, made));
    const stop = store.subscribe((changed) => {
      if (changed.has("open")) {
        const anchor = store.state.module !== null ? `m:${store.state.module}` : null;
        const layout = store.layout(current.current.graph);
        if (anchor !== null) made.anchored(anchor, () => made.show(layout));
        else made.show(layout);
      }
    });
    return () => {
      stop();
      group.delete(made);
      made.dispose();
    };
  }, []);

  useEffect(() => {
    const s = scene.current!;
    if (graph < 0) return;
    s.show(store.layout(graph));
    s.restyle();
    if (!shown.current.fitted && s.frame().width > 0) {
      s.fit();
      shown.current.fitted = true;
    }
    shown.current.graph = graph;
    const { selection, module } = store.state;
    const layout = store.layout(graph);
    const trails = selection.map((id) => layout.trail(id)).filter((t) => t.length > 0);
    const keys = trails.map((t) => t[t.length - 1]!);
    const chosen = module !== null ? `m:${layout.stands(module)}` : (keys[0] ?? null);
    s.select(chosen, keys);
  });

  return (
    <section class="adk-pane" aria-label={title}>
      <header>
        {title}
        <span class="adk-tools">
          <button type="button" onClick={() => scene.current?.zoom(1.3)} title="Zoom in (+)" aria-label="Zoom in">+</button>
          <button type="button" onClick={() => scene.current?.zoom(1 / 1.3)} title="Zoom out (-)" aria-label="Zoom out">−</button>
          <button type="button" onClick={() => scene.current?.fit()} title="Fit the graph (0)">fit</button>
        </span>
      </header>
      <div class="adk-canvas" ref={host} />
      <Minimap store={store} graph={graph} scene={scene} />
      <div class="adk-tip" ref={tip} role="tooltip" hidden />
    </section>
  );
}

/** Bring a node into view in every pane that has it. */
export function reveal(store: Store, group: Set<Scene>, id: number): void {
  store.reveal(id);
  requestAnimationFrame(() => {
    for (const s of group) {
      const trail = store.layout(store.graph).trail(id);
      const last = trail[trail.length - 1];
      if (last !== undefined) s.reveal(last);
    }
  });
}

function follow(group: Set<Scene>, from: Scene, view: View): void {
  for (const s of group) if (s !== from && (s.view.x !== view.x || s.view.y !== view.y || s.view.scale !== view.scale)) {
    s.view = view;
    s.render();
  }
}

function choose(store: Store, key: string | null): void {
  if (key === null) store.select([]);
  else if (key.startsWith("m:")) store.select([], key.slice(2));
  else if (key.startsWith("n:")) store.select([Number(key.slice(2))]);
}

function look(store: Store, at: { graph: number; side: string; diff: boolean }, box: NodeBox | ModuleBox): Look {
  const { walk } = store;
  if (box.kind === "module") {
    const marks = at.diff ? marksIn(store, at, box) : "";
    return {
      className: `adk-level${Math.min(4, box.module.path.split(".").length)} ${marks}`,
      lines: [walk.title(box.module.path), box.inside === null ? `${box.module.size} nodes` : ""],
      title: `${box.module.path || "model"}${box.count > 1 ? `, ${box.count} times` : ""}, ${box.module.size} nodes; double-click to ${box.inside === null ? "open" : "close"}`,
    };
  }
  const row = walk.rowOf(at.graph).get(box.node.id);
  if (row === undefined) return { className: "", lines: [box.node.target], title: box.node.name };
  const info = walk.info(row);
  const d = at.diff ? store.difference() : null;
  const mark = d === null ? "" : at.side === "before" ? (d.erased.has(info.id) ? "adk-erased" : d.changed.has(info.id) ? "adk-changed" : "") : d.created.has(info.id) ? "adk-created" : d.changed.has(info.id) ? "adk-changed" : d.moved.has(info.id) ? "adk-moved" : "";
  const result: Look = {
    className: `adk-c${info.category} ${mark}`,
    lines: [info.op === "call_function" ? info.short : info.name, info.value],
    title: `${info.name}: ${info.op === "call_function" ? info.target : info.op}, ${info.value}${mark ? `, ${mark.slice(4)}` : ""}`,
  };
  const laid = store.overlay();
  if (laid !== null) {
    result.className += " adk-overlaid";
    const value = laid.values.get(info.id);
    if (value !== undefined) {
      result.fill = laid.scale.colour(value);
      result.badge = laid.scale.text(value);
      result.className += isLight(result.fill) || laid.overlay.scale === "words" ? " adk-light" : " adk-dark-fill";
    }
  }
  return result;
}

function marksIn(store: Store, at: { graph: number; side: string }, box: ModuleBox): string {
  const d = store.difference();
  const ids = at.side === "before" ? [d.erased, d.changed] : [d.created, d.changed];
  const prefix = box.module.path + ".";
  const nodes = store.walk.graph(at.graph).nodes;
  for (const set of ids) for (const id of set) {
    const path = nodes.get(id)?.path;
    if (path !== undefined && (path === box.module.path || path.startsWith(prefix))) return "adk-touched";
  }
  return "";
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
  for (const [tag, content] of [["b", info.name], ["div", info.op === "call_function" ? store.walk.call(graph, row) : info.op], ["div", info.value], ["small", info.source === null ? info.path : `${info.path}  ${info.source.file}:${info.source.line}`]] as const) {
    const e = document.createElement(tag);
    e.textContent = content.length > 300 ? `${content.slice(0, 300)}…` : content;
    tip.append(e);
  }
  const frame = host.getBoundingClientRect();
  tip.hidden = false;
  tip.style.left = `${Math.min(event.clientX - frame.left + 14, frame.width - 300)}px`;
  tip.style.top = `${Math.min(event.clientY - frame.top + 40, frame.height - 60)}px`;
}

function keys(e: KeyboardEvent, store: Store, scene: Scene): void {
  const { selection, module } = store.state;
  const k = store.graph;
  const graph = store.walk.graph(k);
  const at = selection[0] ?? null;
  const go = (id: number | undefined): void => {
    if (id === undefined) return;
    store.select([id]);
    const trail = store.layout(k).trail(id);
    scene.reveal(trail[trail.length - 1]!);
  };
  switch (e.key) {
    case "+": case "=": scene.zoom(1.25); break;
    case "-": scene.zoom(0.8); break;
    case "0": scene.fit(); break;
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

function Minimap({ store, graph, scene }: { store: Store; graph: number; scene: { current: Scene | null } }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    let frame = 0;
    const draw = (): void => {
      frame = requestAnimationFrame(draw);
      const s = scene.current;
      const c = canvas.current;
      if (s === null || c === null || graph < 0) return;
      const state = `${graph}|${s.view.x}|${s.view.y}|${s.view.scale}|${store.state.open.size}|${s.frame().width}`;
      if (c.dataset["state"] === state) return;
      c.dataset["state"] = state;
      const root = store.layout(graph).root();
      const g = c.getContext("2d")!;
      const f = Math.min(c.width / root.width, c.height / root.height);
      g.clearRect(0, 0, c.width, c.height);
      const style = getComputedStyle(c);
      g.fillStyle = style.color;
      g.globalAlpha = 0.28;
      for (const b of root.boxes) {
        g.fillRect(b.x * f, b.y * f, Math.max(1, b.width * f), Math.max(1, b.height * f));
        if (b.kind === "module" && b.inside !== null) for (const i of b.inside.boxes) g.fillRect((b.x + i.x) * f, (b.y + i.y + 26) * f, Math.max(1, i.width * f), Math.max(1, i.height * f));
      }
      g.globalAlpha = 1;
      g.strokeStyle = style.borderColor;
      g.lineWidth = 2;
      const { x, y, scale } = s.view;
      const view = s.frame();
      g.strokeRect((-x / scale) * f, (-y / scale) * f, (view.width / scale) * f, (view.height / scale) * f);
    };
    draw();
    return () => cancelAnimationFrame(frame);
  }, [graph]);
  const go = (e: PointerEvent): void => {
    const s = scene.current;
    const c = canvas.current;
    if (s === null || c === null || e.buttons === 0) return;
    const box = c.getBoundingClientRect();
    const root = store.layout(graph).root();
    const f = Math.min(c.width / root.width, c.height / root.height) * (box.width / c.width);
    const view = s.frame();
    s.moveTo({ scale: s.view.scale, x: view.width / 2 - ((e.clientX - box.left) / f) * s.view.scale, y: view.height / 2 - ((e.clientY - box.top) / f) * s.view.scale });
  };
  return <canvas class="adk-minimap" ref={canvas} width={120} height={160} onPointerDown={go} onPointerMove={go} aria-hidden="true" />;
}
