"""Streamed text is the tokenizer's text, to the character, whatever the pieces it came in."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adkit.runtime.detokenizer import Detokenizer, TokenDecoder

KINDS = ["byte_level", "byte_fallback", "word_piece"]


def stream(detokenizer, ids):
    """The pieces as they come, the last at the end; stops where a stop string does."""
    pieces, seen = [], 0
    for token in ids:
        stopped = detokenizer.add(token)
        pieces.append(detokenizer.text[seen:])
        seen = len(detokenizer.text)
        if stopped:
            return pieces
    detokenizer.finish()
    return [*pieces, detokenizer.text[seen:]]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text("the a🙂👩‍👧你é \n", max_size=30))
def test_pieces_of_any_text_add_up_to_decode(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer(text)["input_ids"]
    assert "".join(stream(Detokenizer(TokenDecoder(tokenizer)), ids)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_add_up_to_decode(tokenizers, kind, data):
    """A random model emits broken UTF-8, special tokens in mid-word, runs of spaces, unknown ids."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=40))
    assert "".join(stream(Detokenizer(TokenDecoder(tokenizer)), ids)) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab c🙂", max_size=30),
    stop=st.lists(st.text("ab c🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_text_wherever_tokens_end(tokenizers, text, stop):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(TokenDecoder(tokenizer), tuple(stop))
    pieces = stream(detokenizer, ids)
    # Reference: read character by character until some stop string has just been completed.
    whole = tokenizer.decode(ids)
    expected, stopped = whole, False
    for end in range(1, len(whole) + 1):
        done = [s for s in stop if whole[:end].endswith(s)]
        if done:
            expected, stopped = whole[: end - max(map(len, done))], True
            break
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer._stopped == stopped


def test_half_a_character_waits_for_the_other_half(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer("a🙂b")["input_ids"]
    pieces = stream(Detokenizer(TokenDecoder(tokenizer)), ids)
    assert [p for p in pieces if p] == ["a", "🙂", "b"]
    assert len(ids) == 6


def test_text_that_may_become_a_stop_string_is_held_back_and_released_when_it_does_not(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(TokenDecoder(tokenizer), ("XYZ",))
    texts = []
    for char in "aXYbXYZ":
        (token,) = tokenizer(char)["input_ids"]
        stopped = detokenizer.add(token)
        texts.append(detokenizer.text)
    assert texts == ["a", "a", "a", "aXYb", "aXYb", "aXYb", "aXYb"]
    assert stopped


def test_unfinished_character_comes_out_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer("a🙂")["input_ids"][:-1]
    assert "".join(stream(Detokenizer(TokenDecoder(tokenizer)), ids)) == tokenizer.decode(ids)


def test_a_tokenizer_with_decoding_of_its_own_is_asked_for_it(tokenizers):
    tokenizer = copy.copy(tokenizers["byte_level"])

    class Loud(type(tokenizer)):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    ids = tokenizer("the fox")["input_ids"]
    assert "".join(stream(Detokenizer(TokenDecoder(tokenizer)), ids)) == "the fox"
    tokenizer.__class__ = Loud
    assert "".join(stream(Detokenizer(TokenDecoder(tokenizer)), ids)) == "THE FOX"
