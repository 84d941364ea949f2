"""From requests and an engine to the pictures of ``adkit.viz.live``."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from adkit.playground.driver import Request
from adkit.playground.gauge import PlayStats
from adkit.runtime import Engine
from adkit.runtime.pages import PageState
from adkit.viz.live import Answer, Meter, PageGroup, PageMap, hue

_FIXED = (
    PageGroup("free", "free"),
    PageGroup("kept for reuse", "cached"),
    PageGroup("shared prefix", "shared", "var(--ak-fg)"),
    PageGroup("other requests", "held"),
)
_GROUP_OF = np.zeros(len(PageState), dtype=np.int64)
_GROUP_OF[[PageState.IDLE, PageState.SHARED, PageState.HELD]] = 1, 2, 3


def page_map(engine: Engine, requests: Seq[Request]) -> PageMap:
    """The cache as it is, each page with its look and, when one of ``requests`` holds it alone, its colour."""
    pages = engine.pages
    states = np.concatenate([pool.states() for pool in engine.pools])
    owner = _GROUP_OF[states]
    groups = list(_FIXED)
    for request in requests:
        mine = np.array(request.handle.pages.tolist(), dtype=np.int64) + request.handle.pool * pages.num_pages
        mine = mine[states[mine] == PageState.HELD]
        if len(mine):
            owner[mine] = len(groups)
            groups.append(PageGroup(f"request {request.number}", "held", hue(request.number)))
    if not (owner == 3).any():  # only then is there somebody else to tell of
        owner[owner > 3] -= 1
        del groups[3]
    return PageMap(tuple(groups), owner[states != PageState.PADDING], pages.page_size)


def answer(request: Request) -> Answer:
    """A request as a row: prompt, text or token ids, how it stands."""
    handle = request.handle
    state: str = handle.finish_reason or ""
    if not state and not len(handle.pages):
        state = "waiting" if not handle.num_output else "preempted"
    text = handle.text if handle.detokenizer is not None else " ".join(map(str, handle.output[-400:]))
    if handle.detokenizer is None and text:
        text = f" → {text}"
    facts = [f"{handle.num_output:,} tokens"]
    if request.first_token_seconds is not None:
        facts.append(f"first after {request.first_token_seconds * 1e3:,.0f} ms")
    error = "" if handle.error is None else str(handle.error)
    return Answer(request.number, request.prompt, text, state, " · ".join(facts), request.chat, error)


def meters(stats: PlayStats) -> tuple[Meter, ...]:
    """The panel's figures, in the order shown."""
    first = stats.first_token_seconds
    return (
        Meter("now", stats.tokens_per_second_now, "tokens/s"),
        Meter("mean of this run", stats.tokens_per_second, "tokens/s"),
        Meter("to the first token", None if first is None else first * 1e3, "ms", ",.1f"),
        Meter("tokens of this run", stats.output_tokens if stats.requests else None),
        Meter("sequences a step", stats.batch, form=",.1f"),
        Meter("requests finished", stats.finished if stats.requests else None, f"of {stats.requests}"),
    )
