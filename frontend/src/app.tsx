/** The whole explorer: timeline above, picture or text in the middle, what is chosen at the side. */
import { render } from "preact";
import { useEffect, useMemo, useReducer, useRef, useState } from "preact/hooks";
import { CodeView } from "./code.tsx";
import { scaleOf } from "./colour.ts";
import { fit, Pane, reveal, type Group } from "./pane.tsx";
import type { NodeInfo, Walk } from "./record.ts";
import { Side } from "./side.tsx";
import { MOST_PANES, overlayNames, Store } from "./store.ts";
import { Timeline } from "./timeline.tsx";

export interface Mounted {
  store: Store;
  /** Show a node of a step: what Python's `goto` does. */
  goto(step: number, node: number | null): void;
  dispose(): void;
}

/** Draw the explorer of a walk into an element. */
export function mount(element: HTMLElement, walk: Walk): Mounted {
  const store = new Store(walk);
  const group: Group = new Map();
  const style = categoryStyle(walk);
  element.replaceChildren(style);
  const host = document.createElement("div");
  element.append(host);
  render(<App store={store} group={group} />, host);
  const goto = (step: number, node: number | null): void => {
    store.set({ step });
    if (node !== null) {
      if (!store.state.selection.includes(node)) store.select([node]);
      else store.select(store.state.selection);
      reveal(store, group, node);
    }
  };
  return { store, goto, dispose: () => render(null, host) };
}

/** A colour is taken from the record only if it looks like one. */
function categoryStyle(walk: Walk): HTMLStyleElement {
  const style = document.createElement("style");
  const colour = /^#[0-9a-f]{6}$/i;
  style.textContent = walk.data.categories
    .map((c, k) => (colour.test(c.fill) && colour.test(c.border) ? `.adk .adk-c${k}{--fill:${c.fill};--line:${c.border}}` : ""))
    .join("\n");
  return style;
}

function App({ store, group }: { store: Store; group: Group }) {
  const [, again] = useReducer((n: number) => n + 1, 0);
  const root = useRef<HTMLDivElement>(null);
  const [wide, setWide] = useState(0);
  useEffect(() => store.subscribe(() => again(0)), [store]);
  useEffect(() => {
    if (!store.state.playing) return;
    const timer = setInterval(() => {
      const next = changedFrom(store, store.state.step + 1, 1);
      if (next === null) store.set({ playing: false });
      else store.set({ step: next });
    }, 1100);
    return () => clearInterval(timer);
  }, [store.state.playing]);
  const { state, walk } = store;
  const points = store.points();
  return (
    <div class={`adk ${state.side ? "" : "adk-wide"}`} ref={root} onKeyDown={(e) => shortcuts(e, store, group, root.current!)}>
      <Toolbar store={store} group={group} />
      <Timeline store={store} />
      <div class="adk-main" style={wide === 0 ? {} : { "--adk-side": `${wide}px` }}>
        <div class="adk-middle">
          {store.graph < 0 && points.length === 1 ? (
            <p class="adk-nothing">{nothing(store)}</p>
          ) : state.mode === "code" ? (
            <CodeView store={store} />
          ) : (
            <div class="adk-panes">
              {points.map((p, n) => <Pane key={n} store={store} points={points} n={n} group={group} />)}
            </div>
          )}
          <Legend store={store} group={group} />
        </div>
        <p class="adk-spoken" role="status">{spoken(store)}</p>
        {state.side && <Divider wide={wide} set={setWide} />}
        {state.side && <Side store={store} show={(id) => reveal(store, group, id)} />}
      </div>
    </div>
  );
}

const NARROWEST = 240;
const WIDEST = 900;

/** Between the graph and the panel: dragged, or moved by the arrow keys. `wide` 0: as wide as the style says. */
function Divider({ wide, set }: { wide: number; set(wide: number): void }) {
  const width = (e: Event): number => wide || ((e.currentTarget as HTMLElement).nextElementSibling?.clientWidth ?? NARROWEST);
  const to = (w: number): void => set(Math.round(Math.min(WIDEST, Math.max(NARROWEST, w))));
  const drag = (e: PointerEvent): void => {
    if (e.buttons === 0) return;
    to((e.currentTarget as HTMLElement).parentElement!.getBoundingClientRect().right - e.clientX);
  };
  const keys = (e: KeyboardEvent): void => {
    const by = { ArrowLeft: 24, ArrowRight: -24 }[e.key];
    if (by === undefined) return;
    to(width(e) + by);
    e.preventDefault();
    e.stopPropagation();
  };
  return (
    <div class="adk-divider" role="separator" tabIndex={0} aria-orientation="vertical" aria-label="Width of the panel" aria-valuemin={NARROWEST} aria-valuemax={WIDEST} aria-valuenow={wide || 340}
      onPointerDown={(e) => e.currentTarget.setPointerCapture(e.pointerId)} onPointerMove={drag} onKeyDown={keys} onDblClick={() => set(0)} title="Drag to make the panel wider; double-click for its usual width" />
  );
}

