/** What is chosen, in words: the step, its rewrites, the node with its past and future. */
import { RewritePicture } from "./rewrite.tsx";
import { heads } from "./live.ts";
import { list, type NodeInfo, type Rewrite, type Walk } from "./record.ts";
import type { Store } from "./store.ts";
import { overlays } from "./store.ts";
import { measured, scaleOf } from "./colour.ts";
import { tell } from "./timeline.tsx";

const TABS = { step: "Step", rewrites: "Rewrites", node: "Node", about: "About" };

type Show = (id: number) => void;

export function Side({ store, show }: { store: Store; show: Show }) {
  const { state } = store;
  const tabs = ["step", "rewrites", "node", "about"] as const;
  const turn = (e: KeyboardEvent): void => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (by === undefined) return;
    const tab = tabs[(tabs.indexOf(state.tab) + by + tabs.length) % tabs.length]!;
    store.set({ tab });
    (e.currentTarget as HTMLElement).querySelector<HTMLElement>(`[data-tab=${tab}]`)?.focus();
    e.preventDefault();
  };
  return (
    <aside class="adk-side" aria-label="Details">
      <div role="tablist" aria-label="Details" onKeyDown={turn}>
        {tabs.map((t) => (
          <button type="button" role="tab" key={t} data-tab={t} tabIndex={state.tab === t ? 0 : -1} aria-selected={state.tab === t} onClick={() => store.set({ tab: t })}>{TABS[t]}</button>
        ))}
      </div>
      <div class="adk-panel" role="tabpanel" tabindex={0} aria-label={TABS[state.tab]}>
        {state.tab === "step" ? <StepPanel store={store} /> : state.tab === "rewrites" ? <Rewrites store={store} show={show} /> : state.tab === "node" ? <NodePanel store={store} show={show} /> : <About store={store} />}
      </div>
    </aside>
  );
}

function StepPanel({ store }: { store: Store }) {
  const step = store.walk.steps[store.state.step];
  if (step === undefined) return <p>No step.</p>;
  const config = Object.entries(step.config).filter(([k]) => k !== "stage");
  const rewrites = store.walk.rewrites(store.state.step);
  const head = heads(store.walk.steps, store.state.live)[store.state.step]!;
  const failure = store.state.live.error;
  const [first = "", ...more] = step.doc.trim().split(/\n\s*\n/);
  return (
    <>
      <h2><Name of={step.name} /></h2>
      <p class="adk-muted">{step.stage.replace(/_/g, " ")}: {tell(head)}</p>
      {failure?.step === step.name && <pre class="adk-code adk-failure-text">{failure.text}</pre>}
      <Doc text={first} />
      {rewrites !== null && rewrites.length > 0 && (
        <ul class="adk-classes">
          {rewrites.map((r, n) => <li key={n}><button type="button" onClick={() => store.set({ tab: "rewrites", rewrite: n, site: 0 })} title="Before and after, and its sites">{said(r)}</button></li>)}
        </ul>
      )}
      {step.altered.length > 0 && <p>New data in {step.altered.length} tensors: {step.altered.slice(0, 4).join(", ")}{step.altered.length > 4 ? ", …" : ""}</p>}
      {head.log.map((line, n) => <p key={n} class="adk-log">{line}</p>)}
      <Facts facts={Object.entries(step.details).map(([k, v]) => [k, plain(v)])} />
      <Doc text={more.join("\n\n")} />
      <details><summary>configuration</summary><Facts facts={config.map(([k, v]) => [k, plain(v)])} /></details>
      {step.source !== null && <details><summary>source of the pass (<Name of={`${step.source.file}:${step.source.line}`} />)</summary><pre class="adk-code">{step.source.code}</pre></details>}
    </>
  );
}

/** A rewrite class in words. */
function said(r: Rewrite): string {
  return r.text.replace(/^(\d+) x /, "$1 × ").replaceAll(" -> ", " → ");
}

