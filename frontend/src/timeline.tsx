/** The passes in order, by stage: what each changed, and which two points are looked at. */
import { useEffect, useRef } from "preact/hooks";
import { changedFrom } from "./app.tsx";
import { short } from "./colour.ts";
import type { Step } from "./record.ts";
import type { Store } from "./store.ts";

export function Timeline({ store }: { store: Store }) {
  const { state, walk } = store;
  const strip = useRef<HTMLDivElement>(null);
  const most = Math.max(1, ...walk.steps.map((s) => s.created + s.erased));
  const stages: { name: string; steps: [Step, number][] }[] = [];
  walk.steps.forEach((s, k) => {
    const last = stages[stages.length - 1];
    if (last?.name === s.stage) last.steps.push([s, k]);
    else stages.push({ name: s.stage, steps: [[s, k]] });
  });
  useEffect(() => {
    strip.current?.querySelector<HTMLElement>("[aria-current=step]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [state.step]);
  const go = (by: 1 | -1): void => {
    const k = changedFrom(store, state.step + by, by);
    if (k !== null) store.set({ step: k, against: -1 });
  };
  const scrub = (e: PointerEvent): void => {
    if (e.buttons === 0) return;
    const at = (document.elementFromPoint(e.clientX, e.clientY) as Element | null)?.closest("[data-step]");
    if (at === null || at === undefined) return;
    const k = Number(at.getAttribute("data-step"));
    if (k !== state.step && (walk.steps[k]?.after ?? -1) >= 0) store.set({ step: k });
  };
  return (
    <nav class="adk-timeline" aria-label="Passes">
      <div class="adk-play">
        <button type="button" onClick={() => go(-1)} aria-label="Step back" title="Previous change (k)">◀</button>
        <button type="button" onClick={() => store.set({ playing: !state.playing })} aria-label={state.playing ? "Pause" : "Play"} aria-pressed={state.playing}>{state.playing ? "❚❚" : "▶"}</button>
        <button type="button" onClick={() => go(1)} aria-label="Step forward" title="Next change (j)">▶|</button>
      </div>
      <div class="adk-strip" ref={strip} onPointerMove={scrub}>
        {stages.map((stage) => (
          <div class="adk-stage" key={stage.name}>
            <span class="adk-stage-name">{stage.name}</span>
            <div class="adk-steps">
              {stage.steps.map(([s, k]) => (
                <button
                  type="button"
                  key={k}
                  data-step={k}
                  class={`adk-step adk-${s.status} ${s.before !== s.after ? "adk-changes" : ""} ${k === state.against ? "adk-against" : ""}`}
                  aria-current={k === state.step ? "step" : undefined}
                  aria-label={`${s.name}: ${tell(s)}`}
                  title={`${s.name}\n${tell(s)}\nShift-click: compare with this point`}
                  onClick={(e) => (e.shiftKey ? store.set({ against: k === state.against ? -1 : k, mode: "compare" }) : store.set({ step: k, tab: "step", rewrite: -1 }))}
                >
                  <i style={{ height: `${s.before === s.after ? 2 : 4 + 22 * Math.sqrt((s.created + s.erased + s.changed.length) / (most + 1))}px` }} />
                </button>
              ))}
            </div>
          </div>
        ))}
      </div>
      <label class="adk-against-label">
        compare with{" "}
        <select value={state.against} onChange={(e) => store.set({ against: Number(e.currentTarget.value), ...(Number(e.currentTarget.value) >= 0 ? { mode: "compare" as const } : {}) })}>
          <option value={-1}>the step before</option>
          {walk.steps.map((s, k) => s.after >= 0 && k !== state.step && <option key={k} value={k}>after {s.name}</option>)}
        </select>
      </label>
    </nav>
  );
}

/** A step in words: status, nodes, time, memory. */
export function tell(s: Step): string {
  const parts = [s.status];
  if (s.created + s.erased > 0) parts.push(`+${s.created} −${s.erased} nodes`);
  if (s.changed.length > 0) parts.push(`${s.changed.length} changed`);
  if (s.seconds > 0) parts.push(s.seconds < 1 ? `${(s.seconds * 1e3).toFixed(s.seconds < 0.01 ? 1 : 0)} ms` : `${s.seconds.toFixed(1)} s`);
  if (s.memory_bytes !== 0) parts.push(`${s.memory_bytes > 0 ? "+" : ""}${short(s.memory_bytes)}B`);
  if (s.reason) parts.push(s.reason);
  return parts.join(", ");
}