/** What is chosen, for who hears it. */
function spoken({ state, walk, graph, inspected }: Store): string {
  const id = inspected;
  if (id === undefined) return state.module ?? "";
  const row = graph < 0 ? undefined : walk.rowOf(graph).get(id);
  if (row === undefined) return "";
  const n = walk.info(row);
  return `${n.name}, ${n.op === "call_function" ? n.short : n.op}, ${n.value}, in ${n.path || "the model"}`;
}

/** Why there is nothing to draw at the step looked at. */
function nothing({ state, walk }: Store): string {
  const step = walk.steps[state.step];
  if (step === undefined) return "This record has no steps.";
  if (state.live.running !== "") return "The pipeline is running; its graphs come when it has ended.";
  if (step.status === "pending") return `${step.name} has not run yet, so there is no graph. Run the pipeline (wb.run()) and it appears here.`;
  return `There is no graph at ${step.name}${step.reason ? `: ${step.reason}` : "."}`;
}

const MODES = { graph: "Graph", compare: "Compare", code: "Code" } as const;

function Toolbar({ store, group }: { store: Store; group: Group }) {
  const { state, walk } = store;
  const unfold = (how: () => void): void => unfolded(store, group, how);
  const lays = useMemo(() => overlayNames(walk, store.graph), [walk, store.graph, walk.data.overlays, walk.data.costs]);
  return (
    <div class="adk-toolbar" role="toolbar" aria-label="View">
      <strong class="adk-title" title={[walk.name, ...Object.entries(walk.data.about).map(([k, v]) => `${k}: ${v}`)].join("\n")}>{walk.name}</strong>
      <div class="adk-switch" role="group" aria-label="What is shown">
        {(["graph", "compare", "code"] as const).map((mode) => (
          <button type="button" key={mode} aria-pressed={state.mode === mode} onClick={() => store.set({ mode })}>{MODES[mode]}</button>
        ))}
      </div>
      <button type="button" onClick={() => store.addPane()} disabled={state.mode === "code" || !store.canAddPane} title={`One more point side by side, ${MOST_PANES} at most (p); shift-click a step for that step`}>Add pane</button>
      <label>
        <span class="adk-word">Colour </span>
        <select class="adk-overlay" aria-label="Colour" value={state.overlay} onChange={(e) => store.set({ overlay: e.currentTarget.value })}>
          <option value="">kind of work</option>
          {lays.map((name) => <option key={name} value={name}>{name}</option>)}
        </select>
      </label>
      <label class="adk-check"><input type="checkbox" checked={state.leaves} onChange={(e) => store.set({ leaves: e.currentTarget.checked })} /> Weights</label>
      <div class="adk-switch" role="group" aria-label="Modules">
        <button type="button" onClick={() => unfold(() => store.openAll(state.module))} title="Open every module (of the one chosen)">Unfold all</button>
        <button type="button" onClick={() => unfold(() => store.openChanged())} disabled={state.mode === "code"} title="Open what holds a change, and nothing else (u)">Unfold changed</button>
        <button type="button" onClick={() => unfold(() => store.closeAll())} title="Back to the outline">Fold all</button>
      </div>
      <button type="button" class="adk-quiet" aria-pressed={state.side} onClick={() => store.set({ side: !state.side })} title="The panel with details (d)">Details</button>
      <Search store={store} group={group} />
    </div>
  );
}

/** Another set of open modules: what is chosen stays in view, or else the whole picture comes into it. */
function unfolded(store: Store, group: Group, how: () => void): void {
  how();
  requestAnimationFrame(() => {
    const id = store.inspected;
    if (id !== undefined && store.walk.rowOf(store.graph).has(id)) reveal(store, group, id);
    else fit(store, group);
  });
}

