"""Decode steps replayed from CUDA graphs: one capture a batch size, one copy to fill its inputs.

A decode step launches hundreds of small kernels, and launching them from Python takes longer than running
them. A CUDA graph replays all of them at once. Graphs fix every address and shape, so there is one a size
of the ladder; a batch is padded up to the next size with sequences of one token that write to page 0 and
that nobody reads. Greedy sampling is captured with them.

All sizes share one buffer of inputs: the tokens of the step before, then the batch as
:class:`~adkit.contract.BatchLayout` lays it out, so that the host's part is a single copy. Which of those ids
go in is decided by ``sources``, inside the graph.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adkit.contract import BatchLayout, CachePool, HostBatch
from adkit.ops.sampling import best_tokens

Forward = Callable[..., Tensor]
Progress = Callable[[int, int, str], None]

#: The largest size captured. Beyond it the device has so much to do that launching is not what takes time.
LARGEST = 1024


def ladder(most: int) -> list[int]:
    """Batch sizes to capture, up to ``most`` or 1024: the last one is ``most`` itself where it is not larger.

    Powers of two to 8, multiples of 8 to 64, of 16 to 128, of 32 to 256, of 64 to 512, of 128 to 1024: padding
    costs little, and the logits of every size stay allocated.
    """
    sizes = [1, 2, 4]
    for first in (8, 64, 128, 256, 512):
        step = max(8, first // 4)
        sizes += range(first, max(64, 2 * first), step)
    return [*(n for n in sizes if n < most), min(most, LARGEST)]


def _by_itself(best: Tensor) -> Tensor:
    return best


@dataclass
class DecodeGraphs:
    """A :class:`~adkit.contract.DecodeReplay`: decode steps of ``forward`` over ``caches``, in place.

    ``inputs`` are the graph's placeholders, ``max_pages`` the width of the page table, ``num_previous`` the most tokens
    that a step samples, ``sizes`` the ladder, ascending. ``agree`` makes one of the best tokens [size] that ranks
    found. Until :meth:`capture` it runs ``forward`` itself on the same
    buffers, on any device. ``seconds`` and ``bytes`` say what warming up and capturing took.
    """

    forward: Forward
    inputs: tuple[str, ...]
    caches: CachePool
    sizes: list[int]
    max_pages: int
    num_previous: int
    device: torch.device
    agree: Callable[[Tensor], Tensor] = _by_itself
    seconds: float = 0.0
    bytes: int = 0
    _graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )
    _latest: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._layouts = [BatchLayout(n, n, self.max_pages, n) for n in self.sizes]
        self.num_previous += self.num_previous % 2  # what follows it stays aligned to 16 bytes
        ahead = 8 * self.num_previous
        self._buffer = torch.zeros(ahead + self._layouts[-1].nbytes, dtype=torch.uint8, device=self.device)
        self._previous = self._buffer[:ahead].view(torch.int64)
        self._batch = self._buffer[ahead:]
        # Warming up where capturing happens: libraries keep a workspace a stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def layout(self, sequences: int) -> BatchLayout | None:
        """The layout of the next size of the ladder."""
        at = bisect.bisect_left(self.sizes, sequences)
        return self._layouts[at] if at < len(self.sizes) else None

    def __call__(self, host: HostBatch, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and best tokens [R]."""
        size, rows = host.layout.sequences, host.sequences
        self._batch[: host.layout.nbytes].copy_(host.buffer, non_blocking=True)
        if host.continues and previous is not self._latest:  # else the step before has left them there
            assert previous is not None, "the batch continues a step whose tokens were not given"
            torch.clamp_min(previous, 0, out=self._previous[: len(previous)])
        captured = self._graphs.get(size)
        if captured is None:
            logits, best = self._run(host.layout)
        else:
            graph, logits, best = captured
            graph.replay()
        if rows < size:
            logits, best = logits[:rows], best[:rows]
        self._latest = best
        return logits, best

    def warm_up(self, progress: Progress = lambda done, total, what: None) -> None:
        """Run every size twice: kernels compile, and libraries settle on their workspaces."""
        began = time.perf_counter()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream), torch.inference_mode():
            for done, layout in enumerate(reversed(self._layouts)):
                self._idle(layout)
                for _ in range(2):
                    self._run(layout)
                progress(done + 1, len(self.sizes), "warming up decode steps")
        torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began

    def capture(self, progress: Progress = lambda done, total, what: None) -> None:
        """Capture every size, largest first so that smaller ones reuse its memory. To be warmed up before."""
        began = time.perf_counter()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        pool = torch.cuda.graph_pool_handle()
        for done, layout in enumerate(reversed(self._layouts)):
            self._idle(layout)
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
                logits, best = self._run(layout)
            self._graphs[layout.sequences] = (graph, logits, best)
            progress(done + 1, len(self.sizes), "capturing CUDA graphs")
        torch.cuda.synchronize(self.device)
        self.bytes = free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds += time.perf_counter() - began

    def _run(self, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        """``forward`` on the buffer as it stands: logits [size, V] and best tokens [size], which the next step finds
        ahead of its ids."""
        given = layout.tensors(self._batch)
        known = self._buffer[: 8 * (self.num_previous + layout.tokens)].view(torch.int64)
        given["input_ids"] = known.index_select(0, given["sources"])[None]
        feed = {n: self.caches.tensors[n] if n in self.caches.tensors else given[n] for n in self.inputs}
        logits = self.forward(**feed)[0]
        best = self.agree(best_tokens(logits))
        torch.clamp_min(best, 0, out=self._previous[: layout.sequences])
        return logits, best

    def _idle(self, layout: BatchLayout) -> None:
        """Fill the buffer with a batch of nothing but padding."""
        empty = torch.zeros(layout.nbytes, dtype=torch.uint8)
        fields = layout.arrays(empty)
        fields["rope_lengths"][:] = 1
        fields["cu_seqlens"][:] = np.arange(layout.sequences + 1)
        fields["logits_indices"][:] = np.arange(layout.sequences)
        self._batch[: layout.nbytes].copy_(empty)
