/** One site of a rewrite before and after, its neighbours in grey. */
import * as dagre from "@dagrejs/dagre";
import { useMemo } from "preact/hooks";
import type { Picture } from "./record.ts";
import type { Store } from "./store.ts";

export function RewritePicture({ picture, store, show }: { picture: Picture; store: Store; show: (id: number) => void }) {
  const sides = (["before", "after"] as const).filter((side) => picture.boxes.some((b) => b.side === side));
  return (
    <div class="adk-rewrite">
      {sides.map((side) => <Half key={side} picture={picture} side={side} store={store} show={show} />)}
    </div>
  );
}

function Half({ picture, side, store, show }: { picture: Picture; side: "before" | "after"; store: Store; show: (id: number) => void }) {
  const laid = useMemo(() => arrange(picture, side), [picture, side]);
  const kinds = new Map(store.walk.data.categories.map((c, k) => [c.name, k]));
  return (
    <figure tabIndex={0} aria-label={side}>
      <figcaption>{side}</figcaption>
      <svg viewBox={`0 0 ${laid.width} ${laid.height}`} style={{ width: `clamp(${Math.round(laid.width * 0.55)}px, 100%, ${Math.round(laid.width)}px)` }} role="img" aria-label={`${side}: ${laid.boxes.map((b) => b.title).join(", ")}`}>
        <defs><marker id={`adk-tip-${side}`} viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0.5 L7.5,4 L0,7.5 z" class="adk-arrow" /></marker></defs>
        {laid.arrows.map((d, n) => <path key={n} d={d} class="adk-edge" marker-end={`url(#adk-tip-${side})`} />)}
        {laid.boxes.map((b, n) => (
          <g key={n} class={`adk-node adk-c${kinds.get(b.category) ?? 0} ${b.mark ? `adk-${b.mark}` : ""}`} transform={`translate(${b.x},${b.y})`} onClick={() => { if (b.id >= 0) { store.select([b.id]); if (store.walk.rowOf(store.graph).has(b.id)) show(b.id); } }}>
            <title>{b.tooltip || b.title}</title>
            <rect width={b.width} height={b.height} rx="4" />
            <text class="adk-name" x={b.width / 2} y="14" text-anchor="middle">{b.title}</text>
            {b.detail[0] !== undefined && <text class="adk-detail" x={b.width / 2} y="27" text-anchor="middle">{b.detail[0]}</text>}
          </g>
        ))}
      </svg>
    </figure>
  );
}

function arrange(picture: Picture, side: "before" | "after") {
  const g = new dagre.graphlib.Graph();
  g.setGraph({ rankdir: "TB", nodesep: 10, ranksep: 20, marginx: 6, marginy: 6 });
  g.setDefaultEdgeLabel(() => ({}));
  const chosen = picture.boxes.map((b, n) => [b, n] as const).filter(([b]) => b.side === side);
  for (const [b, n] of chosen) g.setNode(String(n), { width: Math.max(60, Math.max(b.title.length * 6.95, (b.detail[0]?.length ?? 0) * 6.05) + 14), height: b.detail.length > 0 ? 34 : 22 });
  const here = new Set(chosen.map(([, n]) => n));
  const arrows = picture.arrows.filter((a) => here.has(a.tail) && here.has(a.head));
  for (const a of arrows) g.setEdge(String(a.tail), String(a.head), {});
  dagre.layout(g);
  const size = g.graph() as { width?: number; height?: number };
  return {
    width: size.width ?? 100,
    height: size.height ?? 40,
    boxes: chosen.map(([b, n]) => {
      const at = g.node(String(n)) as unknown as { x: number; y: number; width: number; height: number };
      return { ...b, x: at.x - at.width / 2, y: at.y - at.height / 2, width: at.width, height: at.height };
    }),
    arrows: arrows.map((a) => {
      const points = (g.edge(String(a.tail), String(a.head)) as unknown as { points: { x: number; y: number }[] }).points;
      return `M${points.map((p) => `${p.x.toFixed(1)},${p.y.toFixed(1)}`).join(" L")}`;
    }),
  };
}
