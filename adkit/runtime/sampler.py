"""Logits to tokens, for all sequences of a step at once, without waiting for the device.

Where Triton kernels run they choose the tokens (:mod:`adkit.ops.triton.sampling`); what is here is their
reference, and does it elsewhere.

Each row depends on nothing but its own logits, parameters and random numbers, so a request gets the same
tokens whatever shares its batch. Filters apply in transformers' order: repetition penalty, temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from adkit.contract import SamplingParams, TokenLogprob
from adkit.ops.sampling import best_tokens, drawn_tokens
from adkit.ops.triton.ops import kernels_can_run


class Drawing(Protocol):
    """Whose next token is drawn: a :class:`~adkit.runtime.sequence.Sequence`, or what another process was told of it.

    ``plain``: the best token is all that is wanted. ``tokens`` are those known, and ``num_pending`` more are being
    sampled, the last of them in ``row`` of the step before.
    """

    params: SamplingParams
    plain: bool
    tokens: array[int]
    num_pending: int
    row: int

    def uniform(self) -> float:
        """The next number in [0, 1) of its own stream."""
        ...


@dataclass
class Sampled:
    """A step's choices, still on the device: ``token_ids`` int64 [L], -1 where the logits were not finite.

    ``logprobs`` float32 [L] and the best tokens' ``top_ids``, ``top_logprobs`` [L, n] where a request wants
    them.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def fetch(self) -> Sampled:
        """The same on the host, without waiting: to be read once the device's work so far is done.

        The pinned memory comes from torch's cache of it.
        """
        if self.token_ids.device.type != "cuda":
            return self

        def copy(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, True)

        tokens = copy(self.token_ids)
        assert tokens is not None
        return Sampled(tokens, copy(self.logprobs), copy(self.top_ids), copy(self.top_logprobs))

    def to_host(self, params: Seq[SamplingParams]) -> list[tuple[int, TokenLogprob | None]]:
        """Wait for the device; each row's token, and the log-probabilities its request asked for."""
        tokens = self.token_ids.tolist()
        if self.logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return [(t, None) for t in tokens]
        chosen, ids, values = self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist()
        rows: list[tuple[int, TokenLogprob | None]] = []
        for i, (token, p) in enumerate(zip(tokens, params, strict=True)):
            top = dict(zip(ids[i][: p.logprobs], values[i][: p.logprobs], strict=True))
            rows.append((token, None if p.logprobs is None else TokenLogprob(token, chosen[i], top)))
        return rows


def sample(
    logits: Tensor,
    sequences: Seq[Drawing],
    previous: Tensor | None = None,
    best: Tensor | None = None,
) -> Sampled:
    """Choose the next token of L sequences from logits [L, V].

    ``previous`` [L'] are the tokens of the step before, where it is still running: a sequence with a pending
    token has it in its ``row``. ``best`` [L] are the rows' best tokens (-1: not finite), where they are known.
    Log-probabilities are the model's own: those of the logits before any penalty, temperature or filter.
    """
    if best is not None and all(s.plain for s in sequences):
        return Sampled(best)
    params = [s.params for s in sequences]
    scores = _penalise_repetition(logits, sequences, previous)
    sampled = Sampled(_choose(scores, sequences))
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    if wanted:
        logprobs = logits.float().log_softmax(dim=-1)
        chosen = sampled.token_ids.clamp(min=0)  # a row that is not finite has no token
        sampled.logprobs = logprobs.gather(1, chosen[:, None])[:, 0]
        sampled.top_logprobs, sampled.top_ids = logprobs.topk(min(max(wanted), logits.shape[-1]))
    return sampled


