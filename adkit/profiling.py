"""Time each node's kernels: ``wb.profile()`` and ``step.profile()``.

A graph is run node by node with real (or random) weights on a batch of a chosen shape, several times, and each node's
median is kept. On a GPU nodes are timed by CUDA events in a stream that is kept busy ahead of them, so that the time
between two events is the kernels' own and not the host's; a node that waits for the device itself spoils that
for the nodes after it. Weights are read afresh, as in a real step, because every other weight was read since.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from adkit.checking import rope_lengths, runnable, scratch_pool, stamps_around, weight_source
from adkit.contract import CACHE_INPUTS, AdkitError, CachePool, ConfigError, SequenceBatch
from adkit.graph.cost import DEVICES, Device, device_named, node_costs
from adkit.graph.identity import node_id
from adkit.graph.step import Step
from adkit.graph.times import NodeTimes

if TYPE_CHECKING:
    from adkit.workbench import Workbench

_WARMUPS = 2
_CHUNK = (
    128  # nodes timed ahead of the device at once: a stream takes some 1,000 launches before the host waits
)
_SPIN_CYCLES = 1_000_000


class Profile(NodeTimes):
    """Times of a graph's nodes that can be drawn: ``table()``, ``by_op()``, ``draw()``, ``roofline()``."""

    def draw(self, *, layer: int | None = None, **options: Any) -> Any:
        """The graph's picture with measured times: a number in each box, the hotter the longer.

        A box that stands for several nodes (folded layers, collapsed modules) shows their sum. Options as
        :func:`adkit.viz.draw` takes.
        """
        from adkit.viz import draw

        return draw(
            self.snapshot, layer=layer, times=self.seconds,
            **{"title": f"{self.name}: {self.batch}; {self.facts()}", **options},
        )  # fmt: skip

    def roofline(self) -> Any:
        """The nodes under the device's roof: how far each measured rate stays below it."""
        from adkit.viz.plots import roofline

        return roofline(self.table(), dtype=self.dtype)


def profile(
    wb: Workbench,
    step: Step | None = None,
    *,
    sequences: int = 1,
    context: int = 256,
    tokens: int | None = None,
    repeats: int = 5,
    device: Device | str | None = None,
) -> Profile:
    """Time the graph as it stands, or as a step left it.

    By default one decode step: ``sequences`` with ``context`` tokens each, the new one included. ``tokens``: a prefill
    of that many tokens a sequence instead; a graph without a cache (before ``insert_cached_attention``) can do
    nothing else, and takes ``context`` tokens when none are given. ``device`` names the roofline to compare with
    (default: the one measured on, where it is known). Weights are those loaded, else the checkpoint's, else
    random. Raises ConfigError for impossible sizes, AdkitError where there is no graph.
    """
    for name, value in (
        ("sequences", sequences),
        ("context", context),
        ("tokens", tokens),
        ("repeats", repeats),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"profile({name}={value}): expected at least 1")
    snapshot = wb.graph if step is None else step.after
    if not len(snapshot):
        where = "yet: run the pipeline past export first" if step is None else f"after step {step.name!r}"
        raise AdkitError(f"there is no graph {where}")
    on = _device_of(wb.device, device)
    inputs = [n.target for n in snapshot if n.op == "placeholder"]
    cached = bool(set(inputs) & set(CACHE_INPUTS))
    if not cached and tokens is None:
        tokens = context
    vocab = wb.factory.config.get_text_config(decoder=True).vocab_size
    if cached:
        each = 1 if tokens is None else tokens
        pool = scratch_pool(wb, inputs)
        feed = _packed(pool, sequences, each, context if tokens is None else tokens, vocab, wb.device)
        sizes = {"tokens": sequences * each, "sequences": sequences, "context": tokens or context}
    else:
        each = tokens or context
        feed = _unpacked(sequences, each, vocab, wb.device)
        sizes = {"batch": sequences, "seq": each}
        if "logits_indices" in inputs:
            sizes["logits"] = sequences
    costs = node_costs(snapshot, on, sizes)  # first, since it may say that a size is missing
    stamps = stamps_around(wb, step)[1] if step is not None else wb._state.tensors
    gm = runnable(wb, snapshot, stamps, weight_source(wb, "auto"), 0)
    feed = {name: feed[name] for name in inputs if name in feed}
    with torch.inference_mode(), wb.bars as bars:
        seconds, total = _measure(gm, feed, wb.device, repeats, lambda n, of: bars.show(n, of, "profiling"))
    several = f"{sequences} sequences" if sequences > 1 else "1 sequence"
    batch = (
        f"decode of {several}, context {context}"
        if tokens is None
        else f"prefill of {several}, {tokens} tokens"
    )
    where = torch.cuda.get_device_name(wb.device) if wb.device.type == "cuda" else "CPU"
    name = f"{wb.name} after {step.name}" if step is not None else wb.name
    return Profile(name, batch, where, snapshot, seconds, costs, on, total)


def _device_of(here: torch.device, wanted: Device | str | None) -> Device:
    """The device of the roofline: as named, else the known one that this machine's is called like."""
    if wanted is not None:
        try:
            return device_named(wanted)
        except ValueError as error:
            raise ConfigError(f"profile(device=...): {error}") from None
    if here.type != "cuda":
        return DEVICES["2-core CPU"]
    name = torch.cuda.get_device_name(here)
    found = next((d for d in DEVICES.values() if d.name.split()[0] in name), None)
    if found is None:
        known = ", ".join(DEVICES)
        raise ConfigError(
            f"no roofline is known for {name!r}; give profile(device=...), one of {known} or a Device"
        )
    return found


