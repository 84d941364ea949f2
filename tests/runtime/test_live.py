"""What a user of the engine sees: prompts of every kind, streams, chats, errors, prints."""

from __future__ import annotations

import re
import threading
import warnings

import numpy as np
import pytest
import torch

from adkit.contract import (
    Completion,
    EngineError,
    MemoryLimitError,
    RequestError,
    SamplingParams,
)
from adkit.runtime import LiveModel

IGNORE = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture
def live(lab):
    """A model without a tokenizer."""
    return make(lab)


def make(lab, tokenizer=None, num_pages=64, **config):
    model = lab.HashModel(num_pages, 4)
    compiled = model.compiled()
    if tokenizer is not None:
        compiled.vocab_size = len(tokenizer)
    settings = lab.config(page_size=4, **config)
    made = LiveModel(compiled, settings, tokenizer)
    made.fake = model
    return made


class Speller:
    """A graph that says one text and then eos, each token by the token before (so none may come twice)."""

    def __init__(self, tokenizer, text):
        self.ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        self.vocab = len(tokenizer)
        assert len(set(self.ids)) == len(self.ids)

    def __call__(self, **inputs):
        rows = []
        for token in inputs["input_ids"][0][inputs["logits_indices"]].tolist():
            follows = self.ids[self.ids.index(token) + 1] if token in self.ids else self.ids[0]
            rows.append(torch.nn.functional.one_hot(torch.tensor(follows), self.vocab) * 10.0)
        return torch.stack(rows)[None]


@pytest.fixture
def spoken(lab, tokenizers):
    """A model that answers "say" to everything."""

    def build(text, **config):
        tokenizer = tokenizers["byte_level"]
        made = make(lab, tokenizer, **config)
        made.engine.model.forward = Speller(tokenizer, text)
        return made

    return build


def test_one_prompt_gives_one_completion_and_a_list_a_list(lab, live):
    expected = lab.greedy_alone([1, 2, 3], 5, ignore_eos=True)
    one = live.generate([1, 2, 3], IGNORE)
    assert isinstance(one, Completion)
    assert list(one.token_ids) == expected
    assert one.prompt_token_ids == (1, 2, 3)
    assert (one.text, one.finish_reason, one.logprobs) == ("", "length", None)
    assert live.generate([[1, 2, 3]], IGNORE) == [one]
    assert live.generate(((1, 2, 3), torch.tensor([1, 2, 3])), IGNORE) == [one, one]
    assert live.generate(np.array([1, 2, 3]), IGNORE) == one
    assert live.generate([np.int64(1), 2, 3], IGNORE) == one


def test_answers_come_in_the_order_of_prompts_with_their_own_params(lab, live):
    prompts = [[1, 2], [3], [4, 5, 6]]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (7, 2, 4)]
    answers = live.generate(prompts, params)
    for answer, prompt, p in zip(answers, prompts, params, strict=True):
        assert list(answer.token_ids) == lab.greedy_alone(prompt, p.max_tokens, ignore_eos=True)


def test_text_has_no_eos_and_token_ids_do(spoken, tokenizers):
    live = spoken("hi 🙂!")
    answer = live.generate("the fox")
    assert answer.text == str(answer) == "hi 🙂!"
    assert answer.token_ids[-1] == tokenizers["byte_level"].eos_token_id
    assert answer.finish_reason == "stop"
    assert tokenizers["byte_level"].decode(answer.token_ids, skip_special_tokens=True) == answer.text


def test_stop_string_ends_the_text_before_it_and_keeps_the_tokens(spoken, tokenizers):
    answer = spoken("abcXYZdef").generate("q", SamplingParams(stop="XYZ"))
    assert (answer.text, answer.finish_reason) == ("abc", "stop")
    assert tokenizers["byte_level"].decode(answer.token_ids) == "abcXYZ"


def test_half_a_stop_string_at_the_end_is_text(spoken):
    answer = spoken("abcXY").generate("q", SamplingParams(stop=["XYZ"]))
    assert (answer.text, answer.finish_reason) == ("abcXY", "stop")
    answer = spoken("abcXYZ").generate("q", SamplingParams(stop=["XYZ"], max_tokens=5))
    assert (answer.text, answer.finish_reason) == ("abcXY", "length")


def test_logprobs_are_one_a_token(lab, live):
    answer = live.generate([1, 2], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=3))
    assert [p.token_id for p in answer.logprobs] == list(answer.token_ids)
    tokens = [1, 2]
    for p in answer.logprobs:
        expected = lab.logits_of(lab.history_of(tokens, 2)).log_softmax(-1)
        assert p.logprob == pytest.approx(expected[p.token_id].item())
        assert list(p.top) == expected.topk(3).indices.tolist()
        tokens.append(p.token_id)