/** A docstring: paragraphs flow, what is indented keeps its lines. */
function Doc({ text }: { text: string }) {
  return <>{text.trim().split(/\n\s*\n/).map((part, n) => (/^(\s{2,}|\s*- )/.test(part) ? <pre class="adk-doc" key={n}>{dedent(part).replace(/(\S) {3,}/g, "$1  ")}</pre> : <p key={n}>{part.replace(/\s+/g, " ").split("``").map((piece, k) => (k % 2 ? <code key={k}>{piece}</code> : piece))}</p>))}</>;
}

function dedent(text: string): string {
  const lines = text.replace(/^\n+/, "").split("\n");
  const least = Math.min(...lines.filter((l) => l.trim() !== "").map((l) => l.search(/\S/)));
  return lines.map((l) => l.slice(least)).join("\n");
}

function Rewrites({ store, show }: { store: Store; show: Show }) {
  const { walk, state } = store;
  const step = walk.steps[state.step];
  const all = walk.rewrites(state.step);
  if (all === null || all.length === 0) return <p class="adk-muted">{all === null && walk.ask !== null ? "Reading the rewrites from the kernel …" : "This step rewrote nothing."}</p>;
  const n = state.rewrite >= 0 && state.rewrite < all.length ? state.rewrite : 0;
  const chosen = all[n]!;
  const site = Math.min(state.site, chosen.count - 1);
  return (
    <>
      <ul class="adk-classes">
        {all.map((r, k) => <li key={k}><button type="button" aria-pressed={k === n} onClick={() => { store.set({ rewrite: k, site: 0 }); select(store, r, 0, show); }}>{said(r)}</button></li>)}
      </ul>
      {chosen.picture !== null && <RewritePicture picture={chosen.picture} store={store} show={show} />}
      {chosen.count > 1 && (
        <p class="adk-sites">
          <button type="button" aria-label="Previous site" onClick={() => at(store, chosen, site - 1, show)}>◀</button>
          <span>site {site + 1} of {chosen.count}: {walk.text(walk.data.modules.path[chosen.module[site] ?? 0] ?? 0) || "root"}</span>
          <button type="button" aria-label="Next site" onClick={() => at(store, chosen, site + 1, show)}>▶</button>
        </p>
      )}
      {chosen.count === 1 && <p><button type="button" onClick={() => select(store, chosen, 0, show)}>show it in the graph</button></p>}
      {step?.source != null && <details><summary>the pattern (<Name of={`${step.source.file}:${step.source.line}`} />)</summary><pre class="adk-code">{step.source.code}</pre></details>}
    </>
  );
}

function at(store: Store, r: Rewrite, site: number, show: Show): void {
  const n = (site + r.count) % r.count;
  store.set({ site: n });
  select(store, r, n, show);
}

function select(store: Store, r: Rewrite, site: number, show: Show): void {
  const made = [...list(r.created_ids, site), ...list(r.changed_ids, site)];
  const here = store.walk.rowOf(store.graph);
  const ids = made.filter((i) => here.has(i));
  store.set({ selection: ids.length > 0 ? ids : list(r.erased_ids, site), module: null });
  const { inspected } = store;
  if (ids.length > 0 && inspected !== undefined) show(inspected);
}