def _packed(
    pool: CachePool, sequences: int, each: int, context: int, vocab: int, device: torch.device
) -> dict[str, Tensor]:
    """A packed batch of ``sequences`` with ``each`` new tokens of ``context``, over a cache of its own."""
    size = pool.page_size
    pages = math.ceil(context / size)
    pool.allocate(1 + sequences * pages, device)
    table = 1 + torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    position = torch.arange(context - each, context).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(each)
    ends = torch.arange(sequences + 1) * each
    batch = SequenceBatch(
        input_ids=torch.arange(sequences * each)[None] % vocab,
        position_ids=position[None],
        rope_lengths=(position + 1)[None] if each == 1 else torch.full_like(position, context)[None],
        cu_seqlens=ends.int(),
        cache_lens=torch.full((sequences,), context - each, dtype=torch.int32),
        page_table=table,
        slot_mapping=table[owner, position // size].long() * size + position % size,
        logits_indices=ends[1:] - 1,
    ).to(device)
    return {n: getattr(batch, n) for n in SequenceBatch.names()} | pool.tensors


def _unpacked(sequences: int, each: int, vocab: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.arange(sequences * each).view(sequences, each) % vocab
    feed = {
        "input_ids": ids,
        "position_ids": torch.arange(each).expand(sequences, each),
        "rope_lengths": rope_lengths(each, each).expand(sequences, each),
        "logits_indices": torch.arange(1, sequences + 1) * each - 1,
    }
    return {name: value.contiguous().to(device) for name, value in feed.items()}


def _measure(
    gm: GraphModule,
    feed: dict[str, Tensor],
    device: torch.device,
    repeats: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[int, float], float]:
    """(median seconds of each call node by id, median seconds of the whole graph)."""
    clock = _GpuClock(device) if device.type == "cuda" else _HostClock()
    found: dict[int, list[float]] = {}
    whole: list[float] = []
    for run in range(_WARMUPS + repeats):
        timed = _Timed(gm, clock)
        timed.run(*feed.values())
        for i, seconds in timed.seconds().items():
            found.setdefault(i, []).append(seconds)
        clock.begin()
        gm(**feed)
        clock.end(-1)
        whole += [s for _, s in clock.read()]
        progress(run + 1, _WARMUPS + repeats)
    return {i: statistics.median(s[_WARMUPS:]) for i, s in found.items()}, statistics.median(whole[_WARMUPS:])


class _Timed(Interpreter):
    """Runs a graph and has a clock time every call; arguments are fetched before it starts."""

    def __init__(self, gm: GraphModule, clock: _HostClock | _GpuClock) -> None:
        super().__init__(gm)
        self.clock = clock
        self.found: list[tuple[int, float]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run; the clock holds the times afterwards."""
        result = super().run(*args, **kwargs)
        self.found += self.clock.read()
        return result

    def run_node(self, n: Node) -> Any:
        """One node, timed if it is a call."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self.clock.full:
            self.found += self.clock.read()
        self.clock.begin()
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        self.clock.end(node_id(n))
        return result

    def seconds(self) -> dict[int, float]:
        """Seconds of each call by node id."""
        return dict(self.found)


class _HostClock:
    """Times by the host's own clock."""

    full = False

    def __init__(self) -> None:
        self._found: list[tuple[int, float]] = []
        self._start = 0.0

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self, key: int) -> None:
        self._found.append((key, time.perf_counter() - self._start))

    def read(self) -> list[tuple[int, float]]:
        found, self._found = self._found, []
        return found


class _GpuClock:
    """Times by CUDA events behind a kernel that spins long enough for the host to launch what is to be timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        self._host = time.perf_counter()
        self._spin(_SPIN_CYCLES)
        self._cycles = _SPIN_CYCLES / self._between(lambda: torch.cuda._sleep(_SPIN_CYCLES))
        self._lead = 0.05  # seconds that the host is given; enough for a chunk of launches from Python
        self._empty = 0.0
        self._empty = self._between_events()

    @property
    def full(self) -> bool:
        """True when what is under way should be read before more is added."""
        return len(self._events) >= _CHUNK

    def begin(self) -> None:
        if not self._events:
            self._spin(int(self._lead * self._cycles))
        self._begun = _event()

    def end(self, key: int) -> None:
        assert self._begun is not None
        self._events.append((key, self._begun, _event()))

    def read(self) -> list[tuple[int, float]]:
        torch.cuda.synchronize(self.device)
        found = [(k, max(0.0, a.elapsed_time(b) / 1e3 - self._empty)) for k, a, b in self._events]
        self._events = []
        return found

    def _spin(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)

    def _between(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        a = _event()
        run()
        b = _event()
        torch.cuda.synchronize(self.device)
        return a.elapsed_time(b) / 1e3

    def _between_events(self) -> float:
        """What the time between two events is when nothing lies between them."""
        for _ in range(32):
            self.begin()
            self.end(0)
        return statistics.median(s for _, s in self.read())


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
