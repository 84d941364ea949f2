"""Builds the demo model's tokenizer: byte-level BPE in which every digit is a token of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.demo_model.corpus import ASSISTANT, END, PAD, SPECIAL_TOKENS, SYSTEM, USER, document

VOCAB_SIZE = 1536
MAX_LENGTH = 1024

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '" + USER + "' + message['content'] | trim }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '" + ASSISTANT + "' + message['content'] | trim + '" + END + "' }}"
    "{%- elif message['role'] == 'system' -%}{{ '" + SYSTEM + "' + message['content'] | trim }}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)  # fmt: skip


def _sample(documents: int, seed: int) -> Iterator[str]:
    """The texts of `documents` documents, without their special tokens."""
    rng = Random(f"tokenizer-{seed}")
    for _ in range(documents):
        for text, _counts in document(rng):
            for special in SPECIAL_TOKENS:
                text = text.replace(special, "")
            yield text


def build_tokenizer(documents: int = 60_000, seed: int = 0) -> Tokenizer:
    """Train the tokenizer on a sample of the corpus.

    Digits are split off before byte-level BPE, so no merge can hold a digit and numbers are read digit by
    digit. All 256 bytes are in the vocabulary, hence any text survives encoding and decoding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents, seed), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the sample gives {tokenizer.get_vocab_size()} tokens, wanted {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template included) to `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