def test_stream_adds_up_to_generate(spoken, live):
    speaker = spoken("hi 🙂!")
    deltas = list(speaker.stream(["q", "the fox"], SamplingParams(logprobs=1)))
    whole = speaker.generate(["q", "the fox"], SamplingParams(logprobs=1))
    for i, completion in enumerate(whole):
        mine = [d for d in deltas if d.index == i]
        assert "".join(d.text for d in mine) == completion.text
        assert sum((d.token_ids for d in mine), ()) == completion.token_ids
        assert sum((d.logprobs for d in mine), ()) == completion.logprobs
        assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert all(len(d.token_ids) == 1 for d in mine)


def test_streams_can_be_read_in_turns(lab, live):
    a, b = live.stream([1, 2], IGNORE), live.stream([3], IGNORE)
    got = {"a": [], "b": []}
    got["a"] += next(a).token_ids
    for delta in b:
        got["b"] += delta.token_ids
    for delta in a:
        got["a"] += delta.token_ids
    assert got["a"] == lab.greedy_alone([1, 2], 5, ignore_eos=True)
    assert got["b"] == lab.greedy_alone([3], 5, ignore_eos=True)


def test_threads_share_the_engine(lab, live):
    answers = {}

    def ask(i):
        answers[i] = live.generate([i], SamplingParams(max_tokens=20, ignore_eos=True), progress=False)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=300)
    for i in range(1, 5):
        assert list(answers[i].token_ids) == lab.greedy_alone([i], 20, ignore_eos=True)


