"""The loop: schedule a step, launch it, collect the one before.

With overlap (``EngineConfig.overlap``) a step's tokens are collected after the next step was launched, so that the
device never waits for the host; without, at once. Everything else is the same.
"""

from __future__ import annotations

import threading
import time
import warnings
from array import array
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from adkit.contract import (
    CompiledModel,
    Delta,
    EngineConfig,
    EngineError,
    MemoryLimitError,
    RankError,
    RequestError,
    SamplingParams,
)
from adkit.runtime.detokenizer import Detokenizer, TokenDecoder
from adkit.runtime.device import Device, OneDevice
from adkit.runtime.launch import InFlight, Launcher
from adkit.runtime.pages import PageAllocator
from adkit.runtime.pools import PooledScheduler
from adkit.runtime.scheduler import Scheduler
from adkit.runtime.sequence import Sequence
from adkit.runtime.split import SplitLauncher
from adkit.runtime.stats import EngineStats


class Engine:
    """Serves requests with one compiled model: ``add`` them, call ``step`` while ``has_work``.

    The handle that ``add`` returns is the request's state: it fills as steps run, whoever calls them, and
    gives the ``completion()`` in the end. Methods may be called from several threads. A step that fails ends
    the requests that were in it (finish reason "error"), gives their pages back, and leaves the others and
    the engine as they were; an interrupt (Ctrl-C) cancels everything in flight. Steps run on ``device`` (default:
    the model's own, in this process).
    """

    def __init__(
        self, model: CompiledModel, config: EngineConfig, tokenizer: Any = None, device: Device | None = None
    ) -> None:
        if model.caches.num_pages < 2:
            raise MemoryLimitError(
                f"The cache has {model.caches.num_pages} pages; at least 2 are needed (one for "
                "padding). Free memory, or raise free_gpu_memory_fraction."
            )
        self.model = model
        self.config = config
        self.device: Device = OneDevice(model) if device is None else device
        self.tokenizer = tokenizer
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        eos = getattr(tokenizer, "eos_token_id", None)
        #: Tokens that end a request unless it ignores them: the model's and the tokenizer's.
        self.eos_token_ids = frozenset(model.eos_token_ids) | ({eos} if eos is not None else set())
        #: Whether a step is launched before the one before it is collected.
        self.overlaps = model.device.type == "cuda" if config.overlap == "auto" else config.overlap
        self._counts = EngineStats()
        #: Why this engine serves no more requests; empty while it does.
        self.refusal = ""
        self._warned = False
        self._next_id = 0
        self._lock = threading.RLock()
        self._start_empty()

    def _start_empty(self) -> None:
        self._in_flight: InFlight | None = None
        model, caches = self.model, self.model.caches
        #: Who owns which page of which cache: one a rank that has sequences of its own, else one.
        self.pools = [PageAllocator(caches.num_pages, caches.page_size) for _ in range(model.pools)]
        self.pages = self.pools[0]
        matter = "rope_lengths" in model.inputs
        self.scheduler: Scheduler | PooledScheduler
        if len(self.pools) == 1:
            self._launcher = Launcher(model, caches.page_size, self.device)
            self.scheduler = Scheduler(self.config, self.pages, lengths_matter=matter)
        else:
            self._launcher = SplitLauncher(model, caches.page_size, self.device)
            self.scheduler = PooledScheduler(self.config, self.pools, lengths_matter=matter)

    @property
    def capacity(self) -> int:
        """Tokens the cache holds, with several pools all of them together."""
        return self.longest * len(self.pools)

    @property
    def longest(self) -> int:
        """Tokens of one sequence that the cache can hold."""
        return self.pages.capacity * self.pages.page_size

    @property
    def has_work(self) -> bool:
        """True while some request is unfinished."""
        return len(self.scheduler) > 0

    @property
    def stats(self) -> EngineStats:
        """A copy of the counts so far."""
        scheduler = self.scheduler
        return replace(
            self._counts,
            preemptions=self._counts.preemptions + scheduler.num_preempted,
            reused_tokens=self._counts.reused_tokens + scheduler.num_reused_tokens,
        )

    def refuse(self, why: str) -> None:
        """Cancel everything in flight, and raise EngineError with ``why`` for every request from now on."""
        with self._lock:
            self.refusal = why
            self.reset()

    def check(self, prompt: Iterable[int], params: SamplingParams) -> array[int]:
        """The prompt as an array of token ids; raises RequestError for a request that cannot be served."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params is {params!r}; expected a SamplingParams, as adkit.SamplingParams(max_tokens=64)"
            )
        try:
            given = list(prompt)
            if bool in set(map(type, given)):  # an array takes them as 1 and 0
                raise TypeError(f"{next(t for t in given if isinstance(t, bool))} is none")
            tokens = array("q", given)
        except (TypeError, OverflowError) as error:
            raise RequestError(f"A prompt is a string or a list of token ids (integers): {error}") from error
        if not tokens:
            raise RequestError("The prompt is empty; give at least one token")
        vocab = self.model.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocab:
            at, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab)
            raise RequestError(
                f"Token id {token} at position {at} of the prompt is out of range; the vocabulary has "
                f"{vocab} tokens (0 to {vocab - 1}). Was the prompt made with this model's tokenizer?"
            )
        if self.model.max_positions is not None and len(tokens) > self.model.max_positions:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; the model has learned {self.model.max_positions} positions "
                "and no more. Shorten the prompt."
            )
        if len(tokens) >= self.config.max_seq_len:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; max_seq_len is {self.config.max_seq_len}, for the prompt and at "
                "least one new token. Shorten the prompt, or raise max_seq_len."
            )
        if len(tokens) > self.longest:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; max_seq_len is {self.config.max_seq_len}, but the cache holds "
                f"{self.longest} tokens of one sequence. Shorten the prompt, or raise the cache's share of memory "
                "(free_gpu_memory_fraction)."
            )
        if params.stop and self._decoder is None:
            raise RequestError(
                f"Stop strings {list(params.stop)} need a tokenizer, and there is none; use stop_token_ids"
            )
        return tokens

    def add(self, prompt: Iterable[int], params: SamplingParams | None = None) -> Sequence:
        """Queue a request; returns its handle.

        The output ends at ``max_tokens``, or before where prompt and output reach ``max_seq_len`` or the model's
        last learned position, or fill the cache. Raises RequestError for a request that cannot be served, EngineError
        for all of them after :meth:`refuse`.
        """
        params = params if params is not None else SamplingParams()
        tokens = self.check(prompt, params)
        # The last token's keys and values are never needed, hence capacity + 1.
        max_len = min(len(tokens) + params.max_tokens, self.config.max_seq_len, self.longest + 1)
        if self.model.max_positions is not None:  # the last token is sampled and never looked up
            max_len = min(max_len, self.model.max_positions + 1)
        detokenizer = None if self._decoder is None else Detokenizer(self._decoder, tuple(params.stop or ()))
        with self._lock:
            if self.refusal:
                raise EngineError(self.refusal)
            seq = Sequence(self._next_id, tokens, params, max_len, detokenizer)
            if not params.ignore_eos:
                seq.stop_ids |= self.eos_token_ids
            self._next_id += 1
            self._counts.requests += 1
            self.scheduler.add(seq)
        return seq

    def step(self) -> list[Delta]:
        """Run one step; returns what each request gained (``index`` is the handle's ``id``).

        Where steps overlap that is what they gained in the step before, nothing at first. Exceptions of the model do
        not leave this method: they end the step's requests, see ``Sequence.error``.
        """
        with self._lock:
            start = time.perf_counter()
            try:
                return self._step()
            except BaseException:
                # An interrupt can strike anywhere, so nothing half-done is trusted.
                self.reset()
                raise
            finally:
                self._counts.seconds += time.perf_counter() - start

    def _step(self) -> list[Delta]:
        deltas = []
        batch = self.scheduler.schedule()
        if batch is None:
            deltas += self._collect()
            batch = self.scheduler.schedule()
        launched = failure = None
        if batch:
            try:
                launched = self._launch(batch)
            except Exception as error:
                failure = _explain(error, sum(s.num_scheduled for s in batch), len(batch))
        deltas += self._collect()
        self._in_flight = launched
        if failure is not None:
            deltas += self._fail([s for s in batch or [] if not s.finished], failure)
        if not self.overlaps:
            deltas += self._collect()
        return deltas

    def _launch(self, batch: list[Sequence]) -> InFlight:
        """Start a step, behind the one in flight."""
        self._counts.steps += 1
        self._counts.step_sequences += len(batch)
        self._counts.computed_tokens += sum([s.num_scheduled for s in batch])
        return self._launcher(batch, self._in_flight)

    def _collect(self) -> list[Delta]:
        """Write the results of the step in flight, if any, into its sequences, and let the finished ones go."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return []
        unfinished = [s for s in step.sequences if s.finish_reason is None]
        if not unfinished:  # all have ended without it, so nobody waits for it either
            return []
        try:
            results = step.wait()
        except Exception as error:
            return self._fail(unfinished, _explain(error, step.num_tokens, len(step.sequences)))
        deltas = []
        answers = zip(step.sampling, results, strict=True)
        owner, answer = next(answers, (None, None))
        for seq, computed in zip(step.sequences, step.computed, strict=True):
            found = None
            if seq is owner:
                found = answer
                owner, answer = next(answers, (None, None))
                seq.num_pending -= 1
            if seq.finish_reason is not None:  # its token was computed in vain
                continue
            if found is not None and found[0] < 0:
                bad = EngineError(
                    "The model's logits were not finite (NaN or infinite) "
                    f"after {len(seq.tokens)} tokens of this request"
                )
                deltas += self._fail([seq], bad)
                continue
            self.scheduler.publish(seq, computed)
            if found is None:
                continue
            deltas.append(seq.append(*found))
            self._counts.output_tokens += 1
            self._note_length(seq)
            if seq.finish_reason is not None:
                self.scheduler.remove(seq)
        return deltas

    def _note_length(self, seq: Sequence) -> None:
        """Warn, once an engine, of a sequence with more positions than the config names: nothing else would tell."""
        made_for = self.model.made_for
        if (
            made_for is None or self._warned or len(seq.tokens) <= made_for + 1
        ):  # the last token has no position yet
            return
        self._warned = True
        warnings.warn(
            f"A sequence has passed position {made_for:,}, and the model's config names no more "
            f"(max_position_embeddings): what follows may make no sense. max_seq_len={made_for} ends sequences there.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _fail(self, batch: Iterable[Sequence], error: Exception) -> list[Delta]:
        """End requests with an error; what their pages hold is not to be trusted."""
        deltas = []
        for seq in batch:
            pages = seq.pages.tolist()
            self.scheduler.remove(seq, keep_pages=False)
            # A masked-out NaN still spoils a sum of 0 x NaN, so the pages' next holders must not find any.
            holders = self.pools[seq.pool].holders
            self.device.wipe([p for p in pages if not holders(p)], seq.pool)
            seen = len(seq.text), seq.num_output
            seq.finish("error", error)
            deltas.append(seq.delta(seq.id, *seen))
        return deltas

    def cancel(self, seq: Sequence) -> None:
        """End a request now (finish reason "cancelled"), keeping what it has; no effect on a finished one."""
        with self._lock:
            if not seq.finished:
                self.scheduler.remove(seq)
                seq.finish("cancelled")

    def reset(self) -> None:
        """Cancel everything in flight and forget the cache's content."""
        with self._lock:
            self._counts, in_flight = self.stats, list(self.scheduler)
            self._start_empty()
            for seq in in_flight:
                if not seq.finished:
                    seq.finish("cancelled")

    def __repr__(self) -> str:
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        held, capacity = sum(p.held for p in self.pools), sum(p.capacity for p in self.pools)
        pages = f"{held} of {capacity} pages held"
        return f"Engine({running} running, {waiting} waiting, {pages}; {self.stats!r})"


def _explain(error: Exception, tokens: int, sequences: int) -> Exception:
    """The error of a failed step, saying how large the step was and what can be done."""
    if isinstance(error, RankError):  # has its story already
        return error
    size = f"a step of {tokens} tokens in {sequences} sequences"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        explained: Exception = MemoryLimitError(
            f"Out of memory in {size}. Lower max_num_tokens or max_batch_size, or leave the cache less "
            f"memory (free_gpu_memory_fraction). {error}"
        )
        error = error.with_traceback(None)  # its frames hold the tensors that filled the memory
    else:
        explained = EngineError(f"The model failed in {size}: {type(error).__name__}: {error}")
    explained.__cause__ = error
    return explained
