"""One request's state, from submission to its last token."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from adkit.contract import Completion, Delta, FinishReason, SamplingParams, TokenLogprob
from adkit.runtime.detokenizer import Detokenizer
from adkit.runtime.pages import Digest, page_digest


class Sequence:
    """A request being served: its tokens, the cache pages it holds, and how it samples.

    ``tokens`` is prompt and output together, as far as the host knows them; ``num_pending`` more are being sampled
    by steps in flight, the last of them in ``row`` of the latest. The keys and values of the first ``num_cached``
    are in ``pages`` of ``pool`` (or will be before anything launched later runs), and the step being scheduled
    computes the next ``num_scheduled``; the first ``num_published`` pages can be found by others. ``max_len`` bounds
    ``tokens``.
    Tokens and pages are stdlib arrays because numpy copies slices of those without a Python loop.
    """

    def __init__(
        self,
        seq_id: int,
        prompt: Seq[int],
        params: SamplingParams,
        max_len: int,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.id = seq_id
        self.params = params
        self.tokens = array("q", prompt)
        self.prompt_len = len(prompt)
        #: The best token is all that is wanted of its logits.
        self.plain = params.greedy and params.repetition_penalty == 1 and params.logprobs is None
        self.max_len = max_len
        self.pages = array("i")
        self.digests: list[Digest] = []
        self.num_cached = 0
        self.num_scheduled = 0
        self.num_pending = 0
        self.num_published = 0
        self.row = 0
        self.pool = 0
        self.stop_ids: frozenset[int] = frozenset(params.stop_token_ids)
        self.detokenizer = detokenizer
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        # An unseeded request follows torch.manual_seed, as sampling from torch itself would.
        seed = int(params.seed if params.seed is not None else torch.randint(2**63 - 1, ()))
        # It would take the absolute value of a number, but all of a text; numpy's integers are not seeds to it.
        self._random = random.Random(seed if seed >= 0 else str(seed))

    @property
    def output(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_len :].tolist()

    @property
    def num_output(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def text(self) -> str:
        """The text released so far; what may yet become a stop string or another character is held back."""
        return self.detokenizer.text if self.detokenizer else ""

    @property
    def finished(self) -> bool:
        """True once there is a finish reason."""
        return self.finish_reason is not None

    @property
    def num_uncomputed(self) -> int:
        """Tokens, pending ones included, whose keys and values are not in the cache yet."""
        return len(self.tokens) + self.num_pending - self.num_cached

    @property
    def samples(self) -> bool:
        """True when the scheduled tokens reach the end, so that this step's logits give the next token."""
        return self.num_scheduled == len(self.tokens) + self.num_pending - self.num_cached

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own stream, whatever device or batch it runs in."""
        return self._random.getrandbits(32) / 2**32

    def full_page_digests(self, page_size: int, upto: int, by_length: bool) -> Iterator[Digest]:
        """Digests of the pages that the first ``upto`` tokens fill.

        ``by_length``: keys in the cache also depend on the length RoPE saw, the prompt's for prompt tokens
        and the token's own position + 1 after them, so the prompt's length is part of the name of each of its
        pages.
        """
        parent = self.prompt_len.to_bytes(8, "little") if by_length else b""
        for n, start in enumerate(range(0, upto - page_size + 1, page_size)):
            if n == len(self.digests):
                content = self.tokens[start : start + page_size].tobytes()
                self.digests.append(page_digest(self.digests[-1] if n else parent, content))
            yield self.digests[n]

    def append(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take a sampled token; finish when it ends the request (an ending token gives no text)."""
        seen = len(self.detokenizer.text) if self.detokenizer else 0
        self.tokens.append(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        if token in self.stop_ids or (self.detokenizer and self.detokenizer.add(token)):
            self.finish("stop")
        elif len(self.tokens) >= self.max_len:
            self.finish("length")
        text = self.detokenizer.text[seen:] if self.detokenizer else ""
        logprobs = None if self.logprobs is None or logprob is None else (logprob,)
        return Delta(self.id, text, (token,), self.finish_reason, logprobs)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request and release the text held back."""
        if self.detokenizer and self.detokenizer.finish() and reason == "length":
            reason = "stop"
        self.finish_reason, self.error = reason, error

    def delta(self, index: int, text_seen: int, tokens_seen: int) -> Delta:
        """What came since so many characters of text and output tokens."""
        reason = (
            self.finish_reason
        )  # read first: once it is set nothing grows, whichever thread runs the engine
        return Delta(
            index,
            self.text[text_seen:],
            tuple(self.tokens[self.prompt_len + tokens_seen :]),
            reason,
            None if self.logprobs is None else tuple(self.logprobs[tokens_seen:]),
            None if self.error is None else str(self.error),
        )

    def completion(self) -> Completion:
        """The answer as it stands."""
        assert self.finish_reason is not None, "the request is still running"
        return Completion(
            text=self.text,
            token_ids=tuple(self.output),
            finish_reason=self.finish_reason,
            prompt_token_ids=tuple(self.tokens[: self.prompt_len]),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            error=None if self.error is None else str(self.error),
        )

    def __repr__(self) -> str:
        state = self.finish_reason or f"{self.num_cached} cached"
        return f"Sequence({self.id}: {self.prompt_len} prompt + {self.num_output} output tokens, {state})"
