/** The passes in order, by stage: what each changed, which points are looked at, what runs now. */
import { useEffect, useReducer, useRef, useState } from "preact/hooks";
import { changedFrom } from "./app.tsx";
import { short } from "./colour.ts";
import { heads, type Head } from "./live.ts";
import type { Walk } from "./record.ts";
import type { Store } from "./store.ts";

export function Timeline({ store }: { store: Store }) {
  const { state, walk } = store;
  const strip = useRef<HTMLDivElement>(null);
  const all = heads(walk.steps, state.live);
  const [measure, setMeasure] = useState<Measure>("changes");
  const [hovered, hover] = useState(-1);
  const of = (s: Head, k: number): number => MEASURES[measure].of(s, k, walk);
  const most = Math.max(...all.map((s, k) => Math.abs(of(s, k))), 1e-9);
  const stages: { name: string; steps: [Head, number][] }[] = [];
  all.forEach((s, k) => {
    const last = stages[stages.length - 1];
    if (last?.name === s.stage) last.steps.push([s, k]);
    else stages.push({ name: s.stage, steps: [[s, k]] });
  });
  useEffect(() => {
    keepInView(strip.current, strip.current?.querySelector<HTMLElement>("[aria-current=step]") ?? null);
  }, [state.step]);
  const go = (by: 1 | -1): void => {
    const k = changedFrom(store, state.step + by, by);
    if (k !== null) store.set({ step: k });
  };
  const scrub = (e: PointerEvent): void => {
    if (e.buttons === 0) return;
    const at = (document.elementFromPoint(e.clientX, e.clientY) as Element | null)?.closest("[data-step]");
    if (at === null || at === undefined) return;
    const k = Number(at.getAttribute("data-step"));
    if (k !== state.step && (walk.steps[k]?.after ?? -1) >= 0) store.set({ step: k });
  };
  /** One stop for the Tab key; arrows go through the steps. */
  const arrows = (e: KeyboardEvent): void => {
    const to = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[e.key];
    if (to === undefined) return;
    const k = Math.min(all.length - 1, Math.max(0, state.step + to));
    store.set({ step: k, tab: "step", rewrite: -1 });
    strip.current?.querySelector<HTMLElement>(`[data-step="${k}"]`)?.focus();
    e.preventDefault();
  };
  const shown = new Set(state.mode === "graph" ? [] : store.points().map((p) => p.step));
  return (
    <nav class="adk-timeline" aria-label="Passes">
      <div class="adk-play">
        <button type="button" onClick={() => go(-1)} aria-label="Step back" title="Previous change (k)"><Icon d="M11,3 L5,8 L11,13 z M4,3 v10" /></button>
        <button type="button" onClick={() => store.set({ playing: !state.playing })} aria-label={state.playing ? "Pause" : "Play"} aria-pressed={state.playing}><Icon d={state.playing ? "M5,3 v10 M11,3 v10" : "M5,3 L12,8 L5,13 z"} /></button>
        <button type="button" onClick={() => go(1)} aria-label="Step forward" title="Next change (j)"><Icon d="M5,3 L11,8 L5,13 z M12,3 v10" /></button>
      </div>
      <label class="adk-bars" title="What the bars tell: nodes changed, seconds, memory, nodes in all">
        Bars
        <select value={measure} onChange={(e) => setMeasure(e.currentTarget.value as Measure)}>
          {(Object.keys(MEASURES) as Measure[]).map((m) => <option key={m} value={m} disabled={all.every((s, k) => MEASURES[m].of(s, k, walk) === 0)}>{MEASURES[m].name}</option>)}
        </select>
      </label>
      <div class="adk-strip" ref={strip} onPointerMove={scrub} onPointerLeave={() => hover(-1)} onKeyDown={arrows}>
        {stages.map((stage) => (
          <div class="adk-stage" key={stage.name} role="group" aria-label={stage.name} style={{ flexGrow: stage.steps.length }}>
            <span class="adk-stage-name" aria-hidden="true">{stage.name.replace(/_/g, " ")}</span>
            <div class="adk-steps">
              {stage.steps.map(([s, k]) => (
                <button
                  type="button"
                  key={k}
                  data-step={k}
                  class={`adk-step adk-${s.status} ${of(s, k) !== 0 ? "adk-changes" : ""} ${of(s, k) < 0 ? "adk-less" : ""} ${k !== state.step && shown.has(k) ? "adk-shown" : ""}`}
                  tabIndex={k === state.step ? 0 : -1}
                  aria-current={k === state.step ? "step" : undefined}
                  aria-label={`${s.name}: ${tell(s)}`}
                  onPointerEnter={() => hover(k)}
                  onClick={(e) => (e.shiftKey ? beside(store, k) : store.set({ step: k, tab: "step", rewrite: -1 }))}
                >
                  <i style={{ height: `${of(s, k) === 0 ? 2 : 4 + 22 * Math.sqrt(Math.abs(of(s, k)) / most)}px` }} />
                </button>
              ))}
            </div>
          </div>
        ))}
      </div>
      <Running store={store} hovered={hovered} all={all} />
    </nav>
  );
}

