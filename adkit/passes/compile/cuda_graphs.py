"""Steps replayed from CUDA graphs: one capture a size, one copy to fill its inputs.

A step launches hundreds of small kernels, and launching them from Python takes longer than running them, for decode
steps and for prompts of a few hundred tokens alike. A CUDA graph replays all of them at once. Graphs fix every address
and shape, so there is one a size of two ladders. Decode steps (one token a sequence) are padded up to the next
batch size with sequences of one token that write to page 0 and that nobody reads. Steps with prompts are padded to the
next number of tokens, which belong to no sequence, and with sequences that have no tokens. Greedy sampling is captured
with them.

All sizes share one buffer of inputs: the tokens of the step before, then the batch as
:class:`~adkit.contract.BatchLayout` lays it out, so that the host's part is a single copy. Which of those ids
go in is decided by ``sources``, inside the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adkit.contract import BatchLayout, CachePool, HostBatch, fitting_layout
from adkit.ops.sampling import best_tokens

Forward = Callable[..., Tensor]
Progress = Callable[[int, int, str], None]

#: The most sequences of a captured decode step, and the most tokens of one with prompts. Beyond it the device has
#: so much to do that launching is not what takes time.
LARGEST = 1024
#: The fewest tokens of a captured step with prompts: fewer take as long, because weights are read all the same.
_FEWEST = 128
#: Sequences that a step with prompts has room for when they are few.
_FEW = 8


def ladder(most: int) -> list[int]:
    """Batch sizes to capture, up to ``most`` or 1024: the last one is ``most`` itself where it is not larger.

    Powers of two to 8, multiples of 8 to 64, of 16 to 128, of 32 to 256, of 64 to 512, of 128 to 1024: padding
    costs little, and every size takes its time to capture.
    """
    sizes = [1, 2, 4]
    for first in (8, 64, 128, 256, 512):
        step = max(8, first // 4)
        sizes += range(first, max(64, 2 * first), step)
    return [*(n for n in sizes if n < most), min(most, LARGEST)]


def _by_itself(best: Tensor) -> Tensor:
    return best


def prompt_ladder(most: int) -> list[int]:
    """Token counts to capture for steps with prompts, up to ``most`` or 1024: those of :func:`ladder` from 128 on."""
    return [n for n in ladder(most) if n >= min(_FEWEST, most)]


def decode_layouts(sizes: list[int], pages: int) -> list[BatchLayout]:
    """Layouts of decode steps of so many sequences, whose page tables are ``pages`` wide."""
    return [BatchLayout(n, n, pages, n) for n in sizes]


def prompt_layouts(tokens: list[int], pages: int, most: int) -> list[BatchLayout]:
    """Layouts of steps with prompts, of so many tokens each: with room for few sequences, and for up to ``most``, two
    tokens to each."""
    return [
        BatchLayout(t, r, pages, r)
        for t in tokens
        for r in dict.fromkeys((min(_FEW, most, t - 1), min(most, t // 2)))
        if r > 0
    ]


@dataclass
class StepGraphs:
    """A :class:`~adkit.contract.Replay`: steps of ``forward`` over ``caches``, in place.

    ``inputs`` are the graph's placeholders, ``layouts`` the sizes (those of as many tokens as sequences are for decode
    steps), ``num_previous`` the most tokens that a step samples, of all ranks. ``agree`` makes one of the best tokens
    [L] that ranks found. Until :meth:`capture` it runs ``forward`` itself on the same buffers, on any device.
    ``seconds`` and ``bytes`` say what warming up and capturing took.
    """

    forward: Forward
    inputs: tuple[str, ...]
    caches: CachePool
    layouts: list[BatchLayout]
    num_previous: int
    device: torch.device
    agree: Callable[[Tensor], Tensor] = _by_itself
    seconds: float = 0.0
    bytes: int = 0
    _graphs: dict[BatchLayout, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )
    _latest: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.layouts = sorted(self.layouts, key=lambda layout: (layout.tokens, layout.sequences))
        self.num_previous += self.num_previous % 2  # what follows it stays aligned to 16 bytes
        ahead = 8 * self.num_previous
        batch = max(layout.nbytes for layout in self.layouts)
        self._buffer = torch.zeros(ahead + batch, dtype=torch.uint8, device=self.device)
        self._previous = self._buffer[:ahead].view(torch.int64)
        self._batch = self._buffer[ahead:]
        # Warming up where capturing happens: libraries keep a workspace a stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def layout(self, tokens: int, sequences: int) -> BatchLayout | None:
        """The smallest that holds such a step."""
        return fitting_layout(self.layouts, tokens, sequences)

    def __call__(self, host: HostBatch, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [L, V] and best tokens [L]."""
        rows = host.logits
        self._batch[: host.layout.nbytes].copy_(host.buffer, non_blocking=True)
        if host.continues and previous is not self._latest:  # else the step before has left them there
            assert previous is not None, "the batch continues a step whose tokens were not given"
            torch.clamp_min(previous, 0, out=self._previous[: len(previous)])
        captured = self._graphs.get(host.layout)
        if captured is None:
            logits, best = self._run(host.layout)
        else:
            graph, logits, best = captured
            graph.replay()
        if rows < host.layout.logits and not host.shares:
            logits, best = logits[:rows], best[:rows]
        self._latest = best
        return logits, best

    def warm_up(self, progress: Progress = lambda done, total, what: None) -> None:
        """Run every size twice: kernels compile, and libraries settle on their workspaces."""
        began = time.perf_counter()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream), torch.inference_mode():
            for done, layout in enumerate(reversed(self.layouts)):
                self._idle(layout)
                for _ in range(2):
                    self._run(layout)
                progress(done + 1, len(self.layouts), "warming up steps")
        torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began

    def capture(self, progress: Progress = lambda done, total, what: None) -> None:
        """Capture every size, to be warmed up before; the largest first, whose memory the smaller ones reuse."""
        began = time.perf_counter()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        pool = torch.cuda.graph_pool_handle()
        for done, layout in enumerate(reversed(self.layouts)):
            self._idle(layout)
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
                logits, best = self._run(layout)
            self._graphs[layout] = (graph, _borrowed(logits), best)
            del logits
            progress(done + 1, len(self.layouts), "capturing CUDA graphs")
        torch.cuda.synchronize(self.device)
        self.bytes = free - torch.cuda.mem_get_info(self.device)[0]
        self.seconds += time.perf_counter() - began

    def _run(self, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        """``forward`` on the buffer as it stands: logits [L, V], best tokens [L]; the next step finds these too."""
        given = layout.tensors(self._batch)
        known = self._buffer[: 8 * (self.num_previous + layout.tokens)].view(torch.int64)
        given["input_ids"] = known.index_select(0, given["sources"])[None]
        feed = {n: self.caches.tensors[n] if n in self.caches.tensors else given[n] for n in self.inputs}
        logits = self.forward(**feed).flatten(0, 1)
        if "logits_indices" not in self.inputs:  # a graph that does not gather
            logits = logits.index_select(0, given["logits_indices"])
        best = self.agree(best_tokens(logits))
        if len(best) == layout.logits:  # else of several pools, of which the step behind is given what counts
            torch.clamp_min(best, 0, out=self._previous[: layout.logits])
        return logits, best

    def _idle(self, layout: BatchLayout) -> None:
        """Fill the buffer with a step that means nothing: all in page 0, prompts as one sequence."""
        empty = torch.zeros(layout.nbytes, dtype=torch.uint8)
        fields = layout.arrays(empty)
        fields["rope_lengths"][:] = 1
        decode = layout.tokens == layout.sequences
        fields["cu_seqlens"][1:] = np.arange(layout.sequences) + 1 if decode else layout.tokens
        fields["logits_indices"][:] = np.arange(layout.logits)
        self._batch[: layout.nbytes].copy_(empty)


class _Place:
    """Where a tensor lies on the device, as bytes, for others to look at."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 2,
        }  # fmt: skip


def _borrowed(tensor: Tensor) -> Tensor:
    """The same numbers in the same place, without keeping the place.

    Once ``tensor`` is gone its memory goes back to the pool that the graphs share, and they in turn keep the pool: the
    next capture may use it, and what stands there lasts until the next replay.
    """
    if not tensor.is_cuda or not tensor.is_contiguous():
        return tensor
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