function NodePanel({ store, show }: { store: Store; show: Show }) {
  const { state, walk } = store;
  const id = store.inspected;
  if (id === undefined) return state.module !== null ? <ModulePanel store={store} path={state.module} /> : <p class="adk-muted">Click a node. Arrow keys follow its inputs and users; Enter opens a module.</p>;
  const graph = store.graph;
  const here = walk.rowOf(graph).get(id);
  const row = here ?? walk.lastRow(id);
  if (row === null) return <p>Node %{id} is not in this record.</p>;
  const n = walk.info(row);
  const [born, gone] = [walk.born(id), walk.gone(id)];
  const users = walk.graph(graph).users.get(id) ?? [];
  const weights = walk.data.weights[n.target] ?? [];
  const values = walk.data.overlays.filter((o) => overlays(walk, graph, o.name).length > 0).map((o) => [o, o.ids.indexOf(id)] as const).filter(([, k]) => k >= 0);
  return (
    <>
      <h2><Name of={n.name} /></h2>
      {here === undefined && <p class="adk-note">Not in this graph: erased by {walk.steps[gone]?.name ?? "a later step"}. <button type="button" onClick={() => { const s = walk.stepWith(id, state.step); if (s !== null) { store.set({ step: s }); show(id); } }}>go where it stands</button></p>}
      <pre class="adk-code">{n.op === "call_function" ? `${n.short}(${walk.call(graph, row)})` : `${n.op} ${n.target}`}</pre>
      <Facts facts={[["value", n.value], ["op", n.op === "call_function" ? n.target : n.op], ["module", `${n.path || "root"}${n.type ? ` (${n.type})` : ""}`], ["id", `%${n.id}`], ...values.map(([o, k]) => [o.name, scaleOf(o).text(o.values[k]!)] as [string, string])]} />
      <Costs walk={walk} rows={[row]} />
      <Links title="inputs" ids={n.inputs} store={store} show={show} />
      <Links title="users" ids={users} store={store} show={show} />
      {weights.length > 0 && <p>made of {weights.join(", ")}</p>}
      <h3>History</h3>
      <History store={store} id={id} show={show} />
      {born >= 0 && <details><summary>configuration of {walk.steps[born]?.name}</summary><Facts facts={Object.entries(walk.steps[born]?.config ?? {}).map(([k, v]) => [k, plain(v)])} /></details>}
      <LeftAlone store={store} id={id} />
      <Source n={n} />
      {n.op === "call_function" && <Signature store={store} row={row} />}
    </>
  );
}

/** FLOPs, bytes and roofline time of nodes together, a line a phase. */
function Costs({ walk, rows }: { walk: Walk; rows: number[] }) {
  const lines = walk.data.costs.map((c) => {
    const found = rows.map((r) => c.table[c.rows[r] ?? -1]).filter((cost) => cost !== undefined && cost[2] > 0) as [number, number, number, string][];
    const sum = (k: 0 | 1 | 2): number => found.reduce((all, cost) => all + cost[k], 0);
    return { c, flops: sum(0), bytes: sum(1), time: sum(2), bound: found.length === 1 ? found[0]![3] : "" };
  });
  if (lines.every((l) => l.time === 0)) return null;
  return (
    <table class="adk-costs">
      <thead><tr><th>{walk.data.costs[0]!.device} roofline</th><th>work</th><th>traffic</th><th>time</th></tr></thead>
      <tbody>
        {lines.filter((l) => l.time > 0).map(({ c, flops, bytes, time, bound }) => (
          <tr key={c.name} title={Object.entries(c.sizes).map(([k, v]) => `${k} ${v}`).join(", ")}><th>{c.name}</th><td>{measured(flops, "FLOP")}</td><td>{measured(bytes, "B")}</td><td title={bound && `bound by ${bound}`}>{measured(time, "µs")}</td></tr>
        ))}
      </tbody>
    </table>
  );
}

const MOST_ANCESTORS = 400;

