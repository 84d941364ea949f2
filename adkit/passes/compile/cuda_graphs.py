"""Decode steps replayed from CUDA graphs: one capture a batch size, inputs copied into place.

A decode step launches hundreds of small kernels, and launching them from Python takes longer than running
them. A CUDA graph replays all of them at once. Graphs fix every address and shape, so there is one a size
of the ladder; a batch is padded up to the next size with sequences of one token that write to page 0 and
that nobody reads.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adkit.contract import CachePool

Forward = Callable[..., Tensor]


def ladder(most: int) -> list[int]:
    """Batch sizes to capture: powers of two to 8, then multiples of 8, up to ``most`` (which is always
    in)."""
    sizes = [n for n in (1, 2, 4) if n < most] + list(range(8, most, 8))
    return [*sizes, most]


@dataclass
class DecodeGraphs:
    """``forward`` with decode steps replayed; any other step goes through unchanged.

    ``inputs`` are the graph's placeholders, ``max_pages`` the width of the page table, ``sizes`` the ladder.
    After :meth:`capture`, ``seconds`` and ``bytes`` say what capturing took.
    """

    forward: Forward
    inputs: tuple[str, ...]
    caches: CachePool
    sizes: list[int]
    max_pages: int
    device: torch.device
    seconds: float = 0.0
    bytes: int = 0
    _graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict, repr=False)
    _static: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def capture(self, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> None:
        """Warm up and capture every size, largest first so that smaller ones reuse its memory."""
        began = time.perf_counter()
        most = max(self.sizes)
        self._static = self._buffers(most)
        free = torch.cuda.mem_get_info(self.device)[0]
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        for done, size in enumerate(sorted(self.sizes, reverse=True)):
            feed = self._feed(size)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream), torch.inference_mode():
                for _ in range(2):  # kernels compile and libraries settle on their workspaces
                    self.forward(**feed)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph, pool=pool, stream=stream):
                out = self.forward(**feed)
            self._graphs[size] = (graph, out)
            progress(done + 1, len(self.sizes), "capturing CUDA graphs")
        torch.cuda.synchronize(self.device)
        self.bytes = free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds = time.perf_counter() - began

    def __call__(self, **feed: Tensor) -> Tensor:
        """Logits [1, L, V] of one packed step."""
        rows = feed["cu_seqlens"].shape[0] - 1
        cache = next(n for n in self.inputs if n in self.caches.tensors)
        own = (
            feed[cache] is self.caches.tensors[cache]
        )  # a graph reads and writes the caches it was captured with
        if not own or feed["input_ids"].shape[1] != rows or rows > self.sizes[-1]:
            return self.forward(**feed)
        graph, out = self._graphs[self.sizes[bisect.bisect_left(self.sizes, rows)]]
        for name, static in self._static.items():
            given = feed[name]
            if name == "page_table":
                static[:rows, : given.shape[1]].copy_(given)
            elif name in ("input_ids", "position_ids", "rope_lengths"):
                static[:, :rows].copy_(given)
            elif name not in ("cu_seqlens", "logits_indices"):
                static[:rows].copy_(given)
        self._pad(rows)
        graph.replay()
        wanted = feed.get("logits_indices")
        return out[:, :rows].clone() if wanted is None else out.index_select(1, wanted)

    def _pad(self, rows: int) -> None:
        """Rows beyond the batch hold what an earlier, larger one left: they must not write to its pages."""
        if "slot_mapping" in self._static:
            self._static["slot_mapping"][rows:].zero_()
        if "cache_lens" in self._static:
            self._static["cache_lens"][rows:].zero_()

    def _buffers(self, most: int) -> dict[str, Tensor]:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        made = {
            "input_ids": zeros(1, most),
            "position_ids": zeros(1, most),
            "rope_lengths": zeros(1, most) + 1,
            "cu_seqlens": torch.arange(most + 1, dtype=torch.int32, device=self.device),
            "cache_lens": zeros(most, dtype=torch.int32),
            "page_table": zeros(most, self.max_pages, dtype=torch.int32),
            "slot_mapping": zeros(most),
            "logits_indices": torch.arange(most, device=self.device),
        }
        return {name: made[name] for name in self.inputs if name in made}

    def _feed(self, size: int) -> dict[str, Tensor]:
        cut: dict[str, Tensor] = {}
        for name, static in self._static.items():
            if name in ("input_ids", "position_ids", "rope_lengths"):
                cut[name] = static[:, :size]
            else:
                cut[name] = static[: size + 1] if name == "cu_seqlens" else static[:size]
        return cut | {n: self.caches.tensors[n] for n in self.inputs if n in self.caches.tensors}
