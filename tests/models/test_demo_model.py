"""The demo model: loads by plain transformers, is small, keeps any text, and gets its tasks right."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adkit.models.demo import MODEL_DIR
from adkit.models.demo.tasks import (
    MAX_NEW_TOKENS,
    RECALL_KINDS,
    Task,
    addition_tasks,
    held_out_pairs,
    is_correct,
    is_held_out,
    recall_tasks,
)


@pytest.fixture(scope="session")
def demo() -> SimpleNamespace:
    """The demo model and its tokenizer, loaded as a user would load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return SimpleNamespace(tokenizer=tokenizer, model=AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval())


def complete(demo: SimpleNamespace, prompts: list[str], new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
    """Greedy completions of prompts in one left-padded batch, without special tokens."""
    import torch

    inputs = demo.tokenizer(prompts, return_tensors="pt", padding=True)
    masked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        tokens = demo.model.generate(**masked, max_new_tokens=new_tokens)[:, inputs["input_ids"].shape[1] :]
    return demo.tokenizer.batch_decode(tokens, skip_special_tokens=True)


# --- the split rule and the problems -----------------------------------------------------------------


def test_a_sum_is_held_out_with_its_reverse_and_about_one_pair_in_ten():
    pairs = {(a, b) for a in range(100) for b in range(100) if is_held_out(a, b)}
    assert all((b, a) in pairs for a, b in pairs)
    assert all(a >= 10 and b >= 10 for a, b in pairs)
    assert 0.08 < len(pairs) / 8100 < 0.12
    assert pairs == set(held_out_pairs())


def test_addition_tasks_are_held_out_distinct_and_repeatable():
    tasks = addition_tasks()
    assert len({task.name for task in tasks}) == len(tasks) == len(held_out_pairs()) >= 500
    for task in tasks:
        a, b = map(int, re.findall(r"\d+", task.prompt))
        assert is_held_out(a, b)
        assert task.answer == str(a + b)
    assert addition_tasks(20, seed=3) == addition_tasks(20, seed=3) != addition_tasks(20, seed=4)
    with pytest.raises(ValueError, match="held-out ordered pairs"):
        addition_tasks(len(tasks) + 1)


def test_recall_tasks_are_repeatable_answerable_and_cover_every_kind():
    tasks = recall_tasks(60, seed=1)
    assert tasks == recall_tasks(60, seed=1) != recall_tasks(60, seed=2)
    assert {task.name.split("/")[1] for task in tasks} == {kind.name for kind in RECALL_KINDS}
    for task in tasks:
        assert len(re.findall(rf"\b{task.answer}\b", task.prompt)) == 1
        assert task.prompt.endswith("?")


def test_training_never_sees_a_held_out_sum(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repo_root))
    corpus = pytest.importorskip("scripts.demo_model.corpus")
    rng = Random(0)
    sums = 0
    for text in (corpus.text_of(corpus.document(rng)) for _ in range(3000)):
        for a, b in re.findall(r"(\d+) ?\+ ?(\d+)", text):
            sums += 1
            assert not is_held_out(int(a), int(b)), text
    assert sums > 500


# --- grading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 27 + 45 = 72.", True),
        ("27 + 45 = 72", True),
        (" 72", True),
        ("\n27 + 45 = 72.\nWhat is 1 + 1? 1 + 1 = 2.", True),
        (" 27 + 45 = 72<|end|><|pad|>", True),
        (" 27 + 45 = 172.", False),
        (" 27 + 45 = 7", False),
        (" 27 + 45 = 73. No, it is 72.", False),
        (" 72 + 45 = 27.", False),
        ("", False),
    ],
)
def test_grading_of_a_sum(completion: str, right: bool):
    assert is_correct(Task("add/27+45", "What is 27 + 45?", "72"), completion) is right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" Mara has the kite.", True),
        (" kite", True),
        (" Mara has the kites.", False),
        (" Mara has the blackkite.", False),
        (" Mara has the kite and the drum.", False),
    ],
)
def test_grading_of_a_recall(completion: str, right: bool):
    assert is_correct(Task("recall/has/0", "", "kite"), completion) is right


# --- the checkpoint -----------------------------------------------------------------------------------


def test_is_a_small_qwen3_in_bf16_with_one_end_token(demo: SimpleNamespace):
    import torch

    model, tokenizer = demo.model, demo.tokenizer
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.num_parameters() <= 5_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_digit_is_a_token(demo: SimpleNamespace):
    assert demo.tokenizer.tokenize("1234 56+7") == ["1", "2", "3", "4", "Ġ", "5", "6", "+", "7"]


@given(text=st.text())
def test_any_text_survives_the_tokenizer(demo: SimpleNamespace, text: str):
    assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text


def test_adds_and_recalls(demo: SimpleNamespace):
    tasks = addition_tasks(20) + recall_tasks(20)
    answers = complete(demo, [task.prompt for task in tasks])
    wrong = [(t.name, a) for t, a in zip(tasks, answers, strict=True) if not is_correct(t, a)]
    assert not wrong


def test_a_prompt_may_end_with_white_space_or_be_a_chat(demo: SimpleNamespace):
    question = "What is 27 + 45?"
    message = [{"role": "user", "content": question}]
    chat = demo.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    plain, *others = complete(demo, [question, question + " ", question + "\n", chat])
    assert plain == " 27 + 45 = 72."
    assert others == ["27 + 45 = 72."] * 3


def test_a_story_ends_and_keeps_its_hero(demo: SimpleNamespace):
    (story,) = complete(demo, ["Once upon a time, there was a brave girl named Ivy"], 200)
    assert story.rstrip().endswith(".")
    assert "Ivy" in story
    assert 60 < len(demo.tokenizer.tokenize(story)) < 199
