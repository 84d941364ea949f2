"""The panel, driven from Python: it returns at once, streams, stops, shares the engine, and outlives failures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import adkit
from adkit.contract import EngineConfig, RequestError, SamplingParams
from adkit.playground import Playground
from adkit.playground.view import page_map
from adkit.runtime import LiveModel
from tests.runtime.split import engine_of

QUESTION = "Mara has the kite. Finn has the drum. Ida has the lamp. Who has the drum?"
ENDLESS = {"ignore_eos": True, "max_tokens": 900}


@pytest.fixture(scope="module")
def workbench():
    return adkit.Workbench(
        "demo", device="cpu", progress=False, max_seq_len=1024, max_batch_size=8, max_num_tokens=512
    )


@pytest.fixture
def panel(workbench):
    with workbench.play(chat=False) as made:
        yield made
    assert workbench.llm().engine.pages.held == 0, "pages leaked"


def until(true, seconds=120.0):
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Slow:
    """A model that waits before each step until it is told to go on."""

    def __init__(self, engine, monkeypatch):
        self.gate = threading.Semaphore(0)
        forward = engine.model.forward

        def gated(**inputs):
            assert self.gate.acquire(timeout=600)
            return forward(**inputs)

        monkeypatch.setattr(engine.model, "forward", gated)

    def steps(self, count):
        self.gate.release(count)


def test_a_prompt_gives_what_the_engine_gives(workbench, panel):
    expected = workbench.llm().generate(QUESTION, SamplingParams(max_tokens=40))
    assert panel.generate(QUESTION, max_tokens=40) is panel
    (got,) = panel.wait(300)
    assert got == expected
    assert panel.text == expected.text
    assert panel.stats.output_tokens == len(expected.token_ids)
    assert panel.stats.finished == panel.stats.requests == 1
    assert panel.stats.first_token_seconds > 0
    assert not panel.running


def test_it_returns_at_once_and_text_grows(panel, workbench, monkeypatch):
    slow = Slow(workbench.llm().engine, monkeypatch)
    panel.generate("Once upon a time", **ENDLESS)
    assert panel.running
    assert panel.text == ""
    slow.steps(10)
    until(lambda: panel.stats.output_tokens >= 9)
    first = panel.text
    slow.steps(10)
    until(lambda: panel.stats.output_tokens >= 19)
    assert panel.text.startswith(first)
    assert len(panel.text) > len(first)
    slow.steps(10_000)
    panel.stop()


def test_stop_keeps_what_came_and_loses_nothing_of_others(workbench, panel):
    llm = workbench.llm()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    alone = llm.generate("Finn has the drum.", params)
    panel.generate("Once upon a time", copies=3, temperature=0.8, seed=1, **ENDLESS)
    other = llm.submit("Finn has the drum.", params)
    until(lambda: other.num_output > 5)
    panel.stop()
    assert not panel.running
    assert [c.finish_reason for c in panel.completions] == ["cancelled"] * 3
    assert all(c.text for c in panel.completions)
    while not other.finished:
        llm.engine.step()
    assert other.completion() == alone


def test_generate_from_another_cell_works_while_it_plays(workbench, panel):
    llm = workbench.llm()
    expected = llm.generate(QUESTION, SamplingParams(max_tokens=40))
    panel.generate("Once upon a time", copies=2, **ENDLESS)
    assert llm.generate([QUESTION] * 3, SamplingParams(max_tokens=40)) == [expected] * 3
    assert panel.running
    panel.stop()


def test_two_panels_share_the_engine(workbench, panel):
    alone = panel.generate(QUESTION, max_tokens=40).wait(300)
    with workbench.play(chat=False) as second:
        second.generate("Once upon a time", **ENDLESS)
        until(lambda: second.stats.output_tokens > 0)
        assert panel.generate(QUESTION, max_tokens=40).wait(300) == alone
        assert "other requests" in panel.pages.counts()
        assert second.running
    assert second.completions[0].finish_reason == "cancelled"


def test_copies_differ_by_their_seed_and_repeat(panel):
    drawn = panel.generate("Once upon a time", copies=3, temperature=1.0, seed=5, max_tokens=20).wait(300)
    assert len({c.token_ids for c in drawn}) == 3
    again = panel.generate("Once upon a time", copies=1, seed=6).wait(300)
    assert again[0].token_ids == drawn[1].token_ids


def test_a_request_added_while_others_run_joins_them(workbench, panel):
    before = workbench.llm().stats
    panel.generate("Once upon a time", **ENDLESS)
    panel.generate("What is 27 + 45?", max_tokens=20, ignore_eos=False)
    until(lambda: panel.stats.finished == 1)
    assert panel.text == " 27 + 45 = 72."
    assert panel.running
    assert (workbench.llm().stats - before).batch_occupancy > 1
    panel.stop()


def test_chat_remembers_what_was_said_until_reset(workbench, panel):
    panel.generate("What is 27 + 45?", chat=True, max_tokens=30)
    (first,) = panel.wait(300)
    assert first.text == "27 + 45 = 72."
    (second,) = panel.generate("What is 12 + 13?").wait(300)
    asked = workbench.llm().tokenizer.decode(second.prompt_token_ids)
    assert "What is 27 + 45?" in asked
    assert "27 + 45 = 72." in asked
    panel.reset()
    (third,) = panel.generate("What is 12 + 13?").wait(300)
    assert "27" not in workbench.llm().tokenizer.decode(third.prompt_token_ids)
    assert panel.view.answers[0].chat


def test_pages_tell_shared_prefixes_and_what_is_kept(workbench, panel):
    llm = workbench.llm()
    llm.engine.reset()
    page = llm.engine.pages.page_size
    prompt = list(range(20, 20 + 3 * page))
    panel.generate(prompt, max_tokens=1, ignore_eos=True).wait(300)
    assert panel.pages.counts()["kept for reuse"] == 3
    panel.generate([*prompt, 9], copies=2, **ENDLESS)
    until(lambda: panel.stats.output_tokens >= 2)
    counts = panel.pages.counts()
    assert counts["shared prefix"] == 3
    held = [name for name in counts if name.startswith("request ")]
    assert len(held) == 2
    assert sum(counts.values()) == llm.engine.pages.capacity
    panel.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": [5, 99_999]}, "99999"),
        ({"prompt": "hi", "temperature": -1.0}, "temperature"),
        ({"prompt": "hi", "copies": 0}, "copies is 0"),
        ({"prompt": "hi", "warmth": 1.0}, "no sampling field 'warmth'"),
        ({"prompt": "hi", "max_token": 1}, "'max_token'; did you mean 'max_tokens'"),
        ({"prompt": ["hi", "you"]}, "one prompt at a time"),
        ({"prompt": [5] * 3000}, "max_seq_len"),
    ],
)
def test_a_bad_request_is_refused_and_the_panel_lives_on(panel, options, message):
    with pytest.raises(RequestError, match=message):
        panel.generate(**options)
    assert not panel.running
    assert panel.generate("What is 27 + 45?", max_tokens=30).wait(300)[0].text == " 27 + 45 = 72."


def test_what_is_wrong_in_the_controls_is_said_in_the_log(panel):
    panel._controls.fields["seed"].value = "seven"
    panel._controls.prompt.value = "What is 27 + 45?"
    panel._controls.generate.click()
    assert not panel.running
    assert "seed" in panel.errors[-1]
    assert "seven" in panel._controls._panes["log"].value
    panel._controls.fields["seed"].value = ""
    panel._controls.generate.click()
    assert panel.wait(300)[0].text == " 27 + 45 = 72."


def test_a_failing_model_shows_its_message_and_the_next_request_runs(workbench, panel, monkeypatch):
    model = workbench.llm().engine.model
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("3 GiB")))
        (failed,) = panel.generate("What is 27 + 45?", max_tokens=30).wait(300)
    assert failed.finish_reason == "error"
    assert "request 1: Out of memory" in panel.errors[0]
    assert "Out of memory" in panel.view._repr_mimebundle_()["text/html"]
    assert panel.generate("What is 27 + 45?").wait(300)[0].text == " 27 + 45 = 72."


def test_a_broken_engine_is_said_and_ends_the_requests(workbench, panel, monkeypatch):
    engine = workbench.llm().engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda: (_ for _ in ()).throw(AssertionError("books")))
        (ended,) = panel.generate("What is 27 + 45?", max_tokens=30).wait(300)
    assert ended.finish_reason == "cancelled"
    assert "books" in panel.errors[0]
    assert panel.generate("What is 27 + 45?").wait(300)[0].text == " 27 + 45 = 72."


def test_an_interrupted_wait_stops_the_requests(panel, monkeypatch):
    panel.generate("Once upon a time", **ENDLESS)
    wait = panel._driver.wait
    calls = []

    def interrupted(timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(panel._driver, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        panel.wait()
    assert panel.completions[0].finish_reason == "cancelled"
    monkeypatch.undo()
    with pytest.raises(TimeoutError, match="still generating"):
        panel.generate("Once upon a time", **ENDLESS).wait(0.01)
    assert panel.running


def test_the_controls_show_and_give_what_is_asked(panel):
    panel.generate("What is 27 + 45?", temperature=0.5, seed=3, copies=2, max_tokens=9).wait(300)
    fields = panel._controls.fields
    assert fields["temperature"].value == 0.5
    assert fields["seed"].value == "3"
    assert fields["copies"].value == 2
    fields["copies"].value = 4
    fields["seed"].value = ""
    panel._controls.prompt._handle_custom_msg({"event": "submit"}, [])  # Enter
    assert len(panel.wait(300)) == 4
    assert panel._controls.read() == {
        "temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None,
        "max_tokens": 9, "copies": 4,
    }  # fmt: skip


def test_it_is_drawn_at_a_bounded_rate(panel, monkeypatch):
    drawn = []
    show = panel._controls.show
    monkeypatch.setattr(panel._controls, "show", lambda *a: (drawn.append(time.monotonic()), show(*a)))
    panel.generate("Once upon a time", ignore_eos=True, max_tokens=150).wait(300)
    took = panel.stats.seconds
    assert panel.stats.output_tokens == 150
    assert 1 <= len(drawn) <= took / panel.interval + 4, "once an interval, and at the ends"


def test_what_is_drawn_is_the_state(panel):
    panel.generate("What is 27 + 45?", max_tokens=30).wait(300)
    until(lambda: "stop" in panel._controls._panes["answers"].value)
    assert "27 + 45 = 72." in panel._controls._panes["answers"].value
    assert panel._controls.stop.disabled or not panel.running
    bundle = panel._bundle()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "27 + 45 = 72." in bundle["text/html"]


def test_closing_leaves_a_picture_and_refuses_more(workbench):
    panel = workbench.play(chat=False)

    class Display:
        def update(self, bundle, raw):
            self.bundle = bundle

    panel._displays.append(shown := Display())
    panel.generate("Once upon a time", **ENDLESS)
    until(lambda: panel.text)
    panel.close()
    panel.close()
    assert set(shown.bundle) == {"text/plain", "text/html"}
    assert "cancelled" in shown.bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" not in panel._bundle()
    with pytest.raises(RequestError, match="closed"):
        panel.generate("hi")
    until(lambda: not any(t.name == "adkit-playground" for t in threading.enumerate()))


def test_without_ipywidgets_it_is_driven_from_python(workbench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with workbench.play(prompt="What is 27 + 45?", chat=False, max_tokens=30) as panel:
        assert panel.generate().wait(300)[0].text == " 27 + 45 = 72."
        bundle = panel._bundle()
        assert "pip install ipywidgets" in bundle["text/plain"]
        assert "al-pages" in bundle["text/html"]


def test_a_model_without_tokenizer_takes_ids_typed_as_text(workbench):
    llm = workbench.llm()
    bare = LiveModel(llm.engine.model, EngineConfig(max_seq_len=64, device="cpu"))
    with Playground(bare) as panel:
        assert panel.generate(max_tokens=4, ignore_eos=True).wait(300)[0].prompt_token_ids == tuple(
            range(1, 9)
        )
        assert panel.view.answers[0].text.startswith(" → ")
        panel.generate("[5, 6 7]").wait(300)
        assert panel.completions[0].prompt_token_ids == (5, 6, 7)
        with pytest.raises(RequestError, match="no tokenizer"):
            panel.generate("hello")


@pytest.mark.slow
def test_a_process_that_ends_takes_the_panel_with_it():
    source = """
