"""One rank's weights: what is loaded equals that part of the whole, and no more is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from adkit.contract import Cut, EngineConfig, LocalWeight
from adkit.models import ModelFactory, resolve
from adkit.models.checkpoint import Checkpoint
from adkit.models.factory import ModelFactory as Factory
from adkit.models.loading import FUSED, LOCAL, load_graph_tensors
from tests.models.checkpoints import save_tiny
from tests.zoo import tiny_config

RANKS = 4


def parts_of(factory: ModelFactory, rank: int) -> dict[str, LocalWeight]:
    """A part of every tensor: the last dimension cut, or the first; experts by number and feature; two ranges."""
    parts = {}
    for i, (name, tensor) in enumerate(factory.tensors.items()):
        cuts = []
        for dim, size in enumerate(tensor.shape):
            if size % (2 * RANKS) == 0 and (dim + i) % 2 == 0:
                half, piece = size // 2, size // 2 // RANKS
                starts = (rank * piece, half + rank * piece)
                cuts.append(Cut(dim, tuple((s, s + piece) for s in starts)))
            elif size % RANKS == 0:
                cuts.append(Cut(dim, ((rank * size // RANKS, (rank + 1) * size // RANKS),)))
        shared = factory.tied.get(name, name)
        parts[name] = parts[shared] if shared in parts else LocalWeight(name, tuple(cuts), zero=not i % 7)
    return parts


@pytest.mark.parametrize(
    "model_type", ["llama", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "opt"]
)
@pytest.mark.parametrize("rank", [0, 3])
def test_parts_equal_slices_of_what_is_loaded_whole(tmp_path: Any, model_type: str, rank: int) -> None:
    save_tiny(tmp_path, model_type)
    seen: list[tuple[int, int]] = []
    for factory in (
        resolve(tmp_path, device="cpu"),
        resolve(tmp_path, device="cpu", random_weights=True, seed=3),
    ):
        whole = dict(factory.load())
        parts = parts_of(factory, rank)
        assert sum(bool(p.cuts) for p in parts.values()) > 5
        got = dict(factory.load(parts=parts, progress=lambda *done: seen.append(done)))
        assert set(got) == set(whole)
        for name, part in parts.items():
            expected = (
                torch.zeros(part.shape(whole[name].shape)) if part.zero else part.take(whole[part.name])
            )
            assert torch.equal(got[name], expected.to(got[name].dtype)), name
            assert got[name].is_contiguous()
            assert got[name].untyped_storage().nbytes() == got[name].nbytes
        assert seen[-1][0] == seen[-1][1] == sum({id(t): t.nbytes for t in got.values()}.values())


def test_tied_parts_stay_one_tensor(tmp_path: Any) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True, vocab_size=132)
    factory = resolve(tmp_path, device="cpu")
    one, other = factory.tied.popitem()
    rows = (Cut(0, ((33, 66),)),)
    got = dict(factory.load([one, other], parts={n: LocalWeight(n, rows) for n in (one, other)}))
    assert got[one] is got[other]
    assert got[one].shape == (33, 48)


def test_a_part_and_the_whole_of_one_weight(tmp_path: Any) -> None:
    """A weight that is read whole and cut has two names."""
    save_tiny(tmp_path, "mixtral")
    factory = resolve(tmp_path, device="cpu")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    part = LocalWeight(name, (Cut(0, ((1, 3),)),))
    got = dict(factory.load([name, "second"], parts={"second": part}))
    assert torch.equal(got["second"], got[name][1:3])


class Reads:
    """Which stored tensors a checkpoint is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = Checkpoint.mapped
        monkeypatch.setattr(
            Checkpoint, "mapped", lambda c, name: self.names.append(name) or original(c, name)
        )


