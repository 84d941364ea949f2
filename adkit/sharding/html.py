"""HTML of what virtual ranks tell: check, divergence, exchanges, memory. Importing this module registers it."""

from __future__ import annotations

import math
from html import escape

from adkit.graph.display import register_html
from adkit.graph.provenance import without_layer
from adkit.models.memory import human
from adkit.sharding.agreement import Divergence
from adkit.sharding.comm import Comm
from adkit.sharding.memory import RankMemory
from adkit.sharding.result import ShardingCheck
from adkit.viz.html import fragment
from adkit.viz.placement import folded, head, table


@register_html(ShardingCheck)
def _check(c: ShardingCheck) -> str:
    chip = (
        '<span class="ak-chip ak-done">equal</span>'
        if c.ok
        else '<span class="ak-chip ak-failed">differ</span>'
    )
    title = f"{c.dist.world_size} ranks against the uncut model"
    rows = [
        ("logits, rmse ratio", f"{c.rmse_ratio:.1e} (allowed {c.tolerance:.0e})"),
        ("logits, max abs", f"{c.max_abs:.1e}"),
        ("nodes that agreed", f"{c.compared} of {c.nodes}" if c.held else "logits alone were compared"),
        ("held as", ", ".join(f"{n} {how}" for how, n in c.held.items()) or "-"),
        ("weights", c.weights),
        ("tokens", " and ".join(str(list(p)) for p in c.prompts)),
    ]
    wrong = f"<p><b>First divergence</b></p>{_where(c.first_divergence)}" if c.first_divergence else ""
    top = f'<div class="ak-head"><span class="ak-name">{escape(title)}</span>{chip}</div>'
    return fragment(top + wrong + table(("", ""), rows))


@register_html(Divergence)
def _divergence(d: Divergence) -> str:
    return fragment(_where(d))


def _where(d: Divergence) -> str:
    off = "" if math.isnan(d.rmse_ratio) else f"rmse ratio {d.rmse_ratio:.1e}, max abs {d.max_abs:.1e}"
    rows = [
        ("node", f"{d.node} = {d.op}(...)"),
        ("module", d.module or "outside any module"),
        ("who", "the sum over ranks" if d.rank is None else f"rank {d.rank}"),
        ("off by", off),
        ("why", f"{d.why} (held as {d.placement})"),
        ("source", d.source),
    ]
    return table(("", ""), [r for r in rows if r[1]])


@register_html(Comm)
def _comm(c: Comm) -> str:
    rows = folded(
        (
            without_layer(one.module), one.kind, f"[{', '.join(map(str, one.shape))}]", one.dtype,
            human(one.sent(1)), f"{1e6 * one.seconds(1, 1, c.link):.1f} us",
        )
        for one in c
    )  # fmt: skip
    columns = ("module", "", "kind", "shape", "dtype", "a rank sends, decode", "estimate")
    t = c.total()
    facts = (
        f"A decode step: each sends {human(t['decode bytes'])}, {1e6 * t['decode seconds']:.0f} us on {c.link.name} "
        f"({c.link.latency * 1e6:.0f} us latency, {c.link.bandwidth / 1e9:.0f} GB per second)."
    )
    return fragment(
        head(f"{len(c)} exchanges among {c.world} ranks", facts) + table(columns, rows, numbers=columns[-2:])
    )


@register_html(RankMemory)
def _memory(m: RankMemory) -> str:
    rows = [
        (kind, human(n), human(m.whole_by_kind[kind]), f"{m.fraction(kind):.3f}")
        for kind, n in m.by_kind.items()
    ]
    rows.append(
        ("all weights", human(m.weights), human(m.total), f"{m.weights / m.total if m.total else 1:.3f}")
    )
    rows.append(("cache, a token", human(m.cache_per_token), "", ""))
    rows.append(("cache, full", human(m.cache), "", ""))
    facts = f"{m.share:.3f} x a fair share; {human(m.replicated)} of it on every rank"
    columns = ("", "here", "uncut", "held here")
    return fragment(head(f"Rank {m.rank} of {m.world}", facts) + table(columns, rows, numbers=columns[1:]))
