"""A Workbench forked from another goes its own way."""

from __future__ import annotations

import adkit
from adkit.contract import DistConfig
from adkit.sharding.forks import fork, graph_module


def test_a_fork_runs_on_and_leaves_the_original_alone(models) -> None:
    wb = models("llama")
    before, steps, position = wb.graph, [s.status for s in wb.steps], wb.position
    other = fork(wb, position).run()
    assert other.position == len(other.steps)
    assert wb.graph is before
    assert [s.status for s in wb.steps] == steps
    assert wb.position == position
    assert wb.steps[0]._checker.__self__ is wb  # type: ignore[union-attr]
    assert not any(graph_module(wb).get_parameter(n).is_cuda for n in ("model.norm.weight",))
    assert graph_module(wb).get_parameter("model.norm.weight").is_meta


def test_a_fork_of_a_finished_walk_starts_from_the_graph_of_then(models) -> None:
    wb = models("llama")
    done = fork(wb, wb.position).run()
    again = fork(done, wb.position)
    assert again.position == wb.position
    assert [(n.id, n.name) for n in again.graph] == [(n.id, n.name) for n in wb.graph]
    assert graph_module(again).get_parameter("model.norm.weight").is_meta  # weights are shapes again
    assert not graph_module(done).get_parameter("model.norm.weight").is_meta
    assert "adkit_weights" not in graph_module(again).meta
    tokens = [[5, 6, 7]]
    params = adkit.SamplingParams(max_tokens=8, ignore_eos=True)
    assert (
        again.llm().generate(tokens, params)[0].token_ids == done.llm().generate(tokens, params)[0].token_ids
    )


def test_a_fork_before_export_exports(models) -> None:
    wb = adkit.Workbench(models.path("llama"), device="cpu", max_seq_len=64, progress=False)
    other = fork(wb, 3, dist=DistConfig.of(2, rank=1))
    assert wb.position == 0
    assert other.position == 3
    assert len(other.graph) > 50
    assert other._context.dist.rank == 1
    assert wb._context.dist.world_size == 1