def test_only_a_ranks_experts_are_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, "qwen3_moe", num_experts=12, num_local_experts=12)
    factory = resolve(tmp_path, device="cpu")
    reads = Reads(monkeypatch)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    part = LocalWeight(name, (Cut(0, ((9, 12),)), Cut(1, ((0, 12), (24, 36)))))
    (got,) = factory.load([name], parts={name: part})
    assert got[1].shape == (3, 24, 48)
    assert len(reads.names) == 6
    assert {int(n.split(".experts.")[1].split(".")[0]) for n in reads.names} == {9, 10, 11}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_no_more_than_a_part_is_held(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """Nothing is copied out of the mapped files but the part itself (and one expert while it is put together)."""
    save_tiny(tmp_path, model_type)
    factory = resolve(tmp_path, device="cpu")
    monkeypatch.setattr(Checkpoint, "read", lambda *a: pytest.fail("read as a whole"))
    monkeypatch.setattr(Factory, "_whole", lambda *a: pytest.fail("converted as a whole"))
    names = [n for n, t in factory.tensors.items() if t.dim() > 1 and t.shape[0] % 4 == 0]
    parts = {n: LocalWeight(n, (Cut(0, ((0, factory.tensors[n].shape[0] // 4),)),)) for n in names}
    assert len(dict(factory.load(names, parts=parts))) == len(names)


def graph_of(module: nn.Module, names: list[str]) -> GraphModule:
    graph = Graph()
    graph.output(tuple(graph.get_attr(n) for n in names))
    return GraphModule(module, graph)


@pytest.fixture
def halves(tmp_path: Any) -> tuple[ModelFactory, GraphModule, dict[str, LocalWeight]]:
    """A graph that reads one weight's half under its name, one fused of two halves."""
    save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    mlp = "model.layers.0.mlp"
    names = [f"{mlp}.{p}_proj.weight" for p in ("gate", "up", "down")]
    rows = (Cut(0, ((40, 80),)),)
    local = {n: LocalWeight(n, rows) for n in names[:2]}
    local[names[2]] = LocalWeight(names[2], (Cut(1, ((40, 80),)),))
    holder = nn.Module()
    for name, shape in ((f"{mlp}.gate_up.weight", (80, 48)), (names[2], (48, 40))):
        at = holder
        for step in name.split(".")[:-1]:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.weight = nn.Parameter(torch.empty(shape, device="meta"))
    gm = graph_of(holder, [f"{mlp}.gate_up.weight", names[2]])
    gm.meta.update({LOCAL: local, FUSED: {f"{mlp}.gate_up.weight": tuple(names[:2])}})
    return factory, gm, local


def test_a_graphs_parts_and_parts_fused(halves: Any) -> None:
    factory, gm, local = halves
    result = load_graph_tensors(gm, factory)
    whole = dict(factory.load())
    gate, up, down = local
    mlp = gm.model.layers.get_submodule("0").mlp
    assert torch.equal(mlp.gate_up.weight, torch.cat([whole[gate][40:], whole[up][40:]]))
    assert torch.equal(mlp.down_proj.weight, whole[down][:, 40:])
    assert result.tensors == 2
    assert result.bytes == 4 * (80 * 48 + 48 * 40)


def test_checkpoints_are_compared_without_being_held(tmp_path: Any) -> None:
    save_tiny(tmp_path, "llama")
    stored = Checkpoint(tmp_path)
    assert stored.same("lm_head.weight", "lm_head.weight", rows=7)
    assert not stored.same("lm_head.weight", "model.embed_tokens.weight", rows=7)
    assert not stored.same("lm_head.weight", "model.norm.weight")


def test_an_estimate_of_one_rank() -> None:
    from adkit.models.loading import graph_memory

    factory = resolve(tiny_config("llama"), device="cpu")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    gm = graph_of(factory.build(), names)
    engine = EngineConfig(max_seq_len=64)
    whole = graph_memory(gm, factory, engine, torch.device("cpu"))
    assert whole.weights == 2 * 131 * 48 * 4
    gm.meta[LOCAL] = {names[1]: LocalWeight(names[1], (Cut(1, ((0, 24),)),))}
    gm.get_submodule("lm_head").weight = nn.Parameter(torch.empty(131, 24, device="meta"))
    assert graph_memory(gm, factory, engine, torch.device("cpu")).weights == (131 * 48 + 131 * 24) * 4