function Search({ store, group }: { store: Store; group: Group }) {
  const { state } = store;
  const all = useMemo(() => find(store, state.search), [store, state.search, store.graph]);
  const found = useMemo(() => once(store, all), [all]);
  const total = all.length;
  const input = useRef<HTMLInputElement>(null);
  const pick = ({ id, op }: NodeInfo): void => {
    store.set({ search: "", leaves: state.leaves || LEAVES.has(op) });
    store.select([id]);
    reveal(store, group, id);
  };
  /** Arrows go through what was found, from the box and back to it. */
  const move = (e: KeyboardEvent): void => {
    const stops = [input.current!, ...input.current!.parentElement!.querySelectorAll<HTMLElement>(".adk-found button")];
    const at = stops.indexOf(document.activeElement as HTMLElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Escape: 0 }[e.key];
    if (to === undefined) return;
    stops[Math.min(stops.length - 1, Math.max(0, to))]!.focus();
    e.preventDefault();
    e.stopPropagation();
  };
  return (
    <div class="adk-search" role="search">
      <input
        ref={input}
        type="search"
        placeholder="op, name, shape, source line  (/)"
        aria-label="Search nodes"
        value={state.search}
        onInput={(e) => store.set({ search: e.currentTarget.value })}
        onKeyDown={(e) => {
          if (e.key === "Enter" && found.length > 0) pick(found[0]![0]);
          if (e.key === "ArrowDown") move(e);
          if (e.key === "Escape") store.set({ search: "" });
        }}
      />
      {state.search !== "" && (
        <div class="adk-found" onKeyDown={move}>
          <p class="adk-muted" role="status">{total === 0 ? "nothing found" : total === found.length ? `${total} found` : `${total} found; equal layers are listed once`}{found.length > MOST_FOUND ? `; the first ${MOST_FOUND}` : ""}</p>
          <ul aria-label={`${total} found`}>
            {found.slice(0, MOST_FOUND).map(([n, count]) => (
              <li key={n.id}>
                <button type="button" onClick={() => pick(n)} title={n.source === null ? n.target : `${n.target}\n${n.source.file}:${n.source.line}  ${n.source.code}`}>
                  <b>{n.name}</b><span>{n.op === "call_function" ? n.short : n.op === "call_module" ? n.target : n.op}</span><small>{n.value}</small><small>{n.path}</small><span class="adk-count">{count > 1 ? `×${count}` : ""}</span>
                </button>
              </li>
            ))}
          </ul>
        </div>
      )}
    </div>
  );
}

const MOST_FOUND = 60;

/** Of nodes in equal places of equal layers the first, and how many there are. */
function once({ walk, graph }: Store, all: NodeInfo[]): [NodeInfo, number][] {
  if (graph < 0) return [];
  const { representative } = walk.graph(graph);
  const found = new Map<number, [NodeInfo, number]>();
  for (const n of all) {
    const place = representative.get(n.id) ?? n.id;
    const known = found.get(place);
    if (known === undefined) found.set(place, [n, 1]);
    else known[1]++;
  }
  return [...found.values()];
}

/** What a graph reads, drawn only on demand: found last. */
const LEAVES = new Set(["placeholder", "get_attr"]);

function find(store: Store, query: string) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0 || store.graph < 0) return [];
  const { walk } = store;
  const found = walk
    .rows(store.graph)
    .map((r) => walk.info(r))
    .filter((n) => {
      const all = `${n.name} ${n.target} ${n.short} ${n.op} ${n.value} ${n.path} ${n.type} ${n.source === null ? "" : `${n.source.file}:${n.source.line} ${n.source.code}`}`.toLowerCase();
      return words.every((w) => all.includes(w));
    });
  // Those that are called so before those that only stand in such a module.
  const rank = (n: NodeInfo): number => (LEAVES.has(n.op) ? 2 : words.some((w) => `${n.name} ${n.short}`.toLowerCase().includes(w)) ? 0 : 1);
  return found.sort((a, b) => rank(a) - rank(b));
}

function Legend({ store, group }: { store: Store; group: Group }) {
  const { walk } = store;
  const laid = store.overlay();
  const present = useMemo(() => new Set(walk.rows(store.graph).map((r) => walk.data.rows.category[r]!)), [walk, store.graph]);
  const d = store.difference();
  return (
    <div class="adk-legend" role="group" aria-label="Legend">
      <span class="adk-kinds">
      {store.state.mode === "code" ? (
        <Lines />
      ) : laid === null ? (
        walk.data.categories.map((c, k) => present.has(k) && <span key={k}><i class={`adk-swatch adk-c${k}`} />{c.name}</span>)
      ) : laid.overlay.scale === "words" ? (
        laid.overlay.words.map((w, k) => <span key={k}><i class="adk-swatch" style={{ background: laid.scale.colour(k) }} />{w}</span>)
      ) : (
        <span>
          {laid.scale.text(laid.scale.low)} <i class="adk-ramp" style={{ background: ramp(laid.overlay) }} /> {laid.scale.text(laid.scale.high)}{laid.total === null ? "" : <b>total {laid.scale.text(laid.total)}</b>} <small title={laid.overlay.note}>{laid.overlay.note}</small>
        </span>
      )}
      </span>
      <span class="adk-marks">
        {(["created", "erased", "changed", "moved"] as const).map((kind) => d[kind].size > 0 && (
          <button type="button" key={kind} class="adk-walk" onClick={() => next(store, group, [kind])} title={`Go to the next one${kind === "erased" ? ", in the graph before" : ""}`}><i class={`adk-mark adk-${kind}`} />{d[kind].size} {MARKED[kind]}</button>
        ))}
        <span>{walk.rows(store.graph).length} nodes</span>
      </span>
    </div>
  );
}

