/** The whole explorer: timeline above, picture or text in the middle, what is chosen at the side. */
import { render } from "preact";
import { useEffect, useMemo, useReducer, useRef } from "preact/hooks";
import { CodeView } from "./code.tsx";
import { scaleOf } from "./colour.ts";
import { Pane, reveal } from "./pane.tsx";
import type { Walk } from "./record.ts";
import type { Scene } from "./scene.ts";
import { Side } from "./side.tsx";
import { overlays, Store } from "./store.ts";
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
  const group = new Set<Scene>();
  const style = categoryStyle(walk);
  element.replaceChildren(style);
  const host = document.createElement("div");
  element.append(host);
  render(<App store={store} group={group} />, host);
  const goto = (step: number, node: number | null): void => {
    store.set({ step, against: -1 });
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

function App({ store, group }: { store: Store; group: Set<Scene> }) {
  const [, again] = useReducer((n: number) => n + 1, 0);
  const root = useRef<HTMLDivElement>(null);
  useEffect(() => store.subscribe(() => again(0)), [store]);
  useEffect(() => {
    if (!store.state.playing) return;
    const timer = setInterval(() => {
      const next = changedFrom(store, store.state.step + 1, 1);
      if (next === null) store.set({ playing: false });
      else store.set({ step: next, against: -1 });
    }, 1100);
    return () => clearInterval(timer);
  }, [store.state.playing]);
  const { state, walk } = store;
  const step = walk.steps[state.step];
  const [after, before] = [store.graph, store.before];
  const compared = state.mode === "compare" && before !== after && before >= 0;
  const titleBefore = state.against < 0 ? `before ${step?.name ?? ""}` : `after ${walk.steps[state.against]?.name ?? ""}`;
  return (
    <div class="adk" ref={root} onKeyDown={(e) => shortcuts(e, store, root.current!)}>
      <Toolbar store={store} group={group} />
      <Timeline store={store} />
      <div class="adk-main">
        <div class="adk-panes">
          {after < 0 ? (
            <p class="adk-nothing">This step has no graph{step?.reason ? `: ${step.reason}` : "."}</p>
          ) : state.mode === "code" ? (
            <CodeView store={store} />
          ) : (
            <>
              {compared && <Pane key="before" store={store} graph={before} side="before" title={titleBefore} group={group} diff />}
              <Pane key="after" store={store} graph={after} side="after" title={`after ${step?.name ?? ""}`} group={group} diff />
            </>
          )}
          <Legend store={store} />
        </div>
        <Side store={store} show={(id) => reveal(store, group, id)} />
      </div>
    </div>
  );
}

function Toolbar({ store, group }: { store: Store; group: Set<Scene> }) {
  const { state, walk } = store;
  const lays = useMemo(() => overlays(walk, store.graph), [walk, store.graph, walk.data.overlays.length]);
  return (
    <div class="adk-toolbar" role="toolbar" aria-label="Explorer">
      <strong class="adk-title" title={Object.entries(walk.data.about).map(([k, v]) => `${k}: ${v}`).join("\n")}>{walk.data.name || "graph"}</strong>
      <div class="adk-switch" role="group" aria-label="View">
        {(["graph", "compare", "code"] as const).map((mode) => (
          <button type="button" key={mode} aria-pressed={state.mode === mode} onClick={() => store.set({ mode })}>{mode}</button>
        ))}
      </div>
      <label>
        overlay{" "}
        <select value={state.overlay} onChange={(e) => store.set({ overlay: e.currentTarget.value })}>
          <option value="">kind of work</option>
          {lays.map((o) => <option key={o.name} value={o.name}>{o.name}</option>)}
        </select>
      </label>
      <label class="adk-check"><input type="checkbox" checked={state.leaves} onChange={(e) => store.set({ leaves: e.currentTarget.checked })} /> weights</label>
      <button type="button" onClick={() => store.openAll(state.module)} title="Open every module (of the one chosen)">open all</button>
      <button type="button" onClick={() => store.closeAll()}>close all</button>
      <Search store={store} group={group} />
    </div>
  );
}

function Search({ store, group }: { store: Store; group: Set<Scene> }) {
  const { state } = store;
  const found = useMemo(() => find(store, state.search), [store, state.search, store.graph]);
  const input = useRef<HTMLInputElement>(null);
  const pick = (id: number): void => {
    store.set({ search: "" });
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
          if (e.key === "Enter" && found.length > 0) pick(found[0]!.id);
          if (e.key === "Escape") store.set({ search: "" });
        }}
      />
      {state.search !== "" && (
        <ul class="adk-found" aria-label={`${found.length} found`}>
          {found.slice(0, 60).map((n) => (
            <li key={n.id}>
              <button type="button" onClick={() => pick(n.id)}>
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

function find(store: Store, query: string) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0 || store.graph < 0) return [];
  const { walk } = store;
  return walk
    .rows(store.graph)
    .map((r) => walk.info(r))
    .filter((n) => {
      const all = `${n.name} ${n.target} ${n.short} ${n.op} ${n.value} ${n.path} ${n.type} ${n.source === null ? "" : `${n.source.file}:${n.source.line} ${n.source.code}`}`.toLowerCase();
      return words.every((w) => all.includes(w));
    });
}

function Legend({ store }: { store: Store }) {
  const { walk } = store;
  const laid = store.overlay();
  const present = useMemo(() => new Set(walk.rows(store.graph).map((r) => walk.data.rows.category[r]!)), [walk, store.graph]);
  const d = store.difference();
  return (
    <footer class="adk-legend">
      {laid === null ? (
        walk.data.categories.map((c, k) => present.has(k) && <span key={k}><i class={`adk-swatch adk-c${k}`} />{c.name}</span>)
      ) : laid.overlay.scale === "words" ? (
        laid.overlay.words.map((w, k) => <span key={k}><i class="adk-swatch" style={{ background: laid.scale.colour(k) }} />{w}</span>)
      ) : (
        <span>
          {laid.scale.text(laid.scale.low)} <i class="adk-ramp" style={{ background: ramp(laid.overlay) }} /> {laid.scale.text(laid.scale.high)} <small>{laid.overlay.note}</small>
        </span>
      )}
      <span class="adk-marks">
        {d.created.size > 0 && <span><i class="adk-mark adk-created" />{d.created.size} added</span>}
        {d.erased.size > 0 && <span><i class="adk-mark adk-erased" />{d.erased.size} removed</span>}
        {d.changed.size > 0 && <span><i class="adk-mark adk-changed" />{d.changed.size} changed</span>}
        {d.moved.size > 0 && <span><i class="adk-mark adk-moved" />{d.moved.size} moved</span>}
        <span>{walk.rows(store.graph).length} nodes</span>
      </span>
    </footer>
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
    if (k !== null) store.set({ step: k, against: -1 });
  };
  switch (e.key) {
    case "/": root.querySelector<HTMLInputElement>(".adk-search input")?.focus(); break;
    case "j": case "]": go(1); break;
    case "k": case "[": go(-1); break;
    case "c": store.set({ mode: store.state.mode === "compare" ? "graph" : "compare" }); break;
    case "t": store.set({ mode: store.state.mode === "code" ? "graph" : "code" }); break;
    default: return;
  }
  e.preventDefault();
  e.stopPropagation();
}
