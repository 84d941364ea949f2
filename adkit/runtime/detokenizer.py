"""Token ids to text as they come, exact to the character.

A token is not a piece of text: characters are split over tokens, a first token loses its leading space,
special tokens vanish. So text is never decoded token by token: a window that starts at the tokens of the last
piece of text is decoded with and without the new tokens, and the difference is the new piece, once no later
token can change it.
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder:
    """A tokenizer's decoding, special tokens skipped: ``decoder(ids) -> text``.

    Spaces are left as the model wrote them (transformers' ``clean_up_tokenization_spaces`` off).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        vocab = tokenizer.get_vocab()
        byte_tokens = (f"<0x{byte:02X}>" for byte in range(256))
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        #: Ids that stand for text; special tokens and ids beyond the tokenizer's vocabulary are skipped.
        self.spoken = frozenset(vocab.values()) - special
        #: Ids of byte tokens. Decoders judge a run of them as a whole, where one bad byte spoils all.
        self.byte_ids = frozenset(vocab[t] for t in byte_tokens if t in vocab)

    def __call__(self, ids: list[int]) -> str:
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=True)
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _backend(tokenizer: Any) -> Any:
    """The ``tokenizers`` object that does a tokenizer's whole decoding, or None where some of it is Python.

    Asked for directly it takes a tenth of the time, and a step decodes for every one of its sequences.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    whole = isinstance(tokenizer, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode
    return tokenizer.backend_tokenizer if whole else None


class Detokenizer:
    """One answer's text while its tokens arrive, ending before the first stop string.

    ``text`` is final: it only grows, and what may still change (an unfinished character, the beginning of a
    stop string) is held back. Without stop strings, after ``finish`` it equals ``decoder(all tokens)``.
    """

    def __init__(self, decoder: TokenDecoder, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self._decode = decoder
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._window: list[int] = []
        self._num_read = 0  # tokens of the window whose text is already out
        self._read_text = ""  # what those decode to
        self._held = ""
        self._stopped = False

    def add(self, token: int) -> bool:
        """Take the next token; True when its text completes a stop string."""
        if token not in self._decode.spoken:
            return False
        self._window.append(token)
        if token in self._decode.byte_ids:
            return False
        text = self._decode(self._window)
        if len(text) <= len(self._read_text) or text.endswith(_INCOMPLETE):
            return False
        piece = text[len(self._read_text) :]
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        return self._release(piece)

    def finish(self) -> bool:
        """Let go of everything held back; True when that completes a stop string."""
        if self._stopped:
            return False
        piece = self._decode(self._window)[len(self._read_text) :]
        self._window, self._num_read, self._read_text = [], 0, ""
        stopped = self._release(piece)
        self.text += self._held
        self._held = ""
        return stopped

    def _release(self, piece: str) -> bool:
        """Add a piece to the text, up to where a stop string stands or may be under way."""
        held = self._held + piece
        # The stop string that is complete first counts, whatever the pieces in which the text arrived.
        found = [(at + len(s), at) for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            self.text += held[: min(found)[1]]
            return True
        keep = next(
            (n for n in range(min(len(held), self._longest_stop - 1), 0, -1) if self._begins_stop(held[-n:])),
            0,
        )
        self.text += held[: len(held) - keep]
        self._held = held[len(held) - keep :]
        return False

    def _begins_stop(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self._stop)
