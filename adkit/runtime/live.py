"""The engine as its user sees it: prompts in, text out."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from numbers import Integral
from typing import Any, overload

from tqdm.auto import tqdm

from adkit.contract import (
    CompiledModel,
    Completion,
    Completions,
    Delta,
    EngineConfig,
    RankError,
    RequestError,
    SamplingParams,
)
from adkit.runtime.device import Device
from adkit.runtime.engine import Engine
from adkit.runtime.sequence import Sequence
from adkit.runtime.stats import EngineStats

Prompt = str | Seq[int]
Messages = Seq[Mapping[str, Any]]
Params = SamplingParams | Seq[SamplingParams] | None
Request = tuple[Seq[int], SamplingParams]

_QUIET_SECONDS = 2.0
_A_MESSAGE = '{"role": "user", "content": "..."}'


class LiveModel:
    """A compiled model that generates: ``generate``, ``stream``, ``chat``; ``submit`` for those who run it themselves.

    A prompt is a string or a list of token ids (the only kind for a model without a tokenizer; its answers
    have token ids and no text). One prompt gives one ``Completion``, a list of prompts a list of them in the
    same order, a list of one included. ``params`` is one ``SamplingParams`` for all (default: greedy) or a
    list with one a prompt. A bad prompt raises RequestError before anything runs. A request that fails while
    running ends with finish reason "error" and a warning, and the others go on; only when the model failed
    for all of them is its error raised.
    """

    def __init__(
        self,
        model: CompiledModel,
        config: EngineConfig,
        tokenizer: Any = None,
        device: Device | None = None,
        why_no_tokenizer: str = "",
    ) -> None:
        self.engine = Engine(model, config, tokenizer, device)
        self.tokenizer = tokenizer
        self._why_no_tokenizer = why_no_tokenizer or "the model has no tokenizer"

    def close(self) -> None:
        """Cancel everything and let go of the device; ranks in processes of their own are ended.

        A ``with`` block does it too. Without ranks there is nothing to let go of, and the model can go on generating.
        """
        self.engine.reset()
        self.engine.device.close()

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def stats(self) -> EngineStats:
        """What the engine counted since it was built."""
        return self.engine.stats

    @overload
    def generate(
        self, prompts: str | Seq[int], params: Params = None, *, progress: bool = True
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]], params: Params = None, *, progress: bool = True
    ) -> Completions: ...

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: Params = None, *, progress: bool = True
    ) -> Completion | Completions:
        """Complete one prompt or many; a bar shows tokens/s when it takes longer than two seconds.

        ``params``: ``adkit.SamplingParams(max_tokens=64, temperature=0.7)``, or a list with one a prompt.
        Raises RequestError for a request that cannot be served as given.
        """
        texts, single = self._one_or_many(prompts)
        tokens = [self._encode(t, _name("Prompt", i, single)) for i, t in enumerate(texts)]
        completions = self._complete(self._requests(tokens, params), progress)
        return completions[0] if single else completions

    @overload
    def chat(
        self, messages: list[dict[str, Any]], params: Params = None, *, progress: bool = True
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: list[list[dict[str, Any]]], params: Params = None, *, progress: bool = True
    ) -> Completions: ...

    def chat(
        self, messages: Messages | Seq[Messages], params: Params = None, *, progress: bool = True
    ) -> Completion | Completions:
        """Answer one conversation or many through the tokenizer's chat template.

        A conversation is a list of messages ``{"role": "user", "content": "..."}``. Raises RequestError when
        there is no chat template or it does not take the messages.
        """
        if not isinstance(messages, (list, tuple)):
            raise RequestError(
                f"messages is a {type(messages).__name__}; expected a list of messages such as "
                f"{_A_MESSAGE}, or a list of such lists"
            )
        single = all(isinstance(m, Mapping) for m in messages)
        conversations = [messages] if single else messages
        prompts = [
            self._apply_chat_template(c, _name("Conversation", i, single))
            for i, c in enumerate(conversations)
        ]
        completions = self._complete(self._requests(prompts, params), progress)
        return completions[0] if single else completions

    def stream(
        self, prompts: Prompt | Messages | Seq[Prompt | Messages], params: Params = None
    ) -> Iterator[Delta]:
        """Yield each request's pieces as they come; ``index`` is the prompt's place in the list.

        A conversation, as :meth:`chat` takes it, may stand in a prompt's place. A delta's text can be empty while a
        character or a possible stop string is incomplete. Closing the iterator cancels what is unfinished.
        Raises RequestError (at the call) for a request that cannot be served.
        """
        texts, single = ([prompts], True) if _is_conversation(prompts) else self._one_or_many(prompts)
        tokens = [self._tokens(t, i, single) for i, t in enumerate(texts)]
        return self._stream(self._requests(tokens, params))

    def submit(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> Sequence:
        """Queue one prompt, or one conversation, and return its handle without running anything.

        The handle fills as ``engine.step()`` is called, by whichever thread; ``engine.cancel(handle)`` ends it.
        Raises RequestError for a request that cannot be served as given.
        """
        return self.engine.add(self._tokens(prompt, 0, single=True), params)

    def _stream(self, requests: list[Request]) -> Iterator[Delta]:
        with self._in_flight(requests) as handles:
            seen = [(0, 0)] * len(handles)
            pending = list(enumerate(handles))
            while pending:
                self.engine.step()
                for i, handle in pending:
                    delta = handle.delta(i, *seen[i])
                    seen[i] = (seen[i][0] + len(delta.text), seen[i][1] + len(delta.token_ids))
                    if delta.token_ids or delta.finish_reason:
                        yield delta
                    if delta.finish_reason:
                        pending = [p for p in pending if p[0] != i]
            _report_failures(handles)

    def _complete(self, requests: list[Request], progress: bool) -> Completions:
        with self._in_flight(requests) as handles, _ProgressBar(handles, enabled=progress) as bar:
            pending = deque(handles)
            while pending:
                bar.update(self.engine.step())
                while pending and pending[0].finished:
                    pending.popleft()
        _report_failures(handles)
        return Completions(h.completion() for h in handles)

    @contextmanager
    def _in_flight(self, requests: list[Request]) -> Iterator[list[Sequence]]:
        """Submit requests, and leave none of them behind, whatever happens."""
        handles: list[Sequence] = []
        try:
            handles.extend(self.engine.add(prompt, params) for prompt, params in requests)
            yield handles
        except KeyboardInterrupt:
            self.engine.reset()
            raise
        finally:
            for handle in handles:
                self.engine.cancel(handle)

    def _one_or_many(self, prompts: Any) -> tuple[list[Any], bool]:
        """The prompts as a list, and whether a single one was given."""
        prompts = _plain(prompts)
        if isinstance(prompts, str):
            return [prompts], True
        if not isinstance(prompts, list):
            raise RequestError(
                f"prompts is a {type(prompts).__name__}; expected a string, strings or lists of token ids"
            )
        if not prompts:
            raise RequestError("prompts is an empty list; give at least one prompt")
        if all(isinstance(p, Integral) for p in prompts):
            return [prompts], True
        return prompts, False

    def _tokens(self, prompt: Any, index: int, single: bool) -> Any:
        """The token ids of one prompt or one conversation."""
        if _is_conversation(prompt):
            return self._apply_chat_template(prompt, _name("Conversation", index, single))
        return self._encode(prompt, _name("Prompt", index, single))

    def _encode(self, prompt: Any, name: str) -> Any:
        """One prompt's token ids; ``name`` is what errors call it."""
        prompt = _plain(prompt)
        if isinstance(prompt, list):
            return prompt
        if not isinstance(prompt, str):
            talk = "; a conversation goes to chat()" if isinstance(prompt, Mapping) else ""
            raise RequestError(
                f"{name} is a {type(prompt).__name__}; expected a string or a list of token ids{talk}"
            )
        if not prompt:
            raise RequestError(f"{name} is an empty string; give at least one character, or token ids")
        if self.tokenizer is None:
            raise RequestError(f"{name} is a string, but {self._why_no_tokenizer}; give a list of token ids")
        try:
            return self.tokenizer(prompt)["input_ids"]
        except (TypeError, ValueError) as error:  # such as half a surrogate pair, which no encoding takes
            raise RequestError(
                f"{name} is {prompt[:40]!r}, which the tokenizer does not take: {error}"
            ) from error

    def _apply_chat_template(self, messages: Any, name: str) -> list[int]:
        """One conversation's token ids, up to where the answer begins."""
        if (
            not isinstance(messages, (list, tuple))
            or not messages
            or not all(isinstance(m, Mapping) for m in messages)
        ):
            raise RequestError(f"{name} is {messages!r}; expected a list of messages such as {_A_MESSAGE}")
        for i, message in enumerate(messages):
            # Many templates leave out what is missing, and the model then answers something else.
            if "role" not in message or not {"content", "tool_calls"} & set(message):
                raise RequestError(
                    f"Message {i} of {name[0].lower()}{name[1:]} is {message!r}; expected {_A_MESSAGE}"
                )
        if self.tokenizer is None:
            raise RequestError(
                f"chat() needs a tokenizer, but {self._why_no_tokenizer}; use generate() with token ids"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                "The model has no chat template, which chat() needs; use generate() with a plain prompt"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise RequestError(f"{name} is not what the chat template takes: {error}") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _requests(self, prompts: list[Any], params: Any) -> list[Request]:
        """Pair prompts with parameters; every request is checked before the first one runs."""
        each = (
            list(params)
            if isinstance(params, (list, tuple))
            else [SamplingParams() if params is None else params] * len(prompts)
        )
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} SamplingParams for {len(prompts)} prompts; give one, or one a prompt"
            )
        requests: list[Request] = []
        for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append((self.engine.check(prompt, p), p))
            except RequestError as error:
                raise (error if len(prompts) == 1 else RequestError(f"Prompt {i}: {error}")) from None
        return requests

    def __repr__(self) -> str:
        engine = self.engine
        tokenizer = "no tokenizer" if self.tokenizer is None else type(self.tokenizer).__name__
        return (
            f"LiveModel({engine.model.device}, cache of {engine.capacity:,} tokens, "
            f"max_batch_size {engine.config.max_batch_size}, {tokenizer})"
        )