/** What the colours of the programs mean. */
function Lines() {
  return <>{[["added", "line added"], ["removed", "line removed"], ["altered", "line altered"]].map(([kind, told]) => <span key={kind}><i class={`adk-swatch adk-line-${kind}`} />{told}</span>)}</>;
}

const MARKED = { created: "added", erased: "removed", changed: "changed", moved: "moved" } as const;

/** Go to the next marked node; of repeated layers one stands for all. */
function next(store: Store, group: Group, kinds: (keyof typeof MARKED)[], by = 1): void {
  const { walk } = store;
  const d = store.difference();
  const erased = kinds[0] === "erased";
  const at = erased ? store.before : store.graph;
  if (at < 0 || !walk.ready(at)) return;
  const graph = walk.graph(at);
  const marked = [...graph.nodes.values()].filter((n) => kinds.some((kind) => d[kind].has(n.id)));
  const calls = marked.filter((n) => !LEAVES.has(n.op));
  const drawn = (id: number): number => graph.representative.get(id) ?? id;
  const ids = [...new Set((calls.length > 0 ? calls : marked).map((n) => drawn(n.id)))];
  if (ids.length === 0) return;
  const [chosen] = store.state.selection;
  const here = chosen === undefined ? -1 : ids.indexOf(drawn(chosen));
  const id = ids[here < 0 ? (by > 0 ? 0 : ids.length - 1) : (here + by + ids.length) % ids.length]!;
  store.set({ mode: erased && store.state.mode === "graph" ? "compare" : store.state.mode, leaves: store.state.leaves || calls.length === 0 });
  store.select([id]);
  reveal(store, group, id);
}

function ramp(overlay: Parameters<typeof scaleOf>[0]): string {
  const scale = scaleOf({ ...overlay, scale: overlay.scale === "log" ? "linear" : overlay.scale, values: [overlay.scale === "diverging" ? -1 : 0, 1] });
  const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((s) => scale.colour(overlay.scale === "diverging" ? 2 * s - 1 : s));
  return `linear-gradient(90deg, ${stops.join(",")})`;
}

/** The next step in a direction whose graph differs, or null. */
export function changedFrom(store: Store, from: number, by: 1 | -1): number | null {
  const { steps } = store.walk;
  for (let k = from; k >= 0 && k < steps.length; k += by) if (steps[k]!.after >= 0 && steps[k]!.before !== steps[k]!.after) return k;
  return null;
}

function shortcuts(e: KeyboardEvent, store: Store, group: Group, root: HTMLElement): void {
  const typing = (e.target as HTMLElement).matches("input, select, textarea");
  if (typing || e.ctrlKey || e.metaKey || e.altKey) return;
  const go = (by: 1 | -1): void => {
    const k = changedFrom(store, store.state.step + by, by);
    if (k !== null) store.set({ step: k });
  };
  switch (e.key) {
    case "/": root.querySelector<HTMLInputElement>(".adk-search input")?.focus(); break;
    case "j": case "]": go(1); break;
    case "k": case "[": go(-1); break;
    case "c": store.set({ mode: store.state.mode === "compare" ? "graph" : "compare" }); break;
    case "n": next(store, group, ["created", "changed", "moved"]); break;
    case "N": next(store, group, ["created", "changed", "moved"], -1); break;
    case "u": unfolded(store, group, () => store.openChanged()); break;
    case "?": store.set({ side: true, tab: "about" }); break;
    case "p": store.addPane(); break;
    case "x": if (store.state.mode === "compare") store.closePane(store.focus()); break;
    case "d": store.set({ side: !store.state.side }); break;
    case "t": store.set({ mode: store.state.mode === "code" ? "graph" : "code" }); break;
    default: return;
  }
  e.preventDefault();
  e.stopPropagation();
}
