"""Pictures of an engine at work: what they say is what the data says, escaped, bounded, the same each time."""

from __future__ import annotations

import re

import numpy as np

from adkit.graph.display import html_of
from adkit.viz.live import (
    Answer,
    LiveView,
    Meter,
    Occupancy,
    PageGroup,
    PageMap,
    answers_html,
    hue,
    log_html,
    meters_html,
)  # fmt: skip

GROUPS = (
    PageGroup("free", "free"),
    PageGroup("kept for reuse", "cached"),
    PageGroup("shared prefix", "shared"),
    PageGroup("request 1", "held", hue(1)),
)


def blocks(html: str, look: str) -> int:
    """How many cells, or bands of cells, the map (not its legend) has of a look."""
    drawing = html[html.index('class="al-pages"') :].partition("</svg>")[0]
    paths = re.findall(rf'class="al-{look}"[^>]* d="([^"]*)"', drawing)
    return sum(p.count("h8") for p in paths)


def test_every_page_is_a_cell_of_its_group() -> None:
    owner = np.array([0] * 50 + [1] * 3 + [2] * 2 + [3] * 8)
    pages = PageMap(GROUPS, owner, 16)
    assert pages.counts() == {"free": 50, "kept for reuse": 3, "shared prefix": 2, "request 1": 8}
    html = str(html_of(pages))
    assert blocks(html, "free") == 50
    assert blocks(html, "held") == 8
    assert "request 1: 8 pages" in html
    assert "63 pages of 16 tokens" in html
    assert repr(pages) == (
        "PageMap(63 pages of 16 tokens: 50 free, 3 kept for reuse, 2 shared prefix, 8 request 1)"
    )


def test_a_large_cache_is_drawn_in_a_bounded_number_of_cells_that_keep_the_shares() -> None:
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 4, 40_000)
    pages = PageMap(GROUPS, owner)
    per, cells = pages.cells()
    assert len(cells) <= 512
    assert per * len(cells) >= 40_000
    assert all(abs(sum(share for _, share in cell) - 1) < 1e-9 for cell in cells)
    in_full = [share for cell in cells[:-1] for group, share in cell if group == 3]
    assert abs(np.mean(in_full) - np.mean(owner == 3)) < 0.01
    assert cells[0][-1][0] == 0, "what is free lies on top"
    assert len(str(html_of(pages))) < 100_000
    assert f"a cell is {per}" in str(html_of(pages))


def test_looks_differ_by_shape_and_not_by_colour_alone() -> None:
    shapes = {}
    for look in ("free", "cached", "shared", "held"):
        html = str(html_of(PageMap((PageGroup("x", look),), np.zeros(1, dtype=int))))
        found = re.search(rf'class="al-{look}"[^>]* d="([^"]*)"', html)
        assert found is not None
        shapes[look] = found[1]
    assert len({shapes["cached"], shapes["shared"], shapes["held"]}) == 3
    assert "al-free{fill:var(--ak-muted);fill-opacity" in html  # and a free one is faint


def test_the_map_has_the_same_size_whatever_the_pages_are() -> None:
    boxes = [
        re.search(r'viewBox="([^"]+)"', str(html_of(PageMap(GROUPS, np.full(300, g))))) for g in range(4)
    ]
    assert len({b[1] for b in boxes if b}) == 1


def test_text_is_escaped_and_prompt_and_answer_are_told_apart() -> None:
    html = answers_html([Answer(1, "<b>ask</b>", "<script>x</script>", "error", "3 tokens", error="a < b")])
    assert "<b>ask" not in html
    assert "<script>" not in html
    assert '<span class="al-prompt">&lt;b&gt;ask' in html
    assert '<span class="al-text">&lt;script' in html
    assert '<div class="al-error">a &lt; b</div>' in html
    assert "&lt;oh&gt;" in log_html(["<oh>"])


def test_many_long_answers_stay_a_bounded_page_that_shows_their_ends() -> None:
    answers = [Answer(n, "p" * 5_000, "x" * 50_000 + f" end{n}", "") for n in range(1, 101)]
    html = answers_html(answers)
    assert len(html) < 80_000
    assert "and 76 before these" in html
    assert "end100" in html
    assert "end77" in html
    assert "end76" not in html


def test_occupancy_draws_the_latest_samples_at_the_right() -> None:
    occupancy = Occupancy((1.0, 2.0, 4.0), 0.1, 32)
    html = str(html_of(occupancy))
    assert repr(occupancy) == "Occupancy(mean 2.3, most 4.0 of 32 sequences a step)"
    assert html.count("h3V40z") == 3
    assert "M636 40v-36.0h3" in html, "the last and highest is the last bar"
    assert repr(Occupancy((), 0.1, 32)) == "Occupancy(no step yet)"
    assert html_of(Occupancy((), 0.1, 32))


def test_a_meter_without_a_value_says_so() -> None:
    assert Meter("now", None).shown == "–"
    assert "1,234" in meters_html([Meter("now", 1234.4, "tokens/s")])


def test_a_view_shows_all_of_it_without_a_script_and_reads_as_text() -> None:
    view = LiveView(
        "demo on cpu", (Meter("now", 5.0, "tokens/s"),), (Answer(1, "ask", "told", "stop"),),
        PageMap(GROUPS, np.zeros(9, dtype=int)), Occupancy((1.0,), 0.1, 4), ("broke",),
    )  # fmt: skip
    bundle = view._repr_mimebundle_()
    for part in ("demo on cpu", "al-meter", "told", "al-pages", "al-spark", "broke"):
        assert part in bundle["text/html"]
    assert "<script" not in bundle["text/html"]
    assert bundle["text/plain"].splitlines()[:3] == [
        "demo on cpu",
        "  5 tokens/s now",
        "  [1] 'ask' -> 'told' (stop)",
    ]