import adkit, time
panel = adkit.Workbench("demo", device="cpu", progress=False).play(chat=False)
panel.generate("Once upon a time", max_tokens=1900, ignore_eos=True)
while not panel.text:
    time.sleep(0.01)
print("running:", panel.running)
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "running: True\n"), ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_package_says_what_is_where():
    import adkit.playground

    folder = Path(adkit.playground.__file__).parent
    for module in folder.glob("[a-z]*.py"):
        assert f"``{module.stem}``" in (adkit.playground.__doc__ or ""), module.name


def test_the_pages_of_all_ranks_are_one_map():
    engine, _ = engine_of(2, 10)
    handles = [engine.add([n] * 6, adkit.SamplingParams(max_tokens=4, ignore_eos=True)) for n in (1, 2)]
    engine.step()
    assert [h.pool for h in handles] == [0, 1]
    shown = page_map(engine, [SimpleNamespace(handle=h, number=n) for n, h in enumerate(handles)])
    assert len(shown.owner) == 2 * 9  # without each rank's page for padding
    for n, handle in enumerate(handles):
        group = next(i for i, g in enumerate(shown.groups) if g.label == f"request {n}")
        places = [p - 1 + 9 * handle.pool for p in handle.pages]
        assert [i for i, o in enumerate(shown.owner) if o == group] == sorted(places)
