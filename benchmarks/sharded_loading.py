"""Measure what ranks hold while each loads its part of a checkpoint: anonymous memory against the part's bytes.

    python benchmarks/sharded_loading.py [--small]

Makes two checkpoints in a temporary directory (a llama and a mixture of experts stored expert by expert, random bf16
values, files of at most 1 GB), then lets four ranks load one after another, a process each, on the CPU. Writes
``benchmarks/results/sharded_loading.json``. Anonymous memory is ``RssAnon`` of ``/proc/self/status``, sampled every
five milliseconds; mapped checkpoint files are not in it. ``--small`` takes checkpoints of a few megabytes and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sharded_loading.json"
RANKS = 4
LIMIT = 10**9  # bytes a file
DENSE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
EXPERTS = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 7168,
    "num_hidden_layers": 9, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 16,
}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Stored names and shapes of a checkpoint, as those of these kinds are published."""
    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv = (config[f"num_{n}_heads"] * config["head_dim"] for n in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (vocab, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (heads, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, heads))):
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        if "num_local_experts" not in config:
            for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                yield f"{layer}.mlp.{name}_proj.weight", shape
            continue
        moe = f"{layer}.block_sparse_moe"
        yield f"{moe}.gate.weight", (config["num_local_experts"], d)
        for e in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w3", (f, d)), ("w2", (d, f))):
                yield f"{moe}.experts.{e}.{name}.weight", shape
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocab, d)


def write(config: dict[str, Any], directory: Path) -> int:
    """Write a checkpoint of random values; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    noise = torch.randn(1 << 22).to(torch.bfloat16)  # repeated: what is read matters, not what it says
    files: list[dict[str, Any]] = [{}]
    size = total = 0

    def flush() -> None:
        save_file(files[-1], directory / f"model-{len(files):05}.safetensors", metadata={"format": "pt"})
        files[-1] = dict.fromkeys(files[-1])
        files.append({})

    for name, shape in tensors(config):
        count = math.prod(shape)
        if size + 2 * count > LIMIT and files[-1]:
            flush()
            size = 0
        files[-1][name] = noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()
        size += 2 * count
        total += 2 * count
    flush()
    where = {n: f"model-{i + 1:05}.safetensors" for i, names in enumerate(files) for n in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return total


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Peak:
    """The most anonymous memory while it runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous())


def rank_loads(directory: Path, rank: int, moe_ep: int) -> dict[str, Any]:
    """One rank's walk through loading and fusion, in this process."""
    import torch

    from adkit.contract import DistConfig
    from adkit.models.loading import graph_tensor_names
    from adkit.passes.tensors import tensor_at
    from adkit.workbench import Workbench

    torch.set_num_threads(1)
    wb = Workbench(
        directory, dtype="bfloat16", device="cpu", max_seq_len=256, max_batch_size=1, progress=False,
        dist=DistConfig.of(RANKS, moe_ep, rank=rank),
    )  # fmt: skip
    wb.run(until="sharding")
    before = anonymous()
    began = time.perf_counter()
    with Peak() as loading:
        wb.run(until="load_weights")
    seconds, after = time.perf_counter() - began, anonymous()
    gm: Any = wb.module
    held = {id(t): t.nbytes for n in graph_tensor_names(gm) if (t := tensor_at(gm, n)) is not None}
    with Peak() as fusing:
        wb.run(until="post_load_fusion")
    shard = sum(held.values())
    return {
        "rank": rank, "shard_bytes": shard, "before_bytes": before, "after_bytes": after,
        "peak_bytes": loading.bytes, "peak_with_fusion_bytes": max(fusing.bytes, loading.bytes),
        "seconds": round(seconds, 2), "grown_by_shards": round((loading.bytes - before) / shard, 3),
        "process_in_shards": round(loading.bytes / shard, 3),
    }  # fmt: skip


def measure(config: dict[str, Any], moe_eps: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every rank of every split, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        total = write(config, Path(folder))
        for ep in moe_eps:
            ranks = []
            for rank in range(RANKS):
                command = [sys.executable, __file__, "--worker", folder, str(rank), str(ep)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                ranks.append(json.loads(out.splitlines()[-1]))
                print(config["model_type"], f"moe_ep {ep}", ranks[-1], flush=True)
            rows.append(
                {
                    "model": config["model_type"],
                    "checkpoint_bytes": total,
                    "tp": RANKS,
                    "moe_ep": ep,
                    "worst_grown_by_shards": max(r["grown_by_shards"] for r in ranks),
                    "worst_process_in_shards": max(r["process_in_shards"] for r in ranks),
                    "ranks": ranks,
                }
            )
    return rows


def main() -> None:
    """Measure both kinds and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="a few megabytes, nothing written")
    parser.add_argument("--worker", nargs=3, metavar=("DIRECTORY", "RANK", "MOE_EP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        directory, rank, ep = args.worker
        print(json.dumps(rank_loads(Path(directory), int(rank), int(ep))))
        return
    small = SMALL if args.small else {}
    rows = [*measure({**DENSE, **small}, (RANKS,)), *measure({**EXPERTS, **small}, (RANKS, 1))]
    if args.small:
        return
    import torch
    import transformers

    data = {
        "what": "anonymous memory of one rank while it loads its part (bytes; ratios to the part's bytes)",
        "command": "python benchmarks/sharded_loading.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "runs": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