def _choose(scores: Tensor, sequences: Seq[Drawing]) -> Tensor:
    """The next tokens [L] by kernels where they run, else by torch; -1 where scores [L, V] are not finite."""
    params = [s.params for s in sequences]
    if all(p.greedy for p in params):
        return best_tokens(scores)
    uniform = [0.0 if s.params.greedy else s.uniform() for s in sequences]
    if kernels_can_run(scores.is_cuda):
        tokens = _launch(scores, params, uniform)
        if tokens is not NotImplemented:
            return cast(Tensor, tokens)
    scores = scores.float()
    rows = [i for i, p in enumerate(params) if not p.greedy]
    index = _tensor(rows, scores)
    drawn = _draw(
        filter_scores(scores[index], [params[i] for i in rows]),
        _tensor([uniform[i] for i in rows], scores, torch.float64),
    )
    best = best_tokens(scores)
    return torch.where(best < 0, -1, best.index_copy(0, index, drawn))


def _launch(scores: Tensor, params: Seq[SamplingParams], uniform: list[float]) -> Any:
    """Tokens [L] from the kernels; NotImplemented where they do not compile."""
    settings = [
        [p.temperature for p in params],
        [p.top_k or math.inf for p in params],
        [p.top_p if p.top_p < 1 else math.inf for p in params],
        [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params],
        uniform,
    ]
    filters = any(p.top_k for p in params), any(p.top_p < 1 for p in params)
    return drawn_tokens(scores, _tensor(settings, scores, torch.float64), *filters)


def filter_scores(scores: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Scores [L, V] divided by temperature, with -inf where top-k, top-p or min-p rule a token out.

    Every filter comes down to a lowest score that is still allowed; equal scores stand or fall together, so
    more than k tokens can stay where several tie for the last place.
    """
    temperatures = _tensor([p.temperature for p in params], scores)
    # Measured from the maximum, so that a tiny temperature cannot overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    # After that the maximum is 0, and p >= min_p * p_max means score >= log(min_p).
    lowest = _tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], scores)

    rows = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if rows:
        index = _tensor(rows, scores)
        bound = _lowest_of_top(scores[index], [params[i] for i in rows])
        lowest = lowest.index_copy(0, index, torch.maximum(lowest[index], bound))
    return scores.masked_fill(scores < lowest[:, None], -math.inf)


def _lowest_of_top(scores: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """The lowest score [L] that is both among the top k and within the top-p nucleus of those."""
    vocab = scores.shape[-1]
    ks = [min(p.top_k or vocab, vocab) for p in params]
    values = scores.topk(max(ks)).values.double()  # descending
    k = _tensor(ks, scores)
    values = values.masked_fill(torch.arange(max(ks), device=scores.device) >= k[:, None], -math.inf)
    probs = values.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    top_p = _tensor([p.top_p for p in params], scores, torch.float64)
    # A token is in the nucleus while those before it have not reached top_p; without top-p all k are.
    kept = torch.where(top_p < 1, (before < top_p[:, None]).sum(dim=-1), k).minimum(k).clamp(min=1)
    return values.gather(1, kept[:, None] - 1)[:, 0].to(scores.dtype)


def _draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [L]: each row's distribution function, in vocabulary order, inverted at ``uniform`` [L]."""
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    at = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _penalise_repetition(logits: Tensor, sequences: Seq[Drawing], previous: Tensor | None = None) -> Tensor:
    """Lower the scores of tokens that stand in a sequence's prompt or output, where it asks for that."""
    rows = [i for i, s in enumerate(sequences) if s.params.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.float()
    tokens = [np.asarray(sequences[i].tokens) for i in rows]
    known = np.repeat(rows, [len(t) for t in tokens]) * logits.shape[1] + np.concatenate(tokens)
    # Filled by flat index: assigning a Python value to rows and columns would wait for the device.
    seen = torch.zeros(logits.numel(), dtype=torch.bool, device=logits.device)
    seen.index_fill_(0, _tensor(known, logits), True)
    pending = [i for i in rows if sequences[i].num_pending]
    if pending:
        assert previous is not None, "a token is pending, and the step before was not given"
        last = previous[_tensor([sequences[i].row for i in pending], logits)].clamp_min(0)
        seen.index_fill_(0, _tensor(pending, logits) * logits.shape[1] + last, True)
    seen = seen.view(logits.shape)
    penalty = _tensor([s.params.repetition_penalty for s in sequences], logits)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _tensor(values: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Host values on the device of ``like`` without waiting for it; floats take the dtype of ``like``."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if dtype is None and tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