def test_closing_a_stream_cancels_it(live):
    stream = live.stream([[1], [2]], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert live.engine.pages.held == 2
    stream.close()
    assert live.engine.pages.held == 0
    assert not live.engine.has_work


def test_a_stream_never_begun_leaves_nothing_behind(live):
    stream = live.stream([1], IGNORE)
    stream.close()
    assert not live.engine.has_work


def test_interrupt_during_generate_leaves_no_pages_held(live):
    steps = iter(range(3))

    def interrupt(model):
        if next(steps, None) is None:
            raise KeyboardInterrupt

    live.fake.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        live.generate([[1], [2]], IGNORE)
    assert live.engine.pages.held == 0
    assert not live.engine.has_work
    live.fake.fault = lambda model: None
    assert len(live.generate([1], IGNORE).token_ids) == 5


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("hello", None, "no tokenizer; give a list of token ids"),
        (["", [1]], None, "Prompt 0 is an empty string"),
        ("", None, "^The prompt is an empty string"),
        ([], None, "empty list"),
        ([[1], []], None, "Prompt 1: The prompt is empty"),
        ([[1], [99]], None, "Prompt 1: Token id 99 at position 0"),
        (5, None, "prompts is a int"),
        ({"a": 1}, None, "prompts is a dict"),
        ([[1], None], None, "Prompt 1 is a NoneType"),
        ([[1], ["a"]], None, "Prompt 1: .*integers"),
        ([[1], [2]], [SamplingParams()], "1 SamplingParams for 2 prompts"),
        ([[1], [2]], [SamplingParams(), None], "Prompt 1: params is None"),
        ([1], "greedy", r"params is 'greedy'; expected a SamplingParams, as adkit.SamplingParams\("),
        ([1], {}, "params is {}"),
        ([1] * 100, None, "100 tokens; max_seq_len is 64"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_requests_are_refused_at_once_and_run_nothing(live, method, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        getattr(live, method)(prompts, params)
    assert live.stats.requests == 0


def test_a_conversation_is_sent_to_chat(live):
    with pytest.raises(RequestError, match=r"Prompt 0 is a dict; .*; a conversation goes to chat\(\)"):
        live.generate([{"role": "user", "content": "hello"}])


def test_submit_queues_without_running(lab, live, spoken):
    handle = live.submit([1, 2, 3], IGNORE)
    assert live.engine.has_work
    assert (handle.num_output, live.stats.steps) == (0, 0)
    while not handle.finished:
        live.engine.step()
    assert handle.output == lab.greedy_alone([1, 2, 3], 5, ignore_eos=True)
    with pytest.raises(RequestError, match="no tokenizer"):
        live.submit("hello")
    with pytest.raises(RequestError, match="chat template"):
        spoken("hi").submit([{"role": "user", "content": "hello"}])


def test_chat_goes_through_the_template(spoken, tokenizers):
    live = spoken("hi")
    tokenizer = live.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        messages = [{"role": "user", "content": "the fox?"}]
        answer = live.chat(messages)
        assert answer.text == "hi"
        assert tokenizer.decode(answer.prompt_token_ids) == "<s>user: the fox?\nassistant: "
        assert answer.prompt_token_ids.count(tokenizer.bos_token_id) == 1
        assert [a.text for a in live.chat([messages, messages])] == ["hi", "hi"]
        with pytest.raises(RequestError, match=r"^The conversation is not what .* takes: .*no system role"):
            live.chat([{"role": "system", "content": "be brief"}])
        for wrong in ("hello", [], ["hello"], [[]], None, 5, messages[0]):
            with pytest.raises(RequestError, match="expected a list of messages"):
                live.chat(wrong)
        for wrong in ({"role": "user"}, {"role": "user", "text": "the fox?"}, {"content": "the fox?"}):
            with pytest.raises(RequestError, match=r"^Message 1 of the conversation is \{.*; expected \{"):
                live.chat([*messages, wrong])
            with pytest.raises(RequestError, match=r"^Message 0 of conversation 1 is"):
                live.stream([messages, [wrong]])
        assert "".join(d.text for d in live.stream(messages)) == "hi"
        assert [d.index for d in live.stream(["the fox?", messages]) if d.finish_reason] == [0, 1]
    finally:
        tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        live.chat(messages)


def test_text_that_no_tokenizer_takes_is_a_bad_request(spoken):
    with pytest.raises(RequestError, match=r"^The prompt is .*, which the tokenizer does not take"):
        spoken("hi").generate("\ud800")  # half a surrogate pair


def test_a_seed_may_be_numpys(live):
    one, two = (SamplingParams(temperature=1.0, seed=kind(7), max_tokens=5) for kind in (int, np.int64))
    assert live.generate([1], one) == live.generate([1], two)


def test_chat_without_tokenizer_is_refused(live):
    with pytest.raises(RequestError, match="no tokenizer"):
        live.chat([{"role": "user", "content": "hello"}])


def test_failure_of_all_is_raised_and_of_some_is_reported(live):
    def fail(model):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    live.fake.fault = fail
    with pytest.raises(MemoryLimitError, match="Lower max_num_tokens"):
        live.generate([[1], [2]], IGNORE)
    with pytest.raises(MemoryLimitError, match="Lower max_num_tokens"):
        list(live.stream([1], IGNORE))
    live.fake.fault = lambda model: (_ for _ in ()).throw(RuntimeError("kernel broke"))
    with pytest.raises(EngineError, match="RuntimeError: kernel broke"):
        live.generate([1], IGNORE)
    live.fake.fault = lambda model: None
    live.fake.poison = 7
    with pytest.warns(UserWarning, match="1 of 2 requests failed"):
        good, bad = live.generate([[1, 2], [7]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert good.finish_reason == "length"
    assert (bad.finish_reason, bad.token_ids) == ("error", ())
    assert "not finite" in bad.error
    assert live.engine.pages.held == 0


def test_stats_count(live):
    before = live.stats
    live.generate([[1, 2], [3]], IGNORE)
    span = live.stats - before
    assert (span.requests, span.output_tokens, span.steps, span.step_sequences) == (2, 10, 5, 10)
    assert span.computed_tokens == 3 + 8
    assert span.batch_occupancy == 2.0
    assert span.tokens_per_second == pytest.approx(10 / span.seconds)
    assert re.fullmatch(
        r"EngineStats\(2 requests, 10 output tokens in .* s, .* tokens/s, 5 steps of 2\.0 sequences\)",
        repr(span),
    )


def test_everything_prints_readably(live, spoken):
    assert repr(live) == "LiveModel(cpu, cache of 252 tokens, max_batch_size 32, no tokenizer)"
    answers = spoken("hi").generate(["a", "b"])
    assert repr(answers) == "[0] Completion('hi', 3 tokens, 'stop')\n[1] Completion('hi', 3 tokens, 'stop')"
    assert repr(live.generate([1], SamplingParams(max_tokens=1, ignore_eos=True))).startswith("Completion([")
    assert "0 running, 0 waiting, 0 of 63 pages held" in repr(live.engine)


def test_progress_bar_counts_tokens_and_can_be_silenced(live, capsys, monkeypatch):
    monkeypatch.setattr("adkit.runtime.live._QUIET_SECONDS", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.generate([[1], [2]], IGNORE)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "2/2 requests" in shown
    live.generate([[1], [2]], IGNORE, progress=False)
    assert capsys.readouterr().err == ""
