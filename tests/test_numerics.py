"""Numerical error a node, against the same graph in a wider dtype."""

from __future__ import annotations

import pytest
import torch

from adkit.contract import AdkitError


def test_bfloat16_rounds_and_errors_add_up(exported):
    wb = exported(dtype="bfloat16").run()
    for step in ("match_rmsnorm_pattern", None):  # whole prompts; packed and cached
        found = wb.errors(step)
        values = dict(zip(found.ids, found.values, strict=True))
        graph = wb.graph if step is None else wb.steps[step].after
        floating = {
            n.id
            for n in graph
            if n.op == "call_function" and isinstance(n.val, torch.Tensor) and n.val.is_floating_point()
        }
        assert len(floating & set(values)) > 0.9 * len(floating)
        first = next(values[n.id] for n in graph if "linear" in n.target_name)
        last = [values[n.id] for n in graph if "linear" in n.target_name][-1]
        assert 1e-4 < first < last < 0.2


def test_float32_is_measured_in_float64(exported):
    wb = exported().run("pattern_matcher")
    found = wb.errors(weights="random")
    assert "float64" in found.note
    assert 0 < max(found.values) < 1e-4


def test_the_node_that_lost_accuracy_stands_out(exported):
    from adkit.passes import Pass, PassInfo, Stage

    aten = torch.ops.aten

    class Spoil(Pass):
        """Round one activation hard.

        Why: to see it found.
        """

        key = "spoil"
        stage = Stage.PATTERN_MATCHER

        def apply(self, gm, ctx):
            n = [n for n in gm.graph.nodes if "linear" in str(n.target)][4]
            with self.site(gm, [n], label="spoil", before=n.next) as s:
                low = s.call(aten.to.dtype, (n, torch.float8_e4m3fn), like=n)
                back = s.call(aten.to.dtype, (low, torch.float32), like=n)
                for user in list(n.users):
                    if user is not low:
                        user.replace_input_with(n, back)
            return PassInfo(num_matches=1)

    wb = exported().run("pattern_matcher")
    before = max(wb.errors(weights="random").values)
    wb.insert(Spoil())
    wb.run("pattern_matcher")
    values = wb.errors(weights="random")
    order = {n.id: k for k, n in enumerate(wb.graph)}
    bad = sorted(
        (i for i, v in zip(values.ids, values.values, strict=True) if v > 100 * before), key=order.__getitem__
    )
    assert bad
    assert wb.graph[bad[0]].target_name == "aten.to.dtype"


def test_without_a_graph_it_is_refused(exported):
    import adkit

    with pytest.raises(AdkitError, match="no graph yet"):
        adkit.Workbench("demo", device="cpu", progress=False).errors()
