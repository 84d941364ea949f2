"""A model whose logits are a hash of the whole history, as read from its own paged cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adkit.contract import CachePool, CacheSpec, CompiledModel, Delta, EngineConfig
from adkit.passes.compile.cuda_graphs import (
    StepGraphs,
    decode_layouts,
    ladder,
    prompt_ladder,
    prompt_layouts,
)
from adkit.runtime import Engine

VOCAB = 31
EOS = 0
INPUTS = (
    "input_ids", "position_ids", "rope_lengths", "cu_seqlens", "cache_lens", "page_table", "slot_mapping",
    "logits_indices", "record_cache",
)  # fmt: skip

Record = tuple[int, int, int]


def logits_of(history: list[Record]) -> torch.Tensor:
    """Logits [V] that no two histories of (token, position, RoPE length) are likely to share."""
    seed = abs(hash(tuple(history))) % 2**32
    return torch.from_numpy(np.random.default_rng(seed).normal(size=VOCAB, scale=2.0)).float()


def history_of(tokens: list[int], prompt_len: int) -> list[Record]:
    """What a sequence's cache must hold, written down independently of the runtime."""
    return [(t, i, prompt_len if i < prompt_len else i + 1) for i, t in enumerate(tokens)]


class HashModel:
    """Writes (token, position, RoPE length) to its cache, and reads its history from nowhere else."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        spec = CacheSpec("record_cache", (page_size, 3), torch.int64)
        self.pool = CachePool((spec,), page_size)
        self.pool.allocate(num_pages, "cpu")
        self.pool.tensors["record_cache"] -= 1
        self.steps = 0
        self.shapes: list[tuple[int, int, int]] = []
        self.fault: Callable[[HashModel], None] = lambda model: None
        self.poison: int | None = None  # a token that, anywhere in a history, makes its logits NaN

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        assert set(inputs) == set(INPUTS)
        assert bool(((inputs["input_ids"] >= 0) & (inputs["input_ids"] < VOCAB)).all()), "no such token"
        cache = inputs["record_cache"].view(-1, 3)
        slots = inputs["slot_mapping"]
        held = inputs["page_table"][:, 0] > 0  # the other rows only pad the batch
        rows = int(held.sum())
        tokens, asked = int(inputs["cu_seqlens"][rows]), len(inputs["logits_indices"])
        if rows < len(held) or tokens < len(slots):
            assert held[:rows].all(), "padding comes last"
            assert not slots[tokens:].any(), "padding went to somebody's page"
            assert int(inputs["cu_seqlens"][-1]) in (len(slots), tokens), (
                "padding belongs to nobody or is alone"
            )
            inputs |= {n: inputs[n][:, :tokens] for n in ("input_ids", "position_ids", "rope_lengths")}
            inputs |= {n: inputs[n][:rows] for n in ("cache_lens", "page_table")}
            inputs["cu_seqlens"] = inputs["cu_seqlens"][: rows + 1]
            inputs["slot_mapping"] = inputs["slot_mapping"][:tokens]
            wanted = inputs["logits_indices"].tolist()
            wanted = wanted[:1] + [i for i in wanted[1:] if 0 < i < tokens]
            inputs["logits_indices"] = torch.tensor(wanted)
            slots = inputs["slot_mapping"]
        assert len(set(slots.tolist())) == len(slots), "two tokens share a slot"
        assert bool((slots >= self.page_size).all()), "a token went to the padding page"
        self.fault(self)
        self.steps += 1
        cache[slots] = torch.stack(
            [inputs["input_ids"][0], inputs["position_ids"][0], inputs["rope_lengths"][0]], dim=-1
        )
        cu, lens = inputs["cu_seqlens"].tolist(), inputs["cache_lens"].tolist()
        self.shapes.append((len(lens), cu[-1], len(inputs["logits_indices"])))
        rows = []
        for index in inputs["logits_indices"].tolist():
            seq = next(r for r in range(len(lens)) if cu[r] <= index < cu[r + 1])
            positions = torch.arange(lens[seq] + index - cu[seq] + 1)
            pages = inputs["page_table"][seq].long()[positions // self.page_size]
            history = [tuple(r) for r in cache[pages * self.page_size + positions % self.page_size].tolist()]
            poisoned = any(token == self.poison for token, _, _ in history)
            rows.append(logits_of(history) * (float("nan") if poisoned else 1.0))
        rows += [torch.zeros(VOCAB)] * (asked - len(rows))
        return torch.stack(rows)[None]

    def compiled(self) -> CompiledModel:
        return CompiledModel(self.forward, INPUTS, self.pool, VOCAB, torch.device("cpu"), (EOS,))


class Lab:
    """What the runtime's tests share."""

    OVERLAP = REPLAY = False
    VOCAB = VOCAB
    EOS = EOS
    HashModel = HashModel
    history_of = staticmethod(history_of)
    logits_of = staticmethod(logits_of)

    @classmethod
    def config(cls, **config: int) -> EngineConfig:
        return EngineConfig(**{"max_seq_len": 64, "device": "cpu", "overlap": cls.OVERLAP, **config})

    @classmethod
    def engine(
        cls, num_pages: int = 64, page_size: int = 4, tokenizer: object = None, **config: int
    ) -> tuple[Engine, HashModel]:
        model = HashModel(num_pages, page_size)
        settings = cls.config(page_size=page_size, **config)
        compiled = model.compiled()
        if cls.REPLAY:
            most, pages = settings.max_batch_size, -(-settings.max_seq_len // page_size)
            layouts = decode_layouts(ladder(most), pages)
            layouts += prompt_layouts(
                [*range(2, 12, 3), *prompt_ladder(settings.max_num_tokens)], pages, most
            )
            compiled.replay = StepGraphs(compiled.forward, INPUTS, model.pool, layouts, most, compiled.device)
        return Engine(compiled, settings, tokenizer), model

    @staticmethod
    def greedy_alone(
        prompt: list[int],
        max_tokens: int,
        max_len: int = 10**9,
        ignore_eos: bool = False,
        stop: tuple[int, ...] = (),
    ) -> list[int]:
        """The right greedy answer, by the plainest loop there is."""
        tokens = list(prompt)
        while len(tokens) < min(len(prompt) + max_tokens, max_len):
            tokens.append(int(logits_of(history_of(tokens, len(prompt))).argmax()))
            if tokens[-1] in stop or (tokens[-1] == EOS and not ignore_eos):
                break
        return tokens[len(prompt) :]

    @staticmethod
    def drain(engine: Engine) -> None:
        while engine.has_work:
            engine.step()
            engine.pages.check(s.pages for s in engine.scheduler)
        assert engine.pages.held == 0, "pages leaked"

    @staticmethod
    def answered(engine: Engine) -> list[Delta]:
        """Step until a request gains something."""
        while not (deltas := engine.step()):
            assert engine.has_work, "nobody gained anything"
        return deltas


@pytest.fixture(scope="session")
def modes() -> dict[str, type[Lab]]:
    """A step collected at once; after the next was launched; and with decode steps run from the buffers that CUDA
    graphs replay (without the graphs)."""
    return {
        "in_turn": Lab,
        "overlapped": type("Overlapped", (Lab,), {"OVERLAP": True}),
        "replayed": type("Replayed", (Lab,), {"OVERLAP": True, "REPLAY": True}),
    }


@pytest.fixture(scope="session", params=["in_turn", "overlapped", "replayed"])
def lab(modes: dict[str, type[Lab]], request: pytest.FixtureRequest) -> type[Lab]:
    return modes[request.param]


TEXT = [
    "the quick brown fox jumps over the lazy dog, and then again: it's 27 + 45 = 72.",
    "Grüße aus München, naïve café; 你好世界, こんにちは; emoji 🙂🚀👩‍👩‍👧",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:1] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: spaces as part of tokens, bytes for unknown characters."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.,",
    ]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("o", "w"), ("▁", "▁")]
    pieces += [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT has it: the decoder puts the spaces in."""
    words = ["the", "fox", "jump", "##s", "##ing", "over", ".", "a", "##b", "27"]
    pieces = ["[UNK]", "[CLS]", "[SEP]", *words]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]", bos_token="[CLS]"
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte_level": byte_level_tokenizer(),
        "byte_fallback": byte_fallback_tokenizer(),
        "word_piece": word_piece_tokenizer(),
    }
