"""adkit's own engine as the subject of a measurement: built, driven, and let go of."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from adkit.bench import machine
from adkit.bench.timeline import Timeline
from adkit.bench.work import Work, work_of
from adkit.bench.workload import Workload
from adkit.config import Fragment
from adkit.contract import ConfigError, EngineError, SamplingParams
from adkit.models import ModelFactory
from adkit.ranks import place
from adkit.runtime.ranks import launched_ranks
from adkit.runtime.stats import EngineStats
from adkit.workbench import Workbench


def ranks_of(tp: int | None) -> int:
    """How many ranks a benchmark runs on: those asked for, or torchrun's, or one."""
    return tp if tp is not None else launched_ranks() or 1


class Subject:
    """A model's engine for one benchmark: ``run`` a workload as often as needed, then ``close``.

    ``defaults`` are the engine settings that the benchmark would choose; ``config`` and ``overrides`` go over them. A
    bundled config gets seeded random weights, and so does any model with ``random_weights``. The machine's
    ceilings are measured before weights are loaded. ``tp``: on so many ranks, of which this process is rank 0;
    a process that torchrun started as another rank serves, and exits here. ``attention_dp``: each rank attends to
    sequences of its own (docs/sharding.md), and has its share of the engine's sizes.
    """

    def __init__(
        self,
        model: Any,
        defaults: Mapping[str, Any],
        *,
        config: Sequence[Fragment] = (),
        overrides: Sequence[str] = (),
        random_weights: bool = False,
        tp: int | None = None,
        attention_dp: bool = False,
    ) -> None:
        what: dict[str, Any] = {"model": model, "config": [defaults, *config], "overrides": overrides}
        if not random_weights:
            random_weights = Workbench(**what).factory.weights == "none"
        what["random_weights"] = random_weights
        self._ranks = ExitStack()
        here = self._ranks.enter_context(place(tp, what, attention_dp))
        if here.follows:  # rank 0 has measured with its help
            self._ranks.close()
            raise SystemExit(0)
        self.ranks = here.dist.world_size
        self.attention_dp = here.dist.pools > 1
        wb = Workbench(**{**what, **here.settings})
        self.factory: ModelFactory = wb.factory
        self.device: torch.device = wb.device
        self._wb: Workbench | None = wb

    def build(self) -> None:
        """Measure the machine and run the pipeline; after this there are ``ceilings`` (of all ranks together), ``work``
        and ``llm``."""
        assert self._wb is not None
        self.work: Work = work_of(self._wb.run(until="pattern_matcher"))
        mine = self.work.weight_bytes(sys.maxsize) / self.ranks
        one = machine.ceilings(self.device, self.factory.dtype, mine)
        self.ceilings = replace(one, memory=one.memory * self.ranks, matmul=one.matmul * self.ranks)
        machine.reset_peak(self.device)
        self.llm = self._wb.llm()
        self.settings = {
            k: v for k, v in self._wb.config.model_dump(mode="json").items() if k != "transforms"
        }
        self.settings |= {"cache_tokens": self.llm.engine.capacity}
        self.settings |= {"compile": self._wb.steps["compile_model"].info.details}
        if self.ranks > 1:
            self.settings |= {"strategies": self._wb.steps["apply_sharding_hints"].info.details["strategies"]}

    @property
    def name(self) -> dict[str, Any]:
        """What a row says of who was measured."""
        return {"engine": "adkit"} | ({"attention_dp": True} if self.attention_dp else {})

    @property
    def vocab(self) -> int:
        """Tokens to draw prompts from."""
        return int(self.factory.config.get_text_config(decoder=True).vocab_size)

    @property
    def cache_limit(self) -> int:
        """Tokens whose keys and values fit the device beside the weights, nothing else there; no limit on a CPU."""
        if self.device.type != "cuda" or not self.work.cache_token_bytes:
            return sys.maxsize
        total = torch.cuda.get_device_properties(self.device).total_memory * self.ranks
        return int(total - self.work.weight_bytes(sys.maxsize)) // self.work.cache_token_bytes

    def run(self, load: Workload, *, progress: bool = False) -> tuple[Timeline, EngineStats]:
        """Serve the requests, all submitted at once, to the last token; nothing is remembered from earlier runs.

        Raises EngineError when a request fails, ConfigError when one is cut short by the engine's sizes.
        """
        engine = self.llm.engine
        engine.reset()  # forget cached prefixes: every run does the same work
        before = engine.stats
        machine.sync(self.device)
        with tqdm(total=load.new_tokens, desc="adkit", unit=" tokens", delay=2, disable=not progress) as bar:
            start = time.perf_counter()
            handles = [
                engine.add(prompt, SamplingParams(max_tokens=new, ignore_eos=True))
                for prompt, new in zip(load.prompts, load.news, strict=True)
            ]
            stamps: dict[int, list[float]] = {h.id: [] for h in handles}
            while engine.has_work:
                deltas = engine.step()
                now = time.perf_counter()
                for delta in deltas:  # a step may return what an earlier one computed: arrival is what counts
                    if delta.error is not None:
                        raise EngineError(f"request {delta.index} failed: {delta.error}")
                    stamps[delta.index] += [now] * len(delta.token_ids)
                bar.update(sum(len(d.token_ids) for d in deltas))
        made = Timeline(start, list(stamps.values()))
        if made.tokens != load.new_tokens:
            raise ConfigError(
                f"{load.new_tokens} new tokens were asked for and {made.tokens} came: requests ended at "
                f"max_seq_len {engine.config.max_seq_len} or at the {engine.longest} tokens that the cache holds. "
                "Raise them"
            )
        return made, engine.stats - before

    def close(self) -> None:
        """Free the engine, its cache and the weights; the factory stays."""
        self._wb = None
        del self.llm
        self._ranks.close()
        machine.free(self.device)
