/** The whole explorer: timeline above, picture or text in the middle, what is chosen at the side. */
import { render } from "preact";
import { useEffect, useMemo, useReducer, useRef } from "preact/hooks";
import { CodeView } from "./code.tsx";
import { scaleOf } from "./colour.ts";
import { Pane, reveal, type Group } from "./pane.tsx";
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
      store.select([node]);
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
    <div class={`adk ${state.side ? "" : "adk-wide"}`} ref={root} onKeyDown={(e) => shortcuts(e, store, root.current!)}>
      <Toolbar store={store} group={group} />
      <Timeline store={store} />
      <div class="adk-main">
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
          <Legend store={store} />
        </div>
        <p class="adk-spoken" role="status">{spoken(store)}</p>
        {state.side && <Side store={store} show={(id) => reveal(store, group, id)} />}
      </div>
    </div>
  );
}

/** What is chosen, for who hears it. */
function spoken({ state, walk, graph }: Store): string {
  const [id] = state.selection;
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
        Colour{" "}
        <select class="adk-overlay" value={state.overlay} onChange={(e) => store.set({ overlay: e.currentTarget.value })}>
          <option value="">kind of work</option>
          {lays.map((name) => <option key={name} value={name}>{name}</option>)}
        </select>
      </label>
      <label class="adk-check"><input type="checkbox" checked={state.leaves} onChange={(e) => store.set({ leaves: e.currentTarget.checked })} /> Weights</label>
      <div class="adk-switch" role="group" aria-label="Modules">
        <button type="button" onClick={() => store.openAll(state.module)} title="Open every module (of the one chosen)">Unfold all</button>
        <button type="button" onClick={() => store.closeAll()} title="Back to the outline">Fold all</button>
      </div>
      <button type="button" class="adk-quiet" aria-pressed={state.side} onClick={() => store.set({ side: !state.side })} title="The panel with details (d)">Details</button>
      <Search store={store} group={group} />
    </div>
  );
}

function Search({ store, group }: { store: Store; group: Group }) {
  const { state } = store;
  const found = useMemo(() => find(store, state.search), [store, state.search, store.graph]);
  const input = useRef<HTMLInputElement>(null);
  const pick = ({ id, op }: NodeInfo): void => {
    store.set({ search: "", leaves: state.leaves || LEAVES.has(op) });
    store.select([id]);
    reveal(store, group, id);
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
          if (e.key === "Enter" && found.length > 0) pick(found[0]!);
          if (e.key === "Escape") store.set({ search: "" });
        }}
      />
      {state.search !== "" && (
        <ul class="adk-found" aria-label={`${found.length} found`}>
          {found.slice(0, 60).map((n) => (
            <li key={n.id}>
              <button type="button" onClick={() => pick(n)}>
                <b>{n.name}</b> {n.short} <small>{n.value} {n.path}</small>
              </button>
            </li>
          ))}
          {found.length === 0 && <li class="adk-muted">nothing found</li>}
          {found.length > 60 && <li class="adk-muted">and {found.length - 60} more</li>}
        </ul>
      )}
    </div>
  );
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

function Legend({ store }: { store: Store }) {
  const { walk } = store;
  const laid = store.overlay();
  const present = useMemo(() => new Set(walk.rows(store.graph).map((r) => walk.data.rows.category[r]!)), [walk, store.graph]);
  const d = store.difference();
  return (
    <div class="adk-legend" role="group" aria-label="Legend">
      <span class="adk-kinds">
      {laid === null ? (
        walk.data.categories.map((c, k) => present.has(k) && <span key={k}><i class={`adk-swatch adk-c${k}`} />{c.name}</span>)
      ) : laid.overlay.scale === "words" ? (
        laid.overlay.words.map((w, k) => <span key={k}><i class="adk-swatch" style={{ background: laid.scale.colour(k) }} />{w}</span>)
      ) : (
        <span>
          {laid.scale.text(laid.scale.low)} <i class="adk-ramp" style={{ background: ramp(laid.overlay) }} /> {laid.scale.text(laid.scale.high)} <small>{laid.overlay.note}</small>
        </span>
      )}
      </span>
      <span class="adk-marks">
        {d.created.size > 0 && <span><i class="adk-mark adk-created" />{d.created.size} added</span>}
        {d.erased.size > 0 && <span><i class="adk-mark adk-erased" />{d.erased.size} removed</span>}
        {d.changed.size > 0 && <span><i class="adk-mark adk-changed" />{d.changed.size} changed</span>}
        {d.moved.size > 0 && <span><i class="adk-mark adk-moved" />{d.moved.size} moved</span>}
        <span>{walk.rows(store.graph).length} nodes</span>
      </span>
    </div>
  );
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

function shortcuts(e: KeyboardEvent, store: Store, root: HTMLElement): void {
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
    case "p": store.addPane(); break;
    case "x": if (store.state.mode === "compare") store.closePane(store.focus()); break;
    case "d": store.set({ side: !store.state.side }); break;
    case "t": store.set({ mode: store.state.mode === "code" ? "graph" : "code" }); break;
    default: return;
  }
  e.preventDefault();
  e.stopPropagation();
}
