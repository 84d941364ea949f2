"""RoPE fused with the cache write, on real models: what is taken in, equal logits, writes in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adkit
from adkit.checking import packed_logits
from adkit.graph.cost import node_costs
from adkit.ops import OPS, info_of
from tests.zoo import tiny

FUSED = OPS["torch_rope_kv_cache"].overload
ATTENTION = OPS["torch_attention_with_paged_cache"].overload
LENGTHS = (9, 3, 14)

#: Layers fused and norms taken in, of two layers.
KINDS = {
    "llama": (2, 0),
    "qwen3": (2, 4),
    "gemma3_text": (2, 4),
    "olmo2": (2, 0),  # its norms run over all heads at once, and stay
    "phi3": (2, 0),
    "phi": (2, 0),  # half of each head rotates
    "gpt_oss": (2, 0),
    "cohere2": (1, 0),  # interleaved; the layer of full attention has no RoPE
    "glm4": (2, 0),  # interleaved, half of each head
    "exaone4": (1, 2),  # one layer has norms and no RoPE
    "gpt2": (0, 0),
}

QUICK = ("llama", "qwen3", "cohere2", "glm4")


def workbench(kind: str, folder: Any, backend: str | None = "torch", **options: Any) -> adkit.Workbench:
    overrides = [] if backend is None else [f"transforms.fuse_rope_kv_cache.backend={backend}"]
    return adkit.Workbench(
        folder, device="cpu", dtype="float32", max_seq_len=64, page_size=4, progress=False,
        overrides=overrides, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / kind
            tiny(kind)[1].save_pretrained(made[kind])
        return made[kind]

    return get


def calls(wb: adkit.Workbench, target: Any) -> list[Any]:
    return [n for n in wb._state.module.graph.nodes if n.target is target]


def logits(wb: adkit.Workbench) -> torch.Tensor:
    compiled = wb._state.compiled
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 131, (n,), generator=generator) for n in LENGTHS]
    with torch.inference_mode():
        found = packed_logits(
            compiled.forward, compiled.inputs, compiled.caches, prompts, (5, 1, 14), wb.device
        )
    return torch.cat(found)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_fused_and_unfused_graphs_give_equal_logits(saved: Any, kind: str) -> None:
    plain = workbench(kind, saved(kind), None).run()
    assert plain.steps["fuse_rope_kv_cache"].info.skipped
    fused = workbench(kind, saved(kind)).run()
    info = fused.steps["fuse_rope_kv_cache"].info
    assert (info.num_matches, info.details["norms"]) == KINDS[kind]
    writers = {n.args[7] for n in calls(fused, FUSED)}
    assert len(calls(fused, FUSED)) == KINDS[kind][0]
    assert all(n.target == "slot_mapping" for n in writers)
    done = [n for n in calls(fused, ATTENTION) if n.args[9] is None]
    assert len(done) == KINDS[kind][0]
    assert torch.equal(logits(fused), logits(plain))
    assert fused.check("fuse_rope_kv_cache").ok
    assert fused.check("fuse_rope_kv_cache", how="sites").ok


def test_on_auto_it_waits_for_a_gpu_and_says_so(saved: Any) -> None:
    step = (
        workbench("llama", saved("llama"), None).run(until="fuse_rope_kv_cache").steps["fuse_rope_kv_cache"]
    )
    assert step.status == "skipped"
    assert "cpu" in step.info.reason


def test_the_write_comes_before_the_attention_that_reads_it(saved: Any) -> None:
    wb = workbench("qwen3", saved("qwen3")).run()
    order = [n for n in wb._state.module.graph.nodes if n.target in (FUSED, ATTENTION)]
    assert [n.target for n in order] == [FUSED, ATTENTION] * 2
    for write, read in zip(order[::2], order[1::2], strict=True):
        assert write.args[-2:] == read.args[-2:]
        assert {n for n in read.args[:2] if n.args[0] is write} == set(read.args[:2])


def test_it_survives_going_back_and_saving(saved: Any, tmp_path: Any) -> None:
    wb = workbench("qwen3", saved("qwen3")).run()
    want = logits(wb)
    wb.rewind("insert_cached_attention")
    assert torch.equal(logits(wb.run()), want)
    wb.save(tmp_path / "run")
    again = adkit.Workbench.load(tmp_path / "run")
    names = [n.target_name for n in again.graph]
    assert names.count("adkit.torch_rope_kv_cache") == 2


class CacheTraffic(TorchDispatchMode):
    """Counts elements written to the caches, and tensors made that could hold a copy of one."""

    def __init__(self, caches: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.storages = {c.untyped_storage().data_ptr() for c in caches.values()}
        self.smallest = min(c.numel() for c in caches.values())
        self.written = 0
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        info = info_of(func)
        if info is not None:
            with self:  # look inside
                return info.reference(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for given, arg in zip(args, func._schema.arguments, strict=False):
            if arg.alias_info is not None and arg.alias_info.is_write and self.is_cache(given):
                assert func is torch.ops.aten.index_copy_.default, f"{func} writes a cache"
                self.written += args[3].numel()
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not self.is_cache(t) and t.numel() >= self.smallest:
                self.copies.append(str(func))
        return out

    def is_cache(self, t: torch.Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.storages


@pytest.mark.parametrize("backend", ["torch", None])
def test_a_step_writes_its_own_keys_and_values_and_copies_no_cache(saved: Any, backend: str | None) -> None:
    wb = workbench("qwen3", saved("qwen3"), backend, max_batch_size=128).run()
    compiled = wb._state.compiled
    caches = compiled.caches.tensors
    addresses = {n: c.data_ptr() for n, c in caches.items()}
    tokens = 3
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[4, 2, 9]]),
        "rope_lengths": torch.tensor([[5, 3, 10]]),
        "cu_seqlens": torch.arange(4, dtype=torch.int32),
        "cache_lens": torch.tensor([4, 2, 9], dtype=torch.int32),
        "page_table": torch.arange(1, 10, dtype=torch.int32).view(3, 3),
        "slot_mapping": torch.tensor([8, 18, 37]),
        "logits_indices": torch.arange(3),
    }
    feed = {n: caches[n] if n in caches else batch[n] for n in compiled.inputs}
    with torch.inference_mode(), CacheTraffic(caches) as traffic:
        compiled.forward(**feed)
    kv_heads, head_dim = next(iter(caches.values())).shape[2:]
    assert traffic.written == 2 * tokens * 2 * kv_heads * head_dim  # layers, tokens, keys and values
    assert traffic.copies == []
    assert {n: c.data_ptr() for n, c in caches.items()} == addresses


def test_the_cost_model_counts_the_same_writes_once(saved: Any) -> None:
    sizes = {"tokens": 3, "sequences": 3, "context": 20}
    found = []
    for backend in ("torch", None):
        snapshot = workbench("llama", saved("llama"), backend).run(until="initialize_cache").graph
        costs = node_costs(snapshot, "H100 SXM", sizes)
        heads = [n for n in snapshot if n.target_name.split(".")[-1].startswith(("torch_rope", "torch_att"))]
        found.append(sum(costs[n.id].bytes for n in heads))
    fused, plain = found
    # Each layer reads its values once more, and slot_mapping moves from one op to the other.
    values = 2 * 3 * 2 * 12 * 4
    assert fused - plain == values