/** All that a node came from and what it became, by the step that made it: where a node comes from at one look. */
function History({ store, id, show }: { store: Store; id: number; show: Show }) {
  const { walk } = store;
  const found = new Map<number, Set<number>>();
  const put = (i: number): void => {
    const born = walk.born(i);
    (found.get(born) ?? found.set(born, new Set()).get(born)!).add(i);
  };
  for (const next of [(i: number) => walk.origins(i), (i: number) => walk.became(i)]) {
    const seen = new Set([id]);
    for (const i of seen) if (seen.size < MOST_ANCESTORS) for (const o of next(i)) seen.add(o);
    for (const i of seen) put(i);
  }
  const gone = walk.gone(id);
  const changed = walk.steps.map((s, k) => (s.changed.includes(id) ? k : -1)).filter((k) => k >= 0);
  const at = new Set([...found.keys(), ...changed, ...(gone >= 0 ? [gone] : [])]);
  return (
    <ol class="adk-history">
      {[...at].sort((a, b) => a - b).map((step) => {
        const made = [...(found.get(step) ?? [])].filter((i) => i !== id);
        return (
          <li key={step} class={step === walk.born(id) ? "adk-here" : ""}>
            {step < 0 ? <span class="adk-muted">before the first step</span> : <StepLink store={store} step={step} />}
            {step === walk.born(id) && <span> made this node</span>}
            {changed.includes(step) && <span> changed it</span>}
            {step === gone && <span> erased it</span>}
            {made.length > 0 && <Links title={step === walk.born(id) ? "and" : ""} ids={made} store={store} show={show} />}
          </li>
        );
      })}
    </ol>
  );
}

/** Passes after the one that made a node which did nothing to it, and why: the answer to "why is it not fused?" */
function LeftAlone({ store, id }: { store: Store; id: number }) {
  const { walk } = store;
  const [born, gone] = [walk.born(id), walk.gone(id)];
  if (born < 0) return null;
  const end = gone >= 0 ? gone : walk.steps.length;
  const passes = walk.steps.flatMap((s, k) => (k > born && k < end && s.status !== "pending" && !s.changed.includes(id) ? [[s, k] as const] : []));
  if (passes.length === 0) return null;
  const why = (s: (typeof passes)[number][0]): string => s.reason || (s.status === "disabled" ? "disabled" : s.created + s.erased + s.changed.length > 0 ? "rewrote other nodes" : "matched nothing");
  return (
    <details>
      <summary>{passes.length} later passes left it as it is</summary>
      <dl class="adk-facts">{passes.map(([s, k]) => [<dt key={`k${k}`}><StepLink store={store} step={k} /></dt>, <dd key={`v${k}`}>{why(s)}</dd>])}</dl>
    </details>
  );
}

function Source({ n }: { n: NodeInfo }) {
  if (n.source === null) return null;
  return (
    <>
      <h3>Modelling code</h3>
      <p class="adk-muted"><Name of={`${n.source.file}:${n.source.line}`} />{n.source.function ? `, in ${n.source.function}` : ""}</p>
      <Code source={n.source} />
    </>
  );
}

/** The line between its neighbours, where the record has them. */
function Code({ source }: { source: NonNullable<NodeInfo["source"]> }) {
  if (source.context === "") return <pre class="adk-code">{source.code}</pre>;
  const lines = source.context.split("\n");
  const width = String(source.first + lines.length).length;
  return (
    <pre class="adk-code">
      {lines.map((text, k) => {
        const number = source.first + k;
        return <span key={number} class={number === source.line ? "adk-here" : "adk-muted"}>{`${String(number).padStart(width)}  ${text}\n`}</span>;
      })}
    </pre>
  );
}

function Signature({ store, row }: { store: Store; row: number }) {
  const target = store.walk.data.targets[store.walk.data.rows.target[row]!];
  if (!target || (!target.signature && !target.doc)) return null;
  return <details><summary>the op</summary><pre class="adk-code">{target.signature}</pre><pre class="adk-doc">{target.doc}</pre></details>;
}