function Icon({ d }: { d: string }) {
  return <svg class="adk-icon" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true"><path d={d} /></svg>;
}

/** What the bars can be as tall as. */
const MEASURES = {
  changes: { name: "changes", of: (s: Head) => s.created + s.erased + s.changed },
  time: { name: "time", of: (s: Head) => s.seconds },
  memory: { name: "memory", of: (s: Head) => s.memory_bytes },
  size: { name: "size", of: (_: Head, k: number, walk: Walk) => walk.data.graphs[walk.steps[k]?.after ?? -1]?.size ?? 0 },
} as const satisfies Record<string, { name: string; of(s: Head, k: number, walk: Walk): number }>;

type Measure = keyof typeof MEASURES;

/** Shift-click: shown side by side, or closed if it was. */
function beside(store: Store, k: number): void {
  const at = store.state.mode === "compare" ? store.points().findIndex((p) => p.step === k) : -1;
  if (at >= 0) store.closePane(at);
  else if ((store.walk.steps[k]?.after ?? -1) >= 0) store.addPane(k);
}

/** What runs now, or what failed; its place is kept, so that nothing moves when it begins. */
function Running({ store, hovered, all }: { store: Store; hovered: number; all: Head[] }) {
  const { live, step } = store.state;
  const [, tick] = useReducer((n: number) => n + 1, 0);
  useEffect(() => {
    if (live.running === "") return;
    const timer = setInterval(() => tick(0), 500);
    return () => clearInterval(timer);
  }, [live.running]);
  const { walk } = store;
  const said = (k: number) => {
    const s = all[k];
    if (s === undefined) return <div class="adk-now" />;
    const facts = tell(s);
    return <div class="adk-now"><b title={s.name}>{s.name}</b><span title={facts}>{facts}</span><span class="adk-muted">{k + 1} of {all.length}{k === hovered && k !== step ? "; shift-click: beside" : ""}</span></div>;
  };
  if (hovered >= 0) return said(hovered);
  if (live.running !== "") {
    const { progress, log } = live;
    const line = log[log.length - 1];
    const seconds = live.elapsed + (performance.now() - live.told) / 1e3;
    return (
      <div class="adk-now">
        <span role="status">running <b>{live.running}</b></span>
        <span class="adk-muted" title={line}>
          {progress === null ? `${seconds.toFixed(0)} s${line === undefined ? "" : `: ${line}`}` : `${progress.what}: ${amount(progress.done)} of ${amount(progress.total)}`}
        </span>
        <progress aria-label={`Progress of ${live.running}`} {...(progress === null ? {} : { value: progress.done, max: Math.max(1, progress.total) })} />
      </div>
    );
  }
  if (live.error !== null) {
    const k = walk.steps.findIndex((s) => s.name === live.error!.step);
    return (
      <div class="adk-now" role="alert">
        <button type="button" class="adk-failure" onClick={() => k >= 0 && store.set({ step: k, tab: "step", side: true })}>{live.error.step} failed</button>
      </div>
    );
  }
  return said(step);
}

/** Bytes are counted in the millions, other things are not. */
function amount(n: number): string {
  return n > 1 << 20 ? `${short(n)}B` : String(n);
}

/** Scroll a strip sideways, and nothing around it. */
function keepInView(strip: HTMLElement | null, mark: HTMLElement | null): void {
  if (strip === null || mark === null) return;
  const [a, b] = [strip.getBoundingClientRect(), mark.getBoundingClientRect()];
  if (b.left < a.left) strip.scrollLeft -= a.left - b.left + 20;
  else if (b.right > a.right) strip.scrollLeft += b.right - a.right + 20;
}

/** A step in words: status, nodes, time, memory. */
export function tell(s: Head): string {
  const parts = [s.status];
  if (s.created + s.erased > 0) parts.push(`+${s.created} −${s.erased} nodes`);
  if (s.changed > 0) parts.push(`${s.changed} changed`);
  if (s.seconds > 0) parts.push(s.seconds < 1 ? `${(s.seconds * 1e3).toFixed(s.seconds < 0.01 ? 1 : 0)} ms` : `${s.seconds.toFixed(1)} s`);
  if (s.memory_bytes !== 0) parts.push(`${s.memory_bytes > 0 ? "+" : ""}${short(s.memory_bytes)}B`);
  if (s.reason) parts.push(s.reason);
  return parts.join(", ");
}
