/** Both programs as text, aligned; a click chooses the nodes that a line stands for. */
import { useEffect, useMemo, useRef } from "preact/hooks";
import type { Line } from "./record.ts";
import type { Store } from "./store.ts";

interface Pair {
  left: Line | null;
  right: Line | null;
}

const HEIGHT = 18;

export function CodeView({ store }: { store: Store }) {
  const { walk, state } = store;
  const [before, after] = [store.before, store.graph];
  const ready = [before, after].map((k) => k < 0 || walk.ready(k)).every(Boolean);
  const [left, right] = [walk.data.graphs[before]?.view?.code, walk.data.graphs[after]?.view?.code];
  const pairs = useMemo(() => align(left ?? [], right ?? []), [left, right]);
  const chosen = useMemo(() => {
    const g = walk.graph(after);
    return new Set(state.selection.flatMap((i) => [i, g.representative.get(i) ?? i]));
  }, [state.selection, after]);
  const host = useRef<HTMLDivElement>(null);
  const place = useRef(0);
  useEffect(() => {
    const chosen = host.current?.querySelector<HTMLElement>(".adk-chosen");
    if (chosen && host.current) inView(host.current, chosen);
    else if (state.selection.length === 0) bring(host.current, differing(host.current)[0]);
    place.current = 0;
  }, [state.selection, pairs]);
  const changes = useMemo(() => pairs.filter((p, k) => kindOf(p) !== "" && (k === 0 || kindOf(pairs[k - 1]!) === "")).length, [pairs]);
  /** To the next place where the programs differ, after the last one the first. */
  const go = (by: 1 | -1): void => {
    const all = differing(host.current);
    place.current = (place.current + by + all.length) % all.length;
    bring(host.current, all[place.current]);
  };
  const both = before >= 0 && before !== after;
  if (!ready) return <p class="adk-nothing" role="status">Reading the programs from the kernel …</p>;
  if (pairs.length === 0) return <p class="adk-nothing">This record holds no program text for these graphs.</p>;
  return (
    <>
    {both && <div class="adk-between">
      <span class="adk-muted">{changes === 0 ? "the programs are equal" : changes === 1 ? "differ in 1 place" : `differ in ${changes} places`}</span>
      <button type="button" disabled={changes === 0} onClick={() => go(-1)}>Previous difference</button>
      <button type="button" disabled={changes === 0} onClick={() => go(1)}>Next difference</button>
    </div>}
    <div class="adk-programs" ref={host} role="region" aria-label="Programs" tabindex={0}>
      <table>
        {both && <thead><tr><th>{walk.steps[state.step]?.before === before ? `before ${walk.steps[state.step]!.name}` : `after ${walk.steps.find((s) => s.after === before)?.name ?? ""}`}</th><th>after {walk.steps[state.step]?.name}</th></tr></thead>}
        <tbody>
          {pairs.map((p, n) => (
            <tr key={n} class={both && kindOf(p) !== "" ? `adk-${kindOf(p)}` : ""} style={{ height: `${HEIGHT}px` }}>
              {both && <Cell line={p.left} chosen={chosen} store={store} />}
              <Cell line={p.right} chosen={chosen} store={store} />
            </tr>
          ))}
        </tbody>
      </table>
    </div>
    </>
  );
}

function kindOf({ left, right }: Pair): "added" | "removed" | "altered" | "" {
  return left === null ? "added" : right === null ? "removed" : left.text !== right.text || left.comment !== right.comment ? "altered" : "";
}

/** Lines above a difference that stay in view. */
const MARGIN = 3;
const HEADER = 22;

/** First rows of the runs that differ. */
function differing(host: HTMLElement | null): HTMLElement[] {
  const differs = (row: Element | null): boolean => row !== null && row.className !== "";
  return [...(host?.querySelectorAll<HTMLElement>("tbody tr") ?? [])].filter((row) => differs(row) && !differs(row.previousElementSibling));
}

/** A cell that was chosen elsewhere comes into sight; one that is in sight stays where it is. */
function inView(host: HTMLElement, cell: HTMLElement): void {
  const [a, b] = [host.getBoundingClientRect(), cell.getBoundingClientRect()];
  if (b.top < a.top + HEADER || b.bottom > a.bottom) host.scrollTop += b.top - a.top - a.height / 3;
}

/** Scroll the programs, and nothing around them, to a row. */
function bring(host: HTMLElement | null, row: HTMLElement | undefined): void {
  if (host === null || row === undefined) return;
  host.scrollTop += row.getBoundingClientRect().top - host.getBoundingClientRect().top - HEADER - HEIGHT * MARGIN;
}

function Cell({ line, chosen, store }: { line: Line | null; chosen: Set<number>; store: Store }) {
  if (line === null) return <td class="adk-gap" />;
  const hit = line.ids.some((i) => chosen.has(i));
  return (
    <td class={hit ? "adk-chosen" : ""} onClick={() => line.ids.length > 0 && store.select([line.ids[line.ids.length - 1]!])}>
      <div class="adk-line" style={{ paddingLeft: `${line.depth * 2.4 + 3}em` }}>
        <code>{line.text}</code>
        {line.comment && <span class="adk-comment">  # {line.comment}</span>}
      </div>
    </td>
  );
}

/** Lines side by side by the nodes they stand for and their text: greatest common subsequence, greedy on long programs. */
export function align(left: Line[], right: Line[]): Pair[] {
  const key = (l: Line): string => (l.ids.length > 0 ? `${l.ids.join(",")}|${l.text.split("=")[1]?.split("(")[0] ?? ""}` : l.text);
  const a = left.map(key);
  const b = right.map(key);
  const where = new Map<string, number[]>();
  b.forEach((k, n) => (where.get(k) ?? where.set(k, []).get(k)!).push(n));
  // Longest rising sequence of matches (patience): keeps order, linear apart from a logarithm.
  const nodes: { n: number; m: number; prev: number }[] = [];
  const top: number[] = [];
  for (let n = 0; n < a.length; n++) {
    const places = where.get(a[n]!);
    if (places === undefined) continue;
    for (let p = places.length - 1; p >= 0; p--) {
      const m = places[p]!;
      let [lo, hi] = [0, top.length];
      while (lo < hi) {
        const mid = (lo + hi) >> 1;
        if (nodes[top[mid]!]!.m < m) lo = mid + 1;
        else hi = mid;
      }
      nodes.push({ n, m, prev: lo === 0 ? -1 : top[lo - 1]! });
      top[lo] = nodes.length - 1;
    }
  }
  const matched: { n: number; m: number }[] = [];
  for (let at = top.length === 0 ? -1 : top[top.length - 1]!; at >= 0; at = nodes[at]!.prev) matched.push(nodes[at]!);
  matched.reverse();
  const pairs: Pair[] = [];
  let [i, j] = [0, 0];
  for (const { n, m } of [...matched, { n: a.length, m: b.length }]) {
    while (i < n) pairs.push({ left: left[i++]!, right: null });
    while (j < m) pairs.push({ left: null, right: right[j++]! });
    if (n < a.length) pairs.push({ left: left[i++]!, right: right[j++]! });
  }
  return pairs;
}