function ModulePanel({ store, path }: { store: Store; path: string }) {
  const { walk } = store;
  const graph = walk.graph(store.graph);
  const module = graph.modules.get(path);
  if (module === undefined) return <p>{path} is not in this graph.</p>;
  const repeat = graph.repeats.get(path);
  const within = [...graph.nodes.values()].filter((n) => path === "" || n.path === path || n.path.startsWith(`${path}.`));
  const calls = new Map<string, number>();
  for (const n of within) if (n.op === "call_function") calls.set(n.target, (calls.get(n.target) ?? 0) + 1);
  const d = store.difference();
  const count = (set: ReadonlySet<number>): number => within.filter((n) => set.has(n.id)).length;
  const said = store.overlay()?.of(path);
  return (
    <>
      <h2>{walk.title(store.graph, path) || walk.name}</h2>
      <p><button type="button" onClick={() => store.toggle(path)}>{store.state.open.has(path) ? "Fold" : "Unfold"}</button></p>
      <Facts facts={[
        ["path", path || "the model itself"],
        ...(repeat ? [["stands for", `${repeat.count} modules of equal structure, ${repeat.members[0]} to ${repeat.members[repeat.count - 1]}`] as const] : []),
        ["nodes", `${module.size}${count(d.created) + count(d.changed) > 0 ? ` (${count(d.created)} added, ${count(d.changed)} changed)` : ""}`],
        ["weights", String(within.filter((n) => n.op === "get_attr").length)],
        ...(said ? [[store.state.overlay, said.text] as const] : []),
      ]} />
      <Costs walk={walk} rows={within.map((n) => walk.rowOf(store.graph).get(n.id)!)} />
      {calls.size > 0 && <h3>Calls</h3>}
      <Facts facts={[...calls].sort((a, b) => b[1] - a[1]).slice(0, 30).map(([name, n]) => [name, `×${n}`])} />
    </>
  );
}

function About({ store }: { store: Store }) {
  const { data } = store.walk;
  return (
    <>
      <h2>{store.walk.name}</h2>
      {data.note && <p class="adk-note">{data.note}</p>}
      <Facts facts={[...Object.entries(data.about), ...Object.entries(data.versions)]} />
      {data.config && <details><summary>configuration</summary><pre class="adk-code">{data.config}</pre></details>}
      <h3>Keys</h3>
      <Facts facts={[["/", "search"], ["j, k", "next, previous step that changed the graph"], ["n, N", "next, previous changed node"], ["u", "unfold what changed"], ["c", "compare"], ["p, x", "add a pane, close it"], ["t", "programs as text"], ["d", "this panel"], ["arrows", "inputs, users, neighbours"], ["Enter", "open or close a module"], ["+ − 0", "zoom, fit"], ["Esc", "choose nothing"], ["?", "this list"]]} />
    </>
  );
}

function StepLink({ store, step }: { store: Store; step: number }) {
  const s = store.walk.steps[step];
  return s === undefined ? <>?</> : <button type="button" class="adk-link" onClick={() => store.set({ step, tab: "step" })}><Name of={s.name} /></button>;
}

function Links({ title, ids, store, show }: { title: string; ids: number[]; store: Store; show: Show }) {
  const { walk } = store;
  const unique = [...new Set(ids)];
  if (unique.length === 0) return null;
  const here = walk.rowOf(store.graph);
  return (
    <p class="adk-links">
      {title && <span class="adk-muted">{title} </span>}
      {unique.slice(0, 24).map((i) => {
        const row = here.get(i) ?? walk.lastRow(i);
        const name = row === null ? `%${i}` : walk.text(walk.data.rows.name[row]!);
        return <button type="button" key={i} class={here.has(i) ? "adk-link" : "adk-link adk-gone"} onClick={() => { store.select([i]); if (here.has(i)) show(i); }}><Name of={name} /></button>;
      })}
      {unique.length > 24 && <span class="adk-muted"> and {unique.length - 24} more</span>}
    </p>
  );
}

/** A name that may break after its dots, dashes and slashes, and not within its words. */
function Name({ of }: { of: string }) {
  return <>{of.split(/(?<=[_./])(?=\w)/).map((part, n) => (n === 0 ? part : [<wbr key={n} />, part]))}</>;
}

function Facts({ facts }: { facts: (readonly [string, string])[] }) {
  if (facts.length === 0) return null;
  return <dl class="adk-facts">{facts.map(([k, v], n) => [<dt key={`k${n}`}>{k}</dt>, <dd key={`v${n}`}><Name of={v} /></dd>])}</dl>;
}

function plain(v: unknown): string {
  return typeof v === "string" ? v : (JSON.stringify(v) ?? String(v));
}