class _ProgressBar:
    """Tokens as they come, out of the most that can; what a request leaves unused is taken off the total."""

    def __init__(self, handles: list[Sequence], *, enabled: bool) -> None:
        self._handles = {h.id: h for h in handles}
        self._done = 0
        most = sum(h.max_len - h.prompt_len for h in handles)
        enabled &= not os.environ.get("TQDM_DISABLE")  # which tqdm overlooks in notebooks
        self._bar = tqdm(total=most, unit=" tokens", delay=_QUIET_SECONDS, disable=not enabled)

    def update(self, deltas: list[Delta]) -> None:
        """Count a step's deltas (those of other requests in the engine excepted)."""
        for delta in deltas:
            handle = self._handles.get(delta.index)
            if handle is None:
                continue
            if delta.finish_reason:
                self._done += 1
                self._bar.total -= handle.max_len - len(handle.tokens)
                self._bar.set_postfix_str(f"{self._done}/{len(self._handles)} requests", refresh=False)
            self._bar.update(len(delta.token_ids))

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def _is_conversation(prompt: Any) -> bool:
    """Whether it is a list of messages, well made or not."""
    return isinstance(prompt, (list, tuple)) and any(isinstance(m, Mapping) for m in prompt)


def _name(what: str, index: int, single: bool) -> str:
    """What an error calls one of several prompts, or the only one."""
    return f"The {what.lower()}" if single else f"{what} {index}"


def _plain(value: Any) -> Any:
    """Tuples, arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _report_failures(handles: list[Sequence]) -> None:
    """Raise the model's error if it failed for all; warn if requests failed one by one."""
    errors = [h.error for h in handles if h.error is not None]
    if not errors:
        return
    if isinstance(errors[0], RankError) or (len(errors) == len(handles) and all(e.__cause__ for e in errors)):
        raise errors[0]
    warnings.warn(
        f"{len(errors)} of {len(handles)} requests failed; finish_reason is 'error' and .error says why. "
        f"First: {errors[0]}",
        stacklevel=4,
    )
